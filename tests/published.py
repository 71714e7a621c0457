"""Tiny random checkpoints in the published layouts, written key by key from the notes on them, not by our tables."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer


HIDDEN, WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
EXPERT_HIDDEN, EXPERT_WIDTH, ACTION_DIM, HORIZON = 32, 48, 26, 6
VISION = {
    "depth": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_heads": 2,
    "in_chans": 3,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "spatial_patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
PADDED = 128  # the stored vision width, as 3456 is for 3420
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
LINES = [
    "system user assistant You are a helpful assistant.",
    "Observation: front view left wrist view Instruction: Proprioception: 0123456789",
    "Predict the next action in robot action. pick up the red cube and place it in the bowl",
]
NUM_ACTION_TOKENS = 16


def tokenizer(action_tokens: int = NUM_ACTION_TOKENS) -> Qwen2Tokenizer:
    """As it is stored: without the two tokens that upstream adds in code, unless discrete tokens follow them."""
    result = Qwen2Tokenizer().train_new_from_iterator(LINES, vocab_size=400, show_progress=False)
    result.add_special_tokens({"additional_special_tokens": SPECIAL})
    result.eos_token = "<|im_end|>"
    if action_tokens:
        result.add_tokens(["<|propri|>", "<|action|>", *[f"<|action_token_{i}|>" for i in range(action_tokens)]])
    return result


def config(tokens: Qwen2Tokenizer, layers: int = 2, **changes) -> dict:
    """config.json of Wall-OSS-0.5 at this size. Its vocab_size is too small on purpose, as the published one."""
    ids = dict(zip(SPECIAL, tokens.convert_tokens_to_ids(SPECIAL), strict=True))
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "max_window_layers": 70,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 100,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": VISION,
        "num_experts": 2,
        "experts": [
            {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "hidden_act": "silu"},
            {"hidden_size": EXPERT_HIDDEN, "intermediate_size": EXPERT_WIDTH, "hidden_act": "silu"},
        ],
        "dim_inputs": [HIDDEN, EXPERT_HIDDEN],
        "attention_moe": True,
        "mlp_moe": True,
        "norm_moe": True,
        "mot_opt": True,
        "causal_action_attention_mask": True,
        "use_adarms": False,
        "proj_with_mask": True,
        "use_flow_action_expert": True,
        "use_x_pred": False,
        "use_x_loss": True,
        "flow_loss_weight": 1.0,
        "ar_loss_weight": 0.01,
        "action_hidden_size": EXPERT_HIDDEN,
        "state_hidden_size": HIDDEN,
        "action_horizon_flow": HORIZON,
        "use_state_string_representation": True,
        "noise_scheduler": {"beta_alpha": 1.5, "beta_beta": 1.0, "s": 0.999, "num_inference_timesteps": 10},
        **changes,
    }


class Draw:
    """Random weights that are large enough for every mistake to show."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        scale = 0.3 if len(shape) == 1 else 1.2 / shape[1] ** 0.5
        return torch.randn(*shape, generator=self.generator) * scale

    def norm(self, size: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(size, generator=self.generator)


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def vision_weights(draw: Draw, fused: bool, width: int, prefix: str = "visual.") -> dict[str, torch.Tensor]:
    hidden, merged = VISION["hidden_size"], 4 * VISION["hidden_size"]
    real = VISION["intermediate_size"]
    found = {
        "patch_embed.proj.weight": draw(hidden, 3 * 2 * 4 * 4).view(hidden, 3, 2, 4, 4),
        "merger.ln_q.weight": draw.norm(hidden),
        "merger.mlp.0.weight": draw(merged, merged),
        "merger.mlp.0.bias": draw(merged),
        "merger.mlp.2.weight": draw(HIDDEN, merged),
        "merger.mlp.2.bias": draw(HIDDEN),
    }
    for i in range(VISION["depth"]):
        block = f"blocks.{i}."
        found |= {block + "norm1.weight": draw.norm(hidden), block + "norm2.weight": draw.norm(hidden)}
        found |= {block + "attn.qkv.weight": draw(3 * hidden, hidden), block + "attn.qkv.bias": draw(3 * hidden)}
        found |= {block + "attn.proj.weight": draw(hidden, hidden), block + "attn.proj.bias": draw(hidden)}
        gate, up, down = draw(real, hidden), draw(real, hidden), draw(hidden, real)
        gate_bias, up_bias = draw(real), draw(real)
        gate, up, gate_bias, up_bias = (pad_rows(part, width) for part in (gate, up, gate_bias, up_bias))
        found[block + "mlp.down_proj.weight"] = pad_rows(down.T, width).T.contiguous()
        found[block + "mlp.down_proj.bias"] = draw(hidden)
        if fused:
            found[block + "mlp.gate_up_proj.weight"] = torch.cat([gate, up])
            found[block + "mlp.gate_up_proj.bias"] = torch.cat([gate_bias, up_bias])
        else:
            found |= {block + "mlp.gate_proj.weight": gate, block + "mlp.gate_proj.bias": gate_bias}
            found |= {block + "mlp.up_proj.weight": up, block + "mlp.up_proj.bias": up_bias}
    return {prefix + name: values for name, values in found.items()}


def wall_weights(
    rows: int,
    layers: int = 2,
    fused: bool = True,
    vision_fused: bool = True,
    vision_width: int = PADDED,
    state_rows: int = 0,
    action_dim: int = ACTION_DIM,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The weights of Wall-OSS-0.5 (fused) or of wall-oss-flow-0.1 (not), float32."""
    draw = Draw(seed)
    found = {"model.embed_tokens.weight": draw(rows, HIDDEN) * 5}
    kv = KEY_HEADS * HEAD_DIM
    for i in range(layers):
        for expert, (hidden, width) in enumerate([(HIDDEN, WIDTH), (EXPERT_HIDDEN, EXPERT_WIDTH)]):
            layer = f"model.layers.{i}."
            found[f"{layer}input_layernorms.{expert}.weight"] = draw.norm(hidden)
            found[f"{layer}post_attention_layernorms.{expert}.weight"] = draw.norm(hidden)
            weights = {name: draw(count, hidden) for name, count in (("q", HIDDEN), ("k", kv), ("v", kv))}
            biases = {name: draw(count) for name, count in (("q", HIDDEN), ("k", kv), ("v", kv))}
            attention = f"{layer}self_attn."
            if fused:
                found[f"{attention}qkv_proj_experts.{expert}.weight"] = torch.cat(list(weights.values()))
                found[f"{attention}qkv_proj_experts.{expert}.bias"] = torch.cat(list(biases.values()))
            else:
                for name in "qkv":
                    found[f"{attention}{name}_proj_experts.{expert}.weight"] = weights[name]
                    found[f"{attention}{name}_proj_experts.{expert}.bias"] = biases[name]
            found[f"{attention}o_proj_experts.{expert}.weight"] = draw(hidden, HIDDEN)
            gate, up = draw(width, hidden), draw(width, hidden)
            moe = f"{layer}moe.experts.{expert}."
            if fused:
                found[f"{moe}gate_up_proj.weight"] = torch.cat([gate, up])
            else:
                found |= {f"{moe}gate_proj.weight": gate, f"{moe}up_proj.weight": up}
            found[f"{moe}down_proj.weight"] = draw(hidden, width)
    found |= {"model.norms.0.weight": draw.norm(HIDDEN), "model.norms.1.weight": draw.norm(EXPERT_HIDDEN)}
    found |= vision_weights(draw, vision_fused, vision_width)
    wide = EXPERT_HIDDEN
    for name, shape in {
        "w1": (wide, 2 * action_dim),
        "w2": (wide, 2 * wide),
        "w3": (wide, wide),
        "action_proj_back": (action_dim, wide),
    }.items():
        found[f"action_preprocessor.{name}.weight"] = draw(*shape)
    if state_rows:
        found["action_preprocessor.propri_proj.weight"] = draw(state_rows, 2 * action_dim)
    return found


def tables(names: tuple[str, ...] = ("x2_normal", "arx/5.v1"), width: int = ACTION_DIM, seed: int = 3) -> dict:
    """Normaliser tables by kind and dataset; one range is zero."""
    draw = Draw(seed)
    found = {}
    for kind in ("action", "propri"):
        for name in names:
            low, delta = draw(width) - 0.2, draw(width).abs() + 0.1
            delta[3] = 0.0
            found[kind, name] = {"min": low, "delta": delta}
    return found


def qwen_weights(rows: int, layers: int = 2, new_names: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A bare Qwen2.5-VL under its first names, or the new ones."""
    draw = Draw(seed)
    text, vision = ("model.language_model.", "model.visual.") if new_names else ("model.", "visual.")
    kv = KEY_HEADS * HEAD_DIM
    found = {f"{text}embed_tokens.weight": draw(rows, HIDDEN), f"{text}norm.weight": draw.norm(HIDDEN)}
    for i in range(layers):
        layer = f"{text}layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{norm}.weight"] = draw.norm(HIDDEN)
        for name, count in (("q", HIDDEN), ("k", kv), ("v", kv)):
            found[f"{layer}self_attn.{name}_proj.weight"] = draw(count, HIDDEN)
            found[f"{layer}self_attn.{name}_proj.bias"] = draw(count)
        found[f"{layer}self_attn.o_proj.weight"] = draw(HIDDEN, HIDDEN)
        found[f"{layer}mlp.gate_proj.weight"] = draw(WIDTH, HIDDEN)
        found[f"{layer}mlp.up_proj.weight"] = draw(WIDTH, HIDDEN)
        found[f"{layer}mlp.down_proj.weight"] = draw(HIDDEN, WIDTH)
    return found | vision_weights(draw, False, VISION["intermediate_size"], vision)


def save_weights(folder: Path, weights: dict[str, torch.Tensor], files: int = 1) -> None:
    """One file, or several with an index."""
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(weights), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {name: weights[name] for name in names[i::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    settings: dict,
    tokens: Qwen2Tokenizer,
    normalizers: dict | None = None,
    in_files: bool = True,
    in_weights: bool = True,
    files: int = 1,
    recipe: str = "",
) -> Path:
    """A published repository: weights, config.json, tokenizer, image settings, normalisers, config.yml."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(weights)
    for (kind, name), columns in (normalizers or {}).items():
        if in_weights:
            for column, values in columns.items():
                weights[f"action_preprocessor.normalizer_{kind}.{column}.{name}"] = values
    for kind in ("action", "propri"):
        content = {
            f"{column}.{name}": values
            for (found, name), columns in (normalizers or {}).items()
            for column, values in columns.items()
            if found == kind
        }
        if content and in_files:
            torch.save(content, folder / f"normalizer_{kind}.pth")
    save_weights(folder, weights, files)
    (folder / "config.json").write_text(json.dumps(settings))
    tokens.save_pretrained(folder)
    image = {
        "patch_size": VISION["patch_size"],
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 64,
        "max_pixels": 64 * 64,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    if recipe:
        (folder / "config.yml").write_text(recipe)
    return folder


def wall_oss_05(folder: Path, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """The whole of Wall-OSS-0.5: norms and heads in float32, the rest in `dtype`."""
    tokens = tokenizer()
    options = {name: changes.pop(name) for name in ("in_files", "in_weights", "files", "recipe") if name in changes}
    weights = wall_weights(len(tokens) + 7, layers, seed=seed, **changes)
    weights = {
        key: values if "norm" in key or key.startswith("action_preprocessor.") else values.to(dtype)
        for key, values in weights.items()
    }
    return write(folder, weights, config(tokens, layers), tokens, tables(), **options)
