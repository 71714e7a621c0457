"""Reading LeRobot datasets (formats v3.0 and v2.1) without lerobot.

The numbers of all frames are kept in memory as arrays; images are decoded when they are asked for. What differs
between the formats is in `lerobot_metadata.py`.

Legend: N frames, E episodes, H action horizon, S state size, D action size, (h, w) image size.
"""

import io
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

from ..action_space_wallvla import short_camera_key
from .lerobot_metadata import EpisodeRecord, open_parquet, read_episodes, read_info, read_parquet, read_tasks
from .video import VideoReader


OPEN_VIDEOS = 64  # file handles per process; a shuffled dataset visits its video files in random order
ROW_GROUP_CACHE_BYTES = 512 * 2**20  # compressed images kept per process when they live inside parquet files


class LeRobotDataset:
    """Map-style dataset of action samples (`docs/architecture.md`), one per recorded frame.

    Args:
        root: dataset folder (the one that contains `meta/`).
        embodiment: written into every sample; a key of `processor.embodiments`.
        cameras: camera keys to decode, full (`"observation.images.front"`) or short (`"front"`), in this order.
            Default: all colour cameras of the dataset; `[]` for none.
        action_horizon: H, length of the action chunk in frames.
        episodes: episode numbers to read, in this order. Default: all.
        frames_in_memory: decode all frames once, now, into uint8 memory. Needs N * h * w * 3 bytes per camera, which
            forked data loader workers share and spawned ones copy. Worth it for small images, and for image columns
            in files of one huge row group (older writers), whose random access reads the whole group.
        state_key, action_key: features that hold proprioception and action.
        tolerance_s: largest accepted distance in seconds between a row and its video frame. Default: a quarter of the
            frame period, below which the nearest frame cannot be a neighbour.

    Attributes:
        fps (`int`), features (`dict`, as in info.json), tasks (`dict[int, str]`, instruction by task index),
        camera_keys (`list[str]`), num_episodes (`int`),
        episode_ids (`(E,)` int64): the dataset's own episode numbers,
        episode_bounds (`(E, 2)` int64): first and past-the-end sample index of each episode,
        states (`(N, S)` float32), actions (`(N, D)` float32): robot units.

    Raises:
        FileNotFoundError: the folder or a file that the metadata names is missing.
        ValueError: unsupported version, unknown keys, counts that disagree, damaged files, NaN in state or action,
            `frames_in_memory` where not enough memory is free.

    Instances can be pickled and used in data loader workers: every process opens its own files. Not thread-safe.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        embodiment: str,
        cameras: list[str] | None = None,
        action_horizon: int,
        episodes: list[int] | None = None,
        frames_in_memory: bool = False,
        state_key: str = "observation.state",
        action_key: str = "action",
        tolerance_s: float | None = None,
    ):
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; it must be at least 1 frame.")
        self.root = Path(root)
        self.embodiment = embodiment
        self.action_horizon = action_horizon
        info = read_info(self.root)
        self.fps = info["fps"]
        self.features = info["features"]
        self.tolerance_s = 0.25 / self.fps if tolerance_s is None else tolerance_s
        self.camera_keys = self._resolve_cameras(cameras)
        self._video_keys = [key for key in self.camera_keys if self.features[key]["dtype"] == "video"]
        for key, role in ((state_key, "state_key"), (action_key, "action_key")):
            if key not in self.features:
                raise ValueError(
                    f"{role} {key!r} is not a feature of {self.root}. It has: {', '.join(sorted(self.features))}."
                )
        self.tasks = read_tasks(self.root, info)
        self._records = _select(read_episodes(self.root, info, self._video_keys), episodes, self.root)
        self._load_rows(state_key, action_key)
        self._check_files_exist()
        self._open_files = _OpenFiles()
        self._memory: dict[str, np.ndarray] = {}
        if frames_in_memory:
            self._memory = self._decode_all()

    def _resolve_cameras(self, cameras: list[str] | None) -> list[str]:
        known = [key for key, feature in self.features.items() if _is_colour_camera(feature)]
        if cameras is None:
            return known
        by_name = {short_camera_key(key): key for key in known} | {key: key for key in known}
        for camera in cameras:
            if camera not in by_name:
                raise ValueError(
                    f"Camera {camera!r} is not in {self.root}. Its colour cameras: {', '.join(known) or 'none'}."
                )
        return [by_name[camera] for camera in cameras]

    def _load_rows(self, state_key: str, action_key: str):
        """Fill the per-frame arrays from the data files, one file at a time."""
        image_keys = [key for key in self.camera_keys if key not in self._video_keys]
        by_file: dict[Path, list[int]] = {}
        for position, record in enumerate(self._records):
            by_file.setdefault(record.data_file, []).append(position)
        parts: list[dict[str, np.ndarray] | None] = [None] * len(self._records)
        # delay: the old format has a file per episode, so this can take a while; the new one is done before it shows.
        for path, positions in tqdm(by_file.items(), desc="reading", unit="file", delay=2, disable=None):
            rows = _read_data_file(path, state_key, action_key, image_keys, self.features)
            order = np.argsort(rows["episode_index"], kind="stable")
            sorted_ids = rows["episode_index"][order]
            for position in positions:
                record = self._records[position]
                first, last = np.searchsorted(sorted_ids, [record.index, record.index + 1])
                _check_episode_rows(rows, order[first:last], record, state_key, action_key)
                parts[position] = {name: column[order[first:last]] for name, column in rows.items()}
                parts[position]["row_in_file"] = order[first:last]

        lengths = [record.length for record in self._records]
        ends = np.cumsum(lengths)
        self.episode_bounds = np.stack([ends - lengths, ends], axis=1)  # (E, 2)
        self.episode_ids = np.asarray([record.index for record in self._records], dtype=np.int64)
        self.num_episodes = len(self._records)
        self._episode_of_frame = np.repeat(np.arange(self.num_episodes), lengths)  # (N,)
        self.states = np.concatenate([part["state"] for part in parts])  # (N, S)
        self.actions = np.concatenate([part["action"] for part in parts])  # (N, D)
        self.timestamps = np.concatenate([part["timestamp"] for part in parts])  # (N,) seconds in the episode
        self.task_indices = np.concatenate([part["task_index"] for part in parts])  # (N,)
        self._row_in_file = np.concatenate([part["row_in_file"] for part in parts])  # (N,)
        unknown = sorted(set(self.task_indices.tolist()) - set(self.tasks))
        if unknown:
            raise ValueError(
                f"Rows of {self.root} use task_index {unknown}, but the list of tasks in meta/ only has "
                f"{sorted(self.tasks)}. The metadata and the data are from different revisions; download both again."
            )

    def _check_files_exist(self):
        seen = set()
        for record in self._records:
            for key, (path, _) in record.videos.items():
                if path not in seen and not path.is_file():
                    raise FileNotFoundError(
                        f"{path} is missing: the video of {key}, episode {record.index}. Download it, or leave the "
                        "camera out with cameras=[...]."
                    )
                seen.add(path)

    def __len__(self) -> int:
        return len(self._episode_of_frame)

    def __getitem__(self, index: int) -> dict:
        """The sample of one frame.

        Returns:
            dict with `images` ({camera key: uint8 (h, w, 3)}), `instruction`, `state` float32 (S,), `embodiment`,
            `actions` float32 (H, D) in robot units, `action_is_pad` bool (H,), and for messages and evaluation
            `episode_index`, `frame_index`, `timestamp` (seconds since the start of the episode), `dataset_index`.

        Raises:
            IndexError: index outside the dataset.
            ValueError: a frame cannot be decoded.
        """
        index = self._checked(index)
        episode = int(self._episode_of_frame[index])
        actions, is_pad = self.action_chunks(np.asarray([index]))
        return {
            "images": {key: self.image(index, key) for key in self.camera_keys},
            "instruction": self.tasks[int(self.task_indices[index])],
            "state": self.states[index].copy(),
            "embodiment": self.embodiment,
            "actions": actions[0],
            "action_is_pad": is_pad[0],
            "episode_index": int(self.episode_ids[episode]),
            "frame_index": index - int(self.episode_bounds[episode, 0]),
            "timestamp": float(self.timestamps[index]),
            "dataset_index": index,
        }

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} is outside the dataset, which has {len(self)} samples.")
        return int(index) % len(self)

    def action_chunks(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Action chunks that start at the given samples; they stop at the end of the episode.

        Args:
            indices: int (B,) sample indices.

        Returns:
            `(B, H, D)` float32 actions in robot units, repeating the episode's last action past its end, and `(B, H)`
            bool, True on those repeated steps.
        """
        indices = np.asarray(indices)
        last = self.episode_bounds[self._episode_of_frame[indices], 1] - 1
        steps = indices[:, None] + np.arange(self.action_horizon)  # (B, H)
        return self.actions[np.minimum(steps, last[:, None])], steps > last[:, None]

    def image(self, index: int, camera: str) -> np.ndarray:
        """One decoded image: uint8 (h, w, 3) RGB. `camera` is one of `camera_keys`."""
        index = self._checked(index)
        if camera in self._memory:
            return self._memory[camera][index].copy()
        episode = int(self._episode_of_frame[index])
        record = self._records[episode]
        frame = index - int(self.episode_bounds[episode, 0])
        try:
            if camera in record.videos:
                path, start_s = record.videos[camera]
                # frame / fps rather than the timestamp column: float32 seconds are coarser than a tick of the video.
                return self._open_files.video(path).frame_at(start_s + frame / self.fps, self.tolerance_s)
            encoded = self._open_files.images(record.data_file, camera).encoded(int(self._row_in_file[index]))
            return _decode_image(encoded, self.root)
        except ValueError as error:
            raise ValueError(f"Camera {camera}, episode {record.index}, frame {frame}: {error}") from error

    def _decode_all(self) -> dict[str, np.ndarray]:
        """All frames of all cameras, {camera key: uint8 (N, h, w, 3)}."""
        shapes = {key: self.image(0, key).shape for key in self.camera_keys}
        needed = sum(len(self) * int(np.prod(shape)) for shape in shapes.values())
        free = _free_memory_bytes()
        if needed > free:
            raise ValueError(
                f"frames_in_memory needs {needed / 2**30:.1f} GiB for {len(self)} frames of "
                f"{', '.join(self.camera_keys)}, but {free / 2**30:.1f} GiB are free. Choose fewer cameras or "
                "episodes, or frames_in_memory=False."
            )
        memory = {key: np.empty((len(self), *shape), dtype=np.uint8) for key, shape in shapes.items()}
        with tqdm(total=len(self) * len(shapes), desc="decoding", unit="frame", disable=None) as progress:
            for key, frames in memory.items():
                for index in range(len(self)):
                    pixels = self.image(index, key)
                    if pixels.shape != frames.shape[1:]:
                        raise ValueError(
                            f"{key} has images of {frames.shape[1:]} and of {pixels.shape}; frames_in_memory needs "
                            "one size. Use frames_in_memory=False."
                        )
                    frames[index] = pixels
                    progress.update()
        self._open_files = _OpenFiles()
        return memory

    def __getstate__(self) -> dict:
        # Open files stay behind: the receiving process opens its own.
        return self.__dict__ | {"_open_files": _OpenFiles()}


class _OpenFiles:
    """The files that one process has open. After a fork the child starts afresh: file positions would be shared."""

    def __init__(self):
        self._forget()

    def _forget(self):
        self._process = os.getpid()
        self._videos: OrderedDict[Path, VideoReader] = OrderedDict()
        self._image_columns: dict[tuple[Path, str], _ImageColumn] = {}
        self._row_groups = _RowGroupCache()

    def video(self, path: Path) -> VideoReader:
        if os.getpid() != self._process:
            self._forget()
        if path not in self._videos:
            if len(self._videos) == OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
            self._videos[path] = VideoReader(path)
        self._videos.move_to_end(path)
        return self._videos[path]

    def images(self, path: Path, column: str) -> "_ImageColumn":
        if os.getpid() != self._process:
            self._forget()
        if (path, column) not in self._image_columns:
            self._image_columns[path, column] = _ImageColumn(path, column, self._row_groups)
        return self._image_columns[path, column]


class _RowGroupCache:
    """Row groups of image columns, least recently used ones dropped beyond `ROW_GROUP_CACHE_BYTES`."""

    def __init__(self):
        self._groups: OrderedDict[tuple, pa.ChunkedArray] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: tuple, read) -> pa.ChunkedArray:
        if key not in self._groups:
            self._groups[key] = read()
            self._num_bytes += self._groups[key].nbytes
            while self._num_bytes > ROW_GROUP_CACHE_BYTES and len(self._groups) > 1:
                self._num_bytes -= self._groups.popitem(last=False)[1].nbytes
        self._groups.move_to_end(key)
        return self._groups[key]


class _ImageColumn:
    """An image column (struct of bytes and path) of one parquet file, read row group by row group."""

    def __init__(self, path: Path, column: str, cache: _RowGroupCache):
        self._path, self._column, self._cache = path, column, cache
        self._file = open_parquet(path)
        groups = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._group_ends = np.cumsum(groups)

    def encoded(self, row: int) -> dict:
        """{"bytes": encoded image or None, "path": file name or None} of one row of the file."""
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        first = int(self._group_ends[group - 1]) if group else 0
        rows = self._cache.get((self._path, self._column, group), lambda: self._read(group))
        return rows[row - first].as_py()

    def _read(self, group: int) -> pa.ChunkedArray:
        try:
            return self._file.read_row_group(group, columns=[self._column]).column(self._column)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self._path} cannot be read: {error}. Download the file again.") from error


def _decode_image(encoded: dict, root: Path) -> np.ndarray:
    """uint8 (h, w, 3) from an image struct; a struct without bytes names a file of the dataset."""
    if encoded["bytes"] is None and encoded["path"] is None:
        raise ValueError("the image is empty: it has neither bytes nor a path. Record the dataset again.")
    source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else root / encoded["path"]
    try:
        with Image.open(source) as image:
            return np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"the image cannot be decoded: {error}. Download the file again.") from error


def _free_memory_bytes() -> int:
    """Memory that can be allocated without swapping; a generous guess where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _is_colour_camera(feature: dict) -> bool:
    """True for image and video features that hold colours; depth has had three different markers over the years."""
    info = feature.get("info") or feature.get("video_info") or {}
    is_depth = info.get("is_depth_map", False) or info.get("video.is_depth_map", False)
    return feature["dtype"] in ("image", "video") and not is_depth


def _select(records: list[EpisodeRecord], episodes: list[int] | None, root: Path) -> list[EpisodeRecord]:
    by_index = {record.index: record for record in records}
    chosen = list(by_index) if episodes is None else [int(episode) for episode in episodes]
    unknown = [episode for episode in chosen if episode not in by_index]
    if unknown:
        raise ValueError(
            f"Episodes {unknown} are not in {root}, which has {len(records)} episodes "
            f"({min(by_index)} to {max(by_index)})."
        )
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ValueError(f"episodes={episodes}: give at least one episode, and each only once.")
    return [by_index[episode] for episode in chosen]


def _read_data_file(
    path: Path, state_key: str, action_key: str, image_keys: list[str], features: dict
) -> dict[str, np.ndarray]:
    """The numeric columns of one data file, rows in file order."""
    table = read_parquet(path, [state_key, action_key, "timestamp", "frame_index", "episode_index", "task_index"])
    absent = [key for key in image_keys if key not in open_parquet(path).schema_arrow.names]
    if absent:
        raise ValueError(f"{path} has no image column {', '.join(absent)}, which info.json declares.")
    return {
        "state": _matrix(table[state_key], path, state_key, features[state_key]),
        "action": _matrix(table[action_key], path, action_key, features[action_key]),
        "timestamp": table["timestamp"].to_numpy().astype(np.float64),
        "frame_index": table["frame_index"].to_numpy().astype(np.int64),
        "episode_index": table["episode_index"].to_numpy().astype(np.int64),
        "task_index": table["task_index"].to_numpy().astype(np.int64),
    }


def _matrix(column: pa.ChunkedArray, path: Path, key: str, feature: dict) -> np.ndarray:
    """float32 (rows, width) from a scalar, list or fixed-size list column."""
    width = int(np.prod(feature["shape"]))
    is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks]) if is_list and column.chunks else column
    if len(values) != len(column) * width:
        raise ValueError(
            f"{path}: column {key} holds {len(values)} numbers in {len(column)} rows; info.json declares {width} per "
            "row. Download the file again."
        )
    # Writers that go through pandas store NaN as null; here it becomes NaN again, which the caller refuses.
    return values.to_numpy().astype(np.float32).reshape(len(column), width)


def _check_episode_rows(
    rows: dict[str, np.ndarray], selected: np.ndarray, record: EpisodeRecord, state_key: str, action_key: str
):
    if len(selected) != record.length:
        raise ValueError(
            f"{record.data_file} has {len(selected)} rows of episode {record.index}; meta/episodes says "
            f"{record.length}. The download is incomplete or mixes revisions."
        )
    if not np.array_equal(rows["frame_index"][selected], np.arange(record.length)):
        raise ValueError(
            f"{record.data_file}: frame_index of episode {record.index} does not count 0 to {record.length - 1}. "
            "Record or download it again."
        )
    for name, key in (("state", state_key), ("action", action_key)):
        finite = np.isfinite(rows[name][selected]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{key} of episode {record.index}, frame {int(np.argmin(finite))} is NaN or infinite in "
                f"{record.data_file}; all values must be finite. Leave the episode out with episodes=[...]."
            )
