"""Multimodal samples (grounding, visual questions) in parquet files that `datasets` can load.

One row per sample: `image` (PNG, as `datasets.Image` stores it), `text` (the question), `answer`, and metadata columns
of any type that parquet holds, such as object, box or task. Samples of several images have the others in
`more_images`. JSON lines and chats are read by `conversations.py`.
"""

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from .conversations import check_coordinates
from .coordinates import convert_text


COLUMNS = ("image", "text", "answer")
MORE_IMAGES = "more_images"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS_PER_GROUP = 256


class MultimodalWriter:
    """Writes samples into one parquet file, which appears under its name only when it is complete.

        with MultimodalWriter("grounding.parquet") as writer:
            writer.add(pixels, "Where is the red cup?", "<box>[3, 4, 20, 31]</box>", {"object": "red cup"})

    Args:
        path: file to create; it must not exist.

    Raises:
        FileExistsError: the file exists.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists. Delete it or write to another file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.writing-", dir=self.path.parent)
        os.close(handle)
        self._partial = Path(name)
        self._partial.chmod(0o644)  # mkstemp makes it private, and the rename would keep that
        self._rows: list[dict] = []
        self._metadata_names: tuple[str, ...] | None = None
        self._writer: pq.ParquetWriter | None = None
        self._closed = False
        self.num_samples = 0

    def add(
        self,
        image: np.ndarray | Image.Image,
        text: str,
        answer: str,
        metadata: dict | None = None,
        more_images: Sequence[np.ndarray | Image.Image] = (),
    ):
        """Add one sample.

        Args:
            image: uint8 (h, w, 3) RGB, or a PIL image.
            text, answer: the question, and what the model should say.
            metadata: the same keys in every sample; plain values or flat lists of them.
            more_images: images after the first one.

        Raises:
            ValueError: an image of another kind, an empty text, or metadata keys that differ from the first sample's.
        """
        metadata = metadata or {}
        number = self.num_samples
        if self._metadata_names is None:
            self._metadata_names = tuple(metadata)
        if set(metadata) != set(self._metadata_names) or set(metadata) & {*COLUMNS, MORE_IMAGES}:
            raise ValueError(
                f"Sample {number} of {self.path} has metadata {sorted(metadata)}; all samples must have those of the "
                f"first, {sorted(self._metadata_names)}, and none may be called {', '.join(COLUMNS)}."
            )
        for name, value in (("text", text), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"Sample {number} of {self.path}: {name} is {value!r}; it must be non-empty text.")
        row = {"image": self._encoded(image), "text": text, "answer": answer}
        row |= {name: metadata[name] for name in self._metadata_names}
        self._rows.append(row | {MORE_IMAGES: [self._encoded(each) for each in more_images]})
        self.num_samples += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _encoded(self, image: np.ndarray | Image.Image) -> dict:
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"Sample {self.num_samples} of {self.path}: the image is {pixels.dtype} {pixels.shape}; it must be "
                "uint8 (height, width, 3)."
            )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    def _flush(self):
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._partial, _schema(self._rows))
        try:
            table = pa.Table.from_pylist(self._rows, schema=self._writer.schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{self.path}: a metadata value among samples {self.num_samples - len(self._rows)} to "
                f"{self.num_samples - 1} is not of the type that the first samples have: {error}."
            ) from error
        self._writer.write_table(table)
        self._rows = []

    def finalize(self) -> Path:
        """Complete the file and give it its name; returns `path`."""
        if self._closed:
            raise ValueError(f"The writer of {self.path} is closed.")
        if self.num_samples == 0:
            raise ValueError(f"No sample was added, so there is nothing to write to {self.path}.")
        if self._rows:
            self._flush()
        self._writer.close()
        self._closed = True
        os.replace(self._partial, self.path)
        return self.path

    def abort(self):
        """Delete what was written so far; does nothing after `finalize`."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._writer.close()
        self._partial.unlink()

    def __enter__(self) -> "MultimodalWriter":
        return self

    def __exit__(self, error_type, error, traceback):
        if error_type is not None:
            self.abort()
        elif not self._closed:
            try:
                self.finalize()
            finally:
                self.abort()


def _schema(rows: list[dict]) -> pa.Schema:
    """Types of the first rows, with the metadata that lets `datasets` decode the images."""
    # A column that has held nothing yet is taken for text; parquet cannot change its mind later.
    images = ("image", MORE_IMAGES)
    inferred = pa.Table.from_pylist([{k: v for k, v in row.items() if k not in images} for row in rows]).schema
    fields = [pa.field("image", IMAGE_TYPE), pa.field(MORE_IMAGES, pa.list_(IMAGE_TYPE))]
    fields += [pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in inferred]
    schema = pa.schema(fields)
    # Imported here: loading `datasets` takes a second, which readers need not pay.
    from datasets import Features, List
    from datasets import Image as ImageFeature

    features = Features.from_arrow_schema(schema)
    features["image"], features[MORE_IMAGES] = ImageFeature(), List(ImageFeature())
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features.to_dict()}})})


class MultimodalDataset:
    """Map-style dataset of multimodal samples (`docs/architecture.md`).

    Args:
        path: a parquet file, or a folder whose parquet files are read in the order of their names.
        in_memory: keep the compressed images in memory. Otherwise the file is memory-mapped and each access reads the
            row group of the sample: little memory, slow in random order.
        coordinates: what numbers of boxes and points in the texts count: "text" if they are in the model's form
            already (what our writers write), else a key of `coordinates.CONVENTIONS`.
        processor: writes boxes and points; needed unless coordinates is "text".

    Raises:
        FileNotFoundError: no such file, or no parquet file in the folder.
        ValueError: a file that is damaged, or lacks the columns image, text and answer.

    Every column that is not image, text or answer is metadata, which `__getitem__` returns under `metadata`.
    """

    def __init__(self, path: str | Path, in_memory: bool = True, *, coordinates: str = "text", processor=None):
        check_coordinates(coordinates, processor)
        self._coordinates, self._processor = coordinates, processor
        self.path = Path(path)
        self._paths = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self._paths or not self._paths[0].is_file():
            raise FileNotFoundError(f"{self.path} is not a parquet file or a folder with parquet files.")
        self._in_memory = in_memory
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each group, in reading order
        sizes = []
        tables = []
        for number, file_path in enumerate(tqdm(self._paths, desc="multimodal", unit="file", disable=None)):
            file = _open(file_path)
            self._groups += [(number, group) for group in range(file.num_row_groups)]
            sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if in_memory:
                tables.append(_read(file, file_path, None))
        self._group_ends = np.cumsum(sizes)
        self._table = pa.concat_tables(tables, promote_options="default") if in_memory else None
        self._current: tuple[int, pa.Table] | None = None  # the row group that was read last
        self._length = int(self._group_ends[-1]) if sizes else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """One sample: `images` (list of uint8 (h, w, 3)), `text`, `answer`, `metadata`, `dataset_index`.

        Raises:
            IndexError: index outside the dataset.
            ValueError: an image that cannot be decoded.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} is outside {self.path}, which has {len(self)} samples.")
        index = int(index) % len(self)
        row = self._row(index)
        encoded = [row.pop("image"), *(row.pop(MORE_IMAGES, None) or [])]
        try:
            images = [_decoded(each) for each in encoded]
        except (OSError, TypeError) as error:  # TypeError: the row has no bytes
            raise ValueError(f"Sample {index} of {self.path}: the image cannot be decoded: {error}.") from error
        text, answer = row.pop("text"), row.pop("answer")
        if self._coordinates != "text":
            size = images[0].shape[1], images[0].shape[0]
            try:
                text, answer = (convert_text(t, self._coordinates, size, self._processor) for t in (text, answer))
            except ValueError as error:
                raise ValueError(f"Sample {index} of {self.path}: {error}") from error
        return {
            "images": images,
            "text": text,
            "answer": answer,
            "metadata": row,
            "dataset_index": index,
        }

    def _row(self, index: int) -> dict:
        if self._table is not None:
            return self._table.slice(index, 1).to_pylist()[0]
        position = int(np.searchsorted(self._group_ends, index, side="right"))
        if self._current is None or self._current[0] != position:
            number, group = self._groups[position]
            self._current = position, _read(_open(self._paths[number]), self._paths[number], group)
        first = int(self._group_ends[position - 1]) if position else 0
        return self._current[1].slice(index - first, 1).to_pylist()[0]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_current": None}


def _decoded(encoded: dict) -> np.ndarray:
    with Image.open(io.BytesIO(encoded["bytes"])) as image:
        return np.array(image.convert("RGB"))


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as parquet: {error}. It is truncated, corrupt, or a "
            "Git LFS pointer; write or download it again."
        ) from error
    absent = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if absent:
        raise ValueError(
            f"{path} has no column {', '.join(absent)}; multimodal files have image, text and answer. It has: "
            f"{', '.join(file.schema_arrow.names)}."
        )
    return file


def _read(file: pq.ParquetFile, path: Path, group: int | None) -> pa.Table:
    """One row group, or the whole file."""
    try:
        return file.read() if group is None else file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Write or download it again.") from error
