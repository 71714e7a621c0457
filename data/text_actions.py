"""Language-action trajectories without images, for text-to-action pretraining (Qwen-VLA, sections 3.1 and 3.2.3).

Tasks are drawn and put into words by `motion_templates.py`, moved by `arm_motion.py`, and written here as one LeRobot
dataset per arm. There is no physics and no rendering, and no planner that avoids collisions: the table top is the only
obstacle, and the waypoints stay above it.

    generate("runs/text-actions", trajectories=1000, workers=2, seed=0)
"""

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..action_space_wallvla import Embodiment
from .arm_motion import FPS, ArmSpec, PlannedArm
from .lerobot_writer import LeRobotWriter
from .motion_templates import TEMPLATES, Workspace, draw_task


_PACKAGE = "example-robot-data"
_ROBOTS = "cmeel.prefix/share/example-robot-data/robots"
_UR_TOOL = ("z", "y", "-x")
# The paper's arms as far as the package has them. The last three stand in for UR10e, UR5e and, with other kinematics
# than the paper's, Kinova Gen3; UR3 takes the place of TM12.
ARMS = {
    "franka_panda": ArmSpec(
        "panda_description/urdf/panda.urdf",
        "panda_hand_tcp",
        ("z", "-y", "x"),
        0.0,
        (0.0, -0.31, 0.0, -2.35, 0.0, 2.04, 0.785),
        Workspace(0.30, 0.70, 60, (0.45, 0.35)),
    ),
    "ufactory_xarm7": ArmSpec(
        "xarm_description/urdf/xarm7.urdf",
        "link_eef",
        ("z", "-y", "x"),
        0.15,
        (0.0, -0.2, 0.0, 1.24, 0.0, 1.44, 0.0),
        Workspace(0.25, 0.65, 60, (0.42, 0.35)),
    ),
    "ur10": ArmSpec(
        "ur_description/urdf/ur10_robot.urdf",
        "tool0",
        _UR_TOOL,
        0.15,
        (-0.25, -1.65, 1.82, -1.74, -1.57, 1.32),
        Workspace(0.45, 1.00, 60, (0.65, 0.40)),
    ),
    "ur5": ArmSpec(
        "ur_description/urdf/ur5_robot.urdf",
        "tool0",
        _UR_TOOL,
        0.15,
        (-0.22, -1.55, 1.38, -1.40, -1.57, 1.35),
        Workspace(0.30, 0.75, 60, (0.50, 0.35)),
    ),
    "ur3": ArmSpec(
        "ur_description/urdf/ur3_robot.urdf",
        "tool0",
        _UR_TOOL,
        0.15,
        (-0.38, -1.58, 1.16, -1.15, -1.57, 1.19),
        Workspace(0.20, 0.42, 60, (0.30, 0.25)),
    ),
    "kinova_j2s6s200": ArmSpec(
        "kinova_description/robots/kinova.urdf",
        "j2s6s200_end_effector",
        ("x", "y", "z"),
        0.0,
        (-1.55, 3.37, 1.61, 3.14, 1.77, -3.12),
        Workspace(0.25, 0.65, 60, (0.40, 0.35)),
    ),
}
BLOCK = 240  # trajectories that are planned together and kept or redone after an interruption
ATTEMPTS = 50  # tasks that are drawn for one trajectory before its arm counts as misplaced
_POSE_NAMES = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"]


@dataclass(frozen=True)
class _Plan:
    """What the trajectories depend on, besides their numbers."""

    arms: tuple[str, ...]
    trajectories: int
    seed: int
    block: int
    action_horizon: int


def urdf_path(arm: str) -> Path:
    """The URDF file of one of ARMS.

    Raises:
        ValueError: unknown arm.
        ImportError: `example-robot-data` is not installed.
    """
    if arm not in ARMS:
        raise ValueError(f"Unknown arm {arm!r}; known are {', '.join(ARMS)}.")
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f'The arms come from {_PACKAGE}: pip install "wallvla[text-actions]".') from error
    return Path(str(distribution.locate_file(f"{_ROBOTS}/{ARMS[arm].urdf}")))


@cache
def planned_arm(arm: str) -> PlannedArm:
    """One of ARMS with its kinematics."""
    return PlannedArm(ARMS[arm], urdf_path(arm))


def pose_embodiment(arm: str, action_horizon: int) -> Embodiment:
    """One of ARMS as `observation.eef_pose` records it: pose and gripper, no camera, no statistics."""
    layout = (("left_ee_position", 3), ("left_ee_rotation", 4), ("left_gripper", 1))
    return Embodiment(
        cameras={},
        control_frequency=FPS,
        action_horizon=action_horizon,
        state_layout=layout,
        action_layout=layout,
        rotation_format="quaternion_xyzw",
        tool_axes=ARMS[arm].tool_axes,
    )


def template_of(index: int) -> str:
    """Template of a trajectory: they take turns."""
    return list(TEMPLATES)[index % len(TEMPLATES)]


def make_trajectories(arm: str, indices: Sequence[int], seed: int) -> tuple[list[dict], list[dict]]:
    """Trajectories by number; each depends on (seed, arm, index) alone.

    Tasks whose motion the arm cannot make are drawn again.

    Returns:
        for each index {"instruction", "state" (T, J + 1), "velocity" (T, J), "pose" (T, 8)}, float32: joints and
        gripper, joint velocities, position with quaternion xyzw and gripper; and for each failed draw {"template",
        "reason"}; see `PlannedArm.plan`.

    Raises:
        ValueError: ATTEMPTS tasks in a row cannot be done.
    """
    planner, made, failures = planned_arm(arm), {}, []
    stream = zlib.crc32(arm.encode())
    for attempt in range(ATTEMPTS):
        pending = [index for index in indices if index not in made]
        if not pending:
            return [made[index] for index in indices], failures
        tasks = [
            draw_task(template_of(index), ARMS[arm].workspace, np.random.default_rng([seed, stream, index, attempt]))
            for index in pending
        ]
        plans = planner.plan([task.waypoints for task in tasks])
        for index, task, plan in zip(pending, tasks, plans, strict=True):
            if isinstance(plan, str):
                failures.append({"template": task.template, "reason": plan})
                continue
            made[index] = {
                "instruction": task.instruction,
                "state": np.concatenate([plan.joints, plan.gripper], axis=1).astype(np.float32),
                "velocity": plan.velocities.astype(np.float32),
                "pose": np.concatenate([plan.poses, plan.gripper], axis=1).astype(np.float32),
            }
    raise ValueError(
        f"{ATTEMPTS} tasks in a row are out of reach of {arm}, trajectory {pending[0]}: {failures[-1]['reason']}. "
        "Move its workspace."
    )


# --------------------------------------------------------------------------------------------------------------------
# Many of them, on disk
# --------------------------------------------------------------------------------------------------------------------


def generate(
    output: str | Path,
    *,
    trajectories: int,
    arms: Sequence[str] = tuple(ARMS),
    workers: int = 1,
    seed: int = 0,
    action_horizon: int = 64,
    block: int = BLOCK,
    progress: bool = True,
) -> dict:
    """Write `output`: a LeRobot v3.0 dataset per arm, its `ARM.poses.json` (`pose_embodiment`) and `report.json`.

    Features, at 50 frames per second: `observation.state` joints and gripper, `observation.velocity` joints per
    second, `observation.eef_pose` position, quaternion xyzw and gripper, and `action`, the next frame's state. For
    actions that are poses read `state_key="observation.eef_pose", action_key=None`.

    Until everything is complete it lies in the hidden folder `.NAME.partial` beside `output`, where an interrupted run
    goes on when it is called with the same arguments; the number of workers may change.

    Args:
        output: folder to create.
        trajectories: of each arm. The templates take turns.
        arms: keys of ARMS.
        workers: processes. More than one are spawned, so a script needs `if __name__ == "__main__":`.
        seed: of the tasks.
        action_horizon: of the embodiment files.
        block: trajectories between two writes; has no influence on them.
        progress: whether to show progress bars.

    Returns:
        the report: {arm: {template: {"trajectories", "hours", "failures": {reason: count}}}}.

    Raises:
        FileExistsError: `output` exists.
        ValueError: a number out of range, unknown arms, or what is begun has other arguments.
        ImportError: packages of the extra "text-actions" are missing.
        ChildProcessError: a worker died. Call again.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists. Delete it or write to another folder.")
    if trajectories < 1 or workers < 1 or seed < 0 or block < 1 or not arms or len(set(arms)) < len(arms):
        raise ValueError(
            f"Found trajectories={trajectories}, workers={workers}, seed={seed}, block={block}, arms={list(arms)}. "
            "The numbers are at least 1 (seed: 0), and there is at least one arm, each once."
        )
    for arm in arms:
        urdf_path(arm)
    plan = _Plan(tuple(arms), trajectories, seed, block, action_horizon)
    folder = _begin(output, plan)
    blocks = [(arm, first) for arm in arms for first in range(0, trajectories, block)]
    missing = [(folder, plan, *each) for each in blocks if not _block_path(folder, *each).exists()]
    sizes = [min(block, trajectories - first) for *_, first in missing]
    unwritten = [(folder, plan, arm) for arm in arms if not (folder / arm).exists()]
    with _processes(workers) as pool:
        _run(pool, _make_block, missing, sizes, "planning", progress)
        _run(pool, _write_arm, unwritten, [trajectories] * len(unwritten), "writing", progress)
    report = {arm: _report(folder, plan, arm) for arm in arms}
    for arm in arms:
        _write_json(folder / f"{arm}.poses.json", pose_embodiment(arm, action_horizon).to_dict())
    _write_json(folder / "report.json", {"arguments": asdict(plan), "arms": report})
    shutil.rmtree(folder / "blocks")
    os.replace(folder, output)
    (output / "plan.json").unlink()  # only now: it keeps a call with other arguments from going on here
    return report


def format_report(report: dict) -> str:
    """The report as a table, an arm and template a line."""
    lines = [f"{'arm':<17}{'template':<14}{'trajectories':>12}{'hours':>9}{'failed draws':>14}"]
    for arm, templates in report.items():
        for template, row in templates.items():
            failed = sum(row["failures"].values())
            share = failed / (row["trajectories"] + failed) if failed else 0.0
            counts = f"{row['trajectories']:>12}{row['hours']:>9.2f}{failed:>6} ({share:5.1%})"
            lines.append(f"{arm:<17}{template:<14}{counts}")
    return "\n".join(lines)


def _begin(output: Path, plan: _Plan) -> Path:
    """The folder in which `output` is made, with what an interrupted run has left there."""
    folder = output.parent / f".{output.name}.partial"
    (folder / "blocks").mkdir(parents=True, exist_ok=True)
    saved = folder / "plan.json"
    wanted = json.loads(json.dumps(asdict(plan)))
    if saved.exists() and json.loads(saved.read_text()) != wanted:
        raise ValueError(
            f"{folder} holds an interrupted run with other arguments, {saved.read_text().strip()}. Call with these to "
            "go on, or delete the folder."
        )
    _write_json(saved, wanted)
    for leftover in (*folder.glob(".*.writing-*"), *folder.glob("blocks/*.writing")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return folder


@contextmanager
def _processes(workers: int):
    """A pool of processes, or None for one worker, which is this process. All compute with one thread: the matrices
    are small, and threads would only get in each other's way."""
    import torch

    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield None
        finally:
            torch.set_num_threads(threads)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _run(pool, function: Callable, jobs: list[tuple], sizes: list[int], name: str, progress: bool):
    """`function(*job)` for all jobs, which handle so many trajectories each, in the pool if there is one."""
    with tqdm(total=sum(sizes), desc=name, unit="trajectory", disable=None if progress else True) as bar:
        if pool is None:
            for job, size in zip(jobs, sizes, strict=True):
                function(*job)
                bar.update(size)
            return
        try:
            futures = {pool.submit(function, *job): size for job, size in zip(jobs, sizes, strict=True)}
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A worker died, perhaps for lack of memory. The same call goes on from what is complete."
            ) from error


def _one_thread():
    import torch

    torch.set_num_threads(1)


def _block_path(folder: Path, arm: str, first: int) -> Path:
    return folder / "blocks" / f"{arm}-{first:09d}.npz"


def _make_block(folder: Path, plan: _Plan, arm: str, first: int):
    """Plan the trajectories of a block and keep them in a file."""
    indices = range(first, min(first + plan.block, plan.trajectories))
    made, failures = make_trajectories(arm, indices, plan.seed)
    path = _block_path(folder, arm, first)
    writing = path.with_suffix(".writing")
    with writing.open("wb") as file:
        np.savez(
            file,
            lengths=[len(each["state"]) for each in made],
            instructions=[each["instruction"] for each in made],
            failures=json.dumps(failures),
            **{name: np.concatenate([each[name] for each in made]) for name in ("state", "velocity", "pose")},
        )
    os.replace(writing, path)


def _blocks(folder: Path, plan: _Plan, arm: str):
    """(index of the first trajectory, arrays) of each block of an arm, in order."""
    for first in range(0, plan.trajectories, plan.block):
        with np.load(_block_path(folder, arm, first), allow_pickle=False) as arrays:
            yield first, dict(arrays)


def _write_arm(folder: Path, plan: _Plan, arm: str):
    """The dataset of an arm, from its blocks."""
    joints = planned_arm(arm).joint_names
    features = {
        "observation.state": {"dtype": "float32", "shape": (len(joints) + 1,), "names": [*joints, "gripper"]},
        "observation.velocity": {"dtype": "float32", "shape": (len(joints),), "names": joints},
        "observation.eef_pose": {"dtype": "float32", "shape": (8,), "names": _POSE_NAMES},
        "action": {"dtype": "float32", "shape": (len(joints) + 1,), "names": [*joints, "gripper"]},
    }
    with LeRobotWriter(folder / arm, fps=FPS, features=features, robot_type=arm) as writer:
        for _, arrays in _blocks(folder, plan, arm):
            stops = np.cumsum(arrays["lengths"])
            for start, stop, instruction in zip(stops - arrays["lengths"], stops, arrays["instructions"], strict=True):
                state = arrays["state"][start:stop]
                writer.add_frames(
                    {
                        "observation.state": state,
                        "observation.velocity": arrays["velocity"][start:stop],
                        "observation.eef_pose": arrays["pose"][start:stop],
                        "action": np.concatenate([state[1:], state[-1:]]),
                    }
                )
                writer.save_episode(str(instruction))


def _report(folder: Path, plan: _Plan, arm: str) -> dict:
    """Counts of an arm by template."""
    report = {template: {"trajectories": 0, "hours": 0.0, "failures": {}} for template in TEMPLATES}
    for first, arrays in _blocks(folder, plan, arm):
        for index, length in enumerate(arrays["lengths"].tolist(), first):
            row = report[template_of(index)]
            row["trajectories"] += 1
            row["hours"] += length / FPS / 3600
        for failure in json.loads(str(arrays["failures"])):
            counts = report[failure["template"]]["failures"]
            counts[failure["reason"]] = counts.get(failure["reason"], 0) + 1
    return report


def _write_json(path: Path, content: dict):
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(writing, path)
