"""`convert`: a published checkpoint becomes a repository of this layout, tensor by tensor, or nothing is written.

open_checkpoint      headers, config.json, config.yml                     published.py
-> entries           what must be in the checkpoint, and where it goes    layouts.py
-> plan              our parameters, each with its source, in shards
-> write             stream; CRC-32 of every tensor                       tensor_files.py
-> verify            read everything again
-> report, rename    the output appears under its name only now
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Tokenizer
from transformers.dynamic_module_utils import custom_object_save

from ..action_experts_wallvla import ACTION_EXPERTS
from ..configuration_wallvla import WallVLAConfig
from ..modeling_wallvla import WallVLAForConditionalGeneration
from ..processing_wallvla import WallVLAProcessor
from . import x_vla, x_vla_robots
from .layouts import (
    EXPERT,
    NORMALIZER,
    Entry,
    WallLayout,
    compare,
    find_prefix,
    find_wall_layout,
    our_parameters,
    qwen_entries,
    wall_entries,
)
from .published import (
    Checkpoint,
    build_processor,
    load_tables,
    load_tokenizer,
    open_checkpoint,
    qwen_config,
    wall_config,
)
from .tensor_files import (
    DTYPE_NAMES,
    DTYPES,
    INDEX_NAME,
    TensorInfo,
    checksum,
    read_header,
    read_tensor,
    shards,
    write_index,
    write_tensors,
)
from .x_vla import XVLALayout


DTYPES_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT = "conversion_report.json"
# What the upstream layout has and this one does not: kept as it is, for `export`
PUBLISHED = "published"
TABLES, UNUSED = "normalizers.safetensors", "unused.safetensors"
KEPT_TENSORS = {"wall-oss": TABLES, "x-vla": UNUSED}
WENT_TO = {
    "wall-oss": f"processor_config.json (statistics) and {PUBLISHED}/{TABLES}",
    "x-vla": f"{PUBLISHED}/{UNUSED}; nothing that is computed depends on it",
}
KEPT_FILES = {
    "wall-oss": ("config.json", "config.yml", "normalizer_*.pth"),
    "qwen2.5-vl": ("config.json",),
    "x-vla": ("*.json", "*.txt"),
}


@dataclass
class Options:
    """How to convert. The command line has the same names.

    embodiment: see `published.build_embodiments`.
    dtype: "auto" keeps what is stored, so that the result is exact; "float32", "bfloat16" or "float16" casts, except
        for norms and heads, which stay as they are.
    max_shard_size: bytes of a shard.
    state_bins, longest_side: override what the checkpoint says.
    tables: which normaliser tables count where weights and `.pth` files disagree, "weights" or "files".
    action_tokens: discrete action tokens to add to a bare Qwen2.5-VL.
    tokenizer: folder or Hub id of a tokenizer, for an X-VLA without one.
    seed: of the parameters that a bare Qwen2.5-VL does not have.
    """

    embodiment: list[str] = field(default_factory=list)
    dtype: str = "auto"
    max_shard_size: int = 4_000_000_000
    state_bins: int | None = None
    longest_side: int | None = None
    tables: str | None = None
    action_tokens: int = 0
    tokenizer: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Origin:
    """Where a parameter of ours comes from: rows `start` on of the published tensor `key`; new without a key.

    fill: what the rows are that the published tensor does not have: "zeros", "ones" or "normal".
    """

    key: str | None
    start: int = 0
    shape: tuple[int, ...] = ()
    fill: str = "zeros"


@dataclass(frozen=True)
class Parts:
    """What a family of checkpoints is here.

    kept: keys of tensors that no parameter holds.
    layout: how the family stores its tensors; `None`: the action expert is new.
    """

    config: WallVLAConfig
    processor: WallVLAProcessor
    entries: list[Entry]
    kept: list[str]
    layout: WallLayout | XVLALayout | None


@dataclass
class Plan:
    """Everything that is known before the first weight is read."""

    checkpoint: Checkpoint
    parts: Parts
    origins: dict[str, Origin]
    files: dict[str, dict[str, TensorInfo]]
    seed: int

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: info for group in self.files.values() for name, info in group.items()}


def stays_float32(name: str, config: WallVLAConfig) -> bool:
    """Whether a parameter keeps its stored dtype when the others are cast: heads, and norms of both experts if the
    model computes them in float32.
    """
    parts = name.split(".")
    heads = (*ACTION_EXPERTS[config.action_expert.kind].fp32_modules, "state_proj")
    norms = ("input_layernorm", "post_attention_layernorm", "norm") if config.norm_in_float32 else ()
    return parts[-2] in heads or (parts[-2] in norms and not name.startswith("vlm.model.visual."))


def wall_parts(checkpoint: Checkpoint, options: Options) -> Parts:
    """Wall-OSS."""
    tensors = checkpoint.tensors
    tokenizer = load_tokenizer(checkpoint.folder)
    config = wall_config(checkpoint, tokenizer)
    prefix = find_prefix(list(tensors)) + NORMALIZER
    kept = [key for key in tensors if key.startswith(prefix)]
    layout = find_wall_layout(tensors, config)
    entries = wall_entries(config, layout)
    compare(entries, tensors, kept)
    return Parts(config, qwen_processor(checkpoint, config, tokenizer, options), entries, kept, layout)


def qwen_parts(checkpoint: Checkpoint, options: Options) -> Parts:
    """A bare Qwen2.5-VL."""
    tokenizer = load_tokenizer(checkpoint.folder, options.action_tokens)
    config, rows = qwen_config(checkpoint, tokenizer)
    entries = qwen_entries(config, list(checkpoint.tensors), rows)
    compare(entries, checkpoint.tensors)
    return Parts(config, qwen_processor(checkpoint, config, tokenizer, options), entries, [], None)


def qwen_processor(
    checkpoint: Checkpoint, config: WallVLAConfig, tokenizer: Qwen2Tokenizer, options: Options
) -> WallVLAProcessor:
    """The processor of the two families above."""
    tables = load_tables(checkpoint, options.tables)
    return build_processor(
        checkpoint, config, tokenizer, tables, options.embodiment, options.state_bins, options.longest_side
    )


def x_vla_parts(checkpoint: Checkpoint, options: Options) -> Parts:
    """X-VLA."""
    steps = x_vla_robots.read_steps(checkpoint)
    tokenizer = x_vla_robots.load_tokenizer(checkpoint.folder, options.tokenizer or steps.tokenizer)
    config = x_vla_robots.published_config(checkpoint, steps, tokenizer)
    layout = x_vla.find_layout(list(checkpoint.tensors))
    kept = [key for key in checkpoint.tensors if key == layout.prefix + x_vla.LOGITS_BIAS]
    entries = x_vla.entries(config, layout)
    compare(entries, checkpoint.tensors, kept)
    processor = x_vla_robots.build_processor(checkpoint, config, steps, tokenizer, options.embodiment)
    return Parts(config, processor, entries, kept, layout)


PARTS = {"wall-oss": wall_parts, "qwen2.5-vl": qwen_parts, "x-vla": x_vla_parts}


def make_plan(source: str, options: Options) -> Plan:
    """Reads headers and configuration and decides where everything goes.

    Raises:
        ValueError: anything that does not match; names the keys.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.family == "wallvla":
        raise ValueError(f"{source} is already in the layout of this package: load it, or use `wallvla export`.")
    if options.action_tokens and checkpoint.family != "qwen2.5-vl":
        raise ValueError("--action-tokens extends a bare Qwen2.5-VL; this checkpoint has its own vocabulary.")
    parts = PARTS[checkpoint.family](checkpoint, options)
    config, tensors = parts.config, checkpoint.tensors
    origins = find_origins(parts.entries)
    shapes = our_parameters(config)
    assert set(origins) <= set(shapes), set(origins) - set(shapes)
    for name in shapes.keys() - origins.keys():
        if parts.layout is not None or not name.startswith(f"{EXPERT}."):
            raise ValueError(f"Nothing in the checkpoint becomes {name}: config.json and weights disagree.")
    # New parameters last; the others in the order of the published tensors, so that each of those is read once
    for name in shapes:
        fill = "ones" if "norm" in name else "zeros" if name.endswith("bias") else "normal"
        origins.setdefault(name, Origin(None, fill=fill))
    main = DTYPES[tensors[parts.entries[0].key].dtype] if options.dtype == "auto" else DTYPES_BY_NAME[options.dtype]
    config.dtype = main
    infos = {}
    for name, origin in origins.items():
        dtype = "F32" if origin.key is None else tensors[origin.key].dtype
        if not stays_float32(name, config) and (options.dtype != "auto" or origin.key is None):
            dtype = DTYPE_NAMES[main]
        infos[name] = TensorInfo(Path(), dtype, shapes[name])
    files = shards(infos, options.max_shard_size)
    return Plan(checkpoint, parts, origins, files, options.seed)


def find_origins(entries: list[Entry]) -> dict[str, Origin]:
    """{parameter of ours: its origin}, without tied copies."""
    origins = {}
    for entry in entries:
        for piece in entry.pieces:
            if piece.target not in origins:  # or it is a tied head that is stored a second time
                grows = "normal" if piece.target.endswith(("embed_tokens.weight", "lm_head.weight")) else "zeros"
                origins[piece.target] = Origin(entry.key, piece.start, piece.shape, grows)
    return origins


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def corner(tensor: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """`shape` entries of a tensor, from row `start` and column 0 on."""
    tensor = tensor[start : start + shape[0]]
    return tensor[:, : shape[1]] if len(shape) > 1 else tensor


def read_checked(checkpoint: Checkpoint, entry: Entry) -> torch.Tensor:
    """A published tensor in our form. Raises ValueError if it is not finite or its padding is not zero."""
    tensor = read_tensor(checkpoint.tensors[entry.key], entry.key)
    # Both ends are finite exactly if all is: NaN is passed on. One pass, no mask as large as the tensor
    if not all(end.isfinite() for end in torch.aminmax(tensor)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{entry.key} has {count} numbers that are not finite. Download the checkpoint again.")
    covered = sum(torch.Size(piece.shape).numel() for piece in entry.pieces)
    if covered < tensor.numel():
        nonzero = torch.count_nonzero(tensor) - sum(
            torch.count_nonzero(corner(tensor, piece.start, piece.shape)) for piece in entry.pieces
        )
        if nonzero:
            raise ValueError(
                f"{entry.key} is {list(tensor.shape)}, which is padded to {[list(p.shape) for p in entry.pieces]}, "
                f"but {int(nonzero)} numbers of the padding are not zero: it is not the padding that upstream adds."
            )
    return entry.to_ours(tensor)


def initial(name: str, shape: tuple[int, ...], fill: str, std: float, seed: int) -> torch.Tensor:
    """A new parameter, float32. It depends on its name and the seed only, so a resumed conversion draws the same."""
    if fill == "normal":
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(0.0, std, generator=generator)
    return torch.zeros(shape) if fill == "zeros" else torch.ones(shape)


def stream(plan: Plan, group: dict[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one shard. A published tensor that is cut into several pieces is read once."""
    by_key = {entry.key: entry for entry in plan.parts.entries}
    last_key, last = None, None
    for name, info in group.items():
        origin, dtype = plan.origins[name], DTYPES[info.dtype]
        std = plan.parts.config.initializer_range
        if origin.key is None:
            yield name, initial(name, info.shape, origin.fill, std, plan.seed).to(dtype)
            continue
        if origin.key != last_key:
            last = None  # free it before the next one is read
            last_key, last = origin.key, read_checked(plan.checkpoint, by_key[origin.key])
        tensor = corner(last, origin.start, origin.shape).to(dtype)
        if dtype == torch.float16 and not all(end.isfinite() for end in torch.aminmax(tensor)):
            raise ValueError(f"{origin.key} has numbers beyond the range of float16. Use --dtype bfloat16 or float32.")
        if tensor.shape != info.shape:
            grown = initial(name, (info.shape[0] - tensor.shape[0], *info.shape[1:]), origin.fill, std, plan.seed)
            tensor = torch.cat([tensor, grown.to(dtype)])
        yield name, tensor.contiguous()


def check_tied_copies(plan: Plan) -> None:
    """A tied head that is stored a second time has to equal the embedding; it is not written again."""
    for entry in plan.parts.entries:
        for piece in entry.pieces:
            origin = plan.origins[piece.target]
            if origin.key != entry.key and not torch.equal(
                read_checked(plan.checkpoint, entry), read_tensor(plan.checkpoint.tensors[origin.key], origin.key)
            ):
                raise ValueError(
                    f"{entry.key} differs from {origin.key}, though config.json ties them. Set tie_word_embeddings to "
                    "false in config.json if the head is its own."
                )


def fingerprint(plan: Plan) -> str:
    """What the content of the shards depends on: an interrupted conversion goes on only with the same."""
    sources = sorted({info.file for info in plan.checkpoint.tensors.values()})
    described = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sources]
    files = {
        file: {name: [info.dtype, info.shape] for name, info in group.items()} for file, group in plan.files.items()
    }
    return hashlib.sha256(json.dumps([described, files, plan.seed]).encode()).hexdigest()


def write_weights(plan: Plan, folder: Path, progress: tqdm) -> dict[str, int]:
    """Writes the shards that are not there yet. {name: CRC-32}."""
    checksums = {}
    for file, group in plan.files.items():
        done = folder / f"{file}.crc.json"
        if done.exists() and (folder / file).exists():
            checksums.update(json.loads(done.read_text()))
            progress.update(sum(info.bytes for info in group.values()))
            continue

        def counted(group: dict[str, TensorInfo] = group) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in stream(plan, group):
                yield name, tensor
                progress.update(group[name].bytes)

        found = write_tensors(folder / file, group, counted())
        done.write_text(json.dumps(found))
        checksums.update(found)
    write_index(folder, plan.files)
    return checksums


def verify_weights(plan: Plan, folder: Path, checksums: dict[str, int], progress: tqdm) -> None:
    """Reads every tensor again, from the files under their headers, and compares dtype, shape and bytes."""
    for file, group in plan.files.items():
        tensors = read_header(folder / file)
        if set(tensors) != set(group):
            raise OSError(f"{file} does not have the tensors that were written to it: the disk is failing.")
        for name, info in group.items():
            found = tensors[name]
            if (found.dtype, found.shape) != (info.dtype, info.shape) or (
                checksum(read_tensor(found, name)) != checksums[name]
            ):
                raise OSError(f"{name} in {file} is not what was written: the disk is failing, or it is full.")
            progress.update(info.bytes)


# --------------------------------------------------------------------------------------------------------------------
# The rest of the repository, and the command
# --------------------------------------------------------------------------------------------------------------------


def write_repository(plan: Plan, folder: Path) -> None:
    """Configuration, processor, code files and what is kept for `export`; everything but the weights."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(plan.parts.config)
    plan.parts.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=plan.parts.config)
    plan.parts.config.save_pretrained(folder)
    plan.parts.processor.save_pretrained(folder)
    family, kept = plan.checkpoint.family, folder / PUBLISHED
    kept.mkdir(exist_ok=True)
    for pattern in KEPT_FILES[family]:
        for path in plan.checkpoint.folder.glob(pattern):
            if path.name != INDEX_NAME:
                shutil.copyfile(path, kept / path.name)
    if plan.parts.kept:
        infos = {key: plan.checkpoint.tensors[key] for key in plan.parts.kept}
        write_tensors(
            kept / KEPT_TENSORS[family], infos, ((key, read_tensor(info, key)) for key, info in infos.items())
        )


def make_report(plan: Plan, checksums: dict[str, int]) -> dict:
    """Every published key and where it went, every parameter of ours and where it came from."""
    tensors = plan.checkpoint.tensors
    source = {}
    for entry in plan.parts.entries:
        went = [
            {"parameter": piece.target, "first_row": piece.start, "shape": list(piece.shape)} for piece in entry.pieces
        ]
        source[entry.key] = {"dtype": tensors[entry.key].dtype, "shape": list(entry.shape), "went_to": went}
    for key in plan.parts.kept:
        source[key] = {
            "dtype": tensors[key].dtype,
            "shape": list(tensors[key].shape),
            "went_to": WENT_TO[plan.checkpoint.family],
        }
    assert set(source) == set(tensors), set(source) ^ set(tensors)
    parameters = {}
    for name, info in plan.infos.items():
        origin = plan.origins[name]
        rows = 0 if origin.key is None else origin.shape[0]
        came = {"key": origin.key, "first_row": origin.start, "rows": rows}
        if rows < info.shape[0]:
            came["new_rows"] = {"rows": info.shape[0] - rows, "values": origin.fill}
        parameters[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "came_from": came,
            "crc32": checksums[name],
        }
    return {
        "family": plan.checkpoint.family,
        "is_port": plan.checkpoint.is_port,
        "layout": None if plan.parts.layout is None else asdict(plan.parts.layout),
        "source": str(plan.checkpoint.folder),
        "seed": plan.seed,
        "notes": plan.checkpoint.notes,
        "embodiments": list(plan.parts.processor.embodiments),
        "source_keys": source,
        "parameters": parameters,
    }


def report_text(report: dict) -> str:
    """The report for people: counts, notes, then one line for each tensor."""
    new = [name for name, found in report["parameters"].items() if "new_rows" in found["came_from"]]
    lines = [
        f"{report['family']}: {len(report['source_keys'])} published tensors, {len(report['parameters'])} parameters",
        f"every published tensor is used; {len(new)} parameters have rows that are not in the checkpoint",
        f"embodiments: {', '.join(report['embodiments']) or 'none'}",
        *(f"note: {note}" for note in report["notes"]),
        "",
        "published tensor -> parameters",
    ]
    for key, found in report["source_keys"].items():
        went = found["went_to"]
        if not isinstance(went, str):
            went = ", ".join(f"{piece['parameter']} (from row {piece['first_row']})" for piece in went)
        lines.append(f"{key} {found['dtype']} {found['shape']} -> {went}")
    lines += ["", "parameter <- published tensor"]
    for name, found in report["parameters"].items():
        came = found["came_from"]
        origin = "new" if came["key"] is None else f"{came['key']} (from row {came['first_row']}, {came['rows']} rows)"
        if "new_rows" in came and came["key"] is not None:
            origin += f" and {came['new_rows']['rows']} new rows ({came['new_rows']['values']})"
        lines.append(f"{name} {found['dtype']} {found['shape']} <- {origin}")
    return "\n".join(lines) + "\n"


def convert(source: str, output: str | Path, options: Options | None = None, show_progress: bool = False) -> dict:
    """Converts a published checkpoint into a complete repository of this layout.

    The work happens in a folder beside `output`, OUTPUT.partial, which is renamed at the end. Interrupted, it stays
    and the same call goes on after the last complete shard; after an error it is removed.

    Args:
        source: folder or Hub id.
        output: folder that does not exist yet.
        options: see `Options`.
        show_progress: show a progress bar.
    Returns:
        The report, which is also in `conversion_report.json` and, for people, in `conversion_report.txt`.
    Raises:
        ValueError: the checkpoint does not match, key by key; nothing is written.
    """
    options = options or Options()
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists. Give another folder, or remove it first.")
    plan = make_plan(source, options)
    folder = output.with_name(output.name + ".partial")
    stamp = fingerprint(plan)
    stamp_file = folder / "fingerprint"
    if folder.exists() and not (stamp_file.exists() and stamp_file.read_text() == stamp):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(info.bytes for info in plan.infos.values()))
    stamp_file.write_text(stamp)
    return in_folder(folder, output, lambda progress: finish(plan, folder, progress), show_progress)


def finish(plan: Plan, folder: Path, make_bar: Callable[[str, int], tqdm]) -> dict:
    """All that reads and writes weights, in the unfinished folder. Returns the report."""
    size = sum(info.bytes for info in plan.infos.values())
    check_tied_copies(plan)
    with make_bar("convert", size) as progress:
        checksums = write_weights(plan, folder, progress)
    with make_bar("verify", size) as progress:
        verify_weights(plan, folder, checksums, progress)
    write_repository(plan, folder)
    report = make_report(plan, checksums)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    (folder / REPORT).with_suffix(".txt").write_text(report_text(report))
    for path in [*folder.glob("*.crc.json"), folder / "fingerprint"]:
        path.unlink()
    return report


def in_folder(folder: Path, output: Path, work: Callable, show_progress: bool) -> dict:
    """Runs `work` on an unfinished folder and gives it its name. A wrong checkpoint leaves nothing behind."""

    def make_bar(title: str, size: int) -> tqdm:
        return tqdm(total=size, desc=title, unit="B", unit_scale=True, disable=not show_progress)

    try:
        result = work(make_bar)
    except ValueError:
        shutil.rmtree(folder)
        raise
    os.replace(folder, output)
    return result


def check_space(folder: Path, needed: int) -> None:
    """Raises ValueError if the file system of `folder` cannot hold `needed` bytes, less what is there already."""
    present = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - present > free:
        raise ValueError(
            f"The output needs {(needed - present) / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free. "
            "Free space, or give another folder."
        )
