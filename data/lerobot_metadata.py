"""Metadata of LeRobot datasets: which rows of which data file, and which seconds of which video, are an episode.

v3.0: many episodes per file. `meta/info.json` (features, fps, path templates), `meta/tasks.parquet`,
`meta/episodes/**`, `data/**` (one row per frame), `videos/**`.
v2.1 and v2.0: one data file and one video per camera for each episode; tasks and episodes are JSON lines.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


SUPPORTED_VERSIONS = ("v3.0", "v2.1", "v2.0")
_PER_VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")  # columns videos/KEY/... of v3.0


@dataclass(frozen=True)
class EpisodeRecord:
    """Where one episode lives. `videos` maps a camera key to (file, second at which the episode starts in it)."""

    index: int
    length: int
    data_file: Path
    videos: dict[str, tuple[Path, float]]


def read_info(root: Path) -> dict:
    """`meta/info.json`, checked for what every reader needs."""
    path = root / "meta" / "info.json"
    if not root.is_dir():
        raise FileNotFoundError(f"Dataset folder {root} does not exist.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {root} is not a LeRobot dataset. Give the folder that contains meta/, data/ and "
            "videos/."
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Download the file again.") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds {str(info)[:60]!r}; it is a JSON object. Download the file again.")
    version = info.get("codebase_version")
    if version not in SUPPORTED_VERSIONS:
        raise ValueError(
            f"{root} is in LeRobot format {version}; this reader supports {', '.join(SUPPORTED_VERSIONS)}. Convert it "
            "with lerobot's own converter, or download a converted revision from the Hub."
        )
    missing = [
        key for key in ("fps", "features", "total_episodes", "total_frames", "data_path") if info.get(key) is None
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Download the file again.")
    _check_info(info, path)
    return info


def _check_info(info: dict, path: Path):
    """Raises ValueError unless every entry of info.json that is used has its type."""

    def is_count(value, smallest: int = 0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= smallest

    rules = {
        "fps": (isinstance(info["fps"], int | float) and 0 < info["fps"] < math.inf, "positive"),
        "total_episodes": (is_count(info["total_episodes"]), "a count"),
        "total_frames": (is_count(info["total_frames"]), "a count"),
        "chunks_size": (is_count(info.get("chunks_size", 1000), 1), "a count of at least 1"),
        "data_path": (isinstance(info["data_path"], str), "a path"),
        "video_path": (isinstance(info.get("video_path"), str | None), "a path or null"),
        "features": (isinstance(info["features"], dict), "a mapping"),
    }
    wrong = [f"{name} {info.get(name)!r}; it must be {kind}" for name, (fits, kind) in rules.items() if not fits]
    if not wrong:
        for name, feature in info["features"].items():
            shape = feature.get("shape") if isinstance(feature, dict) else None
            is_shape = isinstance(shape, list) and all(is_count(size, 1) for size in shape)
            if not is_shape or not isinstance(feature.get("dtype"), str):
                wrong.append(f"feature {name} {str(feature)[:60]!r} (a mapping with dtype and shape)")
            elif not all(isinstance(feature.get(key) or {}, dict) for key in ("info", "video_info")):
                wrong.append(f"feature {name} with info {str(feature.get('info'))[:60]!r} (a mapping)")
    if wrong:
        raise ValueError(f"{path} has {'; '.join(wrong)}. Download the file again.")


def _filled(template: str, root: Path, **values) -> Path:
    """The path of a file, from a template of info.json."""
    try:
        name = template.format(**values)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{root / 'meta' / 'info.json'} has the path {template!r}, which cannot be filled with "
            f"{', '.join(values)}: {type(error).__name__} {error}. Download the file again."
        ) from error
    if "\0" in name:
        raise ValueError(f"{root / 'meta' / 'info.json'} has the path {template!r}, which no file can have.")
    return root / name


def read_tasks(root: Path, info: dict) -> dict[int, str]:
    """Instructions of the dataset, {task_index: instruction}."""
    if info["codebase_version"] != "v3.0":
        lines = _json_lines(root / "meta" / "tasks.jsonl", ("task_index", "task"))
        return {line["task_index"]: line["task"] for line in lines}
    path = root / "meta" / "tasks.parquet"
    table = read_parquet(path)
    # The instruction is the pandas index: named "task" by newer writers, nameless (pandas' placeholder) by older ones.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise ValueError(
            f"{path} has columns {table.column_names}; expected task_index and task (or __index_level_0__). Download "
            "the file again."
        )
    pairs = list(zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True))
    wrong = [pair for pair in pairs if not isinstance(pair[1], str) or not _is_whole(pair[0])]
    if wrong:
        raise ValueError(f"{path} has task {wrong[0]}; it is a number and a text. Download the file again.")
    return {int(index): text for index, text in pairs}


def _is_whole(value) -> bool:
    """Whether a cell is a whole number; indices may have become floats on their way through pandas."""
    return isinstance(value, int | float) and abs(value) < 2**53 and value == int(value)


def read_episodes(root: Path, info: dict, video_keys: list[str]) -> list[EpisodeRecord]:
    """All episodes by episode number, checked against the totals of info.json.

    Args:
        root: dataset folder.
        info: what `read_info` returned.
        video_keys: cameras whose videos the records should name.
    """
    if video_keys and not info.get("video_path"):
        raise ValueError(
            f"{root / 'meta' / 'info.json'} has no video_path, but declares videos: {', '.join(video_keys)}. Download "
            "the file again, or leave the cameras out with cameras=[]."
        )
    read = _episodes_v3 if info["codebase_version"] == "v3.0" else _episodes_v2
    records = sorted(read(root, info, video_keys), key=lambda record: record.index)
    num_frames = sum(record.length for record in records)
    if len({record.index for record in records}) != len(records):
        raise ValueError(f"The metadata of {root} lists an episode twice. Download meta/ again.")
    if len(records) != info["total_episodes"] or num_frames != info["total_frames"]:
        raise ValueError(
            f"{root / 'meta' / 'info.json'} says {info['total_episodes']} episodes and {info['total_frames']} frames, "
            f"but the list of episodes in meta/ has {len(records)} episodes and {num_frames} frames. They must agree; "
            "the download is incomplete or mixes revisions."
        )
    return records


def _episodes_v2(root: Path, info: dict, video_keys: list[str]) -> Iterator[EpisodeRecord]:
    for line in _json_lines(root / "meta" / "episodes.jsonl", ("episode_index", "length")):
        index = line["episode_index"]
        place = {"episode_chunk": index // info.get("chunks_size", 1000), "episode_index": index}
        videos = {key: (_filled(info["video_path"], root, video_key=key, **place), 0.0) for key in video_keys}
        yield EpisodeRecord(index, line["length"], _filled(info["data_path"], root, **place), videos)


def _episodes_v3(root: Path, info: dict, video_keys: list[str]) -> Iterator[EpisodeRecord]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root / 'meta' / 'episodes'} has no parquet file. Download meta/ again.")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    columns += [f"videos/{key}/{name}" for key in video_keys for name in _PER_VIDEO]
    for path in files:
        for row in read_parquet(path, columns).to_pylist():
            yield _episode_of_row(row, root, info, video_keys)


def _episode_of_row(row: dict, root: Path, info: dict, video_keys: list[str]) -> EpisodeRecord:
    """One row of `meta/episodes`."""
    needed = ("episode_index", "length", "data/chunk_index", "data/file_index")
    if not all(_is_whole(row[name]) and row[name] >= 0 for name in needed):
        raise ValueError(
            f"{root}: meta/episodes has a row with { {name: row[name] for name in needed} }; all are counts. "
            "Download meta/ again."
        )
    index, length = int(row["episode_index"]), int(row["length"])
    place = {"chunk_index": int(row["data/chunk_index"]), "file_index": int(row["data/file_index"])}
    data_file = _filled(info["data_path"], root, **place)
    videos = {}
    for key in video_keys:
        numbers = {name: row[f"videos/{key}/{name}"] for name in _PER_VIDEO}
        indices = [numbers["chunk_index"], numbers["file_index"]]
        seconds = [numbers["from_timestamp"], numbers["to_timestamp"]]
        are_seconds = all(isinstance(second, int | float) and 0 <= second < math.inf for second in seconds)
        if not are_seconds or not all(_is_whole(number) for number in indices):
            raise ValueError(
                f"{root}: meta/episodes has {numbers} for the {key} video of episode {index}. Leave the camera out, "
                "or download meta/ again."
            )
        path = _filled(
            info["video_path"],
            root,
            video_key=key,
            chunk_index=int(numbers["chunk_index"]),
            file_index=int(numbers["file_index"]),
        )
        start, end = (float(second) for second in seconds)
        # A longer video is harmless; in a shorter one the last rows would show the next episode.
        if (end - start) * info["fps"] < length - 0.5:
            raise ValueError(
                f"{root}: episode {index} has {length} rows, but its {key} video spans {end - start:.4f} s, which is "
                f"{(end - start) * info['fps']:.2f} frames at {info['fps']} fps. Leave the episode out, or record it "
                "again."
            )
        videos[key] = (path, start)
    return EpisodeRecord(index, length, data_file, videos)


def _json_lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """Objects of a JSON lines file, each with the needed entries, of which the ones that count are whole numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Download meta/ again.")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON lines: {error}. Download the file again.") from error
    for number, line in enumerate(lines):
        fits = isinstance(line, dict) and all(isinstance(line.get(n), str if n == "task" else int) for n in needed)
        if not fits:
            raise ValueError(
                f"{path}, line {number} is {str(line)[:60]!r}; it needs {' and '.join(needed)}. Download the file "
                "again."
            )
    return lines


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a parquet file; raises FileNotFoundError or ValueError with what to do."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. The download is incomplete; download the dataset again.")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as parquet: {error}. It is truncated, corrupt, or a "
            "Git LFS pointer; download the file again."
        ) from error


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet file as a table; `columns` must all be there."""
    file = open_parquet(path)
    absent = [column for column in columns or [] if column not in file.schema_arrow.names]
    if absent:
        raise ValueError(f"{path} has no column {', '.join(absent)}. It has: {', '.join(file.schema_arrow.names)}.")
    try:
        return file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download the file again.") from error
