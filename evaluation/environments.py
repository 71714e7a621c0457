"""Simulators by name, and what the runner asks of one.

    metaworld/reach-v3              one of the 50 tasks; metaworld/mt10 and metaworld/all are lists of them
    pusht                           gym-pusht
    aloha/transfer-cube             gym-aloha; also aloha/insertion
    gym:CartPole-v1?success_return=200&max_steps=200        any gymnasium environment, see `gym_adapter`
    remote://127.0.0.1:9100         whatever an environment server there offers; remote://127.0.0.1:9100/TASK one task

Inside of results a Meta-World task goes by its bare name (`reach-v3`).
"""

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qsl

import numpy as np

from .gym_env import RENDERED, GymAdapter, GymEnv, StepResult
from .metaworld import INSTRUCTIONS, MAX_STEPS, TASKS, MetaWorldEnv, check_task
from .remote import RemoteEnv


# Meta-World's own multi-task benchmark of ten
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)

GYM_ADAPTERS = {
    # State: position of the agent in pixels; action: where it shall go, in pixels, 0 to 512, ten a second
    "pusht": GymAdapter(
        env_id="gym_pusht/PushT-v0",
        imports="gym_pusht",
        instruction="push the T onto the target",
        control_frequency=10,
        options={
            "obs_type": "pixels_agent_pos",
            "render_mode": "rgb_array",
            "observation_width": 96,
            "observation_height": 96,
        },
        cameras={"front": "pixels"},
        state="agent_pos",
        progress_reward=1.0,  # share of the target that is covered, of the 95% that are success
        max_steps=300,
    ),
    # State and action: both arms' joints in radians and grippers in [0, 1], 14 numbers, 50 a second
    "aloha/transfer-cube": GymAdapter(
        env_id="gym_aloha/AlohaTransferCube-v0",
        imports="gym_aloha",
        instruction="pick up the cube with the right arm and hand it to the left arm",
        control_frequency=50,
        options={"obs_type": "pixels_agent_pos", "render_mode": "rgb_array"},
        cameras={"top": "pixels/top"},
        state="agent_pos",
        progress_reward=4.0,  # four stages
        max_steps=400,
    ),
    "aloha/insertion": GymAdapter(
        env_id="gym_aloha/AlohaInsertion-v0",
        imports="gym_aloha",
        instruction="insert the peg into the socket",
        control_frequency=50,
        options={"obs_type": "pixels_agent_pos", "render_mode": "rgb_array"},
        cameras={"top": "pixels/top"},
        state="agent_pos",
        progress_reward=4.0,
        max_steps=400,
    ),
}
GYM_OPTIONS = ("success", "success_return", "max_steps", "instruction", "camera", "state", "control_frequency")


class Environment(Protocol):
    """One task in a simulator. `success`, `progress` (0 to 1, best so far) and `steps` tell about the episode."""

    instruction: str
    action_dim: int
    action_low: Sequence[float]  # what a random policy draws from
    action_high: Sequence[float]
    control_frequency: float  # actions per second
    max_steps: int  # the simulator ends an episode here
    cameras: Sequence[str]
    success: bool
    progress: float
    steps: int

    def reset_scene(self, seed: int) -> None:
        """Starts the episode that `seed` alone decides."""

    def observe(self, cameras: Sequence[str] | None = None) -> dict:
        """`{"images": {camera: uint8 (h, w, 3)}, "state": float32 (S,)}`; only the cameras asked for are rendered."""

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one action, (action_dim,) in the environment's units."""

    def video_frame(self, size: int) -> np.ndarray:
        """A picture for people, uint8 (size, size, 3)."""

    def close(self) -> None:
        """Frees what it holds."""


def expand_names(names: Sequence[str]) -> list[str]:
    """Names of single tasks for names that may mean several; each once.

    Raises:
        ValueError: a name that none of the forms above fits; the message lists them.
    """
    tasks: list[str] = []
    for name in names:
        family, _, task = name.partition("/")
        if name.startswith("remote://") or name.startswith("gym:") or name in GYM_ADAPTERS:
            found = [name]
        elif family == "metaworld" and task in ("mt10", "all"):
            found = list(MT10 if task == "mt10" else TASKS)
        elif family == "metaworld" and task:
            found = [task]
        else:
            raise ValueError(
                f"Unknown environment {name!r}: use metaworld/TASK, metaworld/mt10, metaworld/all, "
                f"{', '.join(GYM_ADAPTERS)}, gym:ID or remote://host:port."
            )
        tasks += [task for task in found if task not in tasks]
    for task in tasks:
        check_name(task)
    return tasks


def check_name(task: str) -> None:
    """Raises `ValueError` when `task` names no environment. Nothing is started or connected."""
    if task.startswith("gym:"):
        gym_adapter(task)
    elif not task.startswith("remote://") and task not in GYM_ADAPTERS:
        check_task(task)


def step_limit(task: str) -> int | None:
    """The steps at which an episode ends in any case, None where only the environment itself knows."""
    if task in INSTRUCTIONS:
        return MAX_STEPS
    return GYM_ADAPTERS[task].max_steps if task in GYM_ADAPTERS else None


def make_environment(task: str, image_size: int = 64) -> Environment:
    """The environment of a name that `expand_names` gave.

    Raises:
        ImportError: its package is missing.
        WireError: a remote one does not answer.
        ValueError: unknown name.
    """
    if task.startswith("remote://"):
        address, _, remote_task = task.removeprefix("remote://").partition("/")
        return RemoteEnv(address, remote_task or None, image_size)
    if task.startswith("gym:"):
        return GymEnv(gym_adapter(task), image_size)
    if task in GYM_ADAPTERS:
        return GymEnv(GYM_ADAPTERS[task], image_size)
    return MetaWorldEnv(task, image_size=image_size)


def gym_adapter(name: str) -> GymAdapter:
    """The adapter of `gym:ID?option=value&...`.

    Options: `success` (key of info, or terminated, truncated), `success_return` (sum of rewards), `max_steps`,
    `instruction`, `camera` (path of the image in the observation; by default `env.render()`), `state` (path; by
    default the observation itself, "none" for none), `control_frequency` (for videos, default 20).

    Raises:
        ValueError: an option that does not exist, or a number that is none.
    """
    env_id, _, query = name.removeprefix("gym:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(GYM_OPTIONS))
    if unknown or not env_id:
        raise ValueError(f"{name!r}: write gym:ID?option=value; options are {', '.join(GYM_OPTIONS)}, not {unknown}.")
    state = options.get("state", "")
    return GymAdapter(
        env_id=env_id,
        instruction=options.get("instruction", env_id),
        control_frequency=float(options.get("control_frequency", 20)),
        options={"render_mode": "rgb_array"},
        cameras={"front": options.get("camera", RENDERED)},
        state=None if state == "none" else state,
        success=options.get("success", "is_success"),
        success_return=float(options["success_return"]) if "success_return" in options else None,
        max_steps=int(options["max_steps"]) if "max_steps" in options else None,
    )
