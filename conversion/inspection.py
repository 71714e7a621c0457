"""`inspect`: what a checkpoint is, from headers and small files; no weights in memory."""

from math import prod
from pathlib import Path

import torch

from ..action_space_wallvla import Embodiment
from .layouts import NORMALIZER, find_prefix
from .published import MAX_TABLE_BYTES, find_family, locate
from .tensor_files import read_headers, read_json
from .x_vla import published_sizes


def part_of(key: str) -> str:
    """The part of the network that a parameter belongs to, in any of the known layouts."""
    if NORMALIZER in key:
        return "normaliser tables"
    if any(
        name in key for name in ("visual.", "vision_tower.", "vlm.image_", "multi_modal_projector.", "visual_temporal")
    ):
        return "vision tower"
    if any(
        name in key for name in ("embed_tokens", "lm_head", "language_model.shared.", "language_model.model.shared.")
    ):
        return "token embedding"
    if "soft_prompt" in key:
        return "soft prompts"
    heads = ("action_preprocessor.", "state_proj.", "action_in_proj.", "action_time_mlp", "action_out_proj.")
    heads += ("action_encoder.", "action_decoder.")
    if any(name in key for name in heads):
        return "action heads"
    second = ("_experts.1.", ".experts.1.", "norms.1.")
    if key.startswith(("action_expert.", "transformer.", "model.transformer.")) or any(name in key for name in second):
        return "action expert"
    return "language model"


def table_names(folder: Path, keys: list[str], kind: str) -> list[str]:
    """Datasets that have a normaliser `kind`, among the weights or as `.pth`."""
    start = f"{NORMALIZER}{kind}.min."
    names = {key.partition(start)[2] for key in keys if start in key}
    path = folder / f"normalizer_{kind}.pth"
    if path.exists() and path.stat().st_size <= MAX_TABLE_BYTES:
        content = torch.load(path, map_location="cpu", weights_only=True)
        names |= {key.removeprefix("min.") for key in content if key.startswith("min.")}
    return sorted(names)


def robot_lines(values: dict) -> dict:
    """What `wallvla inspect` says of one robot, from its JSON form."""
    robot = Embodiment.from_dict(values)
    found = robot.statistics or {}
    return {
        "cameras": list(robot.cameras.values()),
        "control_frequency": robot.control_frequency,
        "action_horizon": robot.action_horizon,
        "action": [list(part) for part in robot.action_layout],
        "state": [list(part) for part in robot.state_layout],
        "reference_frame": robot.reference_frame,
        "statistics": {kind: sorted(columns) for kind, columns in found.items()},
    }


def inspect(path: str) -> dict:
    """Family, parameters by part, dtypes, robots, action space and tokens of a checkpoint.

    Args:
        path: folder or Hub id.
    Returns:
        A dictionary that JSON can hold.
    """
    folder = locate(path)
    tensors = read_headers(folder)
    keys = list(tensors)
    try:
        family, problem = find_family(keys), None
    except ValueError as error:
        family, problem = "not supported", str(error)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    parts, dtypes = {}, {}
    for key, info in tensors.items():
        count = prod(info.shape)
        parts[part_of(key)] = parts.get(part_of(key), 0) + count
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + count
    embedding = [info.shape for key, info in tensors.items() if part_of(key) == "token embedding"]
    prefix = find_prefix(keys)
    heads = ("action_expert.action_out_proj.weight", f"{prefix}action_preprocessor.action_proj_back.weight")
    action_dim = [tensors[name].shape[0] for name in heads if name in tensors]
    action_dim += [info.shape[-1] for key, info in tensors.items() if key == "action_expert.action_decoder.bias"]
    weights = sum(count for part, count in parts.items() if part != "normaliser tables")
    result = {
        "path": path,
        "family": family,
        "parameters": weights,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "dtypes": dtypes,
        "tensors": len(tensors),
        "files": sorted({info.file.name for info in tensors.values()}),
        "embedding_rows": embedding[0][0] if embedding else None,
        "action_dim": action_dim[0] if action_dim else None,
        "action_horizon": config.get("action_horizon", config.get("action_horizon_flow", config.get("chunk_size"))),
    }
    if problem:
        result["why"] = problem
    if family == "wallvla":
        processor = read_json(folder / "processor_config.json") if (folder / "processor_config.json").exists() else {}
        names = ("state_bins", "state_dim", "longest_side", "proprioception")
        result["processor"] = {name: processor[name] for name in names if name in processor}
        result["action_tokens"] = {
            "first_id": config.get("action_token_start_id"),
            "count": config.get("num_action_tokens", 0),
        }
        result["embodiments"] = {
            name: robot_lines(values) for name, values in processor.get("embodiments", {}).items()
        }
    elif family == "wall-oss":
        projected = f"{prefix}action_preprocessor.propri_proj.weight" in tensors
        result["proprioception"] = "projected" if projected else "text"
        result["normalisers"] = {kind: table_names(folder, keys, kind) for kind in ("action", "propri")}
    elif family == "x-vla":
        result |= published_sizes(config, tensors)
    return result


def inspection_text(result: dict) -> str:
    """The result of `inspect` for people."""
    lines = [
        f"{result['path']}: {result['family']}, {result['parameters']:,} parameters in {result['tensors']} tensors",
        *(f"  {part:<20}{count:>16,}" for part, count in result["parts"].items()),
        f"stored as {', '.join(f'{name} ({count:,})' for name, count in result['dtypes'].items())}",
        f"files: {', '.join(result['files'])}",
        f"token embedding: {result['embedding_rows']} rows",
    ]
    if result["action_dim"]:
        lines.append(f"actions: {result['action_dim']} channels, horizon {result['action_horizon'] or 'not stated'}")
    if "proprioception" in result:
        lines.append(f"proprioception: {result['proprioception']}")
    if "action_mode" in result:
        lines.append(
            f"action mode {result['action_mode']}; {result['domains']} domains, {result['soft_prompts']} soft prompts"
        )
    for name, value in result.get("processor", {}).items():
        lines.append(f"{name}: {value}")
    if "action_tokens" in result:
        tokens = result["action_tokens"]
        lines.append(f"discrete action tokens: {tokens['count']}, from id {tokens['first_id']}")
    for kind, names in result.get("normalisers", {}).items():
        lines.append(f"normaliser {kind}: {', '.join(names) or 'none'}")
    for name, robot in result.get("embodiments", {}).items():
        lines.append(
            f"embodiment {name}: {', '.join(robot['cameras'])}; {robot['action_horizon']} steps at "
            f"{robot['control_frequency']} Hz; {robot['reference_frame']}"
        )
        for kind in ("action", "state"):
            layout = ", ".join(f"{part} {width}" for part, width in robot[kind])
            lines.append(f"  {kind}: {layout or 'none'}; statistics {robot['statistics'].get(kind, 'none')}")
    if "why" in result:
        lines.append(result["why"])
    return "\n".join(lines)
