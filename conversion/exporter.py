"""`export`: a repository of this layout becomes a checkpoint in the published layout; the inverse of `convert`."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..action_space_wallvla import Embodiment
from ..configuration_wallvla import WallVLAConfig
from ..processing_wallvla import WallVLAProcessor
from . import x_vla, x_vla_robots
from .converter import PUBLISHED, REPORT, TABLES, UNUSED, check_space, corner, in_folder
from .layouts import NORMALIZER, Entry, Piece, WallLayout, compare, our_parameters, wall_entries
from .published import CANONICAL_DOF, load_tokenizer
from .tensor_files import (
    DTYPE_NAMES,
    DTYPES,
    TensorInfo,
    checksum,
    read_header,
    read_headers,
    read_json,
    read_tensor,
    shards,
    write_index,
    write_tensors,
)
from .x_vla import XVLALayout


STATE_PROJECTION = "state_proj.weight"


def export(
    source: str | Path, output: str | Path, max_shard_size: int | None = None, show_progress: bool = False
) -> Path:
    """Writes the checkpoint of `source` in the published layout of its kind, that of Wall-OSS or of X-VLA.

    A converted repository gives back the tensors that it came from, byte by byte, with its own configuration and
    normalisers. Another one (trained here, or from a bare Qwen2.5-VL) gets files in the same form.

    Args:
        source: folder in the layout of this package.
        output: folder that does not exist yet.
        max_shard_size: bytes of a shard; without it one file, as upstream has it.
        show_progress: show a progress bar.
    Raises:
        ValueError: the folder does not match its configuration, or upstream has no place for something.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists. Give another folder, or remove it first.")
    if not (source / "config.json").exists() or read_json(source / "config.json").get("model_type") != "wallvla":
        raise ValueError(f"{source} is no repository of this package. `wallvla inspect` says what it is.")
    config = WallVLAConfig.from_pretrained(source, local_files_only=True)
    kinds = config.vlm_config.model_type, config.action_expert.kind
    if kinds not in OUTPUTS:
        known = ", ".join(f"{expert} on {vlm}" for vlm, expert in OUTPUTS)
        raise ValueError(
            f"No published layout has a place for an action expert {kinds[1]} on {kinds[0]}; exports are: {known}."
        )
    processor = load_processor(source)
    tensors = read_headers(source)
    ours = [Entry(name, shape, (Piece(name, 0, shape),)) for name, shape in our_parameters(config).items()]
    compare(ours, tensors)
    report = read_json(source / REPORT) if (source / REPORT).exists() else {}
    published = OUTPUTS[kinds](source, config, processor, tensors, report.get("layout"))
    entries, kept = published.entries, published.kept
    infos = {entry.key: TensorInfo(Path(), tensors[entry.pieces[0].target].dtype, entry.shape) for entry in entries}
    infos |= {key: TensorInfo(Path(), DTYPE_NAMES[values.dtype], tuple(values.shape)) for key, values in kept.items()}
    files = shards(infos, max_shard_size or sum(info.bytes for info in infos.values()))

    folder = output.with_name(output.name + ".partial")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    check_space(folder, sum(info.bytes for info in infos.values()))

    def work(make_bar) -> Path:
        by_key = {entry.key: entry for entry in entries}
        with make_bar("export", sum(info.bytes for info in infos.values())) as progress:
            for file, group in files.items():
                write_file(folder / file, group, by_key, kept, tensors, progress)
        write_index(folder, files)
        published.write_files(folder)
        return output

    return in_folder(folder, output, work, show_progress)


@dataclass(frozen=True)
class Published:
    """What an export writes: tensors made of ours, tensors that are kept, and the small files, into a folder."""

    entries: list[Entry]
    kept: dict[str, torch.Tensor]
    write_files: Callable[[Path], None]


def wall_output(
    source: Path,
    config: WallVLAConfig,
    processor: WallVLAProcessor,
    tensors: dict[str, TensorInfo],
    found: dict | None,
) -> Published:
    """The Wall-OSS layout: that of `found`, or as Wall-OSS-0.5 has it."""
    layout = WallLayout(**found) if found else default_layout(config)
    if 0 < layout.state_rows < config.vlm_config.text_config.hidden_size:
        weights = read_tensor(tensors[STATE_PROJECTION], STATE_PROJECTION)
        if torch.count_nonzero(weights[layout.state_rows :]):  # trained since it was converted
            layout = replace(layout, state_rows=len(weights))
    prefix = layout.prefix + NORMALIZER
    tables = published_tables(source, processor, config)
    tables = {prefix + key.partition(NORMALIZER)[2]: values for key, values in tables.items()}

    def write(folder: Path) -> None:
        write_files(source, folder, config, processor, layout, tables)
        if not found:  # never was a Wall-OSS: the files of a bare Qwen2.5-VL do not describe it
            write_json(folder / "config.json", upstream_config(config, layout))

    return Published(wall_entries(config, layout), tables, write)


def x_vla_output(
    source: Path,
    config: WallVLAConfig,
    processor: WallVLAProcessor,
    tensors: dict[str, TensorInfo],
    found: dict | None,
) -> Published:
    """X-VLA's layout: that of `found`, or as its authors have it."""
    layout = XVLALayout(**found) if found else XVLALayout()
    file, stored = source / PUBLISHED / UNUSED, source / PUBLISHED / "config.json"
    kept = {key: read_tensor(info, key) for key, info in read_header(file).items()} if file.exists() else {}
    values = read_json(stored) if stored.exists() else x_vla.upstream_config(config)
    domains = len(config.domains)

    def write(folder: Path) -> None:
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        for path in (*stored.parent.glob("*.json"), *stored.parent.glob("*.txt")):
            shutil.copyfile(path, folder / path.name)
        if not stored.exists() or values.get("num_domains", 30) != domains:
            write_json(folder / "config.json", values | {"num_domains": domains})

    return Published(x_vla.entries(config, layout), kept, write)


# By the kinds of VLM and action expert
OUTPUTS = {("qwen2_5_vl", "mot"): wall_output, ("florence2", "soft_prompt"): x_vla_output}


def write_json(path: Path, values: dict) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def load_processor(folder: Path) -> WallVLAProcessor:
    """The processor of a folder, by its own classes: the Auto classes would ask before they run code of the folder."""
    values = read_json(folder / "processor_config.json")
    names = inspect.signature(WallVLAProcessor.__init__).parameters
    parts = ("image_processor", "action_codec")  # in files of their own, or not needed here
    fields = {name: value for name, value in values.items() if name in names and name not in parts}
    if values["image_processor"]["image_processor_type"].startswith("CLIP"):  # X-VLA
        image_processor = CLIPImageProcessorPil.from_dict(values["image_processor"])
        return WallVLAProcessor(image_processor, x_vla_robots.load_tokenizer(folder, str(folder)), **fields)
    image_processor = Qwen2VLImageProcessorPil.from_dict(values["image_processor"])
    return WallVLAProcessor(image_processor, load_tokenizer(folder), **fields)


def default_layout(config: WallVLAConfig) -> WallLayout:
    """As Wall-OSS-0.5 is published: everything fused, the vision width without padding."""
    projected = config.proprioception == "projected"
    return WallLayout(
        vision_width=config.vlm_config.vision_config.intermediate_size,
        state_rows=config.vlm_config.text_config.hidden_size if projected else 0,
        lm_head=not config.vlm_config.tie_word_embeddings,
    )


def assemble(entry: Entry, tensors: dict[str, TensorInfo], dtype: torch.dtype) -> torch.Tensor:
    """A published tensor from our parameters: the inverse of cutting it up. What no piece covers is zero."""
    only = entry.pieces[0]
    if entry.is_whole:
        ours = corner(read_tensor(tensors[only.target], only.target), 0, only.shape)
        return entry.to_published(ours).to(dtype).contiguous()
    result = torch.zeros(entry.shape, dtype=dtype)
    for piece in entry.pieces:
        part = corner(read_tensor(tensors[piece.target], piece.target), 0, piece.shape)
        corner(result, piece.start, piece.shape).copy_(part)
    return result


def write_file(
    path: Path,
    group: dict[str, TensorInfo],
    entries: dict[str, Entry],
    tables: dict[str, torch.Tensor],
    tensors: dict[str, TensorInfo],
    progress: tqdm,
) -> None:
    """Writes one file and reads it again."""

    def parts() -> Iterator[tuple[str, torch.Tensor]]:
        for key, info in group.items():
            yield key, tables[key] if key in tables else assemble(entries[key], tensors, DTYPES[info.dtype])
            progress.update(info.bytes)

    checksums = write_tensors(path, group, parts())
    for key, info in read_header(path).items():
        if checksum(read_tensor(info, key)) != checksums[key]:
            raise OSError(f"{key} in {path.name} is not what was written: the disk is failing, or it is full.")


def published_tables(source: Path, processor: WallVLAProcessor, config: WallVLAConfig) -> dict[str, torch.Tensor]:
    """Normaliser tables {key: float32 (channels,)}: those of the source, then those of robots that it did not know."""
    kept = {}
    file = source / PUBLISHED / TABLES
    if file.exists():
        kept = {key: read_tensor(info, key) for key, info in read_header(file).items()}
    known = {key.partition(NORMALIZER)[2].split(".", 2)[2] for key in kept}
    for path in (source / PUBLISHED).glob("normalizer_*.pth"):
        known |= {key.split(".", 1)[1] for key in torch.load(path, map_location="cpu", weights_only=True)}
    for name, robot in processor.embodiments.items():
        if name not in known and robot.statistics is not None:
            for kind, width in (("action", config.action_dim), ("state", processor.state_dim)):
                if kind in robot.statistics:
                    low, delta = embodiment_table(robot, kind, width or len(robot.state_channels))
                    short = "propri" if kind == "state" else kind
                    kept[f"{NORMALIZER}{short}.min.{name}"], kept[f"{NORMALIZER}{short}.delta.{name}"] = low, delta
    return kept


def embodiment_table(robot: Embodiment, kind: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`min` and `delta` (width,) of a robot. A channel that it lacks normalises a zero to its padding."""
    low = -(robot.padding(kind, width).astype(np.float64) + 1) / 2
    delta = np.ones(width)
    channels = robot.state_channels if kind == "state" else robot.action_channels
    q01, q99 = (np.array(robot.statistics[kind][name]) for name in ("q01", "q99"))
    low[channels], delta[channels] = q01, q99 - q01
    return torch.tensor(low, dtype=torch.float32), torch.tensor(delta, dtype=torch.float32)


def write_files(
    source: Path,
    folder: Path,
    config: WallVLAConfig,
    processor: WallVLAProcessor,
    layout: WallLayout,
    tables: dict[str, torch.Tensor],
) -> None:
    """config.json, config.yml, normalisers and tokenizer: the published ones where there are any."""
    kept = source / PUBLISHED
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    for path in kept.glob("*"):
        if path.name != TABLES:
            shutil.copyfile(path, folder / path.name)
    if not (folder / "config.yml").exists():
        recipe = {"task": {"action_horizon_flow": config.action_horizon, "dof_config": upstream_dof(processor)}}
        (folder / "config.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for kind in ("action", "propri"):
        prefix = f"{layout.prefix}{NORMALIZER}{kind}."
        content = {key.removeprefix(prefix): values for key, values in tables.items() if key.startswith(prefix)}
        path = folder / f"normalizer_{kind}.pth"
        known = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if set(content) - set(known):
            torch.save(content | known, path)


def upstream_dof(processor: WallVLAProcessor) -> dict[str, int]:
    """Upstream's dof_config {name: width} of the whole action."""
    if processor.action_dim == 26:
        return dict(zip([f"follow_{name}" for name in CANONICAL_DOF[:6]], (3, 6, 1, 3, 6, 1), strict=True)) | dict(
            zip(CANONICAL_DOF[6:], (3, 1, 2), strict=True)
        )
    return {"action": processor.action_dim}


def upstream_config(config: WallVLAConfig, layout: WallLayout) -> dict:
    """The config.json that upstream's code reads, in its flat form."""
    vlm, expert = config.vlm_config, config.action_expert
    text, vision = vlm.text_config, vlm.vision_config
    if config.prediction != "velocity":
        raise ValueError("Upstream's networks predict the velocity; this one predicts the action: no export.")
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "vocab_size",
        "hidden_act",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
    )
    seen = (
        "depth",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
        "tokens_per_second",
        "window_size",
        "fullatt_block_indexes",
    )
    flat, vision_fields = text.to_dict(), vision.to_dict()
    widths = [text.hidden_size, expert.hidden_size]
    return {
        "model_type": "qwen2_5_vl",
        **{name: flat[name] for name in sizes},
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text.rope_parameters["mrope_section"]},
        "tie_word_embeddings": vlm.tie_word_embeddings,
        "image_token_id": vlm.image_token_id,
        "video_token_id": vlm.video_token_id,
        "vision_start_token_id": vlm.vision_start_token_id,
        "vision_end_token_id": vlm.vision_end_token_id,
        "vision_config": {name: vision_fields[name] for name in seen} | {"in_chans": vision.in_channels},
        "num_experts": 2,
        "experts": [
            {"hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size},
            {"hidden_size": expert.hidden_size, "intermediate_size": expert.intermediate_size},
        ],
        "dim_inputs": widths,
        "action_hidden_size": expert.hidden_size,
        "state_hidden_size": layout.state_rows or text.hidden_size,
        **dict.fromkeys(("attention_moe", "mlp_moe", "norm_moe", "mot_opt", "proj_with_mask"), True),
        **dict.fromkeys(("use_adarms", "use_x_pred"), False),
        "use_flow_action_expert": True,
        "causal_action_attention_mask": expert.action_attention == "causal",
        "use_x_loss": config.loss_space == "action",
        "flow_loss_weight": 1.0,
        "ar_loss_weight": config.action_token_loss_weight,
        "action_horizon_flow": config.action_horizon,
        "use_state_string_representation": config.proprioception == "text",
        "noise_scheduler": {
            "beta_alpha": config.time_alpha,
            "beta_beta": 1.0,
            "s": config.time_scale,
            "num_inference_timesteps": config.num_inference_steps,
        },
    }
