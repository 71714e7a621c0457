"""Five reference frames for the same targets, in a world where the robot's base and the camera move between episodes.

    python benchmarks/reference_frames.py --output runs/reference_frames --worlds moving fixed --seeds 0 1
    python benchmarks/reference_frames.py --output runs/reference_frames --report benchmarks/results  # what is there

The four modes of "Rethinking VLA scaling" (eq. 4) and absolute targets. In the world `moving` every episode draws from
its seed how the robot's base stands and where the camera is; states and targets are in the base's frame, so the same
motion on the table has other numbers in every episode. The world `fixed` is the control where nothing moves. Arms of a
seed share demonstrations, initial weights, batches, augmentation, noise, flow times, scenes and the noise of the
policy: they differ in the embodiment's `reference_frame` and in the statistics that follow from it.
Everything measured is kept: a call after ctrl-C goes on from the last checkpoint and the last episode, and more
--episodes only add to those that are there.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from wallvla import register_auto_classes
from wallvla.action_space_wallvla import REFERENCE_FRAMES, Embodiment, Pose
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.mixture import CoTrainingMixture, random_shift
from wallvla.data.statistics import compute_statistics
from wallvla.evaluation import metaworld
from wallvla.evaluation.closed_loop import run_episode
from wallvla.evaluation.demonstrations import NOISE_HOLD_STEPS, NOISE_PROBABILITY, demonstrations_of
from wallvla.evaluation.gym_env import StepResult
from wallvla.evaluation.journal import Journal
from wallvla.evaluation.metaworld import CONTROL_FREQUENCY, EVALUATION_SEED_START, MetaWorldEnv
from wallvla.evaluation.open_loop import predict_demonstration
from wallvla.evaluation.policy import BlankedImages, HubPolicy, Policy, ScriptedExpert
from wallvla.evaluation.statistics import compare_paired, holm, wilson_interval
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import EMBODIMENT, OPEN_LOOP_SEED, QuickstartConfig, build_model, build_processor, fit
from wallvla.rotations_wallvla import axis_angle_to_matrix, compose, inverse, matrix_to_axis_angle


REFERENCE = "eef_relative"
TASK = "button-press-topdown-v3"
MAX_STEPS = 150  # of an episode; the expert needs about 60
HELD_OUT = 5  # demonstrations of the open-loop figures
STEP_M = 0.01  # what a command of 1 moves Meta-World's set point
HAND_ROTATION = axis_angle_to_matrix(np.array([0.0, np.pi / 2, 0.0]))  # Meta-World's set point: the hand points down
POSE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


# --- the world


@dataclass(frozen=True)
class World:
    """How far things move between episodes, each way and uniformly: yaw of the base, its place, the camera's place."""

    yaw_degrees: float
    base_m: float
    camera_m: float


WORLDS = {"moving": World(90.0, 0.3, 0.05), "fixed": World(0.0, 0.0, 0.0)}


class MovingBaseEnv(MetaWorldEnv):
    """Meta-World seen from a robot whose base stands somewhere else in every episode, and taking target poses.

    State (7,): measured position (m) and rotation (axis-angle) of the hand in the base's frame, gripper opening.
    Action (7,): target position and rotation in the same frame, gripper effort. The controller moves the set point by
    (target - measured position), at most 1 cm per axis of the scene and step; rotations it ignores, as Meta-World
    holds the hand pointing down, within about six degrees.

    `path` holds the hand's positions in the scene (m) since the reset, `commands` what was sent to Meta-World.
    """

    action_dim = len(POSE_NAMES)
    action_low, action_high = (-1.0,) * action_dim, (1.0,) * action_dim

    def __init__(self, task: str, world: World, image_size: int = 64) -> None:
        super().__init__(task, ("front",), image_size)
        self.world = world
        self.base: Pose = (np.zeros(3), np.eye(3))  # pose of the base in the scene
        self.path: list[np.ndarray] = []
        self.commands: list[np.ndarray] = []

    def reset_scene(self, seed: int) -> None:
        """Draws base and camera from `seed`, then the scene as ever: the same scene in every world."""
        rng = np.random.default_rng([seed, 1])
        yaw = np.deg2rad(self.world.yaw_degrees) * rng.uniform(-1, 1)
        place = self.world.base_m * rng.uniform(-1, 1, 2)
        self.base = np.append(place, 0.0), axis_angle_to_matrix(np.array([0.0, 0.0, yaw]))
        camera = self._env.model.camera(metaworld.CAMERAS["front"])
        camera.pos = np.asarray(metaworld.FRONT_CAMERA_POSITION) + self.world.camera_m * rng.uniform(-1, 1, 3)
        super().reset_scene(seed)
        self.path, self.commands = [self._hand()[0]], []

    def _hand(self) -> Pose:
        """The hand's measured pose in the scene."""
        return super().state[:3].astype(np.float64), self._env.data.body("hand").xmat.reshape(3, 3).copy()

    @property
    def state(self) -> np.ndarray:
        """Proprioception now: float32 (7,)."""
        return self._in_base(self._hand(), super().state[3])

    def _in_base(self, pose: Pose, gripper: float) -> np.ndarray:
        position, rotation = compose(inverse(self.base), pose)
        return np.concatenate([position, matrix_to_axis_angle(rotation), [gripper]]).astype(np.float32)

    def expert_action(self) -> np.ndarray:
        """Where the scripted expert would have the set point now: float32 (7,)."""
        command = super().expert_action()
        return self._in_base((self._hand()[0] + STEP_M * command[:3], HAND_ROTATION), command[3])

    def step(self, action: np.ndarray) -> StepResult:
        """Goes towards one target for 1/80 s.

        Raises:
            ValueError: not 7 finite numbers.
            RuntimeError: `reset` was not called, or the episode is over.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"An action is 7 finite numbers ({', '.join(POSE_NAMES)}), got {action.tolist()}.")
        target, _ = compose(self.base, (action[:3], axis_angle_to_matrix(action[3:6])))
        command = np.clip((target - self._hand()[0]) / STEP_M, -1.0, 1.0)
        result = super().step(np.append(command, action[6]))
        self.path.append(self._hand()[0])
        self.commands.append(command)
        return result


def embodiment(reference_frame: str, stats: dict | None = None) -> Embodiment:
    """The robot of `MovingBaseEnv`; all that an arm changes is the frame (and the statistics that belong to it)."""
    layout = (("left_ee_position", 3), ("left_ee_rotation", 3), ("left_gripper", 1))
    return Embodiment(
        cameras={"observation.images.front": "front view"},
        control_frequency=CONTROL_FREQUENCY,
        action_horizon=8,
        state_layout=layout,
        action_layout=layout,
        reference_frame=reference_frame,
        action_gripper_range=(1.0, -1.0),  # an effort of 1 closes
        statistics=stats,
    )


# --- demonstrations


def record_episode(env: MovingBaseEnv, seed: int, noise: float, settle_steps: int = 8) -> list[dict] | None:
    """Frames of one expert episode, or None where the expert did not succeed in time.

    As in `evaluation.demonstrations`: the executed target is disturbed half of the time, the expert's own is the
    label.
    """
    rng = np.random.default_rng([seed, 2])
    env.reset_scene(seed)
    frames, disturbance = [], np.zeros(env.action_dim)
    end = MAX_STEPS
    while env.steps < end:
        observation, action = env.observe(), env.expert_action()
        frame = {"observation.state": observation["state"], "action": action}
        frames.append(frame | {"observation.images.front": observation["images"]["front"]})
        if env.steps % NOISE_HOLD_STEPS == 0:
            disturbance[:3] = rng.normal(0.0, noise * STEP_M, 3) * (rng.random() < NOISE_PROBABILITY)
        env.step(action + disturbance)
        if env.success and end == MAX_STEPS:
            end = env.steps + settle_steps
    return frames if end < MAX_STEPS else None


def record(root: Path, world: World, episodes: int, seed0: int, noise: float, image_size: int = 64) -> None:
    """Writes a LeRobot dataset of `episodes` successful demonstrations, from seed `seed0` on, for all arms."""
    vector = {"dtype": "float32", "shape": [len(POSE_NAMES)], "names": list(POSE_NAMES)}
    camera = {"dtype": "video", "shape": [image_size, image_size, 3], "names": ["height", "width", "channel"]}
    features = {"observation.state": vector, "action": vector, "observation.images.front": camera}
    with (
        LeRobotWriter(root, fps=CONTROL_FREQUENCY, features=features, robot_type="sawyer") as writer,
        MovingBaseEnv(TASK, world, image_size) as env,
        tqdm(total=episodes, desc=f"recording {root.name}", unit="episode") as bar,
    ):
        for seed in itertools.count(seed0):
            frames = record_episode(env, seed, noise)
            if frames is None:
                continue
            for frame in frames:
                writer.add_frame(frame)
            writer.save_episode(env.instruction)
            bar.update()
            if bar.n == episodes:
                return


# --- arms


def train(folder: Path, dataset_root: Path, reference_frame: str, seed: int, options: dict) -> None:
    """Trains the quickstart's model on the action targets alone and saves `folder / "hub"`.

    No state is dropped: in the world's frames a policy needs it to know how the base stands.
    """
    set_seed(seed)
    config = QuickstartConfig(task=[TASK], steps=options["steps"], batch_size=options["batch_size"], seed=seed)
    dataset = LeRobotDataset(dataset_root, embodiment=EMBODIMENT, action_horizon=8, frames_in_memory=True)
    stats = compute_statistics(dataset, embodiment(reference_frame))
    processor = build_processor(config, embodiment(reference_frame, stats))
    length = config.steps * config.batch_size
    mixture = CoTrainingMixture(dataset, seed=seed, length=length, augment=random_shift(2))
    fit(config, build_model(processor), processor, mixture, folder, folder / "hub", {"report_to": "none"})
    shutil.rmtree(folder / "training")


def motion_figures(path: np.ndarray, commands: np.ndarray) -> dict:
    """Smoothness of a path (T + 1, 3) in m and its commands (T, 3), T at least 3: `jerk` in m/s³, RMS of the third
    difference, and `reversals`, the share of commands that point away from the one before."""
    jerk = np.diff(path, n=3, axis=0) * CONTROL_FREQUENCY**3
    against = (commands[1:] * commands[:-1]).sum(axis=1) < 0
    return {"jerk": float(np.sqrt((jerk**2).sum(axis=1).mean())), "reversals": float(against.mean())}


def play(env: MovingBaseEnv, policy: Policy, path: Path, episodes: int) -> list[dict]:
    """Closed-loop episodes on the evaluation seeds; those in the journal at `path` are not played again."""
    with Journal(path) as journal:
        begun = len(journal.records)
        for number in tqdm(range(begun, episodes), desc=str(path), unit="episode", initial=begun, total=episodes):
            outcome = run_episode(env, policy, EVALUATION_SEED_START + number, max_steps=MAX_STEPS)
            kept = {name: outcome[name] for name in ("success", "steps", "progress")}
            motion = motion_figures(np.stack(env.path), np.stack(env.commands))
            journal.append({"seed": EVALUATION_SEED_START + number, **kept, **motion})
        return journal.records[:episodes]


def open_loop(policy: Policy, held_out: Path) -> dict:
    """Along unseen demonstrations: distance to the demonstrated targets (mm; mean, first and last step of a chunk) and
    how uneven the targets of a chunk are (mm, RMS of the second difference; also of the demonstrated ones)."""
    dataset = LeRobotDataset(held_out, embodiment=EMBODIMENT, action_horizon=8, frames_in_memory=True)
    chunks = [predict_demonstration(policy, demonstration)[1:] for demonstration in demonstrations_of(dataset)]
    predicted, demonstrated, is_pad = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    whole = ~is_pad.any(axis=1)
    predicted, demonstrated = 1000 * predicted[whole, :, :3], 1000 * demonstrated[whole, :, :3]
    error = np.linalg.norm(predicted - demonstrated, axis=-1)
    result = {"mm": error.mean(), "first_mm": error[:, 0].mean(), "last_mm": error[:, -1].mean()}
    for name, targets in (("unevenness_mm", predicted), ("demonstrated_unevenness_mm", demonstrated)):
        result[name] = np.sqrt((np.diff(targets, n=2, axis=1) ** 2).sum(axis=-1).mean())
    return {name: float(value) for name, value in result.items()} | {"chunks": len(error)}


def stored(folder: Path, episodes: int) -> dict | None:
    """The result in `folder`, if it has that many episodes."""
    file = folder / "result.json"
    result = json.loads(file.read_text()) if file.exists() else {"closed_loop": []}
    return result if len(result["closed_loop"]) >= episodes else None


def run_arm(output: Path, world: str, reference_frame: str, seed: int, options: dict, episodes: int) -> dict:
    """Trains and measures one policy, or what is missing of it. "expert" is the scripted one through the same
    controller: the upper bound of success, and the path it takes."""
    folder = output / world / f"{reference_frame}-{seed}"
    result = stored(folder, episodes)
    if result is not None:
        return result
    started = time.perf_counter()
    result = {"world": world, "frame": reference_frame, "seed": seed, **provenance()}
    with MovingBaseEnv(TASK, WORLDS[world]) as env:
        policy = ScriptedExpert(env)
        if reference_frame != "expert":
            if not (folder / "hub").exists():
                train(folder, output / world / "dataset", reference_frame, seed, options)
            model = WallVLAForConditionalGeneration.from_pretrained(folder / "hub")
            policy = HubPolicy(model, WallVLAProcessor.from_pretrained(folder / "hub"), EMBODIMENT)
            result["open_loop"] = open_loop(policy, output / world / "held_out")
        result["closed_loop"] = play(env, policy, folder / "episodes.jsonl", episodes)
        if reference_frame == REFERENCE:
            result["blind"] = play(env, BlankedImages(policy), folder / "blind.jsonl", episodes)
    result["seconds"] = round(time.perf_counter() - started)
    write(folder / "result.json", json.dumps(result))
    return result


def provenance() -> dict:
    """Date, commit and machine of a figure."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    machine = f"{names[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, torch {torch.__version__}"
    return {"date": date.today().isoformat(), "commit": commit, "machine": machine}


def write(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def check_options(output: Path, options: dict) -> None:
    """Policies of different training are not compared: a folder holds those of one.

    Raises:
        ValueError: the folder was begun with other options.
    """
    file = output / "options.json"
    if not file.exists():
        write(file, json.dumps(options))
    found = json.loads(file.read_text())
    if found != options:
        raise ValueError(f"{output} was begun with {found}, now {options}: give the same, or another --output.")


# --- report


def outcomes(rows: list[dict], name: str = "closed_loop") -> list[bool]:
    """Success of every episode, by seed of training and scene."""
    return [episode["success"] for row in rows for episode in row[name]]


def rate_cell(solved: list[bool]) -> str:
    """`12/40 = 30% [18%, 45%]`, Wilson's interval."""
    low, high = wilson_interval(sum(solved), len(solved))
    return f"{sum(solved)}/{len(solved)} = {sum(solved) / len(solved):.0%} [{low:.0%}, {high:.0%}]"


def summary_table(arms: dict[str, list[dict]]) -> list[str]:
    """One line for each arm of one world, seeds pooled."""
    lines = [
        "| arm | seeds | success (95% Wilson) | by seed | open loop, mm: mean; first; last step | unevenness of a "
        "chunk, mm | jerk of the path, m/s³ | reversals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, rows in arms.items():
        cells = [arm, str(len(rows)), rate_cell(outcomes(rows))]
        cells.append(", ".join(f"{sum(outcomes([row])) / len(outcomes([row])):.0%}" for row in rows))
        if arm == "expert":
            cells += ["", ""]
        else:
            names = ("mm", "first_mm", "last_mm")
            cells.append("; ".join(f"{statistics.mean(row['open_loop'][name] for row in rows):.1f}" for name in names))
            uneven = statistics.mean(row["open_loop"]["unevenness_mm"] for row in rows)
            cells.append(f"{uneven:.2f} (demonstrated {rows[0]['open_loop']['demonstrated_unevenness_mm']:.2f})")
        episodes = [episode for row in rows for episode in row["closed_loop"]]
        cells.append(f"{statistics.mean(episode['jerk'] for episode in episodes):.0f}")
        cells.append(f"{statistics.mean(episode['reversals'] for episode in episodes):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
        if arm == REFERENCE:
            blind = outcomes(rows, "blind")
            lines.append(f"| {arm}, images blanked | {len(rows)} | {rate_cell(blind)} | | | | | |")
    return lines


def paired_comparisons(arms: dict[str, list[dict]]) -> dict[str, dict]:
    """The reference against every other arm on the seeds that both have, scene by scene; `p_holm` over the arms."""
    base = {row["seed"]: row for row in arms.get(REFERENCE, [])}
    tests = {}
    for arm, rows in arms.items():
        shared = [row for row in rows if row["seed"] in base]
        if arm not in (REFERENCE, "expert") and shared:
            test = compare_paired(outcomes([base[row["seed"]] for row in shared]), outcomes(shared))
            tests[arm] = {
                name: test[name] for name in ("trials", "difference", "low", "high", "only_a", "only_b", "p")
            }
    corrected = holm({arm: test["p"] for arm, test in tests.items()})
    return {arm: {**test, "p_holm": corrected[arm]} for arm, test in tests.items()}


def report(output: Path, results: Path) -> str:
    """Writes `reference_frames.json` and `.md` into `results`, from what `output` holds, and returns the Markdown.

    Raises:
        ValueError: there is no finished policy.
    """
    rows = [json.loads(path.read_text()) for path in sorted(output.glob("*/*/result.json"))]
    if not any(row["frame"] != "expert" for row in rows):
        raise ValueError(f"{output} holds no finished policy: run the benchmark first.")
    options = json.loads((output / "options.json").read_text())
    text = ["# Reference frames\n", f"`benchmarks/reference_frames.py`, {TASK}, {json.dumps(options)}."]
    for name in ("machine", "date", "commit"):
        text.append(f"{name.capitalize()}: {'; '.join(sorted({row[name] for row in rows}))}.")
    tests = {}
    for world in WORLDS:
        here = [row for row in rows if row["world"] == world]
        arms = {arm: [row for row in here if row["frame"] == arm] for arm in (REFERENCE, *REFERENCE_FRAMES, "expert")}
        arms = {arm: sorted(group, key=lambda row: row["seed"]) for arm, group in arms.items() if group}
        if not arms:
            continue
        tests[world] = paired_comparisons(arms)
        text += [f"\n## World `{world}`: {asdict(WORLDS[world])}\n", *summary_table(arms)]
        text += [f"\n| {REFERENCE} minus | pairs | success [95% bootstrap] | only {REFERENCE} / only the other | "]
        text[-1] += "McNemar p | Holm |\n|---|---|---|---|---|---|"
        for arm, test in tests[world].items():
            text.append(
                f"| {arm} | {test['trials']} | {test['difference']:+.0%} [{test['low']:+.0%}, {test['high']:+.0%}] | "
                f"{test['only_a']} / {test['only_b']} | {test['p']:.2g} | {test['p_holm']:.2g} |"
            )
    write(results / "reference_frames.json", json.dumps({"options": options, "paired": tests, "rows": rows}, indent=1))
    write(results / "reference_frames.md", "\n".join(text))
    return "\n".join(text)


def main() -> None:
    """Trains and measures what is not there yet, seed by seed, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/reference_frames"))
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--frames", nargs="*", choices=REFERENCE_FRAMES, default=list(REFERENCE_FRAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--demonstrations", type=int, default=40, help="of the training set")
    parser.add_argument("--episodes", type=int, default=40, help="closed-loop scenes of each policy")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write the tables of what is there")
    options = parser.parse_args()
    if options.report is not None:
        print(report(options.output, options.report))
        return
    torch.set_num_threads(1)
    register_auto_classes()
    training = {name: vars(options)[name] for name in ("demonstrations", "steps", "batch_size")}
    check_options(options.output, training)
    for world in options.worlds:
        folder = options.output / world
        if not (folder / "dataset").exists():
            record(folder / "dataset", WORLDS[world], options.demonstrations, metaworld.TRAINING_SEED_START, noise=0.6)
        if not (folder / "held_out").exists():
            record(folder / "held_out", WORLDS[world], HELD_OUT, OPEN_LOOP_SEED, noise=0.0)
        run_arm(options.output, world, "expert", 0, training, options.episodes)
        for seed, frame in itertools.product(options.seeds, options.frames):
            result = run_arm(options.output, world, frame, seed, training, options.episodes)
            print(f"{world}, {frame}-{seed}: {rate_cell(outcomes([result]))}", flush=True)


if __name__ == "__main__":
    main()
