"""Any `gymnasium` environment as a simulator of the runner: an adapter says where things are, the rest is the same.

adapter = GymAdapter(env_id="gym_pusht/PushT-v0", imports="gym_pusht", cameras={"front": "pixels"}, ...)
with GymEnv(adapter) as env:
    env.reset_scene(seed=1_000_000)
    env.step(action)
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class StepResult(NamedTuple):
    """What one action led to: the reward, whether the task is solved now, whether the episode is over."""

    reward: float
    success: bool
    done: bool


@dataclass(frozen=True)
class GymAdapter:
    """Where an environment keeps what the runner needs.

    Attributes:
        env_id: as `gymnasium.make` takes it; `module:Id` imports the module first.
        instruction: the task in words, which environments of this kind do not say themselves.
        control_frequency: actions per second.
        imports: module that registers the id, or "".
        options: of `gymnasium.make`.
        cameras: our name -> path of the image in the observation (keys joined by "/"); `RENDERED` is `env.render()`.
        state: path of the proprioception in the observation; "" is the observation itself, None is none.
        success: key of `info` that is true when the task is solved, or `"terminated"`, `"truncated"`.
        success_return: instead of `success`: solved when the rewards of the episode add up to this.
        progress_reward: reward that means all of the task; progress is the best reward so far divided by it.
            None: progress is success.
        max_steps: of an episode, None: what the registration says.
    """

    env_id: str
    instruction: str
    control_frequency: float
    imports: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    cameras: Mapping[str, str] = field(default_factory=dict)
    state: str | None = ""
    success: str = "is_success"
    success_return: float | None = None
    progress_reward: float | None = None
    max_steps: int | None = None


RENDERED = "render()"


class GymEnv:
    """A gymnasium environment behind the runner's interface (`environments.Environment`).

    Actions are in the environment's own units, one per dimension of its (flattened) action space, and are clipped to
    its bounds; an environment with discrete actions takes one number, rounded.

    Args:
        adapter: where things are.
        image_size: images are scaled to this side when they have another.

    Raises:
        ImportError: gymnasium or the module of the environment is missing.
        ValueError: the environment does not exist, or an action space without an adapter here.
    """

    def __init__(self, adapter: GymAdapter, image_size: int = 64) -> None:
        try:
            import gymnasium

            if adapter.imports:
                importlib.import_module(adapter.imports)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{adapter.env_id} needs the package {error.name}: pip install {error.name.replace('_', '-')}. If it "
                "clashes with something here, run it in an environment of its own: docs/evaluation.md, Remote."
            ) from error
        try:
            self._env = gymnasium.make(adapter.env_id, **adapter.options)
        except gymnasium.error.Error as error:
            raise ValueError(f"gymnasium cannot make {adapter.env_id!r}: {error}") from error
        self.adapter = adapter
        self.image_size = image_size
        self.instruction = adapter.instruction
        self.control_frequency = adapter.control_frequency
        self.cameras = tuple(adapter.cameras)
        self.max_steps = adapter.max_steps or self._env.spec.max_episode_steps
        if self.max_steps is None:
            raise ValueError(f"{adapter.env_id} has no limit of steps: give max_steps.")
        space = self._env.action_space
        self._discrete = isinstance(space, gymnasium.spaces.Discrete)
        if not self._discrete and not isinstance(space, gymnasium.spaces.Box):
            raise ValueError(f"{adapter.env_id} takes actions of {space}: only Box and Discrete have an adapter.")
        self.action_dim = 1 if self._discrete else int(np.prod(space.shape))
        low, high = ([0.0], [space.n - 1.0]) if self._discrete else (space.low.reshape(-1), space.high.reshape(-1))
        # Where a space has no bound, a random policy draws from [-1, 1]
        self.action_low = np.where(np.isfinite(low), low, -1.0).astype(np.float64).tolist()
        self.action_high = np.where(np.isfinite(high), high, 1.0).astype(np.float64).tolist()
        self._observation: Any = None
        self.success, self.progress, self.steps = False, 0.0, 0

    def __enter__(self) -> "GymEnv":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()

    def reset_scene(self, seed: int) -> None:
        """Starts the episode that `seed` decides."""
        self._observation, _ = self._env.reset(seed=seed)
        self._env.action_space.seed(seed)
        self.success, self.progress, self.steps = False, 0.0, 0
        self._return, self._over = 0.0, False

    def observe(self, cameras: Sequence[str] | None = None) -> dict:
        """`{"images": {camera: uint8 (size, size, 3)}, "state": float32 (S,)}` of now.

        Raises:
            ValueError: unknown camera, something else than an image, or a state that is not finite.
        """
        images = {name: self._image(name, self.image_size) for name in (self.cameras if cameras is None else cameras)}
        state = np.zeros(0, np.float32)
        if self.adapter.state is not None:
            state = np.asarray(self._at(self.adapter.state), np.float32).reshape(-1)
        if not np.isfinite(state).all():
            raise ValueError(
                f"{self.adapter.env_id} reports a state that is not finite at step {self.steps}: {state}."
            )
        return {"images": images, "state": state}

    def step(self, action: np.ndarray) -> StepResult:
        """Executes one action.

        Raises:
            ValueError: wrong shape or not finite, or the environment does not report `success`.
            RuntimeError: the episode is over.
        """
        if self._observation is None or self._over:
            raise RuntimeError("The episode is over or was never begun: call reset_scene(seed).")
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"An action is {self.action_dim} finite numbers, got {action.tolist()}.")
        self._observation, reward, terminated, truncated, info = self._env.step(self._env_action(action))
        self.steps += 1
        reward = float(reward)
        self._return += reward
        self.success = self._is_solved(terminated, truncated, info)
        if self.adapter.progress_reward is not None:
            self.progress = max(self.progress, min(1.0, max(0.0, reward / self.adapter.progress_reward)))
        if self.success:
            self.progress = 1.0
        self._over = bool(terminated or truncated) or self.steps >= self.max_steps
        return StepResult(reward, self.success, self._over)

    def video_frame(self, size: int) -> np.ndarray:
        """A frame for people, uint8 (size, size, 3): the first camera, or `env.render()` without one."""
        return self._image(self.cameras[0], size) if self.cameras else _resize(self._rendered(), size)

    def _env_action(self, action: np.ndarray):
        space = self._env.action_space
        if self._discrete:
            return int(np.clip(round(float(action[0])), 0, space.n - 1)) + int(space.start)
        return np.clip(action.reshape(space.shape), space.low, space.high).astype(space.dtype)

    def _is_solved(self, terminated: bool, truncated: bool, info: Mapping) -> bool:
        if self.adapter.success_return is not None:
            return self._return >= self.adapter.success_return
        outcomes = {"terminated": terminated, "truncated": truncated, **info}
        if self.adapter.success not in outcomes:
            raise ValueError(
                f"{self.adapter.env_id} does not report {self.adapter.success!r}; its info has {sorted(info)}. "
                "Say what success is: gym:ID?success=KEY (also terminated, truncated) or gym:ID?success_return=NUMBER."
            )
        return bool(outcomes[self.adapter.success])

    def _image(self, camera: str, size: int) -> np.ndarray:
        if camera not in self.adapter.cameras:
            raise ValueError(f"{self.adapter.env_id} has no camera {camera!r}: it has {list(self.cameras) or 'none'}.")
        path = self.adapter.cameras[camera]
        return _resize(self._rendered() if path == RENDERED else np.asarray(self._at(path)), size)

    def _rendered(self) -> np.ndarray:
        frame = self._env.render()
        if frame is None:
            raise ValueError(f"{self.adapter.env_id} renders nothing: make it with render_mode='rgb_array'.")
        return np.asarray(frame)

    def _at(self, path: str):
        value = self._observation
        for key in path.split("/") if path else []:
            if not isinstance(value, Mapping) or key not in value:
                known = sorted(value) if isinstance(value, Mapping) else f"no keys, it is {type(value).__name__}"
                raise ValueError(f"The observation of {self.adapter.env_id} has no {path!r}: it has {known}.")
            value = value[key]
        return value


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A camera image is uint8 (h, w, 3), got {image.dtype} {image.shape}.")
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
