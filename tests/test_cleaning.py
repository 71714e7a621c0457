"""Cleaning: every filter finds what was planted, leaves the rest alone, and the plan is what the reader applies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wallvla import cli
from wallvla.data.cleaning import (
    CleaningOptions,
    anomalous_lengths,
    format_inspection,
    global_scale,
    inspect_dataset,
    make_plan,
    moving_frames,
    read_plan,
    write_plan,
)
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter


settings.register_profile("wallvla", max_examples=60, deadline=None)
settings.load_profile("wallvla")

CAMERAS = ("observation.images.front", "observation.images.wrist")
SIZE = 32


def view(camera: int, step: int) -> np.ndarray:
    """Two viewpoints that cannot be confused, with something that moves. uint8 (32, 32, 3)."""
    ramp = np.linspace(30, 200, SIZE)
    image = np.stack([np.add.outer(ramp, 0 * ramp), np.add.outer(0 * ramp, ramp), np.full((SIZE, SIZE), 90)], axis=-1)
    image = image if camera == 0 else 255 - image[::-1]
    left = (2 * step) % (SIZE - 8)
    image[10:18, left : left + 8] = (250, 250, 20) if camera == 0 else (0, 0, 0)
    return np.clip(image, 0, 255).astype(np.uint8)


def walk(length: int, seed: int) -> np.ndarray:
    """A smooth path through [-1, 1], (length, 3)."""
    phase = np.random.default_rng(seed).uniform(0, 6, size=3)
    return np.sin(np.linspace(0, 6, length)[:, None] + phase)


def episode(length=30, seed=0, idle=(), frames=None) -> dict:
    """States, actions and images; `idle` (first, past the end) repeats one state and action."""
    states = walk(length, seed)
    for first, last in idle:
        states[first:last] = states[first]
    actions = states + 0.1
    images = frames or {camera: [view(c, step) for step in range(length)] for c, camera in enumerate(CAMERAS)}
    return {"states": states, "actions": actions, "images": images}


def write(root: Path, episodes: list[dict], tasks=None) -> Path:
    features = {name: {"dtype": "float32", "shape": (3,)} for name in ("observation.state", "action")}
    features |= {camera: {"dtype": "image", "shape": (SIZE, SIZE, 3)} for camera in CAMERAS}
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for number, each in enumerate(episodes):
            for step in range(len(each["states"])):
                frame = {"observation.state": each["states"][step], "action": each["actions"][step]}
                writer.add_frame(frame | {camera: images[step] for camera, images in each["images"].items()})
            writer.save_episode(tasks[number] if tasks else "wave")
    return root


def read(root: Path, **options) -> LeRobotDataset:
    return LeRobotDataset(root, **({"embodiment": "robot", "action_horizon": 4, "skip_errors": True} | options))


def found(root: Path, **options) -> list[tuple[int, str]]:
    inspection = inspect_dataset(read(root), CleaningOptions(**options), progress=False)
    return [(finding.episode, finding.kind) for finding in inspection.findings]


# ---- filters ---------------------------------------------------------------------------------------------------

paths = arrays(np.float64, st.tuples(st.integers(1, 80), st.integers(1, 4)), elements=st.floats(-2, 2))


@given(paths, st.floats(0, 1))
def test_stationary_filter_is_idempotent_and_follows_its_definition(values, threshold):
    keep = moving_frames(values, np.ones(values.shape[1]), threshold)
    kept = values[keep]
    assert keep[0]
    assert moving_frames(kept, np.ones(values.shape[1]), threshold).all()
    last = 0
    for step in range(1, len(values)):
        moved = bool((np.abs(values[step] - values[last]) >= threshold).any())
        assert keep[step] == moved
        last = step if moved else last


def test_slow_motion_is_kept_and_pauses_are_not():
    slow = np.concatenate([np.arange(100) * 0.001, np.full(500, 0.099), 0.099 + np.arange(100) * 0.001])[:, None]
    keep = moving_frames(slow, np.ones(1), 0.0099)
    assert keep.sum() == 20  # every tenth frame of the motion, although no two neighbours differ by 0.01
    assert not keep[100:600].any()


def test_near_constant_numbers_are_no_motion():
    rng = np.random.default_rng(0)
    values = np.stack([np.full(200, 0.3) + rng.normal(0, 1e-7, 200), np.linspace(0, 1, 200)], axis=1)
    scale = global_scale(values)
    assert scale[0] == np.inf and scale[1] == pytest.approx(0.98)
    values[:, 1] = 0
    assert moving_frames(values, scale, 0.01).sum() == 1


def test_anomalous_lengths():
    lengths = np.array([100, 104, 98, 97, 110, 103, 600, 9, 101])
    assert np.flatnonzero(anomalous_lengths(lengths, 6)).tolist() == [6, 7]
    assert not anomalous_lengths(np.array([100, 100, 100, 100, 100, 101]), 6).any()  # no spread, no anomaly
    assert not anomalous_lengths(np.array([10, 1000]), 6).any()


# ---- whole datasets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Path:
    """Episode 0 to 4 are good; each of the others has one fault."""
    good = [episode(30, seed) for seed in range(5)]
    swapped = episode(30, 6)
    swapped["images"] = dict(zip(CAMERAS, reversed(swapped["images"].values()), strict=True))
    duplicated = episode(30, 7)
    duplicated["images"] = dict.fromkeys(CAMERAS, duplicated["images"][CAMERAS[0]])
    black = episode(30, 8)
    black["images"] = black["images"] | {CAMERAS[1]: [np.zeros((SIZE, SIZE, 3), np.uint8)] * 30}
    frozen = episode(30, 9)
    frozen["images"] = frozen["images"] | {CAMERAS[1]: [view(1, 0)] * 30}
    still = episode(30, 10)
    still["states"] = np.full((30, 3), 0.2) + np.random.default_rng(0).normal(0, 0.001, (30, 3))
    idle = episode(30, 11, idle=[(5, 15)])
    faulty = [swapped, duplicated, black, frozen, still, episode(200, 12), idle, episode(30, 13), episode(30, 14)]
    return write(tmp_path_factory.mktemp("spoiled") / "dataset", good + faulty)


def spoil_rows(root: Path):
    """NaN in episode 12, a jump of time in episode 13."""
    path = root / "data" / "chunk-000" / "file-000.parquet"
    frame = pd.read_parquet(path)
    row = frame.index[(frame.episode_index == 12) & (frame.frame_index == 3)][0]
    frame.at[row, "observation.state"] = np.array([0, np.nan, 0], dtype=np.float32)
    late = (frame.episode_index == 13) & (frame.frame_index > 20)
    frame.loc[late, "timestamp"] += 0.5
    frame.to_parquet(path)


EXPECTED = [
    (5, "swapped cameras"),
    (6, "duplicated cameras"),
    (7, "blank image"),
    (8, "frozen camera"),
    (9, "near-constant"),
    (10, "anomalous length"),
    (12, "unreadable"),
    (13, "unreadable"),
]


def test_each_fault_is_found_once_and_nothing_else(tmp_path, spoiled):
    root = Path(shutil.copytree(spoiled, tmp_path / "d"))
    spoil_rows(root)
    assert found(root) == EXPECTED
    without_images = found(root, frames_per_episode=0)
    assert without_images == [each for each in EXPECTED if each[0] >= 9]
    with pytest.raises(ValueError, match="episode 12, frame 3 is NaN"):
        read(root, skip_errors=False)
    late = inspect_dataset(read(root), progress=False).findings[-1]
    assert "episode 13, frame 21 is 0.5000 s from frame / fps; the tolerance is 0.0250 s" in late.message
    assert read(root, tolerance_s=0.6).skipped.keys() == {12}


def test_plan_is_what_the_reader_applies(tmp_path, spoiled):
    root = Path(shutil.copytree(spoiled, tmp_path / "d"))
    spoil_rows(root)
    inspection = inspect_dataset(read(root), progress=False)
    plan = make_plan(inspection)
    path = write_plan(plan, tmp_path / "clean.json")
    assert [p.name for p in tmp_path.glob("*clean*")] == ["clean.json"]
    dataset = read(root, keep=read_plan(path))
    assert dataset.episode_ids.tolist() == [0, 1, 2, 3, 4, 6, 11]
    assert len(dataset) == plan["frames_kept"] and dataset.num_episodes == plan["episodes_kept"]
    whole = read(root)
    # The idle frames 6 to 14 of episode 11 are gone; pictures and numbers are still those of the recorded frames.
    start, stop = dataset.episode_bounds[-1]
    numbers = dataset.frame_numbers[start:stop].tolist()
    assert not set(numbers) & set(range(6, 15)) and {5, 15} <= set(numbers)
    for index in range(start, stop):
        sample = dataset[index]
        other = whole[int(whole.episode_bounds[whole.episode_ids.tolist().index(11), 0]) + sample["frame_index"]]
        np.testing.assert_array_equal(sample["state"], other["state"])
        np.testing.assert_array_equal(sample["images"][CAMERAS[1]], other["images"][CAMERAS[1]])
    chunk = dataset[start + numbers.index(5)]["actions"]
    np.testing.assert_array_equal(chunk[1], dataset.actions[start + numbers.index(15)])
    again = inspect_dataset(dataset, progress=False)
    assert again.frames == sum(len(frames) for frames in again.kept.values())  # idempotent on the dataset, too


def test_a_good_dataset_is_left_alone(tmp_path):
    root = write(tmp_path / "d", [episode(30 + seed, seed) for seed in range(6)])
    inspection = inspect_dataset(read(root), progress=False)
    assert inspection.findings == [] and make_plan(inspection)["frames_kept"] == inspection.frames
    text = format_inspection(inspection)
    assert "0 of 195 frames are idle" in text and "a plan keeps 195 of 195 frames and 6 of 6 episodes" in text


def test_broken_images_are_findings(tmp_path):
    root = write(tmp_path / "d", [episode(12, seed) for seed in range(3)])
    path = root / "data" / "chunk-000" / "file-000.parquet"
    frame = pd.read_parquet(path)
    frame.at[12, CAMERAS[0]] = {"bytes": frame.at[12, CAMERAS[0]]["bytes"][:100], "path": None}
    frame.to_parquet(path)
    assert found(root) == [(1, "broken frame")]


def test_plan_errors(tmp_path):
    root = write(tmp_path / "d", [episode(12, 0)])
    with pytest.raises(ValueError, match="keep names frames of episode 0 that it does not have"):
        read(root, keep={0: [3, 12]}, skip_errors=False)
    with pytest.raises(ValueError, match="No episode of .* can be used"):
        read(root, keep={0: []})
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="no.json is no cleaning plan .*data clean"):
        read_plan(tmp_path / "no.json")


# ---- the command line ------------------------------------------------------------------------------------------


def test_data_commands(tmp_path, spoiled, capsys):
    root = Path(shutil.copytree(spoiled, tmp_path / "d"))
    spoil_rows(root)
    cli.main(["data", "inspect", str(root)])
    text = capsys.readouterr().out
    assert "timestamps within" in text and "tolerance 0.025 s" in text
    assert "1 x swapped cameras" in text and "2 x unreadable" in text and "camera observation.images.front" in text
    output = tmp_path / "clean.json"
    cli.main(["data", "clean", str(root), "--dry-run", "--output", str(output)])
    assert "dry run" in capsys.readouterr().out and not output.exists()
    cli.main(["data", "clean", str(root), "--output", str(output)])
    assert json.loads(output.read_text())["counts"]["near-constant"] == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "inspect", str(root), "--on-error", "raise"])
    assert "episode 12, frame 3 is NaN" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "clean", str(root)])
