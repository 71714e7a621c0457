"""What the processor makes of the same demonstrations for each system is what that system's model reads."""

import numpy as np
import pytest
import torch
from tiny import perturbed, tiny_config_of
from transformers import BartTokenizer, Qwen2Tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import UNIFIED_DIM
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.prompts_wallvla import INTERN_VL, QWEN_CHAT, QWEN_VLA, WALL_OSS, X_VLA, replace


LINES = ["The robot is Franka with single arm. pick up the red cube and place it in the bowl"] * 3
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT_TOKENS += ["<img>", "</img>", "<IMG_CONTEXT>"]
ARM = [["right_ee_position", 3], ["right_ee_rotation", 4], ["right_gripper", 1]]
ROBOT = {
    "cameras": {"images.front": "ego", "images.wrist": "cam_right_wrist"},
    "control_frequency": 5,
    "action_horizon": 8,
    "state_layout": ARM,
    "action_layout": ARM,
    "rotation_format": "quaternion_xyzw",
    "normalization": "none",
    "robot_tag": "Franka",
}


def patches():
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=1, min_pixels=256, max_pixels=1024)


def squares(stock, tokens):
    fields = {"do_center_crop": False} if stock is CLIPImageProcessorPil else {}
    return stock(size={"height": 32, "width": 32}, image_seq_length=tokens, **fields)


SYSTEMS = {  # expert, VLM, prompts, images, proprioception, what the robot is to the model, its channels
    "wall_oss": ("mot", "qwen2_5_vl", WALL_OSS, patches, "text", {"reference_frame": "world_relative"}, 26),
    "qwen_vla": ("dit", "qwen3_5", QWEN_VLA, patches, "none", {}, 26),
    "x_vla": ("soft_prompt", "florence2", replace(X_VLA, language_length=6),
              lambda: squares(CLIPImageProcessorPil, 5), "expert", {"model_rot6d": "interleaved"}, 20),
    "mot_intern_vl": ("mot", "internvl", INTERN_VL, lambda: squares(GotOcr2ImageProcessorPil, 4), "expert",
                      {"slots": "unified", "reference_frame": "eef_relative"}, UNIFIED_DIM),
    "mot_qwen3": ("mot", "qwen3_vl", QWEN_CHAT, patches, "expert", {"slots": "unified"}, UNIFIED_DIM),
}  # fmt: skip


def sample(seed=0, **changes):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(9, 8))
    vectors[:, 3:7] /= np.linalg.norm(vectors[:, 3:7], axis=1, keepdims=True)
    vectors[:, 6] = np.abs(vectors[:, 6])  # of a quaternion and its negative, this one comes back
    vectors[:, 7] = rng.integers(0, 2, size=9)
    images = {key: rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8) for key in ROBOT["cameras"]}
    return {"images": images, "instruction": "pick up", "state": vectors[0], "actions": vectors[1:]} | changes


@pytest.mark.parametrize("name", SYSTEMS)
def test_one_processor_feeds_every_system(name):
    kind, vlm, prompts, images, proprioception, changes, channels = SYSTEMS[name]
    tokenizer = (BartTokenizer if vlm == "florence2" else Qwen2Tokenizer)().train_new_from_iterator(
        LINES, vocab_size=320, show_progress=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, "<image>"]})
    fields = {"action_dim": channels, "state_dim": channels, "proprioception": proprioception}
    if kind == "soft_prompt":
        fields |= {"loss_channel_weights": [1.0] * channels, "binary_channels": [9, 19]}
    config = tiny_config_of(kind, vlm, **fields)
    config.vlm_config.image_token_id = tokenizer.convert_tokens_to_ids(prompts.image_token)
    processor = WallVLAProcessor(
        images(), tokenizer, {"robot": ROBOT | changes}, action_dim=channels, action_horizon=8, state_dim=channels,
        longest_side=None, proprioception=proprioception, prompt_format=prompts,
    )  # fmt: skip
    processor.check_model(config)
    torch.manual_seed(0)
    model = perturbed(WallVLAForConditionalGeneration(config).eval())

    samples = [sample(), sample(1, dropped_cameras=["images.wrist"], state_is_dropped=True)]
    batch = processor.encode(samples)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None for p in model.action_expert.parameters())
    decoded = processor.decode_actions(batch["actions"], np.stack([each["state"] for each in samples]))
    np.testing.assert_allclose(decoded, np.stack([each["actions"] for each in samples]), atol=1e-5)

    asked = [{key: value for key, value in each.items() if key != "actions"} for each in samples]
    inputs = processor.encode(asked)
    chunk = model.sample_actions(**inputs, generator=torch.Generator().manual_seed(0))
    other = processor.encode([asked[0] | {"instruction": "place it"}, asked[1]])
    changed = model.sample_actions(**other, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (2, 8, channels)
    mask = inputs["action_mask"]
    assert not torch.allclose(chunk[0][mask[0]], changed[0][mask[0]]), "the instruction does not reach the actions"
    torch.testing.assert_close(chunk[1], changed[1], atol=1e-4, rtol=1e-4)
    robot_actions = processor.decode_actions(chunk, np.stack([each["state"] for each in samples]))
    assert robot_actions.shape == (2, 8, 8) and np.isfinite(robot_actions).all()
