"""X-VLA: its published tensors and config.json, and what they are here; the robots are in `x_vla_robots`.

Published by its authors (`2toINF/X-VLA-*`) with the vendored Florence-2 of Microsoft, and by LeRobot
(`lerobot/xvla-*`) with the names of one or the other and `model.` before every key.
"""

import re
from dataclasses import dataclass
from math import prod

from transformers import BartConfig
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from ..configuration_wallvla import WallVLAConfig
from .layouts import EXPERT, Entry, Piece, our_parameters
from .tensor_files import TensorInfo


SHARED = "vlm.language_model.shared.weight"
PROJECTION = "vlm.multi_modal_projector.image_projection.weight"
PROJECTOR = r"vlm\.multi_modal_projector\."
# Our name -> the published one, with the names of transformers' Florence-2. The first that fits counts
NAMES = (
    (rf"{EXPERT}\.position_embedding\.weight", "transformer.pos_emb"),
    (rf"{EXPERT}\.soft_prompts\.tokens", "transformer.soft_prompt_hub.weight"),
    (rf"{EXPERT}\.(action_encoder|action_decoder)\.weight", r"transformer.\1.fc.weight"),
    (rf"{EXPERT}\.(action_encoder|action_decoder)\.bias", r"transformer.\1.bias.weight"),
    (rf"{EXPERT}\.auxiliary_proj\.", "transformer.aux_visual_proj."),
    (rf"{EXPERT}\.layers\.(\d+)\.(qkv|proj)\.", r"transformer.blocks.\1.attn.\2."),
    (rf"{EXPERT}\.layers\.(\d+)\.(fc1|fc2)\.", r"transformer.blocks.\1.mlp.\2."),
    (rf"{EXPERT}\.layers\.", "transformer.blocks."),
    (rf"{EXPERT}\.", "transformer."),
)
# Those names -> Microsoft's
VENDORED_NAMES = (
    (r"(vlm\.vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
    (r"(vlm\.vision_tower\.blocks\..*)\.(conv1|conv2)\.", r"\1.\2.fn.dw."),
    (r"(vlm\.vision_tower\.blocks\..*\.spatial_block)\.norm1\.", r"\1.window_attn.norm."),
    (r"(vlm\.vision_tower\.blocks\..*\.channel_block)\.norm1\.", r"\1.channel_attn.norm."),
    (r"(vlm\.vision_tower\.blocks\..*)\.(window_attn|channel_attn)\.", r"\1.\2.fn."),
    (r"(vlm\.vision_tower\.blocks\..*)\.norm2\.", r"\1.ffn.norm."),
    (r"(vlm\.vision_tower\.blocks\..*)\.ffn\.", r"\1.ffn.fn.net."),
    (PROJECTOR + r"image_projection\.weight", "vlm.image_projection"),
    (PROJECTOR + r"image_proj_norm\.", "vlm.image_proj_norm."),
    (PROJECTOR + r"image_position_embed\.", "vlm.image_pos_embed."),
    (PROJECTOR + r"visual_temporal_embed\.", "vlm.visual_temporal_embed."),
    (r"vlm\.language_model\.", "vlm.language_model.model."),
)
ENCODER_EMBEDDING = "vlm.language_model.encoder.embed_tokens.weight"
# Of the decoder, which nobody has: kept for `export`, since it changes nothing
LOGITS_BIAS = "vlm.language_model.final_logits_bias"
MAX_DEPTH = 1000
ACTION_SPACES = ("ee6d", "agibot_ee6d", "joint", "auto")


def renamed(name: str, rules: tuple) -> str:
    """`name` after the first of `rules` that fits its beginning."""
    for pattern, replacement in rules:
        found, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return found
    return name


@dataclass(frozen=True)
class XVLALayout:
    """How an X-VLA checkpoint stores its tensors.

    prefix: what every key starts with.
    vendored: Florence-2 has Microsoft's names.
    embeddings: under which of its two names the token embedding is stored, `SHARED`, `ENCODER_EMBEDDING` or both.
    """

    prefix: str = ""
    vendored: bool = True
    embeddings: tuple[str, ...] = (SHARED,)

    def key(self, name: str) -> str:
        """The published key of a tensor, from our name or that of transformers' Florence-2."""
        name = renamed(name, NAMES)
        return self.prefix + (renamed(name, VENDORED_NAMES) if self.vendored else name)


def find_prefix(keys: list[str]) -> str:
    """`"model."` if LeRobot put it before every key, else nothing."""
    return "model." if any(key.startswith("model.transformer.") for key in keys) else ""


def find_layout(keys: list[str]) -> XVLALayout:
    """The layout that the keys of a checkpoint show."""
    prefix = find_prefix(keys)
    signs = (f"{prefix}vlm.image_projection", f"{prefix}vlm.language_model.model.")
    layout = XVLALayout(prefix, any(key.startswith(signs) for key in keys))
    stored = tuple(name for name in (SHARED, ENCODER_EMBEDDING) if layout.key(name) in keys)
    return XVLALayout(prefix, layout.vendored, stored or (SHARED,))


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The published shape of a parameter of the action expert."""
    if name == f"{EXPERT}.position_embedding.weight":
        return (1, *shape)
    # What a domain has for itself is a row of an embedding
    return (shape[0], prod(shape[1:])) if len(shape) == 3 and name.startswith(EXPERT) else shape


def entries(config: WallVLAConfig, layout: XVLALayout) -> list[Entry]:
    """All tensors of an X-VLA checkpoint, without `final_logits_bias`."""
    result = []
    for name, shape in our_parameters(config).items():
        keys = layout.embeddings if name == SHARED else (name,)
        transposed = layout.vendored and name == PROJECTION
        stored = shape[::-1] if transposed else stored_shape(name, shape)
        result += [Entry(layout.key(key), stored, (Piece(name, 0, shape),), transposed) for key in keys]
    return result


# --------------------------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------------------------


def florence_config(values: dict, image_token_id: int) -> dict:
    """transformers' Florence-2 configuration of `florence_config` in either form.

    Args:
        values: with `text_config` and `vision_config`.
        image_token_id: of the tokenizer.
    """
    text, vision = dict(values.get("text_config") or {}), dict(values.get("vision_config") or {})
    if vision.get("model_type") not in (None, "", "davit", "florence_vision"):
        raise ValueError(f"config.json has a vision tower {vision['model_type']!r}; X-VLA's is DaViT.")
    if text.get("model_type") not in (None, "", "bart", "florence2_language"):
        raise ValueError(f"config.json has a text model {text['model_type']!r}; X-VLA's is Florence-2's (BART).")
    for name, kind, size, ours in (
        ("image_pos_embed", "learned_abs_2d", "max_pos_embeddings", "max_position_embeddings"),
        ("visual_temporal_embedding", "COSINE", "max_temporal_embeddings", "max_temporal_embeddings"),
    ):
        if name in vision:
            found = vision.pop(name) or {}
            if found.get("type") != kind or size not in found:
                raise ValueError(f"config.json has {name} {found}; the model computes {kind} with its {size}.")
            vision[ours] = found[size]
    sources = vision.pop("image_feature_source", None)
    if sources is not None and list(sources) != ["spatial_avg_pool", "temporal_avg_pool"]:
        raise ValueError(f"config.json has image_feature_source {sources}; the model computes the two averages.")
    if "dim_embed" in vision:
        vision["embed_dim"] = vision.pop("dim_embed")
    vision.setdefault("projection_dim", values.get("projection_dim", text.get("d_model")))
    sizes = (
        ("text", text, ("vocab_size", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")),
        ("vision", vision, ("embed_dim", "depths", "num_heads", "num_groups", "patch_size", "patch_stride")),
    )
    for part, found, names in sizes:
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)} of the {part} model. Download it again.")
    for name, depth in (("encoder_layers", text["encoder_layers"]), ("depths", max(vision["depths"]))):
        check_depth(name, depth)
    skipped = {"model_type", "dtype", "architectures", "transformers_version", "id2label", "label2id"}

    def known(found: dict, kind: type) -> dict:
        return {name: found[name] for name in kind.__dataclass_fields__ if name in found and name not in skipped}

    return {
        "model_type": "florence2",
        "text_config": {"model_type": "bart", **known(text, BartConfig)},
        "vision_config": known(vision, Florence2VisionConfig),
        "image_token_id": image_token_id,
    }


def check_depth(name: str, depth: int) -> None:
    """Raises ValueError unless a number of layers is one that a network has."""
    if not isinstance(depth, int) or not 0 < depth <= MAX_DEPTH:
        raise ValueError(f"config.json has {name} {depth}; it is a number from 1 to {MAX_DEPTH}.")


def refuse_other_architectures(config: dict, is_port: bool) -> None:
    """Raises ValueError for settings under which the published code computes something else than we do."""
    mapping = config.get("normalization_mapping") or {}
    normalised = {kind: mode for kind, mode in mapping.items() if kind in ("STATE", "ACTION") and mode != "IDENTITY"}
    mode = mode_of(config)
    for found, rule in (
        (config.get("use_hetero_proj", False), "use_hetero_proj: projections of the observation for each domain"),
        (is_port and not config.get("use_proprio", True), "use_proprio false: no proprioception"),
        (mode not in ACTION_SPACES, f"action_mode {mode}; known: {', '.join(ACTION_SPACES)}"),
        (normalised, f"normalization_mapping {normalised}; X-VLA sees states and actions as they are"),
    ):
        if found:
            raise ValueError(
                f"config.json says {rule}. No published checkpoint uses this and this model does not compute it; "
                "converting would change the results."
            )


def mode_of(config: dict) -> str:
    """The action mode that a published config.json says."""
    return config.get("action_mode", "ee6d").lower()


def real_action_dim(config: dict, action_dim: int) -> int:
    """Channels that a model of action mode "auto" was trained on, the first ones."""
    outputs = [feature["shape"][-1] for feature in (config.get("output_features") or {}).values()]
    return min([*outputs[:1], config.get("real_action_dim", action_dim), action_dim])


def x_vla_config(
    config: dict, is_port: bool, domains: list[str], image_token_id: int, language_tokens: int
) -> WallVLAConfig:
    """`WallVLAConfig` of a published config.json.

    Args:
        config: its config.json.
        is_port: whether it is LeRobot's.
        domains: names of the domains, as many as `num_domains`.
        image_token_id: of the tokenizer.
        language_tokens: of the language in a row, padding included.
    """
    refuse_other_architectures(config, is_port)
    depth, width = config.get("depth", 24), config.get("hidden_size", 1024)
    check_depth("depth", depth)
    prompts = config.get("len_soft_prompts", 32)
    mode = mode_of(config)
    fields = {}
    if mode == "auto":
        channels = config.get("max_action_dim", 20)
        real = real_action_dim(config, channels)
        # The mean over the real channels; the original weighs it 100, LeRobot 1
        weight = (1.0 if is_port else 100.0) / real
        weights = [weight] * real + [0.0] * (channels - real)
        fields = {"action_dim": channels, "state_dim": channels, "loss_channel_weights": weights}
    if is_port:
        fields |= {
            "state_dim": config.get("max_state_dim", 32),
            "num_inference_steps": config.get("num_denoising_steps", 10),
        }
    return WallVLAConfig.x_vla(
        mode,
        vlm_config=florence_config(config.get("florence_config") or {}, image_token_id),
        action_expert={
            "kind": "soft_prompt",
            "conditioning": "soft_prompt" if prompts else "none",
            "hidden_size": width,
            "intermediate_size": int(width * config.get("mlp_ratio", 4.0)),
            "num_hidden_layers": depth,
            "num_attention_heads": config.get("num_heads", 16),
            "num_soft_prompts": prompts,
            "time_dim": config.get("dim_time", 32),
            "max_position_embeddings": config.get("max_len_seq", 512),
        },
        action_horizon=config.get("chunk_size", 32) if is_port else config.get("num_actions", 30),
        domains=domains,
        language_tokens=language_tokens,
        **fields,
    )


def space_of(config: WallVLAConfig) -> tuple:
    """What an action space is: channels, decisions among them, weights."""
    weights = [round(weight, 9) for weight in config.loss_channel_weights]
    return config.action_dim, list(config.binary_channels), weights


def action_mode(config: WallVLAConfig) -> str:
    """The published name of a model's action space. Raises ValueError if there is none for it."""
    found = space_of(config)
    for mode in ACTION_SPACES[:3]:
        if found == space_of(WallVLAConfig.x_vla(mode)):
            return mode
    channels, decisions, weights = found
    used = [weight for weight in weights if weight]
    if decisions or len(set(used)) != 1 or any(weights[len(used) :]):
        raise ValueError(
            f"X-VLA has no action mode with {channels} channels, binary_channels {decisions} and "
            f"loss_channel_weights {weights}: no export. Its modes are {', '.join(ACTION_SPACES)}."
        )
    return "auto"


def upstream_config(config: WallVLAConfig) -> dict:
    """The config.json that X-VLA's own code reads. It has no place for the weight of an "auto" loss, which is 100."""
    expert, vlm = config.action_expert, config.vlm_config
    if config.state_dim != config.action_dim:
        raise ValueError(
            f"X-VLA's own code has states as wide as actions; this model has state_dim {config.state_dim} and "
            f"action_dim {config.action_dim}: no export."
        )
    if expert.conditioning == "hpt" or config.sampler != "renoise" or config.prediction != "action":
        raise ValueError(
            f'X-VLA predicts the action with soft prompts; this model has conditioning "{expert.conditioning}", '
            f'prediction "{config.prediction}" and sampler "{config.sampler}": no export.'
        )
    mode, text, vision = action_mode(config), vlm.text_config.to_dict(), vlm.vision_config.to_dict()
    real = sum(weight > 0 for weight in config.loss_channel_weights)
    seen = ("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups")
    spoken = ("vocab_size", "d_model", "max_position_embeddings", "activation_function", "scale_embedding", "dropout")
    spoken += tuple(f"{side}_{part}" for side in ("encoder", "decoder") for part in ("layers", "ffn_dim"))
    spoken += ("encoder_attention_heads", "decoder_attention_heads", "attention_dropout", "activation_dropout")
    return {
        "model_type": "xvla",
        "architectures": ["XVLA"],
        "florence_config": {
            "model_type": "florence2",
            "projection_dim": vision["projection_dim"],
            "vocab_size": text["vocab_size"],
            "text_config": {"model_type": "florence2_language", **{name: text[name] for name in spoken}},
            "vision_config": {
                "model_type": "davit",
                **{name: vision[name] for name in (*seen, "window_size", "drop_path_rate", "projection_dim")},
                "dim_embed": vision["embed_dim"],
                "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision["max_position_embeddings"]},
                "visual_temporal_embedding": {
                    "type": "COSINE",
                    "max_temporal_embeddings": vision["max_temporal_embeddings"],
                },
                "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
            },
        },
        "hidden_size": expert.hidden_size,
        "depth": expert.num_hidden_layers,
        "num_heads": expert.num_attention_heads,
        "mlp_ratio": expert.intermediate_size / expert.hidden_size,
        "num_domains": len(config.domains),
        "len_soft_prompts": expert.num_soft_prompts if expert.conditioning == "soft_prompt" else 0,
        "dim_time": expert.time_dim,
        "max_len_seq": expert.max_position_embeddings,
        "use_hetero_proj": False,
        "num_actions": config.action_horizon,
        "action_mode": mode,
        "use_proprio": True,
        **({"max_action_dim": config.action_dim, "real_action_dim": real} if mode == "auto" else {}),
    }


def published_sizes(values: dict, tensors: dict[str, TensorInfo]) -> dict:
    """What `wallvla inspect` says of an X-VLA checkpoint, from its config.json and its headers."""
    prefix = find_prefix(list(tensors))
    bias = tensors.get(f"{prefix}transformer.action_decoder.bias.weight")
    rows, channels = bias.shape if bias is not None and len(bias.shape) == 2 else (None, None)
    return {
        "action_dim": channels,
        "action_horizon": values.get("num_actions", values.get("chunk_size")),
        "action_mode": mode_of(values),
        "domains": rows,
        "soft_prompts": values.get("len_soft_prompts", 32),
    }
