"""Tiny random X-VLA checkpoints in the published layouts, key by key from the notes on them, not by our tables."""

import json
from pathlib import Path

import torch
from published import LINES, Draw, save_weights
from transformers import BartTokenizer


WIDTHS, SPOKEN, WIDE, DEPTH, HEADS = (16, 32), 32, 24, 2, 4
VOCABULARY, PROMPTS, TIME, HORIZON, POSITIONS, DOMAINS = 400, 3, 8, 5, 96, 30
CHANNELS = {"ee6d": 20, "agibot_ee6d": 20, "joint": 14, "auto": 20}
SIDE = 32
# In the form of Microsoft's code, and in that of transformers
VISION = {
    "model_type": "davit",
    "drop_path_rate": 0.1,
    "patch_size": [7, 3],
    "patch_stride": [8, 2],
    "patch_padding": [3, 1],
    "patch_prenorm": [False, True],
    "enable_checkpoint": False,
    "dim_embed": list(WIDTHS),
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "depths": [1, 2],
    "window_size": 3,
    "projection_dim": SPOKEN,
    "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 6},
    "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 7},
    "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
}
VISION_NATIVE = {
    "model_type": "florence_vision",
    **{name: VISION[name] for name in list(VISION)[1:6]},
    "embed_dim": list(WIDTHS),
    **{name: VISION[name] for name in ("num_heads", "num_groups", "depths", "window_size", "projection_dim")},
    "max_temporal_embeddings": 6,
    "max_position_embeddings": 7,
}
TEXT = {
    "model_type": "florence2_language",
    "vocab_size": VOCABULARY,
    "d_model": SPOKEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 70,
    "dropout": 0.1,
    "pad_token_id": 1,
}


def config(mode: str = "ee6d", **changes) -> dict:
    """The authors' config.json."""
    return {
        "model_type": "xvla",
        "architectures": ["XVLA"],
        "florence_config": {"model_type": "florence2", "text_config": TEXT, "vision_config": VISION},
        "hidden_size": WIDE,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        "num_domains": DOMAINS,
        "len_soft_prompts": PROMPTS,
        "soft_prompt_length": PROMPTS,
        "dim_time": TIME,
        "max_len_seq": POSITIONS,
        "use_hetero_proj": False,
        "num_actions": HORIZON,
        "action_mode": mode,
        "use_proprio": True,
        **changes,
    }


def port_config(mode: str = "ee6d", **changes) -> dict:
    """LeRobot's config.json."""
    values = config(mode)
    for name in ("model_type", "architectures", "num_actions", "soft_prompt_length"):
        values.pop(name)
    native = {"model_type": "florence2", "text_config": TEXT | {"model_type": "bart"}, "vision_config": VISION_NATIVE}
    images = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 32, 32]} for name in ("image", "image2")}
    return values | {
        "type": "xvla",
        "florence_config": native,
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "max_state_dim": CHANNELS[mode],
        "num_denoising_steps": 7,
        "num_image_views": 3,
        "empty_cameras": 1,
        "tokenizer_max_length": 64,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
        "input_features": {
            **images,
            "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 32, 32]},
            "observation.state": {"type": "STATE", "shape": [8]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [CHANNELS[mode]]}},
        **changes,
    }


def preprocessor(domain: int = 3) -> dict:
    """LeRobot's policy_preprocessor.json."""
    renamed = {"observation.images.top": "observation.images.image"}
    norm_map = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}
    return {
        "name": "policy_preprocessor",
        "steps": [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": renamed}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "tokenizer_processor", "config": {"max_length": 50, "tokenizer_name": "a/tokenizer"}},
            {"registry_name": "xvla_imagenet_normalize", "config": {"image_keys": None}},
            {"registry_name": "xvla_add_domain_id", "config": {"domain_id": domain}},
            {"registry_name": "normalizer_processor", "config": {"norm_map": norm_map}},
        ],
    }


def tokenizer() -> BartTokenizer:
    return BartTokenizer().train_new_from_iterator(LINES * 3, vocab_size=320, show_progress=False)


def linear(draw: Draw, found: dict, name: str, rows: int, columns: int) -> None:
    found[f"{name}.weight"], found[f"{name}.bias"] = draw(rows, columns), draw(rows)


def norm(draw: Draw, found: dict, name: str, size: int) -> None:
    found[f"{name}.weight"], found[f"{name}.bias"] = draw.norm(size), draw(size)


def conv(draw: Draw, found: dict, name: str, rows: int, columns: int, kernel: int) -> None:
    weight = draw(rows, columns * kernel**2).reshape(rows, columns, kernel, kernel)
    found[f"{name}.weight"], found[f"{name}.bias"] = weight, draw(rows)


def vision_weights(draw: Draw) -> dict[str, torch.Tensor]:
    """DaViT and what follows it, in Microsoft's names."""
    found, before = {}, 3
    for stage, (width, kernel) in enumerate(zip(WIDTHS, VISION["patch_size"], strict=True)):
        conv(draw, found, f"vision_tower.convs.{stage}.proj", width, before, kernel)
        norm(draw, found, f"vision_tower.convs.{stage}.norm", before if VISION["patch_prenorm"][stage] else width)
        for number in range(VISION["depths"][stage]):
            for kind, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                block = f"vision_tower.blocks.{stage}.{number}.{kind}"
                for each in ("conv1", "conv2"):
                    conv(draw, found, f"{block}.{each}.fn.dw", width, 1, 3)
                norm(draw, found, f"{block}.{attention}.norm", width)
                linear(draw, found, f"{block}.{attention}.fn.qkv", 3 * width, width)
                linear(draw, found, f"{block}.{attention}.fn.proj", width, width)
                norm(draw, found, f"{block}.ffn.norm", width)
                linear(draw, found, f"{block}.ffn.fn.net.fc1", 4 * width, width)
                linear(draw, found, f"{block}.ffn.fn.net.fc2", width, 4 * width)
        before = width
    found["image_projection"] = draw(WIDTHS[-1], SPOKEN)
    norm(draw, found, "image_proj_norm", SPOKEN)
    for each in ("row", "column"):
        found[f"image_pos_embed.{each}_embeddings.weight"] = draw(7, WIDTHS[-1] // 2)
    angles = torch.outer(torch.arange(6.0), 10000 ** (-torch.arange(0, WIDTHS[-1], 2) / WIDTHS[-1]))
    found["visual_temporal_embed.pos_idx_to_embed"] = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return found


def language_weights(draw: Draw) -> dict[str, torch.Tensor]:
    """The encoder of BART, in Microsoft's names."""
    start = "language_model.model."
    found = {f"{start}shared.weight": draw(VOCABULARY, SPOKEN)}
    found[f"{start}encoder.embed_positions.weight"] = draw(TEXT["max_position_embeddings"] + 2, SPOKEN)
    norm(draw, found, f"{start}encoder.layernorm_embedding", SPOKEN)
    for number in range(TEXT["encoder_layers"]):
        layer = f"{start}encoder.layers.{number}"
        for each in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(draw, found, f"{layer}.self_attn.{each}", SPOKEN, SPOKEN)
        norm(draw, found, f"{layer}.self_attn_layer_norm", SPOKEN)
        linear(draw, found, f"{layer}.fc1", TEXT["encoder_ffn_dim"], SPOKEN)
        linear(draw, found, f"{layer}.fc2", SPOKEN, TEXT["encoder_ffn_dim"])
        norm(draw, found, f"{layer}.final_layer_norm", SPOKEN)
    found["language_model.final_logits_bias"] = torch.zeros(1, VOCABULARY)
    return found


def transformer_weights(draw: Draw, channels: int) -> dict[str, torch.Tensor]:
    """The soft-prompted transformer."""
    inputs = 2 * channels + TIME
    found = {
        "pos_emb": draw(1, POSITIONS, WIDE),
        "soft_prompt_hub.weight": draw(DOMAINS, PROMPTS * WIDE) * 4,
        "action_encoder.fc.weight": torch.cat([draw(inputs, WIDE).reshape(1, -1) for _ in range(DOMAINS)]),
        "action_encoder.bias.weight": draw(DOMAINS, WIDE),
        "action_decoder.fc.weight": torch.cat([draw(WIDE, channels).reshape(1, -1) for _ in range(DOMAINS)]),
        "action_decoder.bias.weight": draw(DOMAINS, channels),
    }
    linear(draw, found, "vlm_proj", WIDE, SPOKEN)
    linear(draw, found, "aux_visual_proj", WIDE, SPOKEN)
    norm(draw, found, "norm", WIDE)
    for number in range(DEPTH):
        block = f"blocks.{number}"
        norm(draw, found, f"{block}.norm1", WIDE)
        norm(draw, found, f"{block}.norm2", WIDE)
        linear(draw, found, f"{block}.attn.qkv", 3 * WIDE, WIDE)
        linear(draw, found, f"{block}.attn.proj", WIDE, WIDE)
        linear(draw, found, f"{block}.mlp.fc1", 2 * WIDE, WIDE)
        linear(draw, found, f"{block}.mlp.fc2", WIDE, 2 * WIDE)
    return found


def weights(mode: str = "ee6d", seed: int = 0) -> dict[str, torch.Tensor]:
    """As the authors publish it."""
    draw = Draw(seed)
    found = {f"vlm.{key}": value for key, value in (vision_weights(draw) | language_weights(draw)).items()}
    return found | {f"transformer.{key}": value for key, value in transformer_weights(draw, CHANNELS[mode]).items()}


def native(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the names of transformers' Florence-2, part by part of a key."""
    result = {}
    for key, values in found.items():
        if key == "vlm.language_model.final_logits_bias":
            continue
        parts = key.split(".")
        if parts[1] == "vision_tower":
            parts = ["conv" if part == "proj" and parts[2] == "convs" else part for part in parts]
            text = ".".join(parts).replace(".fn.dw.", ".").replace(".ffn.fn.net.", ".ffn.").replace(".fn.", ".")
            for old, new in (("window_attn.norm", "norm1"), ("channel_attn.norm", "norm1"), ("ffn.norm", "norm2")):
                text = text.replace(old, new)
        elif parts[1] == "language_model":
            text = ".".join([*parts[:2], *parts[3:]])
        elif parts[0] == "vlm":
            text = ".".join(["vlm", "multi_modal_projector", *parts[1:]]).replace("image_pos_", "image_position_")
            if parts[1] == "image_projection":
                text, values = f"{text}.weight", values.T.contiguous()
        else:
            text = key
        result[text] = values
    return result


def write(folder: Path, found: dict[str, torch.Tensor], settings: dict, files: int = 1, tokens: bool = True) -> Path:
    """A published repository of the authors: weights, config.json, tokenizer, image settings."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, {key: values.contiguous() for key, values in found.items()}, files)
    (folder / "config.json").write_text(json.dumps(settings))
    if tokens:
        tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    image = {"image_processor_type": "CLIPImageProcessor", "size": size, "do_center_crop": False, "resample": 3}
    image |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


def x_vla(folder: Path, mode: str = "ee6d", dtype: torch.dtype = torch.float32, files: int = 1, **changes) -> Path:
    """The authors' form."""
    found = {key: values.to(dtype) for key, values in weights(mode).items()}
    return write(folder, found, config(mode, **changes), files)


def port(
    folder: Path, mode: str = "ee6d", vendored: bool = False, domain: int = 3, tokens: bool = True, **changes
) -> Path:
    """LeRobot's form, with the names of transformers' Florence-2 or Microsoft's."""
    found = weights(mode) if vendored else native(weights(mode))
    found = {f"model.{key}": values for key, values in found.items()}
    write(folder, found, port_config(mode, **changes), tokens=tokens)
    (folder / "policy_preprocessor.json").write_text(json.dumps(preprocessor(domain)))
    return folder
