"""What a published checkpoint says about itself: family, configuration, normaliser tables, robots, tokenizer."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..action_space_wallvla import CANONICAL_LAYOUT, Embodiment
from ..configuration_wallvla import WallVLAConfig
from ..processing_wallvla import WallVLAProcessor
from .layouts import NORMALIZER, find_prefix
from .tensor_files import TensorInfo, read_headers, read_json, read_tensor


SUPPORTED = (
    "Supported: Wall-OSS-0.5 and X-VLA (also LeRobot's ports), wall-oss-flow-0.1, Qwen2.5-VL of any size. "
    "docs/checkpoints.md has the command for each."
)
FILES = ["*.json", "*.safetensors", "*.pth", "*.yml", "*.yaml", "*.txt", "*.jinja", "*.model"]
# Tables of a few hundred numbers; anything larger is no normaliser
MAX_TABLE_BYTES = 64_000_000
MAX_LAYERS = 1000
# Names of upstream's dof_config in the order of the canonical action, without their prefix follow_ or master_
CANONICAL_DOF = (
    "left_ee_cartesian_pos",
    "left_ee_rotation",
    "left_gripper",
    "right_ee_cartesian_pos",
    "right_ee_rotation",
    "right_gripper",
    "velocity_decomposed",
    "height",
    "head_actions",
)
CAMERA_LABELS = {
    "face_view": "front view",
    "left_wrist_view": "left wrist view",
    "right_wrist_view": "right wrist view",
}
STATE_TOKEN, FLOW_TOKEN = "<|propri|>", "<|action|>"
ACTION_TOKEN = "<|action_token_{}|>"


@dataclass
class Checkpoint:
    """A published checkpoint on disk, headers only.

    family: "wall-oss", "x-vla", "qwen2.5-vl" or "wallvla" (already in this layout).
    config: its config.json (of LeRobot's port the part that describes the network).
    recipe: its config.yml, or LeRobot's fields.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    family: str
    config: dict
    recipe: dict
    is_port: bool = False
    notes: list[str] = field(default_factory=list)


def locate(source: str, patterns: list[str] = FILES) -> Path:
    """The folder of a checkpoint: `source` itself, or a snapshot of the Hub repository of that name."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} is neither a folder nor a Hub id such as x-square-robot/wall-oss-0.5.")
    return Path(snapshot_download(source, allow_patterns=patterns))


def find_family(keys: list[str]) -> str:
    """The family of a checkpoint by its keys. Raises ValueError for what cannot be converted, and says why."""
    prefix = find_prefix(keys)
    names = [key.removeprefix(prefix) for key in keys]
    if any(key.startswith("action_expert.") for key in names):
        return "wallvla"
    if any(key.endswith("transformer.action_encoder.fc.weight") for key in keys):
        return "x-vla"
    if any("qkv_proj_experts." in key or ".q_proj_experts." in key for key in names):
        return "wall-oss"
    if any(".moe.experts.1." in key for key in names):
        raise ValueError(
            "This is a first-generation Wall-OSS checkpoint (wall-oss-flow or wall-oss-fast): both experts share one "
            "attention projection and one set of norms, so it is another architecture than the published successor "
            "and cannot be loaded here. Use x-square-robot/wall-oss-0.5 (or wall-oss-flow-0.1, which has an expert "
            "for each pathway); LeRobot's policy wall_x runs the first generation."
        )
    if any(key.endswith("layers.0.mlp.gate_proj.weight") for key in names) and any("visual." in key for key in names):
        return "qwen2.5-vl"
    raise ValueError(f"None of the {len(keys)} keys is known, for instance {keys[:4]}. {SUPPORTED}")


def open_checkpoint(source: str) -> Checkpoint:
    """Reads what a checkpoint says about itself; no weights."""
    folder = locate(source)
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is a LoRA adapter of {base}, not a checkpoint. Merge it with peft in the published code "
            "(`PeftModel.from_pretrained(model, adapter).merge_and_unload()`), save the model and convert that folder."
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json. Give the folder of a complete checkpoint. {SUPPORTED}")
    tensors = read_headers(folder)
    config = read_json(folder / "config.json")
    recipe = {}
    if (folder / "config.yml").exists():
        recipe = yaml.safe_load((folder / "config.yml").read_text()) or {}
    family = find_family(list(tensors))
    is_port = (family, config.get("type")) in (("wall-oss", "wall_oss_05"), ("x-vla", "xvla"))
    if is_port and family == "wall-oss":
        if not config.get("vlm_config"):
            raise ValueError(
                "LeRobot's config.json has no vlm_config, which describes the network. Download it again."
            )
        recipe = {
            "action_horizon": config.get("chunk_size"),
            "cameras": config.get("camera_key_mapping"),
            **recipe,
        }
        config = config["vlm_config"]
    return Checkpoint(folder, tensors, family, config, recipe, is_port)


# --------------------------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------------------------


def vlm_config(config: dict, vocab_size: int) -> dict:
    """The VL expert of a published config.json, whose text fields are flat (Qwen's first form) or nested."""
    text_source = config.get("text_config") or config
    vision_source = config.get("vision_config") or {}
    needed = {
        "text": (text_source, ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
        "vision": (vision_source, ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")),
    }
    for part, (found, names) in needed.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)} of the {part} model. Download it again.")
    for name, found in (("num_hidden_layers", text_source), ("depth", vision_source)):
        if not isinstance(found[name], int) or not 0 < found[name] <= MAX_LAYERS:
            raise ValueError(f"config.json has {name} {found[name]}; it is a number from 1 to {MAX_LAYERS}.")
    skipped = {"rope_parameters", "layer_types", "dtype", "torch_dtype"}
    text = {
        name: text_source[name]
        for name in Qwen2_5_VLTextConfig.__dataclass_fields__
        if name in text_source and name not in skipped
    }
    rope = text_source.get("rope_parameters") or text_source.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("mrope", "default") or "mrope_section" not in rope:
        raise ValueError(
            f"config.json has rope {rope}; the model needs multi-section rope (type mrope with its mrope_section)."
        )
    theta = rope.get("rope_theta", text_source.get("rope_theta", 1e6))
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": float(theta),
        "mrope_section": rope["mrope_section"],
    }
    text["vocab_size"] = vocab_size
    # Qwen's configurations call a window size but do not use it
    text["use_sliding_window"] = False
    vision = {
        name: vision_source[name] for name in Qwen2_5_VLVisionConfig.__dataclass_fields__ if name in vision_source
    }
    vision.pop("rope_parameters", None)
    vision["in_channels"] = vision_source.get("in_channels", vision_source.get("in_chans", 3))
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": {name: value for name, value in vision.items() if name not in ("model_type", "dtype")},
        "tie_word_embeddings": config.get("tie_word_embeddings", text_source.get("tie_word_embeddings", False)),
        **{name: config[name] for name in ids if name in config},
    }


def refuse_other_architectures(config: dict) -> None:
    """Raises ValueError for settings of the published code under which it computes something else than we do."""
    scheduler = config.get("noise_scheduler") or {}
    experts = config.get("experts") or []
    for found, rule in (
        (config.get("use_adarms", False), "use_adarms: adaptive norms"),
        (config.get("use_x_pred", False), "use_x_pred: the clean action as output, with upstream's clamp"),
        (not config.get("proj_with_mask", True), "proj_with_mask false: actions without their mask"),
        (not config.get("use_flow_action_expert", True), "use_flow_action_expert false: no flow expert"),
        (config.get("use_lora", False), "use_lora: unmerged adapters"),
        (scheduler.get("time_shift", 1.0) != 1.0, f"time_shift {scheduler.get('time_shift')}"),
        (scheduler.get("beta_beta", 1.0) != 1.0, f"beta_beta {scheduler.get('beta_beta')}"),
        (len(experts) != 2, f"{len(experts)} experts; there are two, for language and for actions"),
        (not config.get("attention_moe", True), "attention_moe false: attention shared by the experts"),
        (not config.get("norm_moe", True), "norm_moe false: norms shared by the experts"),
    ):
        if found:
            raise ValueError(
                f"config.json says {rule}. No published checkpoint uses this and this model does not compute it; "
                "converting would change the results."
            )
    hidden = [expert.get("hidden_size") for expert in experts]
    if config.get("dim_inputs", hidden) != hidden or hidden[0] != config.get("hidden_size"):
        raise ValueError(
            f"config.json has experts of width {hidden}, dim_inputs {config.get('dim_inputs')} and hidden_size "
            f"{config.get('hidden_size')}; they must agree. Download it again."
        )


def from_recipe(recipe: dict, *paths: str):
    """The first of some dotted paths that a recipe has, or None."""
    for path in paths:
        value = recipe
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def tensor_shape(checkpoint: Checkpoint, key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are taken."""
    if key not in checkpoint.tensors:
        raise ValueError(f"The checkpoint has no {key}: missing, so its sizes are unknown. Download it again.")
    shape = checkpoint.tensors[key].shape
    if len(shape) != dimensions:
        raise ValueError(f"{key} has shape {list(shape)}, it should have {dimensions} dimensions. Download it again.")
    return shape


def wall_config(checkpoint: Checkpoint, tokenizer: Qwen2Tokenizer) -> WallVLAConfig:
    """`WallVLAConfig` of a Wall-OSS checkpoint; what config.json and the tensors leave open is noted."""
    config, recipe, notes = checkpoint.config, checkpoint.recipe, checkpoint.notes
    refuse_other_architectures(config)
    prefix = find_prefix(list(checkpoint.tensors))
    vocab_size = tensor_shape(checkpoint, f"{prefix}model.embed_tokens.weight", 2)[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the embedding {vocab_size} rows. They belong to different "
            "checkpoints; download both again."
        )
    if vocab_size != config.get("vocab_size"):
        notes.append(f"vocab_size {vocab_size} from the tensor; config.json says {config.get('vocab_size')}")
    action_dim = tensor_shape(checkpoint, f"{prefix}action_preprocessor.action_proj_back.weight", 2)[0]
    horizon = from_recipe(config, "action_horizon_flow") or from_recipe(
        recipe, "task.action_horizon_flow", "task.action_horizon", "data.action_horizon", "action_horizon"
    )
    if horizon is None:
        horizon = 32
        notes.append("action_horizon 32: the published chunk of one second; neither config.json nor config.yml has it")
    causal = config.get("causal_action_attention_mask")
    if causal is None:
        causal = any(".qkv_proj_experts." in key for key in checkpoint.tensors)
        notes.append(f"causal_action_attention_mask {causal}: not in config.json; as the published family has it")
    projection = f"{prefix}action_preprocessor.propri_proj.weight"
    fields = {"proprioception": "text"}
    if projection in checkpoint.tensors:
        fields = {
            "proprioception": "projected",
            "state_dim": tensor_shape(checkpoint, projection, 2)[1] // 2,
            "state_token_id": tokenizer.convert_tokens_to_ids(STATE_TOKEN),
        }
    text_says = config.get(
        "use_state_string_representation", from_recipe(recipe, "task.use_state_string_representation")
    )
    if text_says is not None and text_says != (fields["proprioception"] == "text"):
        notes.append(
            f"proprioception {fields['proprioception']!r}, as the tensors show; the configuration says "
            f"use_state_string_representation {text_says}"
        )
    scheduler = config.get("noise_scheduler") or {}
    flow_weight = config.get("flow_loss_weight", 1.0)
    token_weight = config.get("ar_loss_weight", 0.01) / flow_weight
    action_tokens = count_action_tokens(tokenizer)
    if not action_tokens:
        notes.append("no discrete action tokens: the tokenizer names none, so their ids are unknown")
    return WallVLAConfig(
        vlm_config=vlm_config(config, vocab_size),
        action_expert={
            "hidden_size": config["experts"][1]["hidden_size"],
            "intermediate_size": config["experts"][1]["intermediate_size"],
            "action_attention": "causal" if causal else "bidirectional",
        },
        action_dim=action_dim,
        action_horizon=horizon,
        action_token_start_id=tokenizer.convert_tokens_to_ids(ACTION_TOKEN.format(0)) if action_tokens else None,
        num_action_tokens=action_tokens,
        loss_space="action" if config.get("use_x_loss", False) else "velocity",
        action_token_loss_weight=token_weight,
        text_loss_weight=token_weight,
        time_alpha=scheduler.get("beta_alpha", 1.5),
        time_scale=scheduler.get("s", 0.999),
        num_inference_steps=scheduler.get("num_inference_timesteps", 10),
        norm_in_float32=True,
        **fields,
    )


def qwen_config(checkpoint: Checkpoint, tokenizer: Qwen2Tokenizer) -> tuple[WallVLAConfig, int]:
    """`WallVLAConfig` of a bare Qwen2.5-VL with Wall-OSS's action expert, and the rows of the published embedding."""
    new = any(key.startswith("model.language_model.") for key in checkpoint.tensors)
    rows = tensor_shape(checkpoint, f"model.{'language_model.' if new else ''}embed_tokens.weight", 2)[0]
    # Published tables have spare rows; they grow only if these do not suffice
    vocab_size = rows if len(tokenizer) <= rows else -(-len(tokenizer) // 64) * 64
    action_tokens = count_action_tokens(tokenizer)
    config = WallVLAConfig(
        vlm_config=vlm_config(checkpoint.config, vocab_size),
        action_token_start_id=tokenizer.convert_tokens_to_ids(ACTION_TOKEN.format(0)) if action_tokens else None,
        num_action_tokens=action_tokens,
    )
    return config, rows


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer, normaliser tables, robots
# --------------------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, action_tokens: int = 0) -> Qwen2Tokenizer:
    """The published tokenizer with the two tokens that upstream adds in code, and new discrete action tokens."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.json. Download the tokenizer files, too.")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_tokens([STATE_TOKEN, FLOW_TOKEN])
    if action_tokens:
        tokenizer.add_tokens([ACTION_TOKEN.format(i) for i in range(action_tokens)])
    return tokenizer


def count_action_tokens(tokenizer: Qwen2Tokenizer) -> int:
    """How many <|action_token_i|> a tokenizer has. Raises ValueError if their ids are not consecutive."""
    vocabulary = tokenizer.get_vocab()
    ids = []
    while ACTION_TOKEN.format(len(ids)) in vocabulary:
        ids.append(vocabulary[ACTION_TOKEN.format(len(ids))])
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError("The ids of the discrete action tokens are not consecutive; the losses need a range of ids.")
    return len(ids)


def load_image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """The source's image processor, or the published limits where it has none."""
    if (folder / "preprocessor_config.json").exists():
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    # Upstream's limits
    return Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)


def load_tables(checkpoint: Checkpoint, prefer: str | None = None) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Normaliser tables {"action" | "propri" | ...: {dataset: {"min", "delta"}}}, each float (channels,).

    They are stored up to twice: among the weights and as `normalizer_*.pth`.

    Args:
        checkpoint: where they are.
        prefer: "weights" or "files" decides where the two disagree; without it that is an error.
    """
    prefix = find_prefix(list(checkpoint.tensors)) + NORMALIZER
    tables = {"weights": {}, "files": {}}
    for key, info in checkpoint.tensors.items():
        if key.startswith(prefix):
            kind, column, dataset = split_table_key(key.removeprefix(prefix), key)
            tables["weights"].setdefault((kind, dataset), {})[column] = read_tensor(info, key)
    for path in sorted(checkpoint.folder.glob("normalizer_*.pth")):
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(
                f"{path.name} has {path.stat().st_size} bytes; a normaliser has a few thousand. Remove it."
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path.name} is not a table of tensors ({str(error).splitlines()[0]}). Nothing else is loaded from "
                "pickles; download it again."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} holds a {type(content).__name__}, not a table. Download it again.")
        kind = path.stem.removeprefix("normalizer_")
        for key, values in content.items():
            _, column, dataset = split_table_key(f"{kind}.{key}", f"{key} of {path.name}")
            tables["files"].setdefault((kind, dataset), {})[column] = values
    merged = {}
    for where in ("files", "weights"):
        for (kind, dataset), columns in tables[where].items():
            check_table(columns, f"normaliser {kind} of {dataset!r} in the {where}")
            other = merged.setdefault(kind, {}).get(dataset)
            same = other is None or all(torch.equal(columns[name], other[name]) for name in columns)
            if not same and prefer is None:
                raise ValueError(
                    f"The normaliser {kind} of {dataset!r} differs between the weights and normalizer_{kind}.pth. "
                    "Only one can be right: choose with --tables weights or --tables files."
                )
            if same or prefer == where:
                merged[kind][dataset] = columns
    return merged if "action" in merged or not checkpoint.is_port else port_tables(checkpoint.folder)


def port_tables(folder: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The tables of LeRobot's port where they are in its preprocessor: quantiles of one dataset, "lerobot"."""
    tables = {}
    for path in sorted(folder.glob("policy_preprocessor*normalizer*.safetensors"))[:1]:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(
                f"{path.name} has {path.stat().st_size} bytes; a normaliser has a few thousand. Remove it."
            )
        content = load_file(path)
        for kind, feature in (("action", "action"), ("propri", "observation.state")):
            names = [f"{feature}.q01", f"{feature}.q99"]
            if all(name in content for name in names):
                low, high = (content[name].float() for name in names)
                tables[kind] = {"lerobot": {"min": low, "delta": high - low}}
                check_table(tables[kind]["lerobot"], f"normaliser {kind} in {path.name}")
    return tables


def split_table_key(name: str, key: str) -> tuple[str, str, str]:
    """`action.min.DATASET` -> ("action", "min", DATASET); the name of a dataset may contain dots."""
    parts = name.split(".", 2)
    if len(parts) != 3 or parts[1] not in ("min", "delta"):
        raise ValueError(f"Unknown normaliser entry {key}: they are called KIND.min.DATASET and KIND.delta.DATASET.")
    return parts[0], parts[1], parts[2]


def check_table(columns: dict[str, torch.Tensor], name: str) -> None:
    """Raises ValueError if a table is not a `min` and a `delta` (channels,), finite and not below 0."""
    if set(columns) != {"min", "delta"}:
        raise ValueError(f"The {name} has only {', '.join(columns)}; it needs min and delta. Download it again.")
    low, delta = columns["min"], columns["delta"]
    if not all(isinstance(values, torch.Tensor) and values.is_floating_point() for values in (low, delta)):
        raise ValueError(
            f"The {name} holds {type(low).__name__} and {type(delta).__name__}; both are tensors of floats."
        )
    if low.ndim != 1 or low.shape != delta.shape:
        raise ValueError(f"The {name} has min {list(low.shape)} and delta {list(delta.shape)}; both are (channels,).")
    if not (low.isfinite().all() and delta.isfinite().all()) or (delta < 0).any():
        raise ValueError(f"The {name} has numbers that are not finite or a delta below 0. Download it again.")


def normalised_zero(columns: dict[str, torch.Tensor], width: int) -> list[float]:
    """A zero of each channel after normalisation: where channels that a robot lacks end up. `width` numbers.

    A range of zero counts as one. Channels that the table does not have are 0.
    """
    low, delta = columns["min"].double(), columns["delta"].double()
    zero = ((0 - low) / torch.where(delta == 0, 1.0, delta) * 2 - 1).clamp(-1, 1).tolist()
    return zero + [0.0] * (width - len(zero))


def layout_of(dof: dict | None, width: int) -> list[list]:
    """Our layout of upstream's dof_config {name: width}: the canonical one if it is that, else `native`."""
    if dof is not None:
        names = [name.removeprefix("follow_").removeprefix("master_") for name in dof]
        used = {name: count for name, count in zip(names, dof.values(), strict=True) if name != "action_padding"}
        if tuple(used) == CANONICAL_DOF and list(used.values()) == [count for _, count in CANONICAL_LAYOUT]:
            return [list(part) for part in CANONICAL_LAYOUT]
        return [["native", sum(used.values())]]
    if width == sum(count for _, count in CANONICAL_LAYOUT):
        return [list(part) for part in CANONICAL_LAYOUT]
    return [["native", width]]


def table_statistics(columns: dict[str, torch.Tensor], channels: np.ndarray) -> dict[str, list[float]]:
    """Statistics of `channels` from a normaliser table of minima and ranges (q01 and q99 - q01)."""
    low, delta = columns["min"].double().numpy(), columns["delta"].double().numpy()
    if len(channels) and channels[-1] >= len(low):
        raise ValueError(
            f"A layout reaches channel {channels[-1]}, the normaliser table has {len(low)} channels. Correct the "
            "layout, or give the robot its own statistics."
        )
    return {"q01": low[channels].tolist(), "q99": (low + delta)[channels].tolist()}


def build_embodiments(
    checkpoint: Checkpoint, config: WallVLAConfig, tables: dict, state_dim: int | None, given: list[str]
) -> dict[str, Embodiment]:
    """The robots of a checkpoint: one for each dataset with an action table.

    Args:
        checkpoint, config, tables, state_dim: what they belong to.
        given: `NAME` keeps only the named ones, `NAME=FILE` describes one by a JSON file (cameras, layouts, frame);
            without statistics of its own it takes those of the table NAME.
    """
    actions, states = tables.get("action", {}), tables.get("propri", {})
    wanted = dict(item.partition("=")[::2] for item in given) or dict.fromkeys(actions, "")
    recipe = checkpoint.recipe
    cameras = from_recipe(recipe, "cameras", "data.key_mappings.camera")
    if cameras is None:
        names = from_recipe(recipe, "data.resolution") or CAMERA_LABELS
        cameras = {f"observation.images.{name}": name for name in names}
        if not given:
            checkpoint.notes.append(
                f"cameras {', '.join(names)}, in the order of {'config.yml' if recipe.get('data') else 'upstream'}; "
                "--embodiment NAME=FILE describes the robot"
            )
    if actions and not given:
        checkpoint.notes.append(
            f"control_frequency {config.action_horizon}: the chunk of {config.action_horizon} steps lasts one second, "
            "as in the report; reference_frame absolute, that is, actions are taken as they are"
        )
    labels = {key: CAMERA_LABELS.get(name, str(name).replace("_", " ")) for key, name in cameras.items()}
    embodiments = {}
    for name, file in wanted.items():
        if name not in actions and not file:
            raise ValueError(
                f"--embodiment {name}: the checkpoint has no table of that name. It has "
                f"{', '.join(actions) or 'none'}; describe another robot with --embodiment {name}=FILE."
            )
        if file:
            values = read_json(Path(file))
        else:
            width = len(actions[name]["min"])
            state_width = len(states[name]["min"]) if name in states else 0
            state_layout = layout_of(from_recipe(recipe, "task.agent_pos_config", "agent_pos_config"), state_width)
            values = {
                "cameras": list(labels.items()),
                "control_frequency": config.action_horizon,
                "action_horizon": config.action_horizon,
                "state_layout": state_layout if state_width else [],
                "action_layout": layout_of(from_recipe(recipe, "task.dof_config", "dof_config"), width),
                "rotation_format": "rot6d_rows",
            }
        robot = Embodiment.from_dict(values)
        if robot.statistics is None and name in actions:
            statistics = {"action": table_statistics(actions[name], robot.action_channels)}
            values = robot.to_dict() | {"action_padding": normalised_zero(actions[name], config.action_dim)}
            if name in states and len(robot.state_channels):
                statistics["state"] = table_statistics(states[name], robot.state_channels)
                values["state_padding"] = normalised_zero(states[name], state_dim) if state_dim else ()
            robot = Embodiment.from_dict(values | {"statistics": statistics})
        embodiments[name] = robot
    return embodiments


def build_processor(
    checkpoint: Checkpoint,
    config: WallVLAConfig,
    tokenizer: Qwen2Tokenizer,
    tables: dict,
    given: list[str],
    state_bins: int | None = None,
    longest_side: int | None = None,
) -> WallVLAProcessor:
    """The processor of a checkpoint. What it leaves open is noted: bins of the state, size of the images."""
    recipe, notes = checkpoint.recipe, checkpoint.notes
    is_wall = checkpoint.family == "wall-oss"
    state_bins = state_bins or from_recipe(recipe, "data.state_bins")
    if state_bins is None:
        state_bins = 512 if is_wall else 256
        if is_wall and config.proprioception == "text":
            notes.append(
                "state_bins 512: as in LeRobot's port, which reports equal outputs; upstream's loader says 256 and "
                "the checkpoint says nothing. --state-bins changes it"
            )
    sizes = from_recipe(recipe, "data.resolution") or {}
    longest_side = longest_side or max((side for side in sizes.values() if side and side > 0), default=448)
    state_dim = None
    if is_wall:
        widths = {len(columns["min"]) for columns in tables.get("propri", {}).values()}
        state_dim = (
            config.state_dim if config.proprioception == "projected" else max(widths, default=config.action_dim)
        )
    return WallVLAProcessor(
        load_image_processor(checkpoint.folder),
        tokenizer,
        build_embodiments(checkpoint, config, tables, state_dim, given),
        action_dim=config.action_dim,
        action_horizon=config.action_horizon,
        state_bins=state_bins,
        longest_side=longest_side,
        state_dim=state_dim,
        proprioception=config.proprioception,
    )
