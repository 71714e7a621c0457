"""The prompts of the four systems, written out; and the rows that the processor makes of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BartTokenizer, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.data.augmentation import drop_cameras, drop_state
from wallvla.images_wallvla import florence2_image_processor, internvl_image_processor
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.prompts_wallvla import (
    INTERN_VL,
    QWEN_CHAT,
    QWEN_VLA,
    WALL_OSS,
    X_VLA,
    X_VLA_LANGUAGE_PROMPTS,
    PromptFormat,
)


FORMATS = {
    "wall_oss": WALL_OSS,
    "qwen_vla": QWEN_VLA,
    "x_vla": X_VLA,
    "x_vla_language": X_VLA_LANGUAGE_PROMPTS,
    "qwen_chat": QWEN_CHAT,
    "intern_vl": INTERN_VL,
}
LINES = ["The robot is AgileX with dual arms, waist, and mobile base. pick up the red cube and place it in the bowl"]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|propri|>"]
CHAT_TOKENS += ["<img>", "</img>", "<IMG_CONTEXT>"]
BOUNDS = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
ROBOT = {
    "cameras": {"images.head": "ego", "images.left": "cam_left_wrist", "images.right": "cam_right_wrist"},
    "control_frequency": 30.0,
    "action_horizon": 5,
    "state_layout": [["native", 4]],
    "action_layout": [["native", 4]],
    "statistics": {"state": BOUNDS, "action": BOUNDS},
    "robot_tag": "AgileX",
    "arms": 2,
    "waist": True,
    "mobile_base": True,
}
STATE = [-1.0, 0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def chat_tokenizer_json(tmp_path_factory):
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(LINES, vocab_size=400, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bart_tokenizer():
    tokenizer = BartTokenizer().train_new_from_iterator(LINES * 3, vocab_size=320, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture
def chat(chat_tokenizer_json):
    """A processor with patched images and a tokenizer of its own, which view tokens change."""

    def make(prompt_format, proprioception="none", robot=ROBOT, **changes):
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64)
        values = {"embodiments": {"robot": robot}, "action_horizon": 6, "longest_side": 16, "state_dim": 26}
        tokenizer = Qwen2Tokenizer.from_pretrained(chat_tokenizer_json)
        values |= {"prompt_format": prompt_format, "proprioception": proprioception}
        return WallVLAProcessor(images, tokenizer, **(values | changes))

    return make


@pytest.fixture
def x_vla(bart_tokenizer):
    def make(prompt_format=X_VLA, robot=ROBOT, **changes):
        values = {"embodiments": {"robot": robot}, "action_horizon": 6, "longest_side": None, "state_dim": 20}
        values |= {"prompt_format": prompt_format, "proprioception": "expert"}
        return WallVLAProcessor(florence2_image_processor(64), bart_tokenizer, **(values | changes))

    return make


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)


def sample(**changes):
    images = {key: picture(seed) for seed, key in enumerate(ROBOT["cameras"])}
    return {"images": images, "instruction": "pick up the red cube", "state": STATE, "embodiment": "robot"} | changes


def written(processor, **changes):
    """Text of a sample's row, an image as one token."""
    batch = processor.encode([sample(**changes)])
    token = processor.prompt_format.image_token
    text = processor.decode(batch["input_ids"][0])
    while token + token in text:
        text = text.replace(token + token, token)
    return text


# The texts


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIEWS = "".join(f"<|{tag}_start|>{IMAGE}<|{tag}_end|>" for tag in ("ego", "cam_left_wrist", "cam_right_wrist"))


def test_wall_oss_is_the_default(chat):
    assert written(chat(None, "text", state_dim=None)) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Observation: ego: {IMAGE} cam_left_wrist: {IMAGE} cam_right_wrist: {IMAGE}\n"
        "Instruction: pick up the red cube\nPredict the next action in robot action.\n"
        "Proprioception: 0 128 192 255\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_vla(chat):
    assert written(chat(QWEN_VLA)) == (
        "<|im_start|>user\nThe robot is AgileX with dual arms, waist, and mobile base. The control frequency is 30 "
        "Hz. Please predict the next 5 control actions to execute the following task: pick up the red cube."
        f"{VIEWS}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": 1, "waist": False, "mobile_base": False}, "AgileX with single arm. The control frequency is 30 Hz."),
        ({"mobile_base": False}, "AgileX with dual arms, waist. The"),
        ({"waist": False}, "AgileX with dual arms, and mobile base. The"),
        ({"control_frequency": 12.5, "action_horizon": 3}, "is 12.5 Hz. Please predict the next 3 control actions to"),
    ],
)
def test_qwen_vla_takes_its_words_from_the_robot(chat, changes, expected):
    assert expected in written(chat(QWEN_VLA, robot=ROBOT | changes))


def test_qwen_vla_with_the_state_in_the_prompt(chat):
    """Section 5.2.4: state: [34, 128, 67, ...] pick up the bowl."""
    processor = chat(QWEN_VLA, "text", state_dim=None)
    assert "the following task: state: [0, 128, 192, 255] pick up the red cube." in written(processor)
    assert "the following task: pick up the red cube." in written(processor, state_is_dropped=True)
    assert "task: state: [<|propri|>] pick up" in written(chat(QWEN_VLA, "projected"))


def test_qwen_vla_navigation(chat):
    """Native waypoints (dx, dy, dtheta); a robot without arms gets the other sentence."""
    walker = {
        **{"cameras": {"images.head": "ego"}, "control_frequency": 2, "action_horizon": 4, "state_layout": []},
        **{"action_layout": [["native", 3]], "robot_tag": "a legged robot", "arms": 0, "normalization": "none"},
    }
    processor = chat(QWEN_VLA, robot=walker)
    waypoints = np.random.default_rng(0).normal(size=(4, 3))
    ask = {"images": {"head": picture(0)}, "state": None, "actions": waypoints}
    text = written(processor, **ask)
    assert text.startswith(
        "<|im_start|>user\nThe robot is a legged robot, which moves in the ground plane. The control frequency is 2 "
        "Hz. Please predict the next 4 waypoints (dx, dy, dtheta), each the relative displacement and heading change, "
        "to execute the following task: pick up the red cube.<|ego_start|>"
    )
    batch = processor.encode([sample(**ask)])
    assert batch["action_mask"].sum(dim=(1, 2)).item() == 12 and batch["action_mask"][0, :4, :3].all()
    np.testing.assert_allclose(processor.decode_actions(batch["actions"])[0], waypoints, atol=1e-6)


def test_qwen_vla_view_tags_are_single_tokens(chat):
    processor = chat(QWEN_VLA)
    tags = [f"<|{tag}_{end}|>" for tag in ("ego", "cam_left_wrist", "cam_right_wrist") for end in ("start", "end")]
    ids = processor.tokenizer("".join(tags), add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == tags
    before = len(processor.tokenizer)
    processor.add_embodiment("again", ROBOT)
    assert len(processor.tokenizer) == before
    processor.add_embodiment("top", ROBOT | {"cameras": {"images.top": "cam_top"}})
    assert len(processor.tokenizer) == before + 2
    config = WallVLAConfig.tiny(vocab_size=before)
    with pytest.raises(ValueError, match=f"token id {before + 1} in the tokenizer and {before} rows"):
        processor.check_model(config)
    processor.check_model(WallVLAConfig.tiny(vocab_size=before + 2))
    assert len(chat(WALL_OSS).tokenizer) == before - 6


def test_qwen_vla_without_images(chat):
    """Its first stage, T2A, shows none; Wall-OSS keeps at least one."""
    dropped = {"images": None, "dropped_cameras": list(ROBOT["cameras"])}
    assert "red cube.<|im_end|>" in written(chat(QWEN_VLA), **dropped)
    batch = chat(QWEN_VLA).encode([sample(**dropped)])
    assert "pixel_values" not in batch and "image_grid_thw" not in batch
    with pytest.raises(ValueError, match="no camera is left. Keep at least 1"):
        chat(WALL_OSS).encode([sample(**dropped)])


def test_dropped_cameras_leave_the_prompt(chat):
    text = written(chat(QWEN_VLA), dropped_cameras=["images.left"])
    assert f"<|ego_start|>{IMAGE}<|ego_end|><|cam_right_wrist_start|>" in text and "left" not in text


def test_chat_formats_of_the_testbed(chat):
    turns = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nObservation: ego: {image} "
        "cam_left_wrist: {image} cam_right_wrist: {image}\nInstruction: pick up the red cube\n"
        "Predict the next action in robot action.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert written(chat(QWEN_CHAT, "expert")) == turns.format(image=IMAGE)
    assert written(chat(INTERN_VL, "expert")) == turns.format(image="<img><IMG_CONTEXT></img>")


def test_intern_vl_with_its_images(chat_tokenizer_json):
    tokenizer = Qwen2Tokenizer.from_pretrained(chat_tokenizer_json)
    processor = WallVLAProcessor(
        internvl_image_processor(56), tokenizer, {"robot": ROBOT}, action_horizon=6, longest_side=None,
        proprioception="none", prompt_format=INTERN_VL,
    )  # fmt: skip
    batch = processor.encode([sample(), {"images": [picture(0)], "text": "what", "answer": "a cube"}])
    assert batch["pixel_values"].shape == (4, 3, 56, 56) and "image_grid_thw" not in batch
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [12, 4]
    learned = batch["labels"][1][batch["labels"][1] != -100]
    assert processor.decode(learned) == "a cube<|im_end|>"


# X-VLA


def test_x_vla_row(x_vla, bart_tokenizer):
    """[main view | language | other views]; 64 pixels are 2 x 2 + 1 tokens."""
    batch = x_vla().encode([sample(), sample(instruction="pick up", images=sample()["images"])])
    image, pad = bart_tokenizer.convert_tokens_to_ids("<image>"), bart_tokenizer.pad_token_id
    for row, instruction in zip(batch["input_ids"].tolist(), ("pick up the red cube", "pick up"), strict=True):
        language = bart_tokenizer(instruction)["input_ids"]
        assert (language[0], language[-1]) == (bart_tokenizer.bos_token_id, bart_tokenizer.eos_token_id)
        assert row == [image] * 5 + language + [pad] * (50 - len(language)) + [image] * 10
    assert batch["attention_mask"].all()  # the padding of the language is attended to, as published
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == image).long())
    assert batch["pixel_values"].shape == (6, 3, 64, 64) and "image_grid_thw" not in batch


def test_x_vla_missing_views(x_vla, bart_tokenizer):
    """A dropped camera and one that the robot lacks: their places are padding that nothing attends to."""
    image, pad = bart_tokenizer.convert_tokens_to_ids("<image>"), bart_tokenizer.pad_token_id
    two = ROBOT | {"cameras": dict(list(ROBOT["cameras"].items())[:2])}
    processor = x_vla()
    processor.add_embodiment("two", two)
    batch = processor.encode([sample(dropped_cameras=["left"]), sample(embodiment="two"), sample()])
    assert batch["input_ids"].shape == (3, 65)
    for row, (first, second) in enumerate([(pad, image), (image, pad), (image, image)]):
        assert batch["input_ids"][row, 55:].tolist() == [first] * 5 + [second] * 5
        expected = [1] * 55 + [int(first == image)] * 5 + [int(second == image)] * 5
        assert batch["attention_mask"][row].tolist() == expected
    assert len(batch["pixel_values"]) == 2 + 2 + 3
    whole = processor.encode([sample()])["pixel_values"]
    assert torch.equal(batch["pixel_values"], torch.cat([whole[[0, 2]], whole[[0, 1]], whole]))


def test_x_vla_language_prompts(x_vla):
    """Table 10, Droid-Left; two wrist cameras are named once."""
    droid = ROBOT | {"robot_tag": "Single Franka", "control_frequency": 15}
    droid["cameras"] = {"images.head": "Left View", "images.left": "Wrist View", "images.right": "Wrist View"}
    described = "Embodiment: Single Franka, Camera Setup: Left View / Wrist View, Freq: 15Hz. pick up the red cube"
    robot = Embodiment.from_dict(droid)
    assert X_VLA_LANGUAGE_PROMPTS.write_action(robot, [], "pick up the red cube", None) == described
    longer = replace(X_VLA_LANGUAGE_PROMPTS, language_length=120)
    assert f"<s>{described}</s>" in written(x_vla(longer, droid))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": "pick " * 60}, "tokens of language in sample 0, the prompt format has room for 50"),
        ({"dropped_cameras": ["head"]}, "sample 0 with images.head, the main view.*always_keep"),
        (
            {"instruction": "<image>"},
            r"4 image tokens for 3 image\(s\) in sample 0. The text must not contain <image>",
        ),
    ],
)
def test_x_vla_samples_that_do_not_fit(x_vla, changes, message):
    with pytest.raises(ValueError, match=message):
        x_vla().encode([sample(**changes)])


def test_x_vla_has_no_text(x_vla):
    with pytest.raises(ValueError, match="multimodal sample .*writes actions only"):
        x_vla().encode([{"images": [], "text": "what"}])


def test_augmentations_of_the_testbed(x_vla):
    """Views and state dropped at random, the main view kept."""
    rng, processor = np.random.default_rng(0), x_vla()
    views, states = drop_cameras(0.5, always_keep=["images.head"]), drop_state(0.5)
    samples = [states(views(sample(), rng), rng) for _ in range(20)]
    batch = processor.encode(samples)
    kept = [3 - len(each["dropped_cameras"]) for each in samples]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [5 * count for count in kept]
    assert batch["state_mask"].any(dim=1).tolist() == [not each["state_is_dropped"] for each in samples]
    assert len(set(kept)) == 3 and 0 < batch["state_mask"].any(dim=1).sum() < 20


# Proprioception


def test_state_of_the_expert(chat):
    processor = chat(QWEN_CHAT, "expert")
    batch = processor.encode([sample(), sample(state_is_dropped=True), {"images": [], "text": "what"}])
    assert batch["states"].shape == (3, 26) and batch["states"].dtype == torch.float32
    assert batch["states"][0, :4].tolist() == STATE and batch["state_mask"][0].nonzero().flatten().tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert (
        not batch["states"][1:].any() and not batch["state_mask"][1:].any() and batch["state_mask"].dtype == torch.bool
    )
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_no_state(chat):
    batch = chat(QWEN_CHAT, "none").encode([sample()])
    assert "states" not in batch and "state_mask" not in batch
    assert torch.equal(batch["input_ids"], chat(QWEN_CHAT, "expert").encode([sample()])["input_ids"])
    assert "Proprioception: \n<|im_end|>" in written(chat(WALL_OSS, "none"))


def test_states_without_normalisation(chat):
    """X-VLA sees metres; noise is then in the state's own units, and numbers beyond [-1, 1] are in the last bins."""
    robot = ROBOT | {"normalization": "none", "statistics": None}
    processor = chat(WALL_OSS, "expert", robot)
    noisy = processor.encode([sample(state=[2.0, -3.0, 0.5, 0.0], state_noise=np.ones(9))])
    assert noisy["states"][0, :4].tolist() == [3.0, -2.0, 1.5, 1.0]
    assert "Proprioception: 255 0 192 128\n" in written(
        chat(WALL_OSS, "text", robot, state_dim=None), state=[2.0, -3.0, 0.5, 0.0]
    )


def test_model_and_processor_agree_on_the_state(chat):
    config = WallVLAConfig.tiny(vocab_size=512)
    chat(WALL_OSS, "text").check_model(config)
    chat(QWEN_VLA, "none").check_model(config)  # in the prompt or not: the model does not know
    with pytest.raises(ValueError, match="proprioception 'expert' in the processor and 'text' in the model"):
        chat(QWEN_CHAT, "expert").check_model(config)


# Options that contradict each other


def test_options_that_do_not_fit(chat, x_vla, chat_tokenizer_json):
    with pytest.raises(ValueError, match="proprioception 'prompt'. Known: text, projected, expert, none"):
        chat(WALL_OSS, "prompt")
    with pytest.raises(ValueError, match="expert proprioception without state_dim"):
        chat(WALL_OSS, "expert", state_dim=None)
    with pytest.raises(ValueError, match="proprioception 'text' and a prompt format without a place for the state"):
        chat(QWEN_CHAT, "text")
    with pytest.raises(ValueError, match="longest_side 448 with square images.*longest_side=None"):
        x_vla(longest_side=448)
    with pytest.raises(ValueError, match="rows of one length and images of any size"):
        chat(X_VLA)
    with pytest.raises(ValueError, match="3 cameras in embodiment 'robot', the prompt format has 2 views"):
        x_vla(replace(X_VLA, num_views=2))
    with pytest.raises(ValueError, match="tokenizer without <image>. The prompt format needs this special token"):
        WallVLAProcessor(
            florence2_image_processor(64), Qwen2Tokenizer.from_pretrained(chat_tokenizer_json), longest_side=None,
            proprioception="none", prompt_format=X_VLA,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": "a"}, r"unknown field\(s\) prefix in a prompt format, missing none. Known: action, text"),
        ({"action": "{views}{task}"}, "{task} in action of a prompt format. Known there: views, instruction"),
        ({"view_tokens": ["<{tag}>"]}, r"{tag} in view_tokens\[0\]"),
        ({"num_views": 3}, "num_views 3, language_length 0 and an action prompt with {views}"),
        ({"action": "{instruction}"}, "num_views 0, language_length 0 and an action prompt without {views}"),
        ({"action": "", "num_views": 1, "language_length": 5}, "num_views and a text prompt"),
    ],
)
def test_formats_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat.from_dict(WALL_OSS.to_dict() | changes)
    with pytest.raises(ValueError, match="missing end_token"):
        PromptFormat.from_dict({key: value for key, value in WALL_OSS.to_dict().items() if key != "end_token"})


# Saving and loading


@pytest.mark.parametrize("name", FORMATS)
def test_formats_survive_json(name):
    assert PromptFormat.from_dict(json.loads(json.dumps(FORMATS[name].to_dict()))) == FORMATS[name]


LOAD = """
import sys
import numpy as np
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    with np.load(folder + "/images.npz") as images:
        batch = processor(images=dict(images), instruction="pick up", state=[-1.0, 0.0, 0.5, 1.0])
    np.savez(folder + "/found.npz", **{key: value.numpy() for key, value in batch.items()})
"""


def test_round_trip_in_a_fresh_process(chat, x_vla, tmp_path):
    processors = {"qwen": chat(QWEN_VLA, "text"), "x": x_vla(), "intern": chat(INTERN_VL, "expert")}
    images = {key.split(".")[1]: image for key, image in sample()["images"].items()}
    for name, processor in processors.items():
        processor.save_pretrained(tmp_path / name)
        np.savez(tmp_path / name / "images.npz", **images)
        stored = json.loads((tmp_path / name / "processor_config.json").read_text())["prompt_format"]
        assert PromptFormat.from_dict(stored) == processor.prompt_format
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in processors)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, processor in processors.items():
        batch = processor(images=images, instruction="pick up", state=STATE)
        with np.load(tmp_path / name / "found.npz") as found:
            assert found.keys() == batch.keys()
            assert all(np.array_equal(found[key], value) for key, value in batch.items()), name
