"""safetensors files, one tensor in memory at a time: headers, reading by key, writing by stream.

The format: 8 bytes little endian, the size of a JSON header; {name: {dtype, shape, data_offsets}}; the data.
Headers are checked before anything is allocated, so a damaged file is an error that names the tensor.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open


# Floating point only: weights have nothing else
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor: its file, its dtype (a key of DTYPES) and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Header of a safetensors file, checked against the size of the file; reads no weights.

    Raises:
        ValueError: the file is truncated or damaged; names the tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path.name} has {size} bytes and announces a header of {length}: it is truncated or not a "
                "safetensors file. Download it again."
            )
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"The header of {path.name} is not JSON ({error}). Download it again.") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - set(entry):
            raise ValueError(
                f"{name} in {path.name} has no dtype, shape and data_offsets: {entry}. Download it again."
            )
    tensors, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name} in {path.name} has dtype {entry['dtype']}; weights are {', '.join(DTYPES)}. Convert the "
                "unquantised checkpoint."
            )
        info = TensorInfo(path, entry["dtype"], shape)
        if start != position or stop - start != info.bytes:
            raise ValueError(
                f"{name} in {path.name} has shape {list(shape)} in {entry['dtype']}, that is {info.bytes} bytes from "
                f"byte {position} on, but the header gives it bytes {start} to {stop}. The file is damaged; download "
                "it again."
            )
        if 8 + length + stop > size:
            raise ValueError(
                f"{name} in {path.name} ends at byte {8 + length + stop} of a file of {size} bytes: the file is "
                "truncated. Download it again."
            )
        tensors[name], position = info, stop
    if 8 + length + position != size:
        raise ValueError(
            f"{path.name} has {size - 8 - length - position} bytes after its last tensor. The file is damaged; "
            "download it again."
        )
    return tensors


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder: those that its index names, or those of its only weight file.

    Raises:
        ValueError: no weights, a file that the index names is missing, or index and files disagree.
    """
    index = folder / INDEX_NAME
    if index.exists():
        wanted = read_json(index).get("weight_map", {})
        tensors = {}
        for name in sorted(set(wanted.values())):
            if Path(name).name != name or not (folder / name).exists():
                raise ValueError(f"{INDEX_NAME} names the file {name}, which is not in {folder}. Download it.")
            tensors.update(read_header(folder / name))
        wrong = sorted(key for key, file in wanted.items() if key not in tensors or tensors[key].file.name != file)
        extra = sorted(set(tensors) - set(wanted))
        if wrong or extra:
            raise ValueError(
                f"{INDEX_NAME} and the weight files disagree: {len(wrong)} keys are not where the index says "
                f"{wrong[:4]}, {len(extra)} are in no index entry {extra[:4]}. Download the files again."
            )
        return tensors
    files = sorted(folder.glob("*.safetensors"))
    main = folder / "model.safetensors"
    if main.exists():
        return read_header(main)
    if len(files) != 1:
        raise ValueError(
            f"{folder} has {len(files)} safetensors files and neither model.safetensors nor {INDEX_NAME}. Give the "
            "folder of a complete checkpoint."
        )
    return read_header(files[0])


def read_tensor(info: TensorInfo, key: str) -> torch.Tensor:
    """One tensor of a file whose header was checked. The file is opened for this tensor alone: a mapped file would
    stay in memory as far as it was read.
    """
    with safe_open(info.file, framework="pt", device="cpu") as file:
        return file.get_tensor(key)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor_bytes(tensor))


def write_tensors(path: Path, infos: dict[str, TensorInfo], tensors: Iterator[tuple[str, torch.Tensor]]) -> dict:
    """Writes a safetensors file from tensors that come one after the other; one is in memory at a time.

    Args:
        path: file to write; it appears under this name only when it is complete.
        infos: dtype and shape by name, in the order in which `tensors` come.
        tensors: (name, tensor) in that order.
    Returns:
        {name: CRC-32 of its bytes}.
    """
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, info in infos.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.bytes],
        }
        position += info.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path.with_name(path.name + ".unfinished")
    checksums = {}
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (wanted, info), (name, tensor) in zip(infos.items(), tensors, strict=True):
            assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, info.shape, DTYPES[info.dtype]), name
            data = tensor_bytes(tensor)
            file.write(data)
            checksums[name] = zlib.crc32(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return checksums


def shards(infos: dict[str, TensorInfo], max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """{file name: its tensors}, in order; a shard exceeds `max_bytes` only if a single tensor does."""
    groups, used = [{}], 0
    for name, info in infos.items():
        if groups[-1] and used + info.bytes > max_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = info
        used += info.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_index(folder: Path, files: dict[str, dict[str, TensorInfo]]) -> None:
    """The index of a sharded checkpoint; nothing for a single file."""
    if len(files) > 1:
        total = sum(info.bytes for group in files.values() for info in group.values())
        weight_map = {name: file for file, group in files.items() for name in sorted(group)}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError that names the file."""
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is a {type(values).__name__}, not an object. Download it again.")
    return values
