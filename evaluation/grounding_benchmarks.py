"""Questions of public benchmarks from local files (JSONL, JSON or parquet), in the layouts of their publication.

    where2place   folder with point_questions.jsonl (question_id, image, text), images/ and masks/NN.jpg, NN the number
                  of the line; or parquet with question, image, mask
    refspatial    parquet with id, image, mask, object, prompt, suffix, step
    realworldqa   parquet with image, question, answer
    erqa          parquet with question_id, question, question_type, images, answer
    eobench       JSONL with id, question, question_type, answer, num_images, image_paths, relative to the file

An image in parquet is `{"bytes", "path"}`, as `datasets` writes it. `docs/grounding.md` says how far each layout could
be checked against its source.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from .grounding import Question


# Where a benchmark tells the format of the answer; a subject brings its own
_FORMAT_MARK = "Your answer should be formatted"


def load_questions(name: str, path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a benchmark.

    Args:
        name: a key of `BENCHMARKS`.
        path: its file, or a folder with its files.
        limit: keep the first so many.

    Raises:
        ValueError: unknown benchmark, a column or field that is missing, or an image that cannot be read.
        FileNotFoundError: no such file, or none of the benchmark's files in the folder.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"Unknown benchmark {name!r}: use one of {', '.join(BENCHMARKS)}.")
    questions = []
    for question in BENCHMARKS[name](Path(path)):
        if limit is not None and len(questions) == limit:
            break
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no questions of {name}.")
    return questions


def _where2place(path: Path) -> Iterator[Question]:
    lines = path / "point_questions.jsonl"
    if path.suffix == ".parquet" or not lines.is_file():
        for row, where in _parquet_rows(path, ("question", "image", "mask")):
            yield _pointing(row["question"], _decode(row["image"], where), _mask(row["mask"], where), "where2place")
        return
    for number, (row, where) in enumerate(_json_rows(lines, ("image", "text"))):
        mask = path / "masks" / f"{number:02d}.jpg"
        image = _open(path / "images" / row["image"], where)
        yield _pointing(row["text"], image, _mask_file(mask, where), "where2place")


def _refspatial(path: Path) -> Iterator[Question]:
    for row, where in _parquet_rows(path, ("image", "mask", "prompt", "step")):
        image, mask = _decode(row["image"], where), _mask(row["mask"], where)
        yield _pointing(row["prompt"], image, mask, f"{row['step']} steps")


def _pointing(text: str, image: np.ndarray, mask: np.ndarray, category: str) -> Question:
    if mask.shape != image.shape[:2]:
        raise ValueError(f"Found a mask of shape {mask.shape} for an image of shape {image.shape}: {text!r}.")
    return Question("free_space", text.split(_FORMAT_MARK)[0].strip(), [image], mask=mask, category=category)


def _realworldqa(path: Path) -> Iterator[Question]:
    for row, where in _parquet_rows(path, ("image", "question", "answer")):
        yield Question("vqa", row["question"].strip(), [_decode(row["image"], where)], answer=row["answer"])


def _erqa(path: Path) -> Iterator[Question]:
    for row, where in _parquet_rows(path, ("question", "question_type", "images", "answer")):
        images = [_decode(image, where) for image in row["images"]]
        yield Question("vqa", row["question"], images, answer=row["answer"], category=row["question_type"])


def _eobench(path: Path) -> Iterator[Question]:
    for row, where in _json_rows(path, ("question", "question_type", "answer", "image_paths")):
        folder = path if path.is_dir() else path.parent
        images = [_open(folder / name, where) for name in row["image_paths"]]
        yield Question("vqa", row["question"], images, answer=row["answer"], category=row["question_type"])


BENCHMARKS: dict[str, Callable[[Path], Iterator[Question]]] = {
    "where2place": _where2place,
    "refspatial": _refspatial,
    "realworldqa": _realworldqa,
    "erqa": _erqa,
    "eobench": _eobench,
}


# --- files


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is not a file, or a folder without {' or '.join(suffixes)} files.")
    return files


def _json_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[dict, str]]:
    """(row, where it stands) of JSON lines, or of a JSON list."""
    for file in _files(path, (".jsonl", ".json")):
        text = file.read_text()
        try:
            rows = json.loads(text) if file.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not {file.suffix[1:].upper()}: {error}.") from error
        for number, row in enumerate(rows):
            where = f"row {number} of {file}"
            _check_fields(row, fields, where)
            yield row, where


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[dict, str]]:
    for file in _files(path, (".parquet",)):
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}. Download it again.") from error
        _check_fields(dict.fromkeys(table.schema_arrow.names), fields, str(file))
        number = 0
        for batch in table.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                yield row, f"row {number} of {file}"
                number += 1


def _check_fields(row: dict, fields: tuple[str, ...], where: str) -> None:
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}. It has: {', '.join(row)}.")


def _decode(value: dict | bytes, where: str) -> np.ndarray:
    """uint8 (h, w, 3) of an image column."""
    return _pixels(io.BytesIO(value["bytes"] if isinstance(value, dict) else value), where)


def _open(path: Path, where: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{where} names the image {path}, which is not there.")
    return _pixels(path, where)


def _pixels(source, where: str) -> np.ndarray:
    try:
        with Image.open(source) as image:
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: the image cannot be read: {error}.") from error


def _mask(value: dict | bytes, where: str) -> np.ndarray:
    return _decode(value, where).max(axis=2) > 127


def _mask_file(path: Path, where: str) -> np.ndarray:
    return _open(path, where).max(axis=2) > 127
