"""Augmentations: functions of (sample, rng) that change what they say and nothing else; language columns."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment
from wallvla.data.augmentation import (
    color_jitter,
    compose,
    drop_cameras,
    perturb_state,
    random_crop,
    vary_instruction,
)
from wallvla.data.language import EpisodeLanguage, read_persistent, read_questions
from wallvla.data.lerobot import LeRobotDataset
from wallvla.processing_wallvla import WallVLAProcessor


FIXTURES = Path(__file__).parent / "fixtures"
CAMERAS = ("front", "wrist", "side")


def sample(**changes) -> dict:
    pixels = np.random.default_rng(0).integers(40, 200, (16, 24, 3), dtype=np.uint8)
    return {
        "instruction": "tidy up",
        "embodiment": "robot",
        "state": np.array([1.0, 2.0], dtype=np.float32),
        "images": {camera: pixels.copy() for camera in CAMERAS},
    } | changes


ALL = [
    color_jitter(0.3, 0.3, 0.3),
    random_crop(0.8),
    drop_cameras(0.5),
    perturb_state(0.1),
    vary_instruction(0.5, {"tidy up": ["clean up"]}),
]


@pytest.mark.parametrize("augment", ALL)
def test_augmentations_are_functions_of_sample_and_seed(augment):
    original, kept = sample(subtask="take the cup"), sample(subtask="take the cup")
    first, second = (augment(original, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_equal(first, second)
    np.testing.assert_equal(original, kept)
    question = {"text": "where?", "images": [kept["images"]["front"]]}
    assert augment(question, np.random.default_rng(3)) is question


# ---- language ----------------------------------------------------------------------------------------------------


def texts(augment, count=4000, **changes) -> Counter:
    return Counter(augment(sample(**changes), np.random.default_rng(i))["instruction"] for i in range(count))


def test_one_granularity_per_step():
    found = texts(vary_instruction(0.3), subtask="take the cup")
    assert found.keys() == {"tidy up", "take the cup"} and abs(found["take the cup"] / 4000 - 0.3) < 0.03
    assert texts(vary_instruction(1.0), 20).keys() == {"tidy up"}  # no step is annotated


def test_paraphrases_are_equally_likely():
    lists = {"tidy up": ["clean up", "make order"], "take the cup": ["grasp the cup"]}
    found = texts(vary_instruction(0.0, lists), paraphrases=["please tidy up"])
    assert found.keys() == {"tidy up", "clean up", "make order", "please tidy up"}
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in found.values())
    found = texts(vary_instruction(1.0, lists), subtask="take the cup", paraphrases=["please tidy up"])
    assert found.keys() == {"take the cup", "grasp the cup"}  # the dataset's paraphrases are of the goal
    with pytest.raises(ValueError, match="paraphrases of 'tidy up' are 'clean up'; they must be a list"):
        vary_instruction(0.5, {"tidy up": "clean up"})


# ---- proprioception and cameras ------------------------------------------------------------------------------------


def test_state_noise():
    found = np.stack([perturb_state(0.1)(sample(), np.random.default_rng(i))["state_noise"] for i in range(300)])
    assert found.std() == pytest.approx(0.1, rel=0.02) and abs(found.mean()) < 0.003
    np.testing.assert_array_equal(perturb_state(0.1)(sample(), np.random.default_rng(0))["state"], [1, 2])


def test_at_least_one_camera_stays():
    for probability in (0.5, 1.0):
        left = Counter()
        for seed in range(900):
            dropped = drop_cameras(probability)(sample(), np.random.default_rng(seed))["dropped_cameras"]
            kept = [camera for camera in CAMERAS if camera not in dropped]
            assert kept
            left.update(kept)
        expected = 900 * (1 / 3 if probability == 1 else 0.5 + 0.125 / 3)
        assert all(abs(left[camera] - expected) < 60 for camera in CAMERAS)
    blind = sample() | {"images": {}}
    assert drop_cameras(1.0)(blind, np.random.default_rng(0)) == blind
    always = drop_cameras(1.0, always_keep=["wrist"])(sample(), np.random.default_rng(0))
    assert always["dropped_cameras"] == ["front", "side"]


# ---- images --------------------------------------------------------------------------------------------------------


def test_jitter_is_the_same_for_all_cameras():
    original = sample()
    seen = set()
    for seed in range(20):
        images = color_jitter(0.4, 0.4, 0.4)(original, np.random.default_rng(seed))["images"]
        for camera in CAMERAS:
            np.testing.assert_array_equal(images[camera], images["front"])
        seen.add(images["front"].tobytes())
    assert len(seen) == 20
    same = color_jitter()(original, np.random.default_rng(0))["images"]["front"]
    assert np.abs(same.astype(int) - original["images"]["front"]).max() <= 1


def test_jitter_factors():
    grey = sample(images={"front": np.full((4, 4, 3), 100, np.uint8)})
    brightness = [color_jitter(0.5)(grey, np.random.default_rng(i))["images"]["front"][0, 0, 0] for i in range(500)]
    assert min(brightness) >= 50 and max(brightness) <= 150 and np.ptp(brightness) > 80
    colour = np.zeros((4, 4, 3), np.uint8) + np.array([200, 50, 50], np.uint8)
    spread = [
        np.ptp(color_jitter(0, 0, 1)(sample(images={"a": colour}), np.random.default_rng(i))["images"]["a"][0, 0])
        for i in range(300)
    ]
    assert min(spread) < 30 and max(spread) > 170  # from grey to twice the saturation, cut at 0 and 255


def test_crop_windows():
    ramp = np.broadcast_to((np.arange(100) * 2)[None, :, None], (80, 100, 3)).astype(np.uint8)
    images = {"a": ramp, "b": ramp}
    same, other = set(), 0
    for seed in range(60):
        found = random_crop(0.5, same_for_all_cameras=True)(sample(images=images), np.random.default_rng(seed))[
            "images"
        ]
        assert found["a"].shape == (80, 100, 3)
        np.testing.assert_array_equal(found["a"], found["b"])
        width = int(found["a"][0, -1, 0]) - int(found["a"][0, 0, 0])
        assert 94 <= width <= 98  # half of the ramp
        same.add(int(found["a"][0, 0, 0]) // 2)
        free = random_crop(0.5)(sample(images=images), np.random.default_rng(seed))["images"]
        other += not np.array_equal(free["a"], free["b"])
    assert min(same) <= 3 and max(same) >= 47 and other > 40
    whole = random_crop(1.0)(sample(images=images), np.random.default_rng(0))["images"]["a"]
    np.testing.assert_array_equal(whole, ramp)


@pytest.mark.parametrize(
    "make",
    [
        lambda: color_jitter(1.5),
        lambda: random_crop(0),
        lambda: drop_cameras(-0.1),
        lambda: perturb_state(-1),
        lambda: vary_instruction(2),
    ],
)
def test_arguments_are_checked(make):
    with pytest.raises(ValueError, match="must"):
        make()


# ---- what the processor makes of it --------------------------------------------------------------------------------


def test_processor_follows_the_augmentations():
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["Observation front wrist side view"], vocab_size=300)
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    layouts = {"state_layout": [["native", 2]], "action_layout": [["native", 2]], "reference_frame": "joint_relative"}
    statistics = {"q01": [-4.0, -4.0], "q99": [4.0, 4.0]}
    robot = Embodiment.from_dict(
        {
            "cameras": [[camera, f"{camera} view"] for camera in CAMERAS],
            "control_frequency": 10,
            "action_horizon": 3,
            "joint_channels": [0, 1],
            "statistics": {"state": statistics, "action": statistics},
            **layouts,
        }
    )
    processor = WallVLAProcessor(
        Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=64, max_pixels=64 * 64),
        tokenizer, {"robot": robot}, action_dim=2, action_horizon=3, state_bins=8, longest_side=None,
    )  # fmt: skip
    plain = sample(actions=np.array([[2.0, 3.0]] * 3))
    changed = plain | {"dropped_cameras": ["wrist"], "state_noise": np.array([-1.0, 0.25, 9.0])}
    first, second = processor.encode([plain]), processor.encode([changed])
    assert first["image_grid_thw"].shape[0] == 3 and second["image_grid_thw"].shape[0] == 2
    text = processor.tokenizer.decode(second["input_ids"][0])
    assert "wrist" not in text and "front view" in text and "side view" in text
    assert "Proprioception: 1 7\n" in text and "Proprioception: 5 6\n" in processor.tokenizer.decode(
        first["input_ids"][0]
    )
    np.testing.assert_array_equal(first["actions"], second["actions"])  # measured from the true state
    np.testing.assert_allclose(first["actions"][0, 0], [0.25, 0.25])
    with pytest.raises(ValueError, match="no camera is left"):
        processor.encode([plain | {"dropped_cameras": list(CAMERAS)}])


# ---- language columns ----------------------------------------------------------------------------------------------


def test_language_columns_of_lerobot(tmp_path):
    """A dataset that LeRobot 0.6.1 annotated, without its videos."""
    dataset = LeRobotDataset(
        FIXTURES / "lerobot_real_v3_lang", embodiment="r", action_horizon=2, cameras=[], episodes=[0, 1]
    )
    entry = dataset.language[0]
    assert entry.paraphrases == ("please reach a goal position",) and entry.plan == "1. approach 2. act"
    assert [text for _, text in entry.steps] == ["move the gripper above the object", "finish: reach a goal position"]
    switch = entry.steps[1][0]
    for index in (0, 5, int(round(switch * 80)) - 1, int(round(switch * 80)), dataset.episode_bounds[0, 1] - 1):
        expected = entry.steps[int(index / 80 >= switch - 1e-6)][1]
        assert dataset[index]["subtask"] == expected
    assert dataset[3]["paraphrases"] == ["please reach a goal position"]
    table = pq.read_table(FIXTURES / "lerobot_real_v3_lang" / "data" / "chunk-000" / "file-000.parquet")
    asked = [read_questions(table["language_events"], row) for row in range(len(table))]
    found = next(each for each in asked if each)
    assert found == [
        {
            "text": "where is the gripper?",
            "answer": '{"point":[0.5,0.4]}',
            "camera": "observation.images.front",
        }
    ]
    augment = compose(vary_instruction(1.0))
    assert augment(dataset[0], np.random.default_rng(0))["instruction"] == "move the gripper above the object"


def test_older_subtask_columns(tmp_path):
    root = Path(shutil.copytree(FIXTURES / "lerobot_conv_v30", tmp_path / "d"))
    pd.DataFrame({"subtask_index": [0, 1]}, index=pd.Index(["reach", "pull"], name="subtask")).to_parquet(
        root / "meta" / "subtasks.parquet"
    )
    for path in root.glob("data/*/*.parquet"):
        frame = pd.read_parquet(path)
        frame["subtask_index"] = (frame["frame_index"] >= 10).astype("int64")
        frame.to_parquet(path)
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=2, cameras=[])
    assert [dataset[index]["subtask"] for index in (0, 9, 10, 30)] == ["reach", "reach", "pull", "pull"]


def test_language_errors():
    entry = {"role": "user", "content": None, "style": "subtask", "timestamp": 0.0}
    with pytest.raises(ValueError, match="subtask entry with content None"):
        read_persistent(pa.chunked_array([[[entry]]]), 0)
    assert read_persistent(pa.chunked_array([pa.array([None], pa.list_(pa.struct([("style", pa.string())])))]), 0) == (
        EpisodeLanguage()
    )
    assert json.dumps(EpisodeLanguage().step_at(np.array([0.0, 1.0]))) == "[null, null]"
