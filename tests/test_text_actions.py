"""Sentences and motions: each says what the other does, within the arm's limits, whoever computes it and how often."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallvla.action_space_wallvla import quaternion_to_matrix
from wallvla.data.cleaning import CleaningOptions, inspect_dataset
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.motion_templates import CLEARANCE_M, LIFT_M, OBJECTS, TEMPLATES, Workspace, draw_task
from wallvla.data.recipe import build_mixture, read_recipe
from wallvla.data.statistics import compute_statistics


pytest.importorskip("pytorch_kinematics")
arm_motion = pytest.importorskip("wallvla.data.arm_motion")
text_actions = pytest.importorskip("wallvla.data.text_actions")
try:
    text_actions.urdf_path("ur5")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

ARMS = list(text_actions.ARMS)
SMALL = ("franka_panda", "ur5")


# ---- the sentence, read back ---------------------------------------------------------------------------------------

_LENGTH = r"(\d+(?:\.\d+)?) (m|cm)"
_PLACE = rf"{_LENGTH} (?:forward|ahead of the base|in front) and {_LENGTH} (?:to the|to its|on the) (left|right)"
_MOVE = rf"{_LENGTH} (forward|backward|further from the robot|closer to the robot|to the left|to the right)"
_DIRECTIONS = {
    "forward": (1, 0),
    "further from the robot": (1, 0),
    "backward": (-1, 0),
    "closer to the robot": (-1, 0),
    "to the left": (0, 1),
    "to the right": (0, -1),
}


def metres(number: str, unit: str) -> float:
    return float(number) / (100 if unit == "cm" else 1)


def places(sentence: str) -> list[np.ndarray]:
    return [
        np.array([metres(a, b), metres(c, d) * (1 if side == "left" else -1)])
        for a, b, c, d, side in re.findall(_PLACE, sentence)
    ]


def move(sentence: str) -> np.ndarray:
    """The displacement in a sentence, 0 if there is none."""
    rest = re.sub(_PLACE, "", sentence)
    parts = [metres(a, b) * np.array(_DIRECTIONS[direction]) for a, b, direction in re.findall(_MOVE, rest)]
    return sum(parts, np.zeros(2))


def turns(sentence: str) -> list[float]:
    signs = {"counter-clockwise": 1, "clockwise": -1}
    return [float(a) * signs[side] for a, side in re.findall(r"(\d+) degrees (counter-clockwise|clockwise)", sentence)]


def views(sentence: str) -> list[float]:
    """Directions in degrees to the left, in the order of the sentence."""
    found = re.findall(r"(\d+) degrees (?:to the )?(left|right)|(?<!of )(straight ahead)", sentence)
    return [0.0 if ahead else float(a) * (1 if side == "left" else -1) for a, side, ahead in found]


def things(sentence: str) -> list[tuple[float, float]]:
    return [OBJECTS[name] for name in re.findall(rf"\b({'|'.join(OBJECTS)})\b", sentence)]


@dataclasses.dataclass
class Grip:
    """What happens to the gripper from one closing to the next opening."""

    start: np.ndarray  # (4,) x, y, z, heading where it closes
    stop: np.ndarray
    path: np.ndarray  # (T, 4)


def grips(poses: np.ndarray, gripper: np.ndarray) -> list[Grip]:
    """The parts of a motion (T, 4) in which something is held."""
    closed = np.flatnonzero(gripper < 1e-6)
    runs = np.split(closed, np.flatnonzero(np.diff(closed) > 1) + 1)
    return [Grip(poses[run[0]], poses[run[-1]], poses[run]) for run in runs]


def check(template: str, sentence: str, poses: np.ndarray, gripper: np.ndarray, atol: float):
    """The motion (T, 4) does what the sentence says, and nothing else."""
    found, (height, half_width), at = grips(poses, gripper), things(sentence)[0], places(sentence)
    assert poses[:, 2].min() > 0
    first = found[0]
    near = {"atol": atol, "rtol": 0}
    if template == "push":
        end = first.path[np.flatnonzero(first.path[:, 2] < height + 1e-3)[[0, -1]]]
        direction = move(sentence) / np.linalg.norm(move(sentence))
        # Behind the object with a clearance, and as far as it takes to move its near side by the distance.
        np.testing.assert_allclose(end[0, :2], at[0] - direction * (half_width + CLEARANCE_M), atol=atol + 2e-3)
        np.testing.assert_allclose(end[1, :2], at[0] + move(sentence) - direction * half_width, atol=atol + 2e-3)
        assert len(found) == 1 and gripper[-1] < 1e-6
        return
    np.testing.assert_allclose(first.start[:3], [*at[0], height], **near)
    np.testing.assert_allclose(first.stop[2], height, **near)
    lifted = np.array([grip.path[:, 2].max() - grip.start[2] for grip in found])
    np.testing.assert_allclose(lifted, 0.0 if template == "pull" else LIFT_M, atol=atol + 2e-3)  # the line's tolerance
    turned = np.degrees(first.stop[3] - first.start[3])
    if template == "swap":
        (one, other), (source, target, spare) = things(sentence), at
        heights = [one[0], other[0], one[0]]
        for grip, begin, end, z in zip(found, (source, target, spare), (spare, source, target), heights, strict=True):
            np.testing.assert_allclose(grip.start[:3], [*begin, z], **near)
            np.testing.assert_allclose(grip.stop[:3], [*end, z], **near)
        return
    assert len(found) == 1
    if template == "rotate_view":
        np.testing.assert_allclose(first.stop[:2], at[0], **near)
        *now, then = views(sentence)
        np.testing.assert_allclose(np.degrees(first.start[3]), now[0] if now else 0.0, atol=np.degrees(atol))
        np.testing.assert_allclose(np.degrees(first.stop[3]), then, atol=np.degrees(atol))
        return
    target = at[1] if len(at) == 2 else at[0] + move(sentence)
    np.testing.assert_allclose(first.stop[:2], target, **near)
    said = turns(sentence)
    if template == "rotate_place":
        np.testing.assert_allclose(turned, said[0], atol=np.degrees(atol))
    else:
        np.testing.assert_allclose(turned, 0.0, atol=np.degrees(atol))
        np.testing.assert_allclose(np.degrees(first.start[3]), said[0] if said else 0.0, atol=np.degrees(atol))


def dense(waypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Waypoints with points between them, as pose and gripper."""
    parts = [
        now + (then - now) * np.linspace(0, 1, 101)[:, None]
        for now, then in zip(waypoints[:-1], waypoints[1:], strict=True)
    ]
    rows = np.concatenate(parts)
    return rows[:, :4], rows[:, 4]


def headings(quaternion: np.ndarray, arm: str) -> np.ndarray:
    """Heading of recorded quaternions, and the check that the gripper points down all the time."""
    tool = arm_motion.axes_matrix(text_actions.ARMS[arm].tool_axes)
    canonical = quaternion_to_matrix(quaternion) @ tool.T
    np.testing.assert_allclose(canonical[:, :, 0], np.tile([0, 0, -1], (len(canonical), 1)), atol=0.01)
    return np.arctan2(-canonical[:, 0, 1], canonical[:, 1, 1])


# ---- templates -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(TEMPLATES)), st.sampled_from(ARMS), st.integers(0, 2**32))
def test_waypoints_do_what_the_sentence_says(template, arm, seed):
    workspace = text_actions.ARMS[arm].workspace
    task = draw_task(template, workspace, np.random.default_rng(seed))
    check(template, task.instruction, *dense(task.waypoints), atol=1e-9)
    x, z = workspace.home
    np.testing.assert_array_equal(task.waypoints[0], [x, 0, z, 0, 1])
    assert all(workspace.holds(place) for place in places(task.instruction))
    assert task.instruction == draw_task(template, workspace, np.random.default_rng(seed)).instruction


def test_sentences_vary_and_numbers_decide():
    """Hundreds of tasks: nearly all sentences differ, and equal sentences mean equal motions."""
    workspace = text_actions.ARMS["ur5"].workspace
    motions = {}
    for template in TEMPLATES:
        sentences = set()
        for seed in range(300):
            task = draw_task(template, workspace, np.random.default_rng(seed))
            sentences.add(task.instruction)
            known = motions.setdefault(task.instruction, task.waypoints)
            np.testing.assert_array_equal(known, task.waypoints)
        assert len(sentences) > 290
        shapes = {re.sub(r"\d+(\.\d+)?", "#", sentence) for sentence in sentences}
        assert len(shapes) > 100


def test_a_workspace_without_room_is_named():
    with pytest.raises(ValueError, match="has no room for a task"):
        draw_task("swap", Workspace(0.50, 0.51, 2, (0.45, 0.3)), np.random.default_rng(0))


# ---- kinematics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_jacobian_is_the_derivative_of_the_pose(arm):
    chain = text_actions.planned_arm(arm)._arm
    joints = np.random.default_rng(0).uniform(-1, 1, size=(5, len(chain.joint_names)))
    (position, rotation), jacobian = chain.poses_and_jacobians(joints)
    for joint in range(joints.shape[1]):
        step = np.zeros_like(joints)
        step[:, joint] = 1e-6
        (after, turned), (before, back) = chain.poses(joints + step), chain.poses(joints - step)
        np.testing.assert_allclose((after - before) / 2e-6, jacobian[:, :3, joint], atol=1e-7)
        skew = (turned - back) / 2e-6 @ rotation.swapaxes(1, 2)
        spin = np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], axis=1)
        np.testing.assert_allclose(spin, jacobian[:, 3:, joint], atol=1e-7)


@pytest.mark.parametrize("arm", ARMS)
def test_forward_of_inverse_is_the_pose(arm):
    planner = text_actions.planned_arm(arm)
    rng = np.random.default_rng(1)
    x, z = text_actions.ARMS[arm].workspace.home
    position = np.array([x, 0, z]) + rng.uniform(-0.06, 0.06, size=(50, 3))
    rotation = arm_motion.headings_to_rotations(rng.uniform(-0.5, 0.5, size=50))
    joints, solved = planner.inverse(np.tile(planner.home, (50, 1)), position, rotation)
    assert solved.all()
    at, turned = planner.poses(joints)
    np.testing.assert_allclose(at, position, atol=1.8e-6)  # IK_TOLERANCE for each axis
    np.testing.assert_allclose(turned, rotation, atol=4e-6)
    low, high = planner.position_limits.T
    assert (joints >= low).all() and (joints <= high).all()
    far, found = planner.inverse(planner.home[None], np.array([[5.0, 0, 0]]), rotation[:1])
    assert not found[0] and (far >= low).all() and (far <= high).all()


def test_half_a_turn_is_not_taken_for_none():
    planner = text_actions.planned_arm("ur5")
    x, z = text_actions.ARMS["ur5"].workspace.home
    joints, solved = planner.inverse(
        planner.home[None], np.array([[x, 0, z]]), arm_motion.headings_to_rotations(np.array([np.pi]))
    )
    if solved[0]:
        np.testing.assert_allclose(planner.poses(joints)[1][0] @ [0, 1, 0], [0, -1, 0], atol=1e-5)
    assert not np.allclose(joints, planner.home) or not solved[0]


def test_minimum_jerk_and_the_polynomial_have_exact_derivatives():
    time_ = np.linspace(0, 1, 2001)
    place, speed, acceleration = arm_motion.minimum_jerk(time_)
    np.testing.assert_allclose(np.gradient(place, time_)[1:-1], speed[1:-1], atol=1e-5)
    np.testing.assert_allclose(np.gradient(speed, time_)[1:-1], acceleration[1:-1], atol=1e-4)
    assert place[0] == speed[0] == speed[-1] == 0 and place[-1] == 1
    coefficients = np.random.default_rng(0).normal(size=arm_motion.KNOTS)  # of any polynomial of that degree
    knots = np.polynomial.polynomial.polyval(arm_motion.NODES, coefficients)
    basis = arm_motion._basis(time_)
    np.testing.assert_allclose(basis @ knots, np.polynomial.polynomial.polyval(time_, coefficients), atol=1e-10)
    derivative = np.polynomial.polynomial.polyder(coefficients)
    slope = basis @ arm_motion._DERIVATIVE @ knots
    np.testing.assert_allclose(slope, np.polynomial.polynomial.polyval(time_, derivative), atol=1e-9)


# ---- trajectories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    return {arm: text_actions.make_trajectories(arm, range(24), seed=3) for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_trajectories_do_what_their_sentence_says(made, arm):
    trajectories, _ = made[arm]
    assert {text_actions.template_of(index) for index in range(len(trajectories))} == set(text_actions.TEMPLATES)
    for index, trajectory in enumerate(trajectories):
        pose = trajectory["pose"].astype(np.float64)
        motion = np.concatenate([pose[:, :3], headings(pose[:, 3:7], arm)[:, None]], axis=1)
        check(text_actions.template_of(index), trajectory["instruction"], motion, pose[:, 7], atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_trajectories_keep_the_limits_of_the_arm(made, arm):
    planner = text_actions.planned_arm(arm)
    low, high = planner.position_limits.T
    links = planner._arm._chain
    for trajectory in made[arm][0]:
        joints, speed = trajectory["state"][:, :-1].astype(np.float64), trajectory["velocity"].astype(np.float64)
        assert (joints >= low - 1e-6).all() and (joints <= high + 1e-6).all()
        assert (np.abs(speed) <= planner.velocity_limits * (1 + 1e-6)).all()
        # Between frames, and of second order: what a controller at 50 Hz would see.
        steps = np.diff(joints, axis=0) * 50
        assert (np.abs(steps) <= planner.velocity_limits * (1 + 1e-6)).all()
        assert (np.abs(np.diff(steps, axis=0) * 50) <= planner.acceleration_limits * 1.001 + 2e-3).all()
        # Velocities belong to the positions: trapezoids of them add up.
        path = np.cumsum((speed[1:] + speed[:-1]) / 100, axis=0)
        np.testing.assert_allclose(path, joints[1:] - joints[0], atol=1e-3)
        assert (speed[0] == 0).all() and np.abs(speed[-1]).max() < 1e-6
        at, _ = planner.poses(joints)
        np.testing.assert_allclose(at, trajectory["pose"][:, :3], atol=1e-6)
        assert (np.linalg.norm(np.diff(at, axis=0), axis=1) * 50 < arm_motion.TOOL_SPEED * 1.02).all()
        assert (np.linalg.norm(np.diff(trajectory["pose"][:, 3:7], axis=0), axis=1) < 0.1).all()
        heights = links.forward_kinematics_tensor(planner._arm._checked(joints)).numpy()[:, :, 2, 3]
        assert heights.min() > -1e-9  # no link's origin below the table


@pytest.mark.parametrize("arm", ARMS)
def test_a_trajectory_depends_on_seed_and_number_alone(made, arm):
    for index in (0, 5, 17):
        (alone,), _ = text_actions.make_trajectories(arm, [index], seed=3)
        together = made[arm][0][index]
        assert alone["instruction"] == together["instruction"]
        for name in ("state", "velocity", "pose"):
            np.testing.assert_array_equal(alone[name], together[name])
    (other,), _ = text_actions.make_trajectories(arm, [0], seed=4)
    assert other["instruction"] != made[arm][0][0]["instruction"]


def test_what_cannot_be_reached_is_drawn_again_and_counted(monkeypatch):
    spec = text_actions.ARMS["ur3"]
    wide = dataclasses.replace(spec.workspace, farthest=0.60)
    monkeypatch.setitem(text_actions.ARMS, "ur3", dataclasses.replace(spec, workspace=wide))
    trajectories, failures = text_actions.make_trajectories("ur3", range(12), seed=0)
    assert len(trajectories) == 12 and failures
    assert {each["reason"] for each in failures} <= {"unreachable", "limits", "path"}
    beyond = dataclasses.replace(spec.workspace, nearest=0.8, farthest=1.2)
    monkeypatch.setitem(text_actions.ARMS, "ur3", dataclasses.replace(spec, workspace=beyond))
    monkeypatch.setattr(text_actions, "ATTEMPTS", 3)
    with pytest.raises(ValueError, match="3 tasks in a row are out of reach of ur3, trajectory 0: unreachable"):
        text_actions.make_trajectories("ur3", [0], seed=0)


# ---- datasets ------------------------------------------------------------------------------------------------------


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("text_actions") / "data"
    text_actions.generate(output, trajectories=20, arms=SMALL, seed=3, block=8, progress=False)
    return output


def test_round_trip_through_the_reader(written, made):
    for arm in SMALL:
        dataset = LeRobotDataset(written / arm, embodiment=arm, action_horizon=4)
        assert dataset.camera_keys == [] and dataset.fps == 50 and dataset.num_episodes == 20
        poses = LeRobotDataset(
            written / arm, embodiment=arm, action_horizon=4, state_key="observation.eef_pose", action_key=None
        )
        for index, expected in enumerate(made[arm][0][:20]):
            start, stop = dataset.episode_bounds[index]
            assert dataset[start]["instruction"] == expected["instruction"] and dataset[start]["images"] == {}
            np.testing.assert_array_equal(dataset.states[start:stop], expected["state"])
            np.testing.assert_array_equal(dataset.actions[start : stop - 1], expected["state"][1:])
            np.testing.assert_array_equal(dataset.actions[stop - 1], expected["state"][-1])
            first, last = poses.episode_bounds[index]
            np.testing.assert_array_equal(poses.states[first:last], expected["pose"][:-1])
            np.testing.assert_array_equal(poses.actions[first:last], expected["pose"][1:])


def test_report_counts(written):
    report = json.loads((written / "report.json").read_text())
    assert report["arguments"]["seed"] == 3
    for arm in SMALL:
        rows = report["arms"][arm]
        assert [rows[name]["trajectories"] for name in TEMPLATES] == [4, 4, 3, 3, 3, 3]
        dataset = LeRobotDataset(written / arm, embodiment=arm, action_horizon=1)
        hours = sum(row["hours"] for row in rows.values())
        np.testing.assert_allclose(hours, len(dataset) / 50 / 3600)
        assert set(rows["swap"]) == {"trajectories", "hours", "failures"}
    assert text_actions.format_report(report["arms"]).count("\n") == 2 * len(TEMPLATES)


def test_workers_and_blocks_change_nothing(written, tmp_path):
    text_actions.generate(tmp_path / "b", trajectories=20, arms=SMALL, seed=3, block=20, workers=2, progress=False)
    expected, found = files(written), files(tmp_path / "b")
    for each in (expected, found):
        del each["report.json"]  # names the block
    assert found == expected


_RUN = """
from wallvla.data.text_actions import generate
if __name__ == "__main__":
    generate({output!r}, trajectories=20, arms={arms!r}, seed=3, block=2, workers={workers}, progress=False)
"""


def test_killed_and_resumed_is_not_killed(written, tmp_path):
    """Two workers and their parent are killed in the middle; one process goes on."""
    output = tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(_RUN.format(output=str(output), arms=SMALL, workers=2))
    blocks = tmp_path / ".out.partial" / "blocks"
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    while process.poll() is None and not list(blocks.glob("*.npz")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in blocks.glob("*.npz")}
    assert not output.exists() and 1 <= len(kept) < 20
    again = {"trajectories": 20, "arms": SMALL, "seed": 3, "block": 2, "progress": False}
    with pytest.raises(ValueError, match="holds an interrupted run with other arguments"):
        text_actions.generate(output, **again | {"trajectories": 21})
    (blocks / "ur5-000000000.writing").write_bytes(b"half a block")
    (tmp_path / ".out.partial" / ".ur5.writing-x").mkdir()
    made = []
    with pytest.MonkeyPatch.context() as patch:
        original = text_actions._make_block
        patch.setattr(text_actions, "_make_block", lambda *job: (made.append(job[2:]), original(*job)))
        text_actions.generate(output, **again)
    assert len(made) == 20 - len(kept)  # what was complete was not made again
    expected, found = files(written), files(output)
    for each in (expected, found):
        del each["report.json"]
    assert found == expected and not (tmp_path / ".out.partial").exists()
    with pytest.raises(FileExistsError, match="exists. Delete it"):
        text_actions.generate(output, **again)


def test_killed_at_the_end_and_called_otherwise(tmp_path):
    """What is complete but for its name is of its arguments too."""
    output, arguments = tmp_path / "out", {"trajectories": 2, "arms": ("ur5",), "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace

        def interrupted(source, target):
            if Path(target) == output:
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(text_actions.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text_actions.generate(output, seed=1, **arguments)
    with pytest.raises(ValueError, match="holds an interrupted run with other arguments"):
        text_actions.generate(output, seed=2, **arguments)
    text_actions.generate(output, seed=1, **arguments)
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "ur5", "ur5.poses.json"]


def test_a_worker_that_dies_while_jobs_are_handed_out_is_named():
    class Broken:
        def submit(self, function, *job):
            raise text_actions.BrokenProcessPool

    with pytest.raises(ChildProcessError, match="The same call goes on"):
        text_actions._run(Broken(), print, [()], [1], "planning", progress=False)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="workers=0"):
        text_actions.generate(tmp_path / "x", trajectories=1, workers=0)
    with pytest.raises(ValueError, match="Unknown arm 'robot'; known are franka_panda"):
        text_actions.generate(tmp_path / "x", trajectories=1, arms=["robot"])
    assert not list(tmp_path.iterdir())


def test_cleaning_finds_nothing_wrong(written):
    """Generated trajectories move and have usual lengths: the paper's filters keep all of them."""
    dataset = LeRobotDataset(written / "ur5", embodiment="ur5", action_horizon=1)
    inspection = inspect_dataset(dataset, CleaningOptions())
    assert inspection.counts() == {}
    assert len(inspection.kept) == 20


def test_pose_embodiment_reads_the_poses(written):
    values = json.loads((written / "ur5.poses.json").read_text())
    robot = text_actions.Embodiment.from_dict(values | {"action_horizon": 8})
    assert robot == text_actions.pose_embodiment("ur5", 8)
    dataset = LeRobotDataset(
        written / "ur5", embodiment="ur5", action_horizon=8, state_key="observation.eef_pose", action_key=None
    )
    chunk, state = dataset[3]["actions"], dataset[3]["state"]
    model = robot.transform_actions(chunk, state)
    back = robot.inverse_transform_actions(model, state)
    np.testing.assert_allclose(back[:, :3], chunk[:, :3], atol=1e-6)
    np.testing.assert_allclose(quaternion_to_matrix(back[:, 3:7]), quaternion_to_matrix(chunk[:, 3:7]), atol=1e-6)
    np.testing.assert_allclose(model[0, 3:9], [0, 0, 1, 0, 1, 0], atol=1e-4)  # heading 0: x points down, y to the left


# ---- full sequences ------------------------------------------------------------------------------------------------


def test_full_sequence_is_the_whole_trajectory(written):
    dataset = LeRobotDataset(written / "ur5", embodiment="ur5", action_horizon=7, full_sequence=True)
    starts = dataset.episode_bounds[:, 0]
    chunks, is_pad = dataset.action_chunks(starts)
    assert not is_pad.any()
    for (start, stop), chunk in zip(dataset.episode_bounds, chunks, strict=True):
        at = np.linspace(0, stop - start - 1, 7)
        columns = dataset.actions[start:stop].T
        expected = np.stack([np.interp(at, np.arange(stop - start), column) for column in columns], axis=1)
        np.testing.assert_allclose(chunk, expected, atol=1e-6)
    last = dataset.episode_bounds[0, 1] - 1
    np.testing.assert_array_equal(dataset.action_chunks([last])[0][0], np.tile(dataset.actions[last], (7, 1)))
    with pytest.raises(ValueError, match="full_sequence and action_times_s"):
        LeRobotDataset(written / "ur5", embodiment="u", action_horizon=1, action_times_s=[0.0], full_sequence=True)


def test_mixture_of_whole_trajectories_and_chunks(written):
    """20% generated, 80% "recorded": exact shares, one sample per generated trajectory, no image anywhere."""
    folder = written.parent
    robots = {}
    for arm in SMALL:
        dataset = LeRobotDataset(written / arm, embodiment=arm, action_horizon=16)
        width = dataset.actions.shape[1]
        values = {
            "cameras": [],
            "control_frequency": 50,
            "action_horizon": 16,
            "state_layout": [["native", width]],
            "action_layout": [["native", width]],
        }
        robot = text_actions.Embodiment.from_dict(values)
        statistics = compute_statistics(dataset, robot, progress=False)
        robots[arm] = text_actions.Embodiment.from_dict(values | {"statistics": statistics})
    (folder / "mixture.yaml").write_text(
        "multimodal_fraction: 0.0\nbudget: 25\nactions:\n"
        "  - {dataset: data/ur5, embodiment: ur5, weight: 0.2, full_sequence: true, one_group: true}\n"
        "  - {dataset: data/franka_panda, embodiment: franka_panda, weight: 0.8, full_sequence: true, one_group: true}"
    )
    mixture = build_mixture(read_recipe(folder / "mixture.yaml"), robots, seed=0)
    samples = [mixture[i] for i in range(len(mixture))]
    assert [sample["embodiment"] for sample in samples].count("ur5") == 5 and len(samples) == 25
    for sample in samples:
        assert sample["frame_index"] == 0 and sample["images"] == {} and not sample["action_is_pad"].any()
        assert sample["actions"].shape == (16, robots[sample["embodiment"]].action_width)
        encoded = robots[sample["embodiment"]].encode_actions(sample["actions"], sample["state"])
        assert np.abs(encoded).max() <= 1 and encoded.std() > 0.1
    bad = "actions: [{dataset: data/ur5, embodiment: ur5, full_sequence: true, resample: true}]"
    (folder / "bad.yaml").write_text(bad)
    with pytest.raises(ValueError, match="full_sequence and resample, anchors or frame_step_size"):
        build_mixture(read_recipe(folder / "bad.yaml"), robots)


def test_the_example_recipe_is_valid():
    recipe = read_recipe(Path(__file__).parents[1] / "examples" / "mixture_qwen_vla_t2a.yaml")
    generated = [entry for entry in recipe.actions if "text-actions" in entry.dataset]
    assert all(entry.full_sequence for entry in recipe.actions) and all(entry.one_group for entry in generated)
    total = sum(entry.weight for entry in recipe.actions)
    np.testing.assert_allclose(sum(entry.weight for entry in generated) / total, 0.2)
