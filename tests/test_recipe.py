"""Recipes: a YAML of sources becomes a mixture, mistakes in it are named, and a run resumes in the middle of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from wallvla.action_space_wallvla import Embodiment
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.multimodal import MultimodalWriter
from wallvla.data.recipe import build_mixture, read_recipe


CAMERA = "observation.images.front"


def dataset(root: Path, episodes: int, width: int, tasks=("wave",), length=6) -> Path:
    features = {name: {"dtype": "float32", "shape": (width,)} for name in ("observation.state", "action")}
    features[CAMERA] = {"dtype": "image", "shape": (16, 16, 3)}
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for episode in range(episodes):
            for step in range(length):
                vector = np.full(width, episode + step / 100)
                pixels = np.full((16, 16, 3), 10 * step, np.uint8)
                writer.add_frame({CAMERA: pixels, "observation.state": vector, "action": vector})
            writer.save_episode(tasks[episode % len(tasks)])
    return root


def robot(width: int) -> Embodiment:
    return Embodiment.from_dict(
        {
            "cameras": [[CAMERA, "front view"]],
            "control_frequency": 10,
            "action_horizon": 3,
            "state_layout": [["native", width]],
            "action_layout": [["native", width]],
        }
    )


RECIPE = """
multimodal_fraction: 0.25
budget: 8
actions:
  - {dataset: small, embodiment: a, weight: 1}
  - {dataset: large, embodiment: b, weight: 3, frame_step_size: 2}
multimodal:
  - {path: questions.parquet}
  - {path: more.jsonl, coordinates: thousand}
"""


class Formatter:
    def format_point(self, point, size):
        return f"<point>[{round(point[0])}, {round(point[1])}]</point>"

    def format_box(self, box, size):
        return f"<box>{[round(value) for value in box]}</box>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    dataset(folder / "small", 3, 2)
    dataset(folder / "large", 12, 4, tasks=("push", "push", "push", "pull"))
    with MultimodalWriter(folder / "questions.parquet") as writer:
        for number in range(9):
            writer.add(np.zeros((8, 8, 3), np.uint8), f"question {number}", "yes")
    (folder / "more.jsonl").write_text('{"question": "line", "answer": "no"}\n' * 4)
    (folder / "mixture.yaml").write_text(RECIPE)
    return folder


def test_recipe_becomes_a_mixture(folder):
    recipe = read_recipe(folder / "mixture.yaml")
    mixture = build_mixture(recipe, {"a": robot(2), "b": robot(4)}, seed=3, processor=Formatter())
    samples = [mixture[i] for i in range(len(mixture))]
    actions = [sample for sample in samples if "instruction" in sample]
    widths = [len(sample["state"]) for sample in actions]
    assert widths.count(2) == 2 * 6 and widths.count(4) == 6 * 3  # 2 and 6 trajectories; every second frame of the 6
    assert {sample["embodiment"] for sample in actions} == {"a", "b"}
    for start in range(0, len(samples) - 4, 4):
        assert sum("text" in sample for sample in samples[start : start + 4]) == 1
    counts = mixture._sources[0].group_counts
    assert dict(zip(mixture._sources[0].groups, counts.tolist(), strict=True)) == {
        ("small", "wave"): 2, ("large", "push"): 4, ("large", "pull"): 2,
    }  # fmt: skip


def test_resume_of_a_recipe(folder):
    recipe = read_recipe(folder / "mixture.yaml")
    make = lambda: build_mixture(  # noqa: E731
        recipe, {"a": robot(2), "b": robot(4)}, seed=3, length=90, processor=Formatter()
    )
    expected = [make().locate(i) for i in range(90)]
    resumed = make()
    resumed.resume(json.loads(json.dumps(make().state(37))))
    assert [resumed.locate(i) for i in range(53)] == expected[37:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("actions: []", "names no dataset under actions"),
        ("multimodal: []", "lacks actions"),
        ("actions: 3", "actions is 3; it is a list"),
        ("[", "is not valid YAML"),
        ("speed: 3\nactions: []", "has unknown options speed; known are actions, multimodal"),
        ("actions: [{dataset: small}]", "entry 0 of actions lacks embodiment"),
        ("actions: [{dataset: small, embodiment: a, wieght: 2}]", "unknown options wieght"),
        ("actions: [{dataset: small, embodiment: a, weight: much}]", "weight is 'much'; it is a number"),
        ("actions: [{dataset: small, embodiment: a, frame_step_size: 1.5}]", "frame_step_size is 1.5"),
        ("actions: [{dataset: 3, embodiment: a}]", "dataset is 3; it is text"),
        ("actions: [3]", "entry 0 of actions is 3; it is a mapping"),
        ("robots: [a]\nactions: [{dataset: small, embodiment: a}]", "robots is .'a'.; it is a mapping"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "m.yaml")


def test_mistakes_about_datasets_are_named(folder):
    recipe = read_recipe(folder / "mixture.yaml")
    with pytest.raises(ValueError, match="Dataset large is of embodiment 'b'; the checkpoint knows a"):
        build_mixture(recipe, {"a": robot(2)}, processor=Formatter())
    with pytest.raises(ValueError, match="coordinates='thousand' needs a processor"):
        build_mixture(recipe, {"a": robot(2), "b": robot(4)})
    (folder / "none.yaml").write_text("actions: [{dataset: nothing_here, embodiment: a}]")
    with pytest.raises(FileNotFoundError, match="'nothing_here' is not a Hub id"):
        build_mixture(read_recipe(folder / "none.yaml"), {"a": robot(2)})
