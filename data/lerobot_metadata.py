"""Metadata of LeRobot datasets: which rows of which data file, and which seconds of which video, are an episode.

v3.0: many episodes per file. `meta/info.json` (features, fps, path templates), `meta/tasks.parquet`,
`meta/episodes/**`, `data/**` (one row per frame), `videos/**`.
v2.1 and v2.0: one data file and one video per camera for each episode; tasks and episodes are JSON lines.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


SUPPORTED_VERSIONS = ("v3.0", "v2.1", "v2.0")


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
    if info["fps"] <= 0:
        raise ValueError(f"{path} has fps {info['fps']}; it must be positive. Download the file again.")
    return info


def read_tasks(root: Path, info: dict) -> dict[int, str]:
    """Instructions of the dataset, {task_index: instruction}."""
    if info["codebase_version"] != "v3.0":
        return {line["task_index"]: line["task"] for line in _json_lines(root / "meta" / "tasks.jsonl")}
    path = root / "meta" / "tasks.parquet"
    table = read_parquet(path)
    # The instruction is the pandas index: named "task" by newer writers, nameless (pandas' placeholder) by older ones.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise ValueError(
            f"{path} has columns {table.column_names}; expected task_index and task (or __index_level_0__). Download "
            "the file again."
        )
    return dict(zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True))


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
    for line in _json_lines(root / "meta" / "episodes.jsonl"):
        index = line["episode_index"]
        place = {"episode_chunk": index // info.get("chunks_size", 1000), "episode_index": index}
        videos = {key: (root / info["video_path"].format(video_key=key, **place), 0.0) for key in video_keys}
        yield EpisodeRecord(index, line["length"], root / info["data_path"].format(**place), videos)


def _episodes_v3(root: Path, info: dict, video_keys: list[str]) -> Iterator[EpisodeRecord]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root / 'meta' / 'episodes'} has no parquet file. Download meta/ again.")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    per_video = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{key}/{name}" for key in video_keys for name in per_video]
    for path in files:
        for row in read_parquet(path, columns).to_pylist():
            yield _episode_of_row(row, root, info, video_keys)


def _episode_of_row(row: dict, root: Path, info: dict, video_keys: list[str]) -> EpisodeRecord:
    """One row of `meta/episodes`; indices may have become floats on their way through pandas."""
    index, length = int(row["episode_index"]), int(row["length"])
    data_file = info["data_path"].format(
        chunk_index=int(row["data/chunk_index"]), file_index=int(row["data/file_index"])
    )
    videos = {}
    for key in video_keys:
        if row[f"videos/{key}/file_index"] is None:
            raise ValueError(f"{root}: meta/episodes names no {key} video for episode {index}. Leave the camera out.")
        path = info["video_path"].format(
            video_key=key,
            chunk_index=int(row[f"videos/{key}/chunk_index"]),
            file_index=int(row[f"videos/{key}/file_index"]),
        )
        start, end = float(row[f"videos/{key}/from_timestamp"]), float(row[f"videos/{key}/to_timestamp"])
        # A longer video is harmless; in a shorter one the last rows would show the next episode.
        if (end - start) * info["fps"] < length - 0.5:
            raise ValueError(
                f"{root}: episode {index} has {length} rows, but its {key} video spans {end - start:.4f} s, which is "
                f"{(end - start) * info['fps']:.2f} frames at {info['fps']} fps. Leave the episode out, or record it "
                "again."
            )
        videos[key] = (root / path, start)
    return EpisodeRecord(index, length, root / data_file, videos)


def _json_lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Download meta/ again.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON lines: {error}. Download the file again.") from error


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
