"""Demonstrations from scripted experts, recorded in worker processes, in an order that depends on nothing.

The executed action gets noise for about half of the time while the expert's own action is kept as the label, so that
demonstrations show how to come back; without it a cloned policy does not know what to do one centimetre off the path.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from .metaworld import EVALUATION_SEED_START, MAX_STEPS, TRAINING_SEED_START, MetaWorldEnv, check_task, mask_box
from .workers import WorkerPool


NOISE_HOLD_STEPS = 6  # 75 ms: long enough to leave the path, short enough to stay near it
NOISE_PROBABILITY = 0.5
# A failed expert is retried far away in seed space, so that no retry meets the seed of another episode.
RETRY_STRIDE = 100_000
MAX_ATTEMPTS = 8


@dataclass
class GroundingSample:
    """One object in one image, from the simulator's ground truth.

    `box` is (x1, y1, x2, y2) in pixels, ends exclusive; `mask` bool (h, w) holds the visible pixels; `others` holds
    the boxes of the other objects in the same image by name.
    """

    image: np.ndarray  # uint8 (h, w, 3)
    task: str
    camera: str
    name: str
    box: tuple[int, int, int, int]
    mask: np.ndarray
    others: dict[str, tuple[int, int, int, int]]
    frame_index: int = -1  # frame of the demonstration; -1 for a scene


@dataclass
class Demonstration:
    """One successful episode: T frames, each with the state seen and the expert's action there (robot units)."""

    task: str
    instruction: str
    seed: int
    states: np.ndarray  # float32 (T, 4)
    actions: np.ndarray  # float32 (T, 4)
    frames: dict[str, np.ndarray]  # camera -> uint8 (T, h, w, 3)
    grounding: list[GroundingSample]
    failed_seeds: tuple[int, ...]  # where the expert failed before this seed
    effector_pixels: np.ndarray  # float64 (T, 2), the end effector (x, y) in the image of the first camera


def record_demonstrations(
    tasks: Sequence[str],
    episodes_per_task: int,
    seed0: int = TRAINING_SEED_START,
    image_size: int = 64,
    cameras: Sequence[str] = ("front", "wrist"),
    noise: float = 0.6,
    settle_steps: int = 8,
    max_steps: int = 300,
    grounding_every: int = 25,
    num_processes: int = 2,
    progress: bool = True,
    all_views: bool = False,
) -> Iterator[Demonstration]:
    """Yields successful demonstrations, one task after the other, the same ones for any number of processes.

    Args:
        tasks: names from `metaworld.TASKS`.
        episodes_per_task: number of demonstrations of each task.
        seed0: episode i uses seed `seed0 + i`. Seeds stay below `RETRY_STRIDE`, retries below `EVALUATION_SEED_START`:
            a policy is never evaluated on a scene that it was trained on.
        image_size: side of the frames in pixels.
        cameras: cameras to record.
        noise: standard deviation of the noise on the executed displacement, in action units; 0 for none.
        settle_steps: steps that are recorded after the success.
        max_steps: an episode without success by then is a failure of the expert and is tried with another seed.
        grounding_every: steps between two frames of the first camera whose objects are recorded; 0 for none.
        num_processes: worker processes.
        progress: whether to show a progress bar.
        all_views: record the objects in all cameras instead of the first one.

    Raises:
        ValueError: unknown task, or seeds outside the training range.
        WorkerError: a worker stopped, for instance because the expert failed `MAX_ATTEMPTS` times in a row.
    """
    for task in tasks:
        check_task(task)
    if not 0 < max_steps <= max_steps + settle_steps <= MAX_STEPS:
        raise ValueError(
            f"max_steps {max_steps} + settle_steps {settle_steps} must lie in [1, {MAX_STEPS}], Meta-World's limit."
        )
    if not TRAINING_SEED_START <= seed0 <= seed0 + episodes_per_task <= RETRY_STRIDE:
        raise ValueError(
            f"Seeds {seed0} to {seed0 + episodes_per_task} leave the range of first attempts "
            f"[{TRAINING_SEED_START}, {RETRY_STRIDE}]: choose a smaller seed0 or fewer episodes."
        )
    recorder = {
        "image_size": image_size,
        "cameras": list(cameras),
        "noise": noise,
        "settle_steps": settle_steps,
        "max_steps": max_steps,
        "grounding_every": grounding_every,
        "all_views": all_views,
    }
    # Tasks take turns, so that any prefix of the recording is balanced.
    jobs = [
        {"kind": "demonstration", "task": task, "seed": seed0 + episode}
        for episode in range(episodes_per_task)
        for task in tasks
    ]
    retries = 0
    with (
        WorkerPool({"job": "record", "recorder": recorder}, max(1, min(num_processes, len(jobs)))) as pool,
        tqdm(total=len(jobs), desc="demonstrations", unit="episode", disable=not progress) as bar,
    ):
        for reply in pool.map_in_order(jobs):
            samples = [GroundingSample(**sample) for sample in reply.pop("grounding")]
            demonstration = Demonstration(**reply, grounding=samples)
            retries += len(demonstration.failed_seeds)
            bar.set_postfix(expert_failures=retries, refresh=False)
            bar.update()
            yield demonstration


def demonstrations_of(dataset) -> list[Demonstration]:
    """All episodes of a `LeRobotDataset` (or an object with its attributes) as demonstrations, decoded to memory."""
    demonstrations = []
    for number, (start, end) in enumerate(dataset.episode_bounds.tolist()):
        samples = [dataset[index] for index in range(start, end)]
        frames = {
            key.rsplit(".", 1)[-1]: np.stack([sample["images"][key] for sample in samples])
            for key in dataset.camera_keys
        }
        demonstrations.append(
            Demonstration(
                task=samples[0]["instruction"],
                instruction=samples[0]["instruction"],
                seed=int(dataset.episode_ids[number]),
                states=dataset.states[start:end],
                actions=dataset.actions[start:end],
                frames=frames,
                grounding=[],
                failed_seeds=(),
            )
        )
    return demonstrations


def record_scenes(
    tasks: Sequence[str],
    seeds: Sequence[int],
    image_size: int = 64,
    camera: str = "front",
    num_processes: int = 2,
    progress: bool = True,
) -> Iterator[list[GroundingSample]]:
    """Yields the objects of one image per (seed, task): new placements, the arm somewhere on the way to its goal.

    A scene costs a tenth of a demonstration and shows other placements. Take seeds from `EVALUATION_SEED_START` on for
    an evaluation.
    """
    for task in tasks:
        check_task(task)
    jobs = [{"kind": "scene", "task": task, "seed": int(seed)} for seed in seeds for task in tasks]
    recorder = {"image_size": image_size, "cameras": [camera]}
    with (
        WorkerPool({"job": "record", "recorder": recorder}, max(1, min(num_processes, len(jobs)))) as pool,
        tqdm(total=len(jobs), desc="scenes", unit="scene", disable=not progress) as bar,
    ):
        for reply in pool.map_in_order(jobs):
            bar.update()
            yield [GroundingSample(**sample) for sample in reply]


class Recorder:
    """The worker's side of both functions above: one simulator per task, plain dictionaries as replies."""

    def __init__(
        self,
        image_size: int,
        cameras: Sequence[str],
        noise: float = 0.0,
        settle_steps: int = 0,
        max_steps: int = MAX_STEPS,
        grounding_every: int = 0,
        all_views: bool = False,
    ) -> None:
        self.image_size = image_size
        self.cameras = tuple(cameras)
        self.noise = noise
        self.settle_steps = settle_steps
        self.max_steps = max_steps
        self.grounding_every = grounding_every
        self.all_views = all_views
        self._envs: dict[str, MetaWorldEnv] = {}

    def run(self, job: dict) -> dict | list[dict]:
        """Answers one job; see `record_demonstrations` and `record_scenes` for the two kinds."""
        task, seed = job["task"], job["seed"]
        if task not in self._envs:
            self._envs[task] = MetaWorldEnv(task, self.cameras, self.image_size)
        env = self._envs[task]
        if job["kind"] == "scene":
            return self._scene(env, seed)
        failed_seeds = []
        for attempt in range(MAX_ATTEMPTS):
            attempt_seed = seed + attempt * RETRY_STRIDE
            assert attempt_seed < EVALUATION_SEED_START
            episode = self._demonstration(env, attempt_seed)
            if episode is not None:
                return {**episode, "failed_seeds": tuple(failed_seeds)}
            failed_seeds.append(attempt_seed)
        raise RuntimeError(
            f"The expert of {task} failed {MAX_ATTEMPTS} times in a row with noise {self.noise} "
            f"(seeds {failed_seeds}): record it with less noise."
        )

    def close(self) -> None:
        """Closes the simulators."""
        for env in self._envs.values():
            env.close()

    def _demonstration(self, env: MetaWorldEnv, seed: int) -> dict | None:
        """One episode, or None when the expert did not succeed in time."""
        rng = _episode_rng(env.task, seed)
        grounding_offset = int(rng.integers(self.grounding_every)) if self.grounding_every else 0
        states, actions, grounding, effector = [], [], [], []
        frames = {camera: [] for camera in self.cameras}
        disturbance = np.zeros(4)
        observation = env.reset(seed)
        remaining = None  # steps left after the success
        while remaining != 0:
            if remaining is None and env.steps == self.max_steps:
                return None
            action = env.expert_action()
            states.append(observation["state"])
            actions.append(action)
            effector.append(env.project(self.cameras[0], observation["state"][None, :3])[0])
            for camera, image in observation["images"].items():
                frames[camera].append(image)
            if self.grounding_every and env.steps % self.grounding_every == grounding_offset:
                for camera in self.cameras if self.all_views else self.cameras[:1]:
                    grounding += [sample | {"frame_index": len(states) - 1} for sample in _grounding(env, camera)]
            if env.steps % NOISE_HOLD_STEPS == 0:
                disturbance = _disturbance(rng, self.noise)
            env.step(action + disturbance)
            if remaining is None:
                remaining = self.settle_steps if env.success else None
            else:
                remaining -= 1
            observation = env.observe()
        return {
            "task": env.task,
            "instruction": env.instruction,
            "seed": seed,
            "states": np.stack(states),
            "actions": np.stack(actions),
            "frames": {camera: np.stack(images) for camera, images in frames.items()},
            "grounding": grounding,
            "effector_pixels": np.stack(effector),
        }

    def _scene(self, env: MetaWorldEnv, seed: int) -> list[dict]:
        rng = _episode_rng(env.task, seed)
        env.reset_scene(seed)
        disturbance = _disturbance(rng, 1.0)
        for _ in range(int(rng.integers(0, 60))):
            env.step(env.expert_action() + disturbance)
        return _grounding(env, self.cameras[0])


def _episode_rng(task: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(task.encode())])


def _disturbance(rng: np.random.Generator, noise: float) -> np.ndarray:
    """Displacement noise for one hold period, float64 (4,), zero for half of the draws; the gripper stays true."""
    values = rng.normal(0.0, 1.0, 3) * noise * (rng.random() < NOISE_PROBABILITY)
    return np.append(values, 0.0)


def _grounding(env: MetaWorldEnv, camera: str) -> list[dict]:
    masks = env.object_masks(camera)
    boxes = {name: mask_box(mask) for name, mask in masks.items()}
    image = env.observe((camera,))["images"][camera]
    return [
        {
            "image": image,
            "task": env.task,
            "camera": camera,
            "name": name,
            "box": boxes[name],
            "mask": mask,
            "others": {other: box for other, box in boxes.items() if other != name},
        }
        for name, mask in masks.items()
    ]
