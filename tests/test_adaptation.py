"""The benchmark of adaptation: robots and their inverses, commands that are held, tables from results by hand."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wallvla import cli
from wallvla.evaluation.demonstrations import Demonstration
from wallvla.evaluation.gym_env import StepResult


PATH = Path(cli.__file__).parent / "benchmarks" / "adaptation.py"
spec = importlib.util.spec_from_file_location("adaptation", PATH)
adaptation = importlib.util.module_from_spec(spec)
sys.modules["adaptation"] = adaptation  # dataclasses look their module up
spec.loader.exec_module(adaptation)
ROBOTS = adaptation.ROBOTS


@pytest.mark.parametrize("name", ROBOTS)
def test_a_robot_and_its_inverse(name):
    robot = ROBOTS[name]
    vectors = np.random.default_rng(0).normal(size=(5, 4))
    seen = robot.to_robot(vectors)
    np.testing.assert_allclose(robot.to_simulator(seen), vectors, atol=1e-12)
    for index, axis in enumerate(robot.axes):
        np.testing.assert_allclose(seen[:, index], robot.unit * np.sign(axis) * vectors[:, abs(axis) - 1])
    np.testing.assert_allclose(seen[:, 3], robot.unit * vectors[:, 3])


def test_robots_differ_in_everything():
    robots = list(ROBOTS.values())
    for field in ("camera", "axes", "unit", "seed"):
        assert len({vars(robot)[field] for robot in robots}) == 3
    assert len({robot.hold for robot in robots}) == 2


def test_axes_can_be_common():
    sizes = adaptation.Sizes(axes="common")
    for name, robot in ROBOTS.items():
        common = adaptation.robot_of(sizes, name)
        vectors = np.arange(4.0)
        np.testing.assert_allclose(common.to_robot(vectors), robot.unit * vectors)
        assert adaptation.robot_of(adaptation.Sizes(), name) == robot
        assert common.camera == robot.camera and common.hold == robot.hold


def test_commands_are_held_and_are_means():
    robot = ROBOTS["right"]
    rng = np.random.default_rng(0)
    actions, states = rng.normal(size=(2, 7, 4))
    frames = np.arange(7)[:, None, None, None]
    shown = Demonstration("t", "do it", 5, states, actions, {"corner3": frames}, [], (), np.zeros((7, 2)))
    seen, robot_states, commands = adaptation.commands_of(robot, shown)
    assert seen.ravel().tolist() == [0, 2, 4]
    place = adaptation.place_of_base(5)
    np.testing.assert_allclose(robot_states, robot.to_robot(states[[0, 2, 4]] - place))
    assert place.shape == (4,) and 0 < np.abs(place[:2]).max() < 0.3 and not place[2:].any()
    assert (place != adaptation.place_of_base(6))[:2].all()
    np.testing.assert_allclose(commands, robot.to_robot((actions[[0, 2, 4]] + actions[[1, 3, 5]]) / 2))


class Simulator:
    """Counts steps and remembers what was done; solved in the third step."""

    instruction, success, progress, steps = "do it", False, 0.0, 0

    def __init__(self):
        self.done = []

    def reset_scene(self, seed):
        self.seed = seed

    def step(self, action):
        self.done.append(action)
        self.steps += 1
        self.success = self.steps == 3
        return StepResult(1.0, self.success, False)

    def observe(self, cameras):
        return {"images": dict.fromkeys(cameras, "picture"), "state": np.array([1.0, 2.0, 3.0, 0.5])}


def test_a_command_is_executed_on_the_axes_of_the_simulator():
    robot, simulator = ROBOTS["left"], Simulator()
    env = adaptation.RobotEnv(robot, simulator)
    env.reset_scene(5)
    command = robot.to_robot(np.array([0.1, 0.2, 0.3, -1.0]))
    env.step(command)
    np.testing.assert_allclose(simulator.done, [[0.1, 0.2, 0.3, -1.0]] * 2)
    env.step(command)
    assert env.steps == 3 and env.success  # it stops where the task is solved
    seen = env.observe(("front",))
    assert seen["images"] == {"front": "picture"}
    assert simulator.seed == 5
    state = np.array([1.0, 2.0, 3.0, 0.5]) - adaptation.place_of_base(5)  # as in demonstrations of that seed
    np.testing.assert_allclose(seen["state"], robot.to_robot(state))


def test_tables_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "trained_share", lambda folder, arm: 0.01 if arm == "LoRA" else 1.0)
    with pytest.raises(ValueError, match="no finished policy"):
        adaptation.read_results(tmp_path)
    adaptation.check_sizes(tmp_path, adaptation.Sizes())
    with pytest.raises(ValueError, match="was begun with"):
        adaptation.check_sizes(tmp_path, adaptation.Sizes(scenes=31))
    outcomes = {"random": [True] + [False] * 9, "copied": [False] + [True] * 8 + [False], "LoRA": [False] * 10}
    for arm, successes in outcomes.items():
        folder = tmp_path / f"{arm}-10"
        folder.mkdir()
        result = {"arm": arm, "demonstrations": 10, "successes": successes, "error": 0.25, "seconds": 1}
        (folder / "arm.json").write_text(json.dumps(result))
    (tmp_path / "base-soft_prompt").mkdir()
    base = {"successes": [True] * 10, "error": 0.1, "seconds": 1}
    (tmp_path / "base-soft_prompt" / "result-front.json").write_text(json.dumps(base))
    text = adaptation.report(tmp_path, tmp_path / "results")
    assert "| soft_prompt | front | 10 of 10 = 100% [72%, 100%] | 0.1000 |" in text
    assert "| 10 | LoRA | 1.0% | 0 of 10 = 0% [0%, 28%] | 0.2500 |" in text
    # 8 scenes against 1: p = 2 * (1 + 9) / 2**9; Holm doubles the smaller of two
    assert "| 10 | copied | +70% [" in text and "| 8 / 1 | 0.039 | 0.078 |" in text
    assert "| 10 | LoRA | -10% [" in text and "| 0 / 1 | 1.000 | 1.000 |" in text
    written = json.loads((tmp_path / "results" / "adaptation_own_axes.json").read_text())
    assert [each["arm"] for each in written["arms"]] == ["random", "copied", "LoRA"]
    page = (tmp_path / "results" / "adaptation_own_axes.md").read_text()
    assert text in page and "python benchmarks/adaptation.py --output RUNS\n" in page
    sizes = written["sizes"] | {"axes": "common", "new_demonstrations": [10, 20]}
    assert adaptation.command_of(sizes).endswith("RUNS --axes common --new-demonstrations 10 20")
    assert SimpleNamespace(**written["sizes"]).scenes == 30
