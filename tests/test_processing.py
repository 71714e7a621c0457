"""The processor: prompts, images, labels, actions and masks, its inverses, its errors, saving and loading."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment
from wallvla.processing_wallvla import WallVLAProcessor


SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
LINES = [
    "pick up the red cube and place it in the bowl",
    "system user assistant You are a helpful assistant.",
    "Observation: front view left wrist view Instruction: Proprioception: 0123456789",
    "Predict the next action in robot action. <point>[1, 2]</point>",
]
BOUNDS = {"q01": [-1.0] * 4, "q99": [1.0] * 4}

NATIVE = {
    "cameras": {"observation.images.wrist": "left wrist view", "observation.images.front": "front view"},
    "control_frequency": 10,
    "action_horizon": 5,
    "state_layout": [["native", 4]],
    "action_layout": [["native", 4]],
    "statistics": {"state": BOUNDS, "action": BOUNDS},
    "domain": 3,
}
_ARM = [["right_gripper", 1], ["right_ee_position", 3], ["right_ee_rotation", 4]]
ARM = {
    "prompt": "You control an arm.",
    "cameras": {"observation.images.front": "front view"},
    "control_frequency": 20,
    "action_horizon": 6,
    "state_layout": _ARM,
    "action_layout": _ARM,
    "rotation_format": "quaternion_wxyz",
    "reference_frame": "eef_relative",
    "action_gripper_range": [1, -1],
    "statistics": {
        kind: {"q01": [-4.0] * 3 + [-1.0] * 6 + [-0.5], "q99": [4.0] * 3 + [1.0] * 6 + [1.5]}
        for kind in ("state", "action")
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(LINES, vocab_size=400)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(**changes):
        image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64)
        values = {"embodiments": {"native": NATIVE, "arm": ARM}, "action_horizon": 6, "longest_side": 16}
        return WallVLAProcessor(**({"image_processor": image_processor, "tokenizer": tokenizer} | values | changes))

    return make


@pytest.fixture(scope="module")
def processor(make):
    return make()


def picture(seed=0, height=16, width=16):
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def native_sample(seed=0, **changes):
    rng = np.random.default_rng(seed)
    sample = {
        "images": {"front": picture(seed), "wrist": picture(seed + 1000, 8, 16)},
        "instruction": "pick up the red cube",
        "state": rng.uniform(-1, 1, size=4).astype(np.float32),
        "embodiment": "native",
        "actions": rng.uniform(-1, 1, size=(5, 4)).astype(np.float32),
        "action_is_pad": np.zeros(5, dtype=bool),
        "frame_index": seed,  # datasets add keys of their own
    }
    return sample | changes


def arm_sample(seed=0, **changes):
    rng = np.random.default_rng(seed)
    vectors = rng.uniform(-1, 1, size=(7, 8))
    vectors[:, 4] = np.abs(vectors[:, 4]) + 0.1  # of a quaternion and its negative, this one comes back
    vectors[:, 4:] /= np.linalg.norm(vectors[:, 4:], axis=-1, keepdims=True)
    sample = {
        "images": {"observation.images.front": picture(seed)},
        "instruction": "place it in the bowl",
        "state": vectors[0],
        "embodiment": "arm",
        "actions": vectors[1:],
    }
    return sample | changes


def without_actions(sample):
    return {key: value for key, value in sample.items() if key not in ("actions", "action_is_pad")}


def text_sample(seed=0, images=1, **changes):
    pictures = [Image.fromarray(picture(seed + index, 24, 16)) for index in range(images)]
    return {"images": pictures, "text": "where is the cube", "answer": "<point>[1, 2]</point>"} | changes


def row_text(processor, batch, row=0):
    """Text of a row, with runs of image tokens as one and without padding."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    return re.sub(r"(<\|image_pad\|>)+", r"\1", processor.decode(ids))


# Prompts


def test_action_prompt(processor):
    batch = processor.encode([native_sample(state=[-1.0, 0.0, 0.5, 1.0])])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert row_text(processor, batch) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Observation: left wrist view: {image} front view: {image}\n"
        "Instruction: pick up the red cube\nPredict the next action in robot action.\n"
        "Proprioception: 0 128 192 255\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_embodiment_writes_the_system_turn(processor):
    text = row_text(processor, processor.encode([arm_sample()]))
    assert text.startswith("<|im_start|>system\nYou control an arm.<|im_end|>\n")


def test_training_and_inference_see_the_same_prefix(processor):
    training = processor.encode([native_sample(), arm_sample()])
    inference = processor.encode([without_actions(native_sample()), without_actions(arm_sample())])
    assert training.keys() - inference.keys() == {"actions"}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "domain_ids"):
        assert torch.equal(training[key], inference[key]), key


def test_dropped_state_is_an_empty_line(processor):
    for changes in ({"state": None}, {"state_is_dropped": True}):
        text = row_text(processor, processor.encode([native_sample(**changes)]))
        assert "robot action.\nProprioception: \n<|im_end|>" in text


def test_dropped_state_still_is_the_reference_of_actions(processor):
    seen, dropped = (processor.encode([arm_sample(state_is_dropped=flag)]) for flag in (False, True))
    assert "Proprioception: \n" in row_text(processor, dropped)
    assert torch.equal(seen["actions"], dropped["actions"])


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(2, 600))
@settings(max_examples=30, deadline=None)
def test_state_bins_follow_the_formula(make, state, bins):
    processor = make(state_bins=bins)
    text = row_text(processor, processor.encode([native_sample(state=state)]))
    normalised = processor.embodiments["native"].encode_state(state)
    expected = np.digitize(normalised, np.linspace(-1, 1, bins + 1)[:-1]) - 1
    assert re.search(r"Proprioception: (.*)\n", text)[1] == " ".join(map(str, expected))
    assert 0 <= expected.min() and expected.max() < bins


def test_state_dim_writes_all_canonical_channels(make):
    """Wall-OSS-0.5 writes 26 numbers for every robot; unused channels are 0, the middle bin."""
    processor = make(state_dim=26)
    text = row_text(processor, processor.encode([arm_sample()]))
    numbers = re.search(r"Proprioception: (.*)\n", text)[1].split()
    own = row_text(make(), make().encode([arm_sample()]))
    assert numbers[:10] == ["128"] * 10 and numbers[20:] == ["128"] * 6
    assert numbers[10:20] == re.search(r"Proprioception: (.*)\n", own)[1].split()


def test_text_prompt_and_labels(processor):
    batch = processor.encode([text_sample(images=2), text_sample(answer="the bowl")])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{image}{image}where is the cube<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row_text(processor, batch) == prompt + "<point>[1, 2]</point><|im_end|>\n"
    for row, answer in enumerate(["<point>[1, 2]</point>", "the bowl"]):
        learned = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][learned], batch["input_ids"][row][learned])
        assert processor.decode(batch["labels"][row][learned]) == f"{answer}<|im_end|>"
    assert not {"actions", "action_mask", "domain_ids"} & batch.keys()


def test_labels_continue_the_tokens_of_the_prompt(processor):
    """An answer that starts with a newline must not melt into the prompt's last token."""
    sample = text_sample(answer="\n\n the bowl")
    asked = {key: value for key, value in sample.items() if key != "answer"}
    question, dialogue = processor.encode([asked]), processor.encode([sample])
    assert "labels" not in question
    length = question["input_ids"].shape[1]
    assert torch.equal(dialogue["input_ids"][:, :length], question["input_ids"])
    assert (dialogue["labels"][0, :length] == -100).all() and (dialogue["labels"][0, length:-1] != -100).all()


def test_only_multimodal_samples_have_answers(processor):
    """Flow tokens follow the prompt of an action sample directly."""
    batch = processor.encode([native_sample(answer="the bowl")])
    assert "labels" not in batch and torch.equal(batch["input_ids"], processor.encode([native_sample()])["input_ids"])


def test_text_without_images(processor):
    batch = processor.encode([text_sample(images=0)])
    assert "pixel_values" not in batch and not batch["mm_token_type_ids"].any()


def test_robot_without_cameras(make):
    """Text-to-action: the prompt is that of the same robot with cameras, but for the images, and none is needed."""
    seeing = make()
    blind = Embodiment.from_dict(seeing.embodiments["native"].to_dict() | {"cameras": []})
    processor = make(embodiments=seeing.embodiments | {"native": blind})
    batch = processor.encode([native_sample(images={})])
    with_images = row_text(seeing, seeing.encode([native_sample()]))
    expected = re.sub(r"Observation:.*\n", "Observation:\n", with_images)
    assert row_text(processor, batch) == expected != with_images
    assert "pixel_values" not in batch and batch["action_mask"].any()
    mixed = processor.encode([native_sample(images={}), text_sample(images=1)])
    assert len(mixed["image_grid_thw"]) == 1
    with pytest.raises(ValueError, match="images of type list in sample 0"):
        processor.encode([native_sample(images=[picture()])])


# Batches


def test_batch_contract(processor):
    batch = processor.encode([native_sample(), text_sample(images=3), arm_sample()])
    size, length = batch["input_ids"].shape
    patches = int(batch["image_grid_thw"].prod(dim=1).sum())
    expected = {
        "pixel_values": ((patches, 3 * 2 * 4 * 4), torch.float32),
        "input_ids": ((size, length), torch.int64),
        "attention_mask": ((size, length), torch.int64),
        "mm_token_type_ids": ((size, length), torch.int64),
        "labels": ((size, length), torch.int64),
        "image_grid_thw": ((6, 3), torch.int64),
        "actions": ((3, 6, 26), torch.float32),
        "action_mask": ((3, 6, 26), torch.bool),
        "action_padding": ((3, 26), torch.float32),
        "domain_ids": ((3,), torch.int64),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert batch["domain_ids"].tolist() == [3, 0, 0]
    assert (batch["labels"][[0, 2]] == -100).all()
    image_tokens = batch["mm_token_type_ids"].sum(dim=1)
    assert torch.equal(batch["mm_token_type_ids"].bool(), batch["input_ids"] == processor.image_token_id)
    assert image_tokens.sum() == patches // 4


def test_rows_of_a_batch_are_the_samples_padded_on_the_left(processor):
    samples = [native_sample(instruction="pick"), text_sample(images=2), arm_sample(), native_sample(1)]
    batch = processor.encode(samples)
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    patches = images = 0
    for row, sample in enumerate(samples):
        alone = processor.encode([sample])
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][row].sum() == length
        assert (batch["input_ids"][row, :-length] == processor.tokenizer.pad_token_id).all()
        for key in ("input_ids", "mm_token_type_ids", "labels"):
            if key in alone:
                assert torch.equal(batch[key][row, -length:], alone[key][0]), key
        for key in ("actions", "action_mask"):
            if key in alone:
                assert torch.equal(batch[key][row], alone[key][0]), key
        stop, last = patches + len(alone["pixel_values"]), images + len(alone["image_grid_thw"])
        assert torch.equal(batch["pixel_values"][patches:stop], alone["pixel_values"])
        assert torch.equal(batch["image_grid_thw"][images:last], alone["image_grid_thw"])
        patches, images = stop, last
    assert patches == len(batch["pixel_values"]) and images == len(batch["image_grid_thw"])


def test_call_is_encode(processor):
    sample = native_sample()
    arguments = {key: value for key, value in sample.items() if key != "frame_index"}
    one, expected = processor(**arguments), processor.encode([sample])
    samples = [native_sample(), native_sample(1)]
    columns = {key: [sample[key] for sample in samples] for key in arguments}
    columns["embodiment"] = "native"
    two, expected_two = processor(**columns), processor.encode(samples)
    for found, wanted in ((one, expected), (two, expected_two)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_call_with_text(processor):
    sample = text_sample()
    expected = processor.encode([sample])
    for images in (sample["images"], sample["images"][0], np.asarray(sample["images"][0])):
        batch = processor(images=images, text=sample["text"], answer=sample["answer"])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    batch = processor(images=[sample["images"]] * 2, text=[sample["text"]] * 2)
    assert batch["input_ids"].shape[0] == 2 and "labels" not in batch


def test_only_embodiment_needs_no_name(make):
    processor = make(embodiments={"native": NATIVE})
    sample = native_sample()
    del sample["embodiment"]
    batch = processor.encode([sample])
    assert torch.equal(batch["actions"], processor.encode([native_sample()])["actions"])
    assert processor.decode_actions(batch["actions"][0]).shape == (5, 4)


def test_numpy_batch(processor):
    batch = processor.encode([native_sample()], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())


# Images


@pytest.mark.parametrize("patch_size", [4, 14])
def test_patches_are_those_of_the_image_processor(make, patch_size):
    """Bit for bit, with and without resizing, for sizes that change inside a batch."""
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=2, min_pixels=56 * 56)
    processor = make(image_processor=image_processor, longest_side=None)
    sizes = [(56, 56), (56, 56), (112, 56), (64, 64), (57, 90), (56, 56), (20, 30)]
    images = [picture(seed, *size) for seed, size in enumerate(sizes)]
    batch = processor.encode([{"images": images, "text": "where is the cube"}])
    expected = image_processor(images, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
    assert batch["mm_token_type_ids"].sum() == expected["image_grid_thw"].prod(dim=1).sum() // 4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (448, 336)),
        ((480, 640), (336, 448)),
        ((100, 100), (448, 448)),
        ((448, 300), (448, 300)),
        ((1000, 333), (448, 149)),
    ],
)
def test_longer_side_is_truncated(make, size, expected):
    """The published image sizes: int(), not round, and then whole patches."""
    processor = make(image_processor=Qwen2VLImageProcessorPil(do_resize=False), longest_side=448)
    assert processor.resized_size(size) == expected
    rounded = make(image_processor=Qwen2VLImageProcessorPil(), longest_side=448).resized_size(size)
    assert rounded == tuple(28 * round(side / 28) for side in expected)


def test_longer_side_is_bicubic(make):
    image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64)
    processor = make(image_processor=image_processor, longest_side=32)
    image = picture(0, 60, 100)
    batch = processor.encode([{"images": [image], "text": ""}])
    resized = Image.fromarray(image).resize((32, 19), Image.Resampling.BICUBIC)
    assert torch.equal(batch["pixel_values"], image_processor([resized], return_tensors="pt")["pixel_values"])


def test_kinds_of_images(processor):
    array = picture()
    expected = processor.encode([{"images": [array], "text": ""}])["pixel_values"]
    for image in (Image.fromarray(array), Image.fromarray(array).convert("RGBA"), np.asfortranarray(array)):
        assert torch.equal(processor.encode([{"images": [image], "text": ""}])["pixel_values"], expected)
    assert (
        processor.encode([{"images": [Image.fromarray(array).convert("L")], "text": ""}])["pixel_values"].shape
        == expected.shape
    )


def test_cameras_are_found_by_long_and_short_key(processor):
    sample = native_sample()
    long = native_sample(images={f"observation.images.{key}": image for key, image in sample["images"].items()})
    more = native_sample(images=sample["images"] | {"back": picture(9)})  # a camera that this robot's policy ignores
    expected = processor.encode([sample])["pixel_values"]
    assert torch.equal(processor.encode([long])["pixel_values"], expected)
    assert torch.equal(processor.encode([more])["pixel_values"], expected)


# Actions


def test_decode_actions_is_the_inverse_of_encode(processor):
    for sample in (native_sample(), arm_sample()):
        batch = processor.encode([sample])
        actions = processor.decode_actions(batch["actions"], state=sample["state"], embodiment=sample["embodiment"])
        assert actions.shape == (1, *sample["actions"].shape) and isinstance(actions, np.ndarray)
        np.testing.assert_allclose(actions[0], sample["actions"], atol=1e-5)  # the batch is float32


def test_decode_actions_of_batches(processor):
    samples = [arm_sample(seed) for seed in range(3)]
    chunks = processor.encode(samples)["actions"]
    states = np.stack([sample["state"] for sample in samples])
    together = processor.decode_actions(chunks, state=states, embodiment="arm")
    for row, chunk in enumerate(chunks):
        alone = processor.decode_actions(chunk, state=states[row], embodiment="arm")
        np.testing.assert_allclose(together[row], alone, atol=1e-12)
    shared = processor.decode_actions(chunks, state=states[0], embodiment="arm")
    np.testing.assert_allclose(shared[0], together[0], atol=1e-12)
    half = processor.decode_actions(chunks.to(torch.bfloat16), state=states, embodiment="arm")
    np.testing.assert_allclose(half, together, atol=0.05)


def test_action_mask(processor):
    is_pad = np.array([False, False, False, True, True])
    batch = processor.encode([native_sample(action_is_pad=is_pad), arm_sample(), text_sample()])
    expected = np.zeros((3, 6, 26), dtype=bool)
    expected[0, :3, :4] = True
    expected[1, :, 10:20] = True
    assert np.array_equal(batch["action_mask"], expected)
    assert not batch["actions"][~batch["action_mask"]].any()
    assert batch["actions"][0, :3, :4].abs().min() > 0


def test_short_chunks_are_padded(processor):
    chunk = native_sample()["actions"]
    samples = [native_sample(actions=chunk[:2], action_is_pad=None), native_sample()]
    batch = processor.encode(samples)
    assert batch["action_mask"][:, :, 0].sum(dim=1).tolist() == [2, 5]
    assert torch.equal(batch["actions"][0, :2], batch["actions"][1, :2]) and not batch["actions"][0, 2:].any()


def test_action_mask_at_inference_marks_the_robots_horizon(processor):
    batch = processor.encode([without_actions(native_sample()), without_actions(arm_sample())])
    expected = np.zeros((2, 6, 26), dtype=bool)
    expected[0, :5, :4] = True
    expected[1, :, 10:20] = True
    assert np.array_equal(batch["action_mask"], expected)


def test_targets_are_clipped_to_the_normalised_range(processor):
    batch = processor.encode([native_sample(actions=np.full((5, 4), 7.0))])
    assert batch["actions"].max() == 1


# Grounding


sides = st.integers(30, 3000)


@given(sides, sides, st.tuples(*[st.floats(0, 1)] * 4))
@settings(max_examples=60, deadline=None)
def test_grounding_round_trip(make, width, height, fractions):
    processor = make(image_processor=Qwen2VLImageProcessorPil(), longest_side=448)
    resized = processor.resized_size((width, height))
    x1, x2 = sorted(fraction * width for fraction in fractions[:2])
    y1, y2 = sorted(fraction * height for fraction in fractions[2:])
    text = "the cube " + processor.format_box((x1, y1, x2, y2), (width, height))
    text += processor.format_point((x1, y2), (width, height))
    points, boxes = processor.parse_grounding(text, (width, height))
    half_pixel = np.array([width / resized[0], height / resized[1]]) / 2 + 1e-6  # texts hold whole pixels
    assert (np.abs(np.subtract(boxes[0], (x1, y1, x2, y2))) <= np.tile(half_pixel, 2)).all()
    assert (np.abs(np.subtract(points[0], (x1, y2))) <= half_pixel).all()


def test_grounding_text(make):
    processor = make(image_processor=Qwen2VLImageProcessorPil(), longest_side=448)
    assert processor.resized_size((896, 672)) == (448, 336)
    assert processor.format_box((10, 20, 100, 200), (896, 672)) == "<box>[5, 10, 50, 100]</box>"
    assert processor.format_point((10, 20), (896, 672)) == "<point>[5, 10]</point>"
    text = "<point>[1, 2]</point> and <box>[5,10,50.5,100]</box><point> [ 3 , 4 ] </point>"
    assert processor.parse_grounding(text, (896, 672)) == ([(2, 4), (6, 8)], [(10, 20, 101, 200)])


def test_grounding_is_clamped_to_the_image(make):
    processor = make(image_processor=Qwen2VLImageProcessorPil(), longest_side=448)
    text = f"<box>[-5, 10, 9999, {'9' * 400}]</box><point>[-1, 500]</point>"
    assert processor.parse_grounding(text, (896, 672)) == ([(0, 672)], [(0, 20, 896, 672)])


@pytest.mark.parametrize(
    "text",
    ["", "a cube", "<box>[1, 2, 3]</box>", "<box>[1, 2, 3, 4]", "<point>[a, b]</point>", "<point>1, 2</point>",
     "<box>[9, 9, 1, 1]</box>", "<point>[1, 2, 3]</point>", "<point>[nan, inf]</point>"],
)  # fmt: skip
def test_malformed_grounding_is_skipped(processor, text):
    assert processor.parse_grounding(text, (64, 64)) == ([], [])


# Errors


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (native_sample(images={"front": picture()}), "images of front in sample 0, missing observation.images.wrist"),
        (native_sample(images=None), "images of no camera in sample 0"),
        (native_sample(images=[picture()]), "images of type list in sample 0. .*{'observation.images.wrist': image"),
        (native_sample(images={"front": picture(), "wrist": picture() / 255}), r"float64 array \(16, 16, 3\)"),
        (native_sample(images={"front": picture()[..., :1], "wrist": picture()}), r"uint8 array \(16, 16, 1\)"),
        (native_sample(images={"front": picture()[:0], "wrist": picture()}), r"uint8 array \(0, 16, 3\)"),
        (text_sample(images=0) | {"images": ["cube.png"]}, "an image that is a str"),
        (native_sample(embodiment="franka"), "embodiment 'franka'. Known: native, arm. .*add_embodiment"),
        (native_sample(embodiment=None), "embodiment None. Known: native, arm"),
        (native_sample(state=np.zeros(5)), "5 state channels, the state_layout has 4"),
        (native_sample(state=[0, np.nan, 0, 0]), r"nan in state channel 1 \(native\[1\]\)"),
        (native_sample(state=np.zeros((2, 4))), r"state of shape \(2, 4\) in sample 0"),
        (native_sample(actions=np.zeros((5, 3))), "3 action channels, the action_layout has 4"),
        (native_sample(actions=np.diag([0, 0, np.nan, 0]), action_is_pad=None), "nan in action channel 2.*step 2"),
        (native_sample(actions=np.zeros((6, 4))), "6 action steps in sample 0, the embodiment's action_horizon is 5"),
        (native_sample(action_is_pad=np.zeros(4)), r"action_is_pad of shape \(4,\) and 5 action steps in sample 0"),
        (arm_sample(state=None), "no state in sample 0, whose actions are eef_relative"),
        (native_sample(instruction="<|image_pad|>"), r"3 image tokens for 2 image\(s\) in sample 0"),
        (text_sample(answer="<|image_pad|>"), r"2 image tokens for 1 image\(s\)"),
        ({"images": []}, "keys images in sample 0"),
        (native_sample(text="what"), "sample 0. An action sample has `instruction`, a multimodal sample `text`"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit(processor, sample, message):
    with pytest.raises(ValueError, match=message):
        processor.encode([sample])


def test_empty_and_mixed_batches(processor):
    with pytest.raises(ValueError, match="no samples"):
        processor.encode([])
    with pytest.raises(ValueError, match="no `actions` in sample 1, though other samples have them"):
        processor.encode([native_sample(), without_actions(native_sample())])


def test_missing_statistics(make):
    processor = make(embodiments={"native": NATIVE | {"statistics": None}})
    with pytest.raises(ValueError, match="no state statistics.*wallvla stats"):
        processor.encode([native_sample()])
    with pytest.raises(ValueError, match="no action statistics.*wallvla stats"):
        processor.encode([native_sample(state=None)])
    with pytest.raises(ValueError, match="no action statistics.*wallvla stats"):
        processor.decode_actions(np.zeros((6, 26)), embodiment="native")


def test_nothing_is_cut_off(make):
    length = make().encode([native_sample()])["input_ids"].shape[1]
    assert make(max_length=length).encode([native_sample()])["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=f"{length} tokens in sample 0, max_length is {length - 1}"):
        make(max_length=length - 1).encode([native_sample()])
    with pytest.raises(ValueError, match="max_length is 3"):
        make().encode([native_sample()], max_length=3)
    with pytest.raises(ValueError, match="max_length is 3"):
        make()(images=[], text="where is the cube", max_length=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither of `instruction` and `text`"),
        ({"instruction": "a", "text": "b"}, "both of `instruction` and `text`"),
        ({"text": "a", "state": [0]}, "state beside `text`"),
        ({"instruction": "a", "answer": "b"}, "answer beside `instruction`"),
        ({"text": ["a", "b"], "images": [[]]}, "images 1 for a batch of 2"),
    ],
)
def test_calls_that_do_not_fit(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_misspelt_argument(processor):
    with pytest.raises(TypeError, match="instructions"):
        processor(instructions="a")


def test_bad_chunks(processor):
    with pytest.raises(ValueError, match=r"action chunk of shape \(6, 25\)"):
        processor.decode_actions(np.zeros((6, 25)), embodiment="native")
    with pytest.raises(ValueError, match=r"action chunk of shape \(4, 26\).*5 steps"):
        processor.decode_actions(np.zeros((4, 26)), embodiment="native")
    chunk = np.zeros((2, 6, 26))
    chunk[1, 3, 12] = np.nan
    with pytest.raises(ValueError, match="non-finite number at step 3, model channel 12"):
        processor.decode_actions(chunk, state=arm_sample()["state"], embodiment="arm")
    with pytest.raises(ValueError, match="no state"):
        processor.decode_actions(np.zeros((6, 26)), embodiment="arm")
    with pytest.raises(ValueError, match=r"state of shape \(3, 8\) for an action chunk of shape \(2, 6, 26\)"):
        processor.decode_actions(np.zeros((2, 6, 26)), state=np.zeros((3, 8)), embodiment="arm")
    assert np.isfinite(processor.decode_actions(chunk, embodiment="native")).all()  # another robot's channel


def test_embodiments_that_do_not_fit_the_model(make):
    with pytest.raises(ValueError, match="action_horizon 6 in embodiment 'arm', the model predicts 5"):
        make(action_horizon=5)
    with pytest.raises(ValueError, match="reaches channel 19 of a model with 10"):
        make(action_dim=10)
    with pytest.raises(
        ValueError, match="state that reaches channel 19 in embodiment 'arm', the prompt has state_dim 10"
    ):
        make(state_dim=10)
    with pytest.raises(ValueError, match=r"unknown embodiment field\(s\) fps"):
        make(embodiments={"native": NATIVE | {"fps": 10}})


def test_tokenizer_without_special_tokens(make):
    plain = Qwen2Tokenizer().train_new_from_iterator(LINES, vocab_size=300)
    with pytest.raises(ValueError, match=r"tokenizer without <\|image_pad\|>"):
        make(tokenizer=plain)


# Saving and loading


LOAD = """
import json, sys
import numpy as np
from transformers import AutoProcessor
folder, again = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
with np.load(folder + "/sample.npz") as sample:
    batch = processor(images={"front": sample["front"]}, instruction="pick", state=sample["state"], embodiment="arm")
    actions = processor.decode_actions(sample["chunk"], state=sample["state"], embodiment="arm")
np.savez(folder + "/found.npz", actions=actions, **{key: value.numpy() for key, value in batch.items()})
processor.save_pretrained(again)
"""


def test_round_trip_in_a_fresh_process(make, tmp_path):
    """Saved here, loaded by remote code where `wallvla` is unknown, saved there and loaded once more."""
    processor = make(state_bins=512, state_dim=26, max_length=900, text_system_prompt="You see.", action_horizon=7)
    first, second = tmp_path / "first", tmp_path / "second"
    processor.save_pretrained(first)
    assert {"processing_wallvla.py", "action_space_wallvla.py"} <= set(os.listdir(first))
    state = arm_sample()["state"]
    chunk = np.random.default_rng(0).uniform(-1, 1, size=(7, 26))
    np.savez(first / "sample.npz", front=picture(), state=state, chunk=chunk)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(first), str(second)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    batch = processor(images={"front": picture()}, instruction="pick", state=state, embodiment="arm")
    with np.load(first / "found.npz") as found:
        assert found.keys() == {"actions", *batch.keys()}
        assert all(np.array_equal(found[key], value) for key, value in batch.items())
        np.testing.assert_allclose(
            found["actions"], processor.decode_actions(chunk, state=state, embodiment="arm"), atol=1e-12
        )
    assert json.loads((first / "processor_config.json").read_text()) == json.loads(
        (second / "processor_config.json").read_text()
    )
    loaded = WallVLAProcessor.from_pretrained(second)
    assert loaded.embodiments == processor.embodiments
    assert list(loaded.embodiments["native"].cameras) == list(NATIVE["cameras"])
    for name in ("action_dim", "action_horizon", "state_bins", "longest_side", "state_dim", "max_length"):
        assert vars(loaded)[name] == vars(processor)[name], name
    assert loaded.text_system_prompt == "You see." and loaded.image_processor.patch_size == 4


def test_added_embodiments_are_saved(make, tmp_path):
    processor = make(embodiments=None)
    processor.add_embodiment("arm", Embodiment.from_dict(ARM))
    processor.save_pretrained(tmp_path)
    assert WallVLAProcessor.from_pretrained(tmp_path).embodiments == {"arm": Embodiment.from_dict(ARM)}


def test_pil_replaces_other_backends(make):
    """With torchvision installed, AutoImageProcessor loads its torchvision twin, whose resize gives other numbers."""

    class Twin(Qwen2VLImageProcessorPil.__base__):
        size = {"shortest_edge": 64, "longest_edge": 128}
        patch_size, merge_size, temporal_patch_size = 8, 1, 2

        def __init__(self):
            super().__init__(size=self.size, patch_size=8, merge_size=1)

    image_processor = make(image_processor=Twin(), embodiments=None).image_processor
    assert isinstance(image_processor, Qwen2VLImageProcessorPil)
    assert (image_processor.patch_size, image_processor.merge_size) == (8, 1)
    assert image_processor.size["longest_edge"] == 128
