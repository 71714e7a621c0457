"""The world whose base moves: its transforms, its controller, its demonstrations, and the tables over its arms."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from wallvla import cli
from wallvla.action_space_wallvla import REFERENCE_FRAMES, axis_angle_to_matrix
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.statistics import compute_statistics
from wallvla.evaluation.closed_loop import run_episode
from wallvla.evaluation.metaworld import CONTROL_FREQUENCY, MetaWorldEnv
from wallvla.evaluation.policy import ScriptedExpert


PATH = Path(cli.__file__).parent / "benchmarks" / "reference_frames.py"

spec = importlib.util.spec_from_file_location("reference_frames", PATH)
frames = importlib.util.module_from_spec(spec)
sys.modules["reference_frames"] = frames  # dataclasses look their module up
spec.loader.exec_module(frames)


@pytest.fixture(scope="module")
def envs():
    """The same task without motion between episodes, and with."""
    with (
        frames.MovingBaseEnv(frames.TASK, frames.WORLDS["fixed"], 16) as fixed,
        frames.MovingBaseEnv(frames.TASK, frames.WORLDS["moving"], 16) as moving,
    ):
        yield fixed, moving


def seen_from(base, vector):
    """A pose vector of the scene as a base sees it, by homogeneous 4 x 4 matrices."""
    outer, inner = np.eye(4), np.eye(4)
    outer[:3, 3], outer[:3, :3] = base
    inner[:3, 3], inner[:3, :3] = vector[:3], axis_angle_to_matrix(np.asarray(vector[3:6], np.float64))
    return np.linalg.inv(outer) @ inner


def test_base_and_camera_move_and_the_scene_stays(envs):
    """Same seed: one scene. State and targets differ by the episode's rigid transform, drawn from the seed alone."""
    fixed, moving = envs
    images, bases = [], []
    for seed in (7, 8, 7):
        fixed.reset_scene(seed), moving.reset_scene(seed)
        for here, there in ((fixed.state, moving.state), (fixed.expert_action(), moving.expert_action())):
            matrix = seen_from(moving.base, here)
            np.testing.assert_allclose(there[:3], matrix[:3, 3], atol=1e-6)
            np.testing.assert_allclose(axis_angle_to_matrix(there[3:6].astype(np.float64)), matrix[:3, :3], atol=1e-5)
            assert there[6] == here[6]
        np.testing.assert_array_equal(fixed.body_position("button"), moving.body_position("button"))
        bases.append(np.append(moving.base[0], moving.base[1]))
        images.append(moving.observe()["images"]["front"])
        assert (images[-1] != fixed.observe()["images"]["front"]).any()
    np.testing.assert_array_equal(bases[0], bases[2])
    np.testing.assert_array_equal(images[0], images[2])
    assert np.abs(bases[0] - bases[1]).max() > 0.01
    np.testing.assert_array_equal(fixed.base[1], np.eye(3))


def test_replayed_targets_reproduce_the_episode(envs):
    """A demonstration's targets, sent as they are stored, lead along its path, in plain Meta-World too."""
    _, env = envs
    recorded = frames.record_episode(env, 3, noise=0.0)
    path, commands = np.stack(env.path), np.stack(env.commands)
    env.reset_scene(3)
    for frame in recorded:
        np.testing.assert_allclose(env.state, frame["observation.state"], atol=2e-4)
        env.step(frame["action"])
    assert env.success
    np.testing.assert_allclose(np.stack(env.path), path, atol=2e-4)
    with MetaWorldEnv(frames.TASK, (), 16) as plain:
        plain.reset_scene(3)
        for frame, command in zip(recorded, commands, strict=True):
            plain.step(np.append(command, frame["action"][6]))
        assert plain.success
        np.testing.assert_allclose(plain.state[:3], path[-1], atol=1e-6)


def test_the_controller_clips_and_refuses(envs):
    _, env = envs
    env.reset_scene(5)
    start = env.path[0]
    far = env.expert_action()
    far[:3] += 10 * env.base[1].T @ np.array([1.0, 0.0, 0.0])  # ten metres along the scene's x
    env.step(far)
    assert env.commands[0][0] == 1.0 and np.abs(env.path[1] - start).max() < 0.02
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(far[:4])
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))


def test_the_expert_succeeds_through_every_base(envs):
    _, env = envs
    for seed in (1_000_000, 1_000_001):
        assert run_episode(env, ScriptedExpert(env), seed, max_steps=frames.MAX_STEPS)["success"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("frames") / "dataset"
    frames.record(root, frames.WORLDS["moving"], 1, 0, noise=0.6, image_size=16)
    return LeRobotDataset(root, embodiment=frames.EMBODIMENT, action_horizon=8)


def test_frames_differ_in_what_is_invariant(dataset):
    """Every frame decodes to the same targets; the end effector's sees the same motion the same from every base."""
    chunks, _ = dataset.action_chunks(np.arange(0, 40))
    states = dataset.states[:40]
    turn = axis_angle_to_matrix(np.array([0.0, 0.0, 1.0]))
    moved = [np.array(values, np.float64) for values in (states, chunks)]
    for values in moved:  # the same motions, seen from a base that stands otherwise
        rotations = turn @ axis_angle_to_matrix(values[..., 3:6])
        values[..., :3] = values[..., :3] @ turn.T + [0.2, -0.1, 0.0]
        values[..., 3:6] = frames.matrix_to_axis_angle(rotations)
    for name in REFERENCE_FRAMES:
        robot = frames.embodiment(name, compute_statistics(dataset, frames.embodiment(name), progress=False))
        model_sees = robot.transform_actions(chunks, states)
        assert model_sees.shape == (40, 8, 10)
        back = robot.inverse_transform_actions(model_sees, states)
        np.testing.assert_allclose(back[..., :3], chunks[..., :3], atol=1e-6)
        same = np.allclose(robot.transform_actions(moved[1], moved[0]), model_sees, atol=1e-5)
        assert same == name.startswith("eef"), name


def test_motion_figures():
    """A cubic path has the jerk 6 a; commands that alternate all reverse."""
    times = np.arange(20) / CONTROL_FREQUENCY
    path = np.stack([2 * times**3, times, 0 * times], axis=1)
    forward = np.ones((19, 3))
    figures = frames.motion_figures(path, forward)
    assert figures["jerk"] == pytest.approx(12.0, rel=1e-6) and figures["reversals"] == 0
    alternating = forward * (-1.0) ** np.arange(19)[:, None]
    assert frames.motion_figures(path, alternating)["reversals"] == 1


def test_one_training_per_folder_and_tables(tmp_path):
    options = {"task": "t", "steps": 3, "demonstrations": 2}
    frames.check_options(tmp_path, options)
    frames.check_options(tmp_path, options)
    with pytest.raises(ValueError, match="begun with .*'steps': 3.* now .*'steps': 4"):
        frames.check_options(tmp_path, options | {"steps": 4})
    with pytest.raises(ValueError, match="no finished policy"):
        frames.report(tmp_path, tmp_path / "results")
    solved = {"eef_relative": [1, 1, 1, 1, 1, 1, 0], "world_delta": [0, 0, 0, 0, 0, 0, 1], "expert": [1] * 7}
    for arm, outcomes in solved.items():
        episodes = [{"success": bool(value), "jerk": 2.0, "reversals": 0.5} for value in outcomes]
        names = ("mm", "first_mm", "last_mm", "unevenness_mm", "demonstrated_unevenness_mm")
        row = {"world": "moving", "frame": arm, "seed": 0, "machine": "m", "date": "d", "commit": "c"}
        row |= {"closed_loop": episodes, "blind": episodes[:2], "open_loop": dict.fromkeys(names, 1.25)}
        frames.write(tmp_path / "moving" / f"{arm}-0" / "result.json", json.dumps(row))
    text = frames.report(tmp_path, tmp_path / "results")
    assert (
        "| eef_relative | 1 | 6/7 = 86% [49%, 97%] | 86% | 1.2; 1.2; 1.2 | 1.25 (demonstrated 1.25) | 2 | 50% |"
        in text
    )
    assert "| eef_relative, images blanked | 1 | 2/2 = 100%" in text and "| expert | 1 | 7/7" in text
    # 6 of 7 scenes against 1: twice the tail of seven fair coins, (1 + 7) / 2^7 each
    assert "| 6 / 1 | 0.12 | 0.12 |" in text
    stored = json.loads((tmp_path / "results" / "reference_frames.json").read_text())
    assert stored["paired"]["moving"]["world_delta"]["p"] == 0.125 and len(stored["rows"]) == 3
    assert (tmp_path / "results" / "reference_frames.md").read_text() == text + "\n"
