"""Tiny random models and batches that several test files share. CPU, milliseconds."""

from dataclasses import replace

import torch
from transformers import BartTokenizer

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.images_wallvla import florence2_image_processor, internvl_image_processor
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.prompts_wallvla import INTERN_VL, QWEN_CHAT, X_VLA
from wallvla.quickstart import QuickstartConfig, build_processor, build_tokenizer, embodiment


IMAGE_ID, ACTION_START, NUM_ACTION_TOKENS, VOCABULARY = 500, 400, 64, 512


def tiny_config(**overrides) -> WallVLAConfig:
    config = WallVLAConfig.tiny(
        vocab_size=VOCABULARY,
        action_token_start_id=ACTION_START,
        num_action_tokens=NUM_ACTION_TOKENS,
        **overrides,
    )
    config.vlm_config.image_token_id = IMAGE_ID
    return config


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PATCHES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
}
LAYERS = 2 * ["linear_attention", "full_attention"]
TINY_VLMS = {
    "qwen2_5_vl": WallVLAConfig.tiny(vocab_size=VOCABULARY).vlm_config.to_dict(),
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "vision_config": PATCHES | {"deepstack_visual_indexes": [0, 1]},
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": TEXT
        | {"layer_types": LAYERS, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        },
        "vision_config": PATCHES,
        "image_token_id": IMAGE_ID,
    },
    "internvl": {
        "model_type": "internvl",
        "text_config": {"model_type": "qwen3"} | TEXT,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
        "image_token_id": IMAGE_ID,
        "image_seq_length": 4,
    },
    "florence2": {
        "model_type": "florence2",
        "text_config": {
            "model_type": "bart",
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [8, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 4,
            "projection_dim": 64,
        },
        "image_token_id": VOCABULARY + 1,
    },
}
TINY_EXPERTS = {
    "mot": {"hidden_size": 32, "intermediate_size": 64},
    "soft_prompt": {
        "kind": "soft_prompt",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_soft_prompts": 3,
        "time_dim": 8,
        "max_position_embeddings": 96,
    },
    "dit": {
        "kind": "dit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mrope_section": [4, 2, 2],
        "time_dim": 16,
    },
}
# What each kind is trained with, at the smallest size
KIND_FIELDS = {
    "mot": {},
    "soft_prompt": {
        "prediction": "action",
        "proprioception": "expert",
        "state_dim": 4,
        "loss_reduction": "per_channel",
        "loss_channel_weights": [5.0, 5.0, 1.0, 0.5],
        "binary_channels": [2],
        "time_sampler": "stratified",
        "time_scale": 1.0,
        "sampler": "renoise",
        "domains": ["first", "second", "third"],
    },
    "dit": {"loss_space": "velocity", "loss_reduction": "per_channel", "domains": ["first", "second", "third"]},
}


def tiny_config_of(kind: str, vlm: str = "qwen2_5_vl", **overrides) -> WallVLAConfig:
    """A model of each kind on each VLM; `action_expert` in the overrides is merged."""
    expert = TINY_EXPERTS[kind] | overrides.pop("action_expert", {})
    fields = KIND_FIELDS[kind] | {"vlm_config": TINY_VLMS[vlm], "action_expert": expert} | overrides
    if vlm == "florence2":
        fields["language_tokens"] = 6
    config = WallVLAConfig.tiny(**fields)
    if vlm == "qwen2_5_vl":
        config.vlm_config.image_token_id = IMAGE_ID
    return config


def tiny_model_of(kind: str, vlm: str = "qwen2_5_vl", seed: int = 0, **overrides) -> WallVLAForConditionalGeneration:
    """As `tiny_model`, of any kind on any VLM."""
    torch.manual_seed(seed)
    return perturbed(WallVLAForConditionalGeneration(tiny_config_of(kind, vlm, **overrides)).eval())


def perturbed(model: WallVLAForConditionalGeneration) -> WallVLAForConditionalGeneration:
    """Weights larger than at initialisation, so that differences show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tiny_model(seed: int = 0, **overrides) -> WallVLAForConditionalGeneration:
    """A model whose weights are larger than at initialisation, so that differences show."""
    torch.manual_seed(seed)
    return perturbed(WallVLAForConditionalGeneration(tiny_config(**overrides)).eval())


def tiny_batch(
    images: tuple[int, ...] = (1, 2), text: int = 6, action_tokens: int = 0, padding: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Samples with that many images (of 32 pixels, 4 tokens each), left padded to one length.

    With `action_tokens` each sample ends in as many discrete tokens and one end-of-turn token, all labelled.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rows = []
    for count in images:
        row = integers(10, 300, 3)
        for _ in range(count):
            row += [5, *[IMAGE_ID] * 4, 6]
        row += integers(10, 300, text)
        if action_tokens:
            row += [*integers(ACTION_START, ACTION_START + NUM_ACTION_TOKENS, action_tokens), 7]
        rows.append(row)
    length = max(map(len, rows)) + padding
    batch = {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(sum(images) * 16, 3 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(images)),
    }
    if action_tokens:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, -action_tokens - 1 :] = batch["input_ids"][:, -action_tokens - 1 :]
    return batch


TINY_ROBOT = {
    "cameras": {"observation.images.front": "front view", "observation.images.wrist": "wrist view"},
    "control_frequency": 10,
    "action_horizon": 8,
    "state_layout": [["native", 4]],
    "action_layout": [["native", 4]],
    "statistics": {name: {"q01": [-1.0] * 4, "q99": [1.0] * 4} for name in ("state", "action")},
}


def tiny_processor_of(vlm: str, robots: dict | None = None, proprioception: str = "expert") -> WallVLAProcessor:
    """A processor whose batches fit the tiny model on that VLM, for robots with 4 channels of state and action."""
    robots, side = {"robot": TINY_ROBOT} if robots is None else robots, 32
    common = {"action_dim": 4, "action_horizon": 8, "state_dim": 4, "proprioception": proprioception}
    config = QuickstartConfig(image_size=side)
    if vlm == "florence2":
        tokenizer = BartTokenizer().train_new_from_iterator(["press the button"], vocab_size=300, show_progress=False)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        images = florence2_image_processor(side)
        images.image_seq_length = 5  # the tiny tower has twice as many a side, and their mean
        prompts = replace(X_VLA, num_views=2, language_length=12)
        return WallVLAProcessor(images, tokenizer, robots, longest_side=None, prompt_format=prompts, **common)
    tokenizer = build_tokenizer(config)
    if vlm == "internvl":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
        images = internvl_image_processor(side)
        images.image_seq_length = 4
        return WallVLAProcessor(images, tokenizer, robots, longest_side=None, prompt_format=INTERN_VL, **common)
    images = build_processor(config, embodiment(config)).image_processor
    return WallVLAProcessor(images, tokenizer, robots, longest_side=side, prompt_format=QWEN_CHAT, **common)


def tiny_parts_of(kind: str, vlm: str, robots: dict | None = None, **overrides) -> tuple:
    """(model, processor) of each kind on each VLM; every expert gets the state that its kind can take."""
    proprioception = overrides.setdefault("proprioception", "expert")
    processor = tiny_processor_of(vlm, robots, proprioception)
    config = tiny_config_of(kind, vlm, state_dim=4, **overrides)
    values = config.to_dict()
    values["vlm_config"]["text_config"]["vocab_size"] = len(processor.tokenizer)
    values["vlm_config"]["image_token_id"] = processor.image_token_id
    if values["language_tokens"]:
        values["language_tokens"] = processor.prompt_format.language_length
    config = WallVLAConfig(**{name: values[name] for name in WallVLAConfig.__dataclass_fields__ if name in values})
    torch.manual_seed(0)
    return perturbed(WallVLAForConditionalGeneration(config).eval()), processor


def tiny_batch_of(vlm: str, images: tuple[int, ...] = (1, 2), padding: int = 0, seed: int = 0) -> dict:
    """A batch as the processor of a VLM makes it, with `domain_ids` and `states`."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    extra = {
        "domain_ids": torch.arange(count) % 3,
        "states": torch.rand(count, 4, generator=generator) * 2 - 1,
        "state_mask": torch.ones(count, 4, dtype=torch.bool),
    }
    if vlm == "florence2":  # [view 5 | language 6 | view 5], a missing view at its end
        tokens, image = 5, VOCABULARY + 1
        ids = torch.randint(2, 300, (count, 6), generator=generator)
        first = torch.full((count, tokens), image)
        second = torch.tensor([[image if views > 1 else 1] * tokens for views in images])
        mask = torch.ones(count, 2 * tokens + 6, dtype=torch.long)
        mask[:, tokens + 6 :] = second == image
        pixels = torch.randn(sum(images), 3, 32, 32, generator=generator)
        return {
            "input_ids": torch.cat([first, ids, second], dim=1),
            "attention_mask": mask,
            "pixel_values": pixels,
        } | extra
    batch = tiny_batch(images, padding=padding, seed=seed)
    if vlm == "internvl":
        del batch["image_grid_thw"]
        batch["pixel_values"] = torch.randn(sum(images), 3, 32, 32, generator=generator)
    return batch | extra


def tiny_actions(batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Actions, noise and times; the mask hides channel 3 everywhere and the last steps of the last sample."""
    generator = torch.Generator().manual_seed(seed)
    actions, noise = torch.randn(2, batch_size, 8, 4, generator=generator)
    mask = torch.ones(batch_size, 8, 4, dtype=torch.bool)
    mask[..., 3] = False
    mask[-1, 5:] = False
    return {
        "actions": actions,
        "noise": noise,
        "action_mask": mask,
        "time": torch.rand(batch_size, generator=generator) * 0.99,
    }


SHARDING_CASES = [(labels, checkpointing) for labels in (True, False) for checkpointing in (False, True)]


def loss_and_gradients(model: WallVLAForConditionalGeneration, labels: bool) -> tuple[torch.Tensor, dict]:
    """Of one batch, with or without text to learn."""
    batch = tiny_batch(action_tokens=5, padding=2)
    if not labels:
        batch.pop("labels")
    model.zero_grad()
    loss = model(**batch, **tiny_actions(2)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
