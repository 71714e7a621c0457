"""Where each tensor of a published checkpoint goes: the same table for both directions, for `convert` and `export`.

A published tensor is cut by rows into our parameters. What is left over is padding and has to be zero.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil, prod

import torch

from ..configuration_wallvla import WallVLAConfig
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .tensor_files import TensorInfo


TEXT = "vlm.model.language_model"
VISION = "vlm.model.visual"
EXPERT = "action_expert"
EMBEDDING = f"{TEXT}.embed_tokens.weight"
NORMALIZER = "action_preprocessor.normalizer_"
# Vision MLPs are padded to a multiple of this while upstream trains: 3420 becomes 3456
VISION_PADDING = 128


@dataclass(frozen=True)
class Piece:
    """The rows from `start` on, as many as `shape` has, of a published tensor; the first rows of our `target`."""

    target: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A published tensor: its key, its shape and the pieces it is cut into.

    A tensor that is all of one parameter may be stored in another shape, its numbers in the same order, or, if
    `transposed`, as the transpose of our matrix.
    """

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is one parameter and nothing else."""
        return len(self.pieces) == 1 and prod(self.shape) == prod(self.pieces[0].shape)

    def to_ours(self, stored: torch.Tensor) -> torch.Tensor:
        """The published tensor in the form of our parameter; as it is, if it is cut into several."""
        if not self.is_whole:
            return stored
        return (stored.T if self.transposed else stored).reshape(self.pieces[0].shape)

    def to_published(self, ours: torch.Tensor) -> torch.Tensor:
        """Inverse of `to_ours` for a tensor that is one parameter."""
        return (ours.T if self.transposed else ours).reshape(self.shape)


@dataclass(frozen=True)
class WallLayout:
    """How a Wall-OSS checkpoint stores what `WallVLAConfig` describes.

    fused_attention, fused_mlp, fused_vision: one matrix for q, k, v; for gate and up; the same in the vision tower.
    vision_width: rows of a vision gate, padding included.
    state_rows: rows of `propri_proj`; 0 without one.
    lm_head: the tied head is stored a second time.
    prefix: what every key starts with.
    """

    fused_attention: bool = True
    fused_mlp: bool = True
    fused_vision: bool = True
    vision_width: int = 3420
    state_rows: int = 0
    lm_head: bool = False
    prefix: str = ""


def our_parameters(config: WallVLAConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all that a checkpoint of ours stores: parameters, tied ones once, and buffers."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(config)
    stored = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors if name in stored}


def find_prefix(keys: list[str]) -> str:
    """`"model."` if a wrapper put it before every key, else nothing."""
    return "model." if "model.model.embed_tokens.weight" in keys else ""


def find_wall_layout(tensors: dict[str, TensorInfo], config: WallVLAConfig) -> WallLayout:
    """The layout that the keys and shapes of a checkpoint show."""
    prefix = find_prefix(list(tensors))
    shapes = {key.removeprefix(prefix): info.shape for key, info in tensors.items()}
    width = config.vlm_config.vision_config.intermediate_size
    fused_vision = any(".mlp.gate_up_proj." in key for key in shapes if key.startswith("visual."))
    gate = shapes.get(f"visual.blocks.0.mlp.{'gate_up_proj' if fused_vision else 'gate_proj'}.weight", (0,))
    stored = gate[0] // (2 if fused_vision else 1)
    padded = ceil(width / VISION_PADDING) * VISION_PADDING
    return WallLayout(
        fused_attention=any(".qkv_proj_experts." in key for key in shapes),
        fused_mlp=any(key.startswith("model.layers.") and ".gate_up_proj." in key for key in shapes),
        fused_vision=fused_vision,
        vision_width=stored if stored == padded else width,
        state_rows=shapes.get("action_preprocessor.propri_proj.weight", (0,))[0],
        lm_head="lm_head.weight" in shapes,
        prefix=prefix,
    )


def whole(key: str, target: str, shape: tuple[int, ...]) -> Entry:
    """A published tensor that is one parameter of ours."""
    return Entry(key, shape, (Piece(target, 0, shape),))


def stacked(key: str, targets: dict[str, int], columns: tuple[int, ...], stride: int | None = None) -> Entry:
    """Parameters of `targets` {name: rows} on top of each other, `stride` rows apart if they are padded."""
    pieces, start = [], 0
    for target, rows in targets.items():
        pieces.append(Piece(target, start, (rows, *columns)))
        start += stride or rows
    return Entry(key, (start, *columns), tuple(pieces))


def vision_entries(config: WallVLAConfig, prefix: str, fused: bool, stored_width: int) -> list[Entry]:
    """The vision tower; `stored_width` rows of a gate, of which those after `intermediate_size` are padding."""
    vision = config.vlm_config.vision_config
    hidden, width = vision.hidden_size, vision.intermediate_size
    merged = hidden * vision.spatial_merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    entries = [
        whole(f"{prefix}patch_embed.proj.weight", f"{VISION}.patch_embed.proj.weight", (hidden, *patch)),
        whole(f"{prefix}merger.ln_q.weight", f"{VISION}.merger.ln_q.weight", (hidden,)),
    ]
    for number, rows in ((0, merged), (2, vision.out_hidden_size)):
        for kind, columns in (("weight", (merged,)), ("bias", ())):
            name = f"merger.mlp.{number}.{kind}"
            entries.append(whole(prefix + name, f"{VISION}.{name}", (rows, *columns)))
    for i in range(vision.depth):
        block = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            name = f"{block}{norm}.weight"
            entries.append(whole(prefix + name, f"{VISION}.{name}", (hidden,)))
        for linear, rows in (("attn.qkv", 3 * hidden), ("attn.proj", hidden)):
            for kind, columns in (("weight", (hidden,)), ("bias", ())):
                name = f"{block}{linear}.{kind}"
                entries.append(whole(prefix + name, f"{VISION}.{name}", (rows, *columns)))
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            gates = {f"{VISION}.{block}mlp.{part}_proj.{kind}": width for part in ("gate", "up")}
            if fused:
                name = f"{prefix}{block}mlp.gate_up_proj.{kind}"
                entries.append(stacked(name, gates, columns, stored_width))
            else:
                for part, target in zip(("gate", "up"), gates, strict=True):
                    name = f"{prefix}{block}mlp.{part}_proj.{kind}"
                    entries.append(stacked(name, {target: width}, columns, stored_width))
        down = f"{block}mlp.down_proj."
        entries.append(
            Entry(
                f"{prefix}{down}weight", (hidden, stored_width), (Piece(f"{VISION}.{down}weight", 0, (hidden, width)),)
            )
        )
        entries.append(whole(f"{prefix}{down}bias", f"{VISION}.{down}bias", (hidden,)))
    return entries


def wall_layer_entries(config: WallVLAConfig, layout: WallLayout, layer: int, expert: int) -> list[Entry]:
    """One layer of one expert: 0 is the VL expert, 1 the action expert."""
    text = config.vlm_config.text_config
    sizes, ours = ((text, TEXT), (config.action_expert, EXPERT))[expert]
    hidden, width, heads = sizes.hidden_size, sizes.intermediate_size, text.num_attention_heads
    head_dim = text.hidden_size // heads
    source, target = f"model.layers.{layer}.", f"{ours}.layers.{layer}."
    rows = {"q": heads * head_dim} | dict.fromkeys("kv", text.num_key_value_heads * head_dim)
    entries = []
    for norm in ("input_layernorm", "post_attention_layernorm"):
        entries.append(whole(f"{source}{norm}s.{expert}.weight", f"{target}{norm}.weight", (hidden,)))
    for kind, columns in (("weight", (hidden,)), ("bias", ())):
        names = {letter: f"{target}self_attn.{letter}_proj.{kind}" for letter in rows}
        if layout.fused_attention:
            pieces = {names[letter]: count for letter, count in rows.items()}
            entries.append(stacked(f"{source}self_attn.qkv_proj_experts.{expert}.{kind}", pieces, columns))
        else:
            for letter, count in rows.items():
                key = f"{source}self_attn.{letter}_proj_experts.{expert}.{kind}"
                entries.append(whole(key, names[letter], (count, *columns)))
    out = (hidden, heads * head_dim)
    entries.append(whole(f"{source}self_attn.o_proj_experts.{expert}.weight", f"{target}self_attn.o_proj.weight", out))
    experts = f"{source}moe.experts.{expert}."
    gates = {part: f"{target}mlp.{part}_proj.weight" for part in ("gate", "up")}
    if layout.fused_mlp:
        pieces = dict.fromkeys(gates.values(), width)
        entries.append(stacked(f"{experts}gate_up_proj.weight", pieces, (hidden,)))
    else:
        for part, name in gates.items():
            entries.append(whole(f"{experts}{part}_proj.weight", name, (width, hidden)))
    entries.append(whole(f"{experts}down_proj.weight", f"{target}mlp.down_proj.weight", (hidden, width)))
    return entries


def wall_entries(config: WallVLAConfig, layout: WallLayout) -> list[Entry]:
    """All weights of a Wall-OSS checkpoint with an expert for each pathway, without its normaliser tables."""
    text, expert = config.vlm_config.text_config, config.action_expert
    embedding = (text.vocab_size, text.hidden_size)
    entries = [
        whole("model.embed_tokens.weight", EMBEDDING, embedding),
        whole("model.norms.0.weight", f"{TEXT}.norm.weight", (text.hidden_size,)),
        whole("model.norms.1.weight", f"{EXPERT}.norm.weight", (expert.hidden_size,)),
    ]
    if layout.lm_head:
        tied = config.vlm_config.tie_word_embeddings
        entries.append(whole("lm_head.weight", EMBEDDING if tied else "vlm.lm_head.weight", embedding))
    for layer in range(text.num_hidden_layers):
        for number in (0, 1):
            entries += wall_layer_entries(config, layout, layer, number)
    entries += vision_entries(config, "visual.", layout.fused_vision, layout.vision_width)
    wide = expert.hidden_size
    for key, target, shape in (
        ("w1", "action_in_proj", (wide, 2 * config.action_dim)),
        ("w2", "action_time_mlp_in", (wide, 2 * wide)),
        ("w3", "action_time_mlp_out", (wide, wide)),
        ("action_proj_back", "action_out_proj", (config.action_dim, wide)),
    ):
        entries.append(whole(f"action_preprocessor.{key}.weight", f"{EXPERT}.{target}.weight", shape))
    if layout.state_rows:
        shape = (layout.state_rows, 2 * config.state_dim)
        entries.append(whole("action_preprocessor.propri_proj.weight", "state_proj.weight", shape))
    return [Entry(layout.prefix + entry.key, entry.shape, entry.pieces) for entry in entries]


def qwen_entries(config: WallVLAConfig, keys: list[str], vocab_size: int) -> list[Entry]:
    """All weights of a Qwen2.5-VL, under its first names (`visual.`, `model.`) or its new ones."""
    new = any(key.startswith("model.language_model.") for key in keys)
    text_prefix, vision_prefix = ("model.language_model.", "model.visual.") if new else ("model.", "visual.")
    text = config.vlm_config.text_config
    hidden, width, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    head_dim = hidden // heads
    key_rows = text.num_key_value_heads * head_dim
    shapes = {"embed_tokens.weight": (vocab_size, hidden), "norm.weight": (hidden,)}
    for i in range(text.num_hidden_layers):
        layer = f"layers.{i}."
        for letter, rows in (("q", heads * head_dim), ("k", key_rows), ("v", key_rows)):
            shapes[f"{layer}self_attn.{letter}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}self_attn.{letter}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            shapes[f"{layer}mlp.{part}_proj.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
    entries = [whole(text_prefix + name, f"{TEXT}.{name}", shape) for name, shape in shapes.items()]
    if "lm_head.weight" in keys or not config.vlm_config.tie_word_embeddings:
        target = EMBEDDING if config.vlm_config.tie_word_embeddings else "vlm.lm_head.weight"
        entries.append(whole("lm_head.weight", target, (vocab_size, hidden)))
    vision_width = config.vlm_config.vision_config.intermediate_size
    return entries + vision_entries(config, vision_prefix, False, vision_width)


def compare(entries: list[Entry], tensors: dict[str, TensorInfo], kept: Collection[str] = ()) -> None:
    """Raises ValueError if a checkpoint is not exactly `entries` and `kept`: names missing, unexpected and mis-shaped
    keys.
    """
    expected = {entry.key: entry.shape for entry in entries}
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected) - set(kept))
    shapes = [
        f"{key} is {list(tensors[key].shape)}, the configuration says {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = [f"  {len(keys)} {kind}: {keys[:8]}" for kind, keys in problems.items() if keys]
    if lines:
        raise ValueError(
            "The checkpoint does not match its configuration:\n" + "\n".join(lines) + "\nEvery tensor must be "
            "accounted for, so nothing was written. Download the checkpoint again, or correct its config.json."
        )
