"""Meta-World on a CPU: one robot, 50 tasks, fast rendering, ground truth for every visible object.

    with MetaWorldEnv("button-press-topdown-v3") as env:
        observation = env.reset(seed=0)
        while not env.success:
            env.step(env.expert_action())

Units: state = end-effector x, y, z in metres + gripper opening in [0, 1]; action = end-effector displacement + gripper
effort, all in [-1, 1] (1 moves the set point by 1 cm), 80 actions a second.
"""

import ctypes
import difflib
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from ctypes.util import find_library
from types import ModuleType

import numpy as np

from .gym_env import StepResult


CONTROL_FREQUENCY = 80  # actions per second
MAX_STEPS = 500  # Meta-World ends every episode here
STATE_NAMES = ("x", "y", "z", "gripper")
STATE_UNITS = ("m", "m", "m", "opening")
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
ACTION_UNITS = ("cm", "cm", "cm", "effort")

# Seeds of the two uses never meet: demonstrations use [0, 1_000_000), evaluations everything above.
TRAINING_SEED_START = 0
EVALUATION_SEED_START = 1_000_000

RENDERING_HELP = (
    "MuJoCo cannot render on this machine: neither EGL nor OSMesa is usable. "
    "Install one (Debian, Ubuntu): apt-get install -y libegl1 libgl1-mesa-dri libopengl0\n"
    "(If it is installed: something imported mujoco earlier with another backend; set MUJOCO_GL=egl.)"
)

# Our camera names -> the simulator's. Any other camera of the scene can be asked for by its own name.
CAMERAS = {"front": "corner2", "wrist": "gripperPOV"}
FRONT_CAMERA_POSITION = (0.75, 0.075, 0.7)  # closer than Meta-World's own: the hand is a few pixels wider

INSTRUCTIONS = {
    "assembly-v3": "put the ring onto the peg",
    "basketball-v3": "put the ball into the hoop",
    "bin-picking-v3": "move the green cube from the red bin into the blue bin",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-v3": "push the button in",
    "button-press-wall-v3": "reach around the wall and push the button in",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "hammer the nail into the block",
    "hand-insert-v3": "put the block into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole from the side",
    "peg-unplug-side-v3": "unplug the peg",
    "pick-out-of-hole-v3": "pick the block out of the hole",
    "pick-place-v3": "pick up the block and bring it to the ball",
    "pick-place-wall-v3": "pick up the block and bring it over the wall to the ball",
    "plate-slide-back-side-v3": "slide the plate sideways out of the goal",
    "plate-slide-back-v3": "slide the plate back out of the goal",
    "plate-slide-side-v3": "slide the plate sideways into the goal",
    "plate-slide-v3": "slide the plate into the goal",
    "push-back-v3": "pull the block back to the ball",
    "push-v3": "push the block to the ball",
    "push-wall-v3": "push the block around the wall to the ball",
    "reach-v3": "reach the ball",
    "reach-wall-v3": "reach over the wall to the ball",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "kick the ball into the goal",
    "stick-pull-v3": "pull the bottle with the stick",
    "stick-push-v3": "push the bottle with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}
TASKS = tuple(INSTRUCTIONS)

# What a person would call each piece of a scene: (body, start of the geometry's name or "" for all of the body, name).
# The first rule that fits wins. Bodies without a rule (arm, table, walls of the table) are background.
_HAND_BODIES = ("right_hand", "hand", "rightclaw", "rightpad", "leftclaw", "leftpad")
_NAME_RULES = (
    *((body, "", "robot hand") for body in _HAND_BODIES),
    ("asmbly_peg", "WrenchHandle", "green handle"),
    ("asmbly_peg", "", "ring"),
    ("backboardlink", "", "backboard"),
    ("basketball", "", "ball"),
    ("binA", "", "red bin"),
    ("binB", "", "blue bin"),
    ("block", "", "block"),
    ("box", "bin", "box"),
    ("box", "block_", "box"),
    ("button", "", "button"),
    ("buttonbox", "", "button box"),
    ("cm_link", "", "coffee machine"),
    ("cmbutton", "", "button"),
    ("dial", "", "dial"),
    ("door_link", "handle", "door handle"),
    ("door_link", "door_handle", "door handle"),
    ("door_link", "dl_metal2", "door"),
    ("door_link", "door", "door"),
    ("door_link", "lock", "lock"),
    ("door_link", "", "door handle"),
    ("doorlockA", "", "safe"),
    ("doorlockB", "", "safe"),
    ("drawer_link", "objGeom", "drawer handle"),
    ("drawer_link", "", "drawer"),
    ("drawercase_link", "", "cabinet"),
    ("faucet_link", "", "faucet"),
    ("faucet_link2", "", "faucet handle"),
    ("hammer", "", "hammer"),
    ("hammerblock", "", "wooden block"),
    ("handle_link", "", "handle"),
    ("hdlprs", "", "handle box"),
    ("hooplink", "", "hoop"),
    ("lever", "", "lever base"),
    ("lever_link1", "", "lever"),
    ("lock_link", "", "lock"),
    ("mug", "", "mug"),
    ("nail_link", "", "nail"),
    ("obj", "mug", "mug"),
    ("obj", "", "block"),
    ("objA", "", "green cube"),
    ("object", "therm", "bottle"),
    ("peg", "", "peg"),
    ("plug", "", "plug"),
    ("plug_wall", "", "socket"),
    ("puck_channel", "", "plate"),
    ("puck_goal", "", "goal"),
    ("shelf", "", "shelf"),
    ("soccer_ball1", "", "ball"),
    ("soccer_goal", "", "goal"),
    ("stick", "", "stick"),
    ("top_link", "BoxHandle", "lid handle"),
    ("top_link", "", "lid"),
    ("wall", "", "brick wall"),
    ("window", "", "window"),
    ("windowb_a", "window_white", "window handle"),
    ("windowb_a", "", "window"),
    ("windowb_b", "", "window"),
)
_HAND_SITES = ("rightEndEffector", "leftEndEffector")  # painted dots on the fingers
_COLORS = ("red", "green", "blue")


def check_task(task: str) -> None:
    """Raises `ValueError` with close matches when `task` is not one of the 50 `TASKS`."""
    if task not in INSTRUCTIONS:
        close = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see wallvla.evaluation.metaworld.TASKS."
        raise ValueError(f"Unknown Meta-World task {task!r}: {hint}")


def _import_mujoco() -> ModuleType:
    """Imports mujoco with an off-screen backend that this machine has.

    Raises:
        RuntimeError: no backend can be used; the message holds the command that installs one.
        ImportError: mujoco itself is missing.
    """
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        # mujoco reads this at import and would choose GLFW, which needs a display.
        os.environ["MUJOCO_GL"] = "osmesa" if find_library("EGL") is None and find_library("OSMesa") else "egl"
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise ImportError("Meta-World evaluation needs the simulator: pip install 'wallvla[sim]'") from error
    except (ImportError, AttributeError, ctypes.ArgumentError) as error:  # PyOpenGL says it in any of these ways
        raise RuntimeError(f"{RENDERING_HELP}\nMuJoCo says: {error}") from error
    return mujoco


class MetaWorldEnv:
    """One Meta-World task, deterministic by seed, rendering only what is asked for.

    Args:
        task: one of `TASKS`.
        cameras: what `observe` renders by default: `"front"`, `"wrist"`, or any camera of the scene by its own name.
        image_size: side of the square images in pixels.

    Raises:
        ValueError: unknown task or camera.
        ImportError: the `sim` extra is not installed.
        RuntimeError: the machine has no off-screen OpenGL.
    """

    action_dim = len(ACTION_NAMES)
    action_low, action_high = (-1.0,) * action_dim, (1.0,) * action_dim
    control_frequency = CONTROL_FREQUENCY
    max_steps = MAX_STEPS

    def __init__(self, task: str, cameras: Sequence[str] = ("front", "wrist"), image_size: int = 64) -> None:
        check_task(task)
        self._mujoco = _import_mujoco()
        self.task = task
        self.instruction = INSTRUCTIONS[task]
        self.image_size = image_size
        self._env = _make_env(task)
        self._renderers: dict = {}  # size -> mujoco.Renderer, made on first use
        self._images: dict[str, np.ndarray] = {}  # by camera, of the current instant
        self._expert = None
        self._observation: np.ndarray | None = None  # Meta-World's own (39,): hand, objects, goal
        self.success = False
        self.progress = 0.0
        self.steps = 0

        model = self._env.model
        self.cameras = tuple(cameras)
        for camera in self.cameras:
            self._simulator_camera(camera)
        model.camera(CAMERAS["front"]).pos = FRONT_CAMERA_POSITION
        # Shadow maps and multisampling are nine tenths of the cost on a CPU; the renderer reads both when it is made.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        self._geom_names = [_geom_object(model, geom) for geom in range(model.ngeom)]
        self._site_names = [_site_object(model, site) for site in range(model.nsite)]

    def __enter__(self) -> "MetaWorldEnv":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Frees the OpenGL contexts. Python's exit order would free them after their library is gone."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()

    def reset(self, seed: int) -> dict:
        """Places the objects by `seed` (same seed, same scene, whatever ran before) and returns `observe()`."""
        self.reset_scene(seed)
        return self.observe()

    def reset_scene(self, seed: int) -> None:
        """`reset` without rendering."""
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self._env.seed(seed)
        self._env.reset()
        # Meta-World moves bodies and goals after its last forward pass: without another one, the first frame and the
        # first observation still show the scene of a previous draw.
        self._mujoco.mj_forward(self._env.model, self._env.data)
        for site, position in self._env._target_site_config:
            self._env._set_pos_site(site, position)
        self._env._prev_obs = self._env._get_curr_obs_combined_no_goal()
        self._observation = self._env._get_obs()
        self._expert = _make_expert(self.task)
        self._images.clear()
        self.success, self.progress, self.steps = False, 0.0, 0

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one action for 1/80 s.

        Args:
            action: (4,) displacement and gripper effort; values outside [-1, 1] are clipped.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
            RuntimeError: `reset` was not called, or the episode is over.
        """
        if self._observation is None:
            raise RuntimeError("Call reset(seed) before step(action).")
        if self.steps >= MAX_STEPS:
            raise RuntimeError(f"The episode ended after {MAX_STEPS} steps: call reset(seed).")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"An action is 4 finite numbers (dx, dy, dz, gripper), got {action.tolist()}.")
        self._observation, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        self._images.clear()
        self.steps += 1
        self.success = bool(info["success"])
        # Meta-World's dense rewards are made to lie in [0, 10]. The best so far is a progress, though no linear one
        self.progress = 1.0 if self.success else max(self.progress, min(1.0, float(reward) / 10))
        return StepResult(float(reward), self.success, self.steps >= MAX_STEPS)

    @property
    def state(self) -> np.ndarray:
        """Proprioception now: float32 (4,), metres and gripper opening."""
        if self._observation is None:
            raise RuntimeError("Call reset(seed) first.")
        return self._observation[:4].astype(np.float32)

    def observe(self, cameras: Sequence[str] | None = None) -> dict:
        """Renders and returns `{"images": {camera: uint8 (size, size, 3)}, "state": float32 (4,)}`.

        Args:
            cameras: the cameras to render, by default all of `self.cameras`; an instant is rendered only once.
        """
        images = {}
        for camera in self.cameras if cameras is None else cameras:
            if camera not in self._images:
                self._images[camera] = self.render(camera)
            images[camera] = self._images[camera]
        return {"images": images, "state": self.state}

    def render(self, camera: str, size: int | None = None) -> np.ndarray:
        """One frame of a camera, uint8 (size, size, 3); `size` defaults to `image_size`."""
        return self._upright(camera, self._aimed_renderer(camera, size).render())

    def video_frame(self, size: int) -> np.ndarray:
        """A picture for people: the front camera, uint8 (size, size, 3)."""
        return self.render("front", size)

    def expert_action(self) -> np.ndarray:
        """What Meta-World's scripted expert would do now: float32 (4,) in [-1, 1]. It sees the true object poses."""
        if self._observation is None:
            raise RuntimeError("Call reset(seed) before expert_action().")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experts warn when they clip their own output
            action = self._expert.get_action(self._observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def object_masks(self, camera: str, min_pixels: int = 4, size: int | None = None) -> dict[str, np.ndarray]:
        """Visible pixels of every named object, from the simulator's segmentation.

        Args:
            camera: the camera to look through.
            min_pixels: objects with fewer visible pixels are left out.
            size: side of the image in pixels, by default `image_size`.

        Returns:
            name -> bool (size, size). No pixel belongs to two objects; table, arm and floor are not objects.
        """
        renderer = self._aimed_renderer(camera, size)
        renderer.enable_segmentation_rendering()
        segments = self._upright(camera, renderer.render())  # (size, size, 2): id, kind of object
        renderer.disable_segmentation_rendering()

        masks: dict[str, np.ndarray] = {}
        kinds = self._mujoco.mjtObj
        for kind, names in ((kinds.mjOBJ_GEOM, self._geom_names), (kinds.mjOBJ_SITE, self._site_names)):
            of_kind = segments[..., 1] == int(kind)
            for index in np.unique(segments[..., 0][of_kind]):
                name = names[index]
                if name is not None:
                    mask = of_kind & (segments[..., 0] == index)
                    masks[name] = masks[name] | mask if name in masks else mask
        return {name: masks[name] for name in sorted(masks) if masks[name].sum() >= min_pixels}

    def objects(self, camera: str, min_pixels: int = 4, size: int | None = None) -> dict[str, tuple[int, ...]]:
        """Boxes (x1, y1, x2, y2) in pixels around what is visible of every named object; x2 and y2 are exclusive."""
        return {name: mask_box(mask) for name, mask in self.object_masks(camera, min_pixels, size).items()}

    def project(self, camera: str, points: np.ndarray, size: int | None = None) -> np.ndarray:
        """Pixel positions (N, 2) of world points (N, 3) in metres, also for points that something hides."""
        size = self.image_size if size is None else size
        name = self._simulator_camera(camera)
        data, model = self._env.data, self._env.model
        rotation = data.camera(name).xmat.reshape(3, 3)
        local = (np.asarray(points) - data.camera(name).xpos) @ rotation  # the camera looks along its -z
        focal = 0.5 * size / np.tan(np.deg2rad(model.camera(name).fovy[0]) / 2)
        pixels = np.stack([local[:, 0], -local[:, 1]], axis=1) / -local[:, 2:] * focal + size / 2
        return size - pixels if name == CAMERAS["front"] else pixels

    def body_position(self, body: str) -> np.ndarray:
        """World position (3,) in metres of a body of the simulator's scene."""
        return self._env.data.body(body).xpos.copy()

    def _simulator_camera(self, camera: str) -> str:
        name = CAMERAS.get(camera, camera)
        model = self._env.model
        known = [model.camera(index).name for index in range(model.ncam)]
        if name not in known:
            raise ValueError(f"Unknown camera {camera!r} of {self.task}: use one of {[*CAMERAS, *known]}.")
        return name

    @staticmethod
    def _upright(camera: str, image: np.ndarray) -> np.ndarray:
        if CAMERAS.get(camera, camera) == CAMERAS["front"]:  # this camera hangs upside down in Meta-World
            image = image[::-1, ::-1]
        return np.ascontiguousarray(image)

    def _aimed_renderer(self, camera: str, size: int | None):
        """The renderer of a size with the scene as it is now; the size defaults to `image_size`."""
        renderer = self._renderer(self.image_size if size is None else size)
        renderer.update_scene(self._env.data, camera=self._simulator_camera(camera))
        return renderer

    def _renderer(self, size: int):
        if size not in self._renderers:
            try:
                renderer = self._mujoco.Renderer(self._env.model, size, size)
            except (ImportError, AttributeError, RuntimeError, self._mujoco.FatalError) as error:
                raise RuntimeError(f"{RENDERING_HELP}\nMuJoCo says: {error}") from error
            flags = self._mujoco.mjtRndFlag
            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_HAZE):
                renderer.scene.flags[flag] = 0
            self._renderers[size] = renderer
        return self._renderers[size]


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box (x1, y1, x2, y2) around the True pixels of a mask; x2 and y2 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("The mask has no True pixel, so it has no box.")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _make_env(task: str):
    """Meta-World's environment with the goal in its observation (the experts need it) and objects placed by seed."""
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.types import Task
    except ModuleNotFoundError as error:
        raise ImportError("Meta-World evaluation needs the simulator: pip install 'wallvla[sim]'") from error
    env_class = ALL_V3_ENVIRONMENTS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium comments on Meta-World's float64 spaces
        env = env_class()
    # The same as picking a task of `metaworld.MT1`, without drawing 100 of them (0.5 s).
    fields = {"env_cls": env_class, "rand_vec": np.zeros(3), "partially_observable": False}
    env.set_task(Task(env_name=task, data=pickle.dumps(fields)))
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    return env


def _make_expert(task: str):
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[task]()


def _geom_object(model, geom: int) -> str | None:
    """The everyday name of the object that a geometry belongs to, None for background."""
    body = int(model.geom_bodyid[geom])
    while body and not model.body(body).name:
        body = int(model.body_parentid[body])
    labels = [model.geom(geom).name]
    if model.geom_dataid[geom] >= 0:
        labels.append(model.mesh(int(model.geom_dataid[geom])).name)
    if model.geom_matid[geom] >= 0:
        labels.append(model.mat(int(model.geom_matid[geom])).name)
    for rule_body, start, name in _NAME_RULES:
        if rule_body == model.body(body).name and any(label.startswith(start) for label in labels):
            return name
    return None


def _site_object(model, site: int) -> str | None:
    """Goals are drawn as coloured balls; the dots on the fingertips belong to the hand."""
    name = model.site(site).name
    if name in _HAND_SITES:
        return "robot hand"
    if "goal" in name:
        return f"{_COLORS[int(np.argmax(model.site(site).rgba[:3]))]} ball"
    return None
