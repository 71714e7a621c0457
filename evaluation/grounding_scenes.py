"""Scenes for grounding that no model was trained on, made on the fly: new placements, new colours, clutter.

    unseen       placements of evaluation seeds, as in the demonstrations otherwise
    colors       every object in a new colour, none of its own textures (names with a colour in them stay as they are)
    distractors  cylinders, capsules and ellipsoids of any colour on the table, which no name means

Masks and boxes are the simulator's ground truth for what is visible: a distractor hides what is behind it.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm.auto import tqdm

from .demonstrations import GroundingSample
from .metaworld import EVALUATION_SEED_START, MetaWorldEnv, check_task, mask_box


VARIANTS = ("unseen", "colors", "distractors")
NUM_DISTRACTORS = 4
TABLE_X, TABLE_Y = (-0.35, 0.35), (0.4, 0.9)  # metres, where the table is in sight and the arm can reach
_COLOR_WORDS = ("red", "green", "blue", "brick", "wooden")


class AlteredEnv(MetaWorldEnv):
    """A Meta-World task whose objects can be recoloured and joined by distractors. They change the picture only."""

    def __init__(self, task: str, cameras: Sequence[str] = ("front",), image_size: int = 64) -> None:
        super().__init__(task, cameras, image_size)
        model = self._env.model
        self._true_looks = model.geom_rgba.copy(), model.geom_matid.copy()
        self._distractors: list[tuple] = []  # (type, size (3,), position (3,), rgba (4,))

    def recolor(self, rng: np.random.Generator) -> None:
        """Gives each named object one new colour; the hand and names with a colour keep theirs."""
        self.restore_looks()
        model, colors = self._env.model, {}
        for geom, name in enumerate(self._geom_names):
            if name is None or name == "robot hand" or name.split()[0] in _COLOR_WORDS:
                continue
            if name not in colors:
                colors[name] = np.append(_vivid(rng), 1.0)
            model.geom_rgba[geom, :3] = colors[name][:3]
            model.geom_matid[geom] = -1  # a material would bring its texture

    def restore_looks(self) -> None:
        """The colours of the task, without distractors."""
        model = self._env.model
        model.geom_rgba[:], model.geom_matid[:] = self._true_looks
        self._distractors = []
        self._images.clear()

    def scatter(self, rng: np.random.Generator, count: int = NUM_DISTRACTORS) -> None:
        """Puts distractors on the table. They are pictures without a body: nothing collides with them."""
        kinds = self._mujoco.mjtGeom
        # No box and no sphere: tasks have blocks and balls, and a question about those has to stay clear
        types = (kinds.mjGEOM_CYLINDER, kinds.mjGEOM_CAPSULE, kinds.mjGEOM_ELLIPSOID)
        for _ in range(count):
            size = rng.uniform(0.018, 0.035)
            position = np.array([rng.uniform(*TABLE_X), rng.uniform(*TABLE_Y), size])
            rgba = np.append(_vivid(rng), 1.0)
            self._distractors.append((types[rng.integers(len(types))], size * np.array([1, 1, 0.7]), position, rgba))
        self._images.clear()

    def _aimed_renderer(self, camera: str, size: int | None):
        renderer = super()._aimed_renderer(camera, size)
        scene = renderer.scene
        for kind, extent, position, rgba in self._distractors:
            geom = scene.geoms[scene.ngeom]
            self._mujoco.mjv_initGeom(geom, kind, extent, position, np.eye(3).ravel(), rgba.astype(np.float32))
            # An id of its own, so that it covers what is behind it in the segmentation, too; it stands for no object
            geom.segid, geom.objid, geom.objtype = scene.ngeom, -1, int(self._mujoco.mjtObj.mjOBJ_UNKNOWN)
            scene.ngeom += 1
        return renderer


def _vivid(rng: np.random.Generator) -> np.ndarray:
    """A random colour (3,) that is neither gray nor dark: one channel high, one low."""
    return rng.permutation([rng.uniform(0.75, 1.0), rng.uniform(0.0, 0.25), rng.uniform(0.0, 1.0)])


def altered_scenes(
    tasks: Sequence[str],
    seeds: Sequence[int],
    variant: str,
    image_size: int = 64,
    camera: str = "front",
    min_visible: float = 0.7,
    progress: bool = True,
) -> Iterator[list[GroundingSample]]:
    """Yields the objects of one image for each (task, seed), the arm somewhere on its way.

    Args:
        tasks: names from `metaworld.TASKS`.
        seeds: of the scenes, from `EVALUATION_SEED_START` on.
        variant: one of `VARIANTS`.
        image_size: side of the images in pixels.
        camera: the camera to look through.
        min_visible: an object of which the distractors leave less than this part is not asked for.
        progress: whether to show a progress bar.

    Raises:
        ValueError: unknown task or variant, or seeds that demonstrations may have used.
    """
    for task in tasks:
        check_task(task)
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r} of the simulator's scenes: use one of {', '.join(VARIANTS)}.")
    if min(seeds) < EVALUATION_SEED_START:
        raise ValueError(f"Seed {min(seeds)} is one of training: use seeds from {EVALUATION_SEED_START} on.")
    with tqdm(total=len(tasks) * len(seeds), desc=variant, unit="scene", disable=not progress) as bar:
        for task in tasks:
            with AlteredEnv(task, (camera,), image_size) as env:
                for seed in seeds:
                    yield _scene(env, int(seed), variant, camera, min_visible)
                    bar.update()


def _scene(env: AlteredEnv, seed: int, variant: str, camera: str, min_visible: float) -> list[GroundingSample]:
    rng = np.random.default_rng([seed, VARIANTS.index(variant), zlib.crc32(env.task.encode())])
    env.restore_looks()
    env.reset_scene(seed)
    for _ in range(int(rng.integers(0, 60))):
        env.step(env.expert_action())
    whole = {name: int(mask.sum()) for name, mask in env.object_masks(camera).items()}
    if variant == "colors":
        env.recolor(rng)
    elif variant == "distractors":
        env.scatter(rng)
    masks = env.object_masks(camera)
    masks = {name: mask for name, mask in masks.items() if mask.sum() >= min_visible * whole[name]}
    boxes = {name: mask_box(mask) for name, mask in masks.items()}
    image = env.observe((camera,))["images"][camera]
    return [
        GroundingSample(
            image=image,
            task=env.task,
            camera=camera,
            name=name,
            box=boxes[name],
            mask=mask,
            others={other: box for other, box in boxes.items() if other != name},
        )
        for name, mask in masks.items()
    ]
