"""Reading LeRobot datasets (formats v3.0 and v2.1) without lerobot.

The numbers of all frames are kept in memory as arrays; images are decoded when they are asked for. What differs
between the formats is in `lerobot_metadata.py`.

Legend: N frames, E episodes, H action horizon, S state size, D action size, (h, w) image size.
"""

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

from ..action_space_wallvla import short_camera_key
from .chunks import linear
from .hub import open_dataset
from .language import PERSISTENT, SUBTASK_INDEX, EpisodeLanguage, read_persistent, read_subtasks
from .lerobot_metadata import EpisodeRecord, open_parquet, read_episodes, read_info, read_parquet, read_tasks
from .video import VideoReader


logger = logging.getLogger(__name__)

OPEN_VIDEOS = 64  # file handles per process; a shuffled dataset visits its video files in random order
ROW_GROUP_CACHE_BYTES = 512 * 2**20  # compressed images kept per process when they live inside parquet files


class LeRobotDataset:
    """Map-style dataset of action samples (`docs/architecture.md`), one per recorded frame.

    Args:
        root: dataset folder (the one that contains `meta/`), or a Hub id ("lerobot/pusht"), of which only the files
            that are read get downloaded, videos when they are first needed.
        embodiment: written into every sample; a key of `processor.embodiments`.
        cameras: camera keys to decode, full (`"observation.images.front"`) or short (`"front"`), in this order.
            Default: all colour cameras of the dataset; `[]` for none.
        action_horizon: H, steps of the action chunk.
        episodes: episode numbers to read, in this order. Default: all.
        keep: frames to keep by episode number, ascending numbers of its frames; the other frames are as if they had
            never been recorded. Episodes that are not named are kept whole, those with no frame left out. This is what
            `wallvla data clean` writes; see `cleaning.read_plan`.
        frames_in_memory: decode all frames once, now, into uint8 memory. Needs N * h * w * 3 bytes per camera, which
            forked data loader workers share and spawned ones copy. Worth it for small images, and for image columns
            in files of one huge row group (older writers), whose random access reads the whole group.
        state_key, action_key: features that hold proprioception and action. `action_key=None`: the dataset has no
            actions, the state of the next frame takes their place (the last frame of an episode, which has no next
            one, is left out).
        convert: called once per episode as `convert(states (T, S0), actions (T, D0))`, returns float arrays (T, S) and
            (T, D): forward kinematics, other conventions; see `unification.py`.
        action_times_s: (H,) seconds after the observation at which the steps of a chunk lie, ascending; see
            `chunks.py`. Default: step j is the j-th next frame.
        full_sequence: the chunk of a frame is all that is left of its episode: H steps at even distances from the
            action of the frame to the last one, none of them padding. Instead of `action_times_s`.
        interpolate: `interpolate(lower (..., D), upper (..., D), fraction (...,))` between two neighbouring frames,
            for times that fall between them. Default: linear. `Embodiment.interpolate_actions` turns rotations.
        skip_errors: leave out episodes that cannot be read and list them in `skipped`, instead of raising.
        revision: branch, tag or commit of a Hub dataset.
        tolerance_s: largest accepted distance in seconds between a row's timestamp, its place in the recording (frame
            number / fps) and the nearest video frame. Default: a quarter of the frame period, below which the nearest
            frame cannot be a neighbour.

    Attributes:
        fps (`int`), features (`dict`, as in info.json), tasks (`dict[int, str]`, instruction by task index),
        camera_keys (`list[str]`), num_episodes (`int`),
        episode_ids (`(E,)` int64): the dataset's own episode numbers,
        episode_bounds (`(E, 2)` int64): first and past-the-end sample index of each episode,
        states (`(N, S)` float32), actions (`(N, D)` float32): robot units,
        frame_numbers (`(N,)` int64): each sample's frame in its recording,
        subtasks (`list[str]`), subtask_indices (`(N,)` int64): step-level instructions; -1 where there is none,
        language (`list[EpisodeLanguage]`): annotations of each episode, empty where there are none,
        skipped (`dict[int, str]`): reason by number of the episodes that `skip_errors` left out.

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
        keep: dict[int, Sequence[int]] | None = None,
        frames_in_memory: bool = False,
        state_key: str = "observation.state",
        action_key: str | None = "action",
        convert: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
        action_times_s: Sequence[float] | None = None,
        full_sequence: bool = False,
        interpolate: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] = linear,
        skip_errors: bool = False,
        revision: str | None = None,
        tolerance_s: float | None = None,
    ):
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; it must be at least 1 frame.")
        self.root, self._hub = open_dataset(root, revision)
        self.embodiment = embodiment
        self.action_horizon = action_horizon
        self._convert, self._interpolate, self._skip_errors = convert, interpolate, skip_errors
        self.skipped: dict[int, str] = {}
        info = read_info(self.root)
        self.fps = info["fps"]
        self.features = info["features"]
        self.tolerance_s = 0.25 / self.fps if tolerance_s is None else tolerance_s
        self.camera_keys = self._resolve_cameras(cameras)
        self._video_keys = [key for key in self.camera_keys if self.features[key]["dtype"] == "video"]
        for key, role in ((state_key, "state_key"), (action_key, "action_key")):
            if key is not None and key not in self.features:
                raise ValueError(
                    f"{role} {key!r} is not a feature of {self.root}. It has: {', '.join(sorted(self.features))}."
                )
        self.tasks = read_tasks(self.root, info)
        self._action_steps = _steps_of_times(action_times_s, action_horizon, self.fps)
        if full_sequence and action_times_s is not None:
            raise ValueError("Found full_sequence and action_times_s. Steps have times, or they fill the episode.")
        self._full_sequence = full_sequence
        self._records = _select(read_episodes(self.root, info, self._video_keys), episodes, self.root)
        if self._hub is None:
            self._check_videos_exist()
        self._load_rows(state_key, action_key, keep or {})
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

    def _load_rows(self, state_key: str, action_key: str | None, keep: dict[int, Sequence[int]]):
        """Fill the per-frame arrays from the data files, one file at a time."""
        by_file: dict[Path, list[int]] = {}
        for position, record in enumerate(self._records):
            by_file.setdefault(record.data_file, []).append(position)
        parts: list[dict | None] = [None] * len(self._records)
        image_keys = [key for key in self.camera_keys if key not in self._video_keys]
        reader = _EpisodeReader(state_key, action_key, image_keys, self, keep)
        # delay: the old format has a file per episode, so this can take a while; the new one is done before it shows.
        for path, positions in tqdm(by_file.items(), desc="reading", unit="file", delay=2, disable=None):
            try:
                if self._hub is not None:
                    self._hub.fetch(path)
                reader.open(path)
            except (ValueError, FileNotFoundError) as error:
                self._skip([self._records[position].index for position in positions], error)
                continue
            for position in positions:
                try:
                    parts[position] = reader.episode(self._records[position])
                except ValueError as error:
                    self._skip([self._records[position].index], error)

        kept = [position for position, part in enumerate(parts) if part is not None and len(part["state"])]
        if not kept:
            raise ValueError(
                f"No episode of {self.root} can be used: {list(self.skipped.values())[:3] or 'none kept'}."
            )
        self._records = [self._records[position] for position in kept]
        parts = [parts[position] for position in kept]
        lengths = [len(part["state"]) for part in parts]
        ends = np.cumsum(lengths)
        self.episode_bounds = np.stack([ends - lengths, ends], axis=1)  # (E, 2)
        self.episode_ids = np.asarray([record.index for record in self._records], dtype=np.int64)
        self.num_episodes = len(self._records)
        self._episode_of_frame = np.repeat(np.arange(self.num_episodes), lengths)  # (N,)
        self.states = np.concatenate([part["state"] for part in parts])  # (N, S)
        self.actions = np.concatenate([part["action"] for part in parts])  # (N, D)
        self.timestamps = np.concatenate([part["timestamp"] for part in parts])  # (N,) seconds in the episode
        self.task_indices = np.concatenate([part["task_index"] for part in parts])  # (N,)
        self.frame_numbers = np.concatenate([part["frame_index"] for part in parts])  # (N,)
        self._row_in_file = np.concatenate([part["row_in_file"] for part in parts])  # (N,)
        self._load_language(parts)
        unknown = sorted(set(self.task_indices.tolist()) - set(self.tasks))
        if unknown:
            raise ValueError(
                f"Rows of {self.root} use task_index {unknown}, but the list of tasks in meta/ only has "
                f"{sorted(self.tasks)}. The metadata and the data are from different revisions; download both again."
            )

    def _skip(self, episodes: list[int], error: Exception):
        if not self._skip_errors:
            raise error
        for episode in episodes:
            self.skipped[episode] = str(error)
        logger.warning("%s: episode(s) %s skipped: %s", self.root, episodes, error)

    def _load_language(self, parts: list[dict]):
        self.language = [part["language"] for part in parts]
        texts: dict[str, int] = {}
        older = read_subtasks(self.root)
        self.subtask_indices = np.full(len(self), -1, dtype=np.int64)
        for (start, stop), part in zip(self.episode_bounds, parts, strict=True):
            steps = part["language"].step_at(self.timestamps[start:stop])
            if older and "subtask_index" in part:
                steps = [older.get(int(number)) for number in part["subtask_index"]]
            for index, text in enumerate(steps, start):
                if text is not None:
                    self.subtask_indices[index] = texts.setdefault(text, len(texts))
        self.subtasks = list(texts)

    def _check_videos_exist(self):
        seen, broken = set(), set()
        for record in self._records:
            for key, (path, _) in record.videos.items():
                if path not in seen and not path.is_file():
                    error = FileNotFoundError(
                        f"{path} is missing: the video of {key}, episode {record.index}. Download it, or leave the "
                        "camera out with cameras=[...]."
                    )
                    self._skip([record.index], error)
                    broken.add(record.index)
                    break
                seen.add(path)
        self._records = [record for record in self._records if record.index not in broken]

    def __len__(self) -> int:
        return len(self._episode_of_frame)

    def __getitem__(self, index: int) -> dict:
        """The sample of one frame.

        Returns:
            dict with `images` ({camera key: uint8 (h, w, 3)}), `instruction`, `state` float32 (S,), `embodiment`,
            `actions` float32 (H, D) in robot units, `action_is_pad` bool (H,), and for messages and evaluation
            `episode_index`, `frame_index`, `timestamp` (seconds since the start of the episode), `dataset_index`;
            where the dataset has them `subtask` (the step-level instruction) and `paraphrases` (of the instruction).

        Raises:
            IndexError: index outside the dataset.
            ValueError: a frame cannot be decoded.
        """
        index = self._checked(index)
        episode = int(self._episode_of_frame[index])
        actions, is_pad = self.action_chunks(np.asarray([index]))
        language = {}
        if self.subtask_indices[index] >= 0:
            language["subtask"] = self.subtasks[self.subtask_indices[index]]
        if self.language[episode].paraphrases:
            language["paraphrases"] = list(self.language[episode].paraphrases)
        return {
            "images": {key: self.image(index, key) for key in self.camera_keys},
            "instruction": self.tasks[int(self.task_indices[index])],
            "state": self.states[index].copy(),
            "embodiment": self.embodiment,
            "actions": actions[0],
            "action_is_pad": is_pad[0],
            "episode_index": int(self.episode_ids[episode]),
            "frame_index": int(self.frame_numbers[index]),
            "timestamp": float(self.timestamps[index]),
            "dataset_index": index,
            **language,
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
        last = self.episode_bounds[self._episode_of_frame[indices], 1][:, None] - 1  # (B, 1)
        if self._full_sequence:
            wanted = indices[:, None] + (last - indices[:, None]) * np.linspace(0, 1, self.action_horizon)  # (B, H)
        elif self._action_steps is None:
            steps = indices[:, None] + np.arange(self.action_horizon)  # (B, H)
            return self.actions[np.minimum(steps, last)], steps > last
        else:
            wanted = indices[:, None] + self._action_steps
        steps = np.minimum(wanted, last)
        lower = np.floor(steps).astype(np.int64)
        between = self._interpolate(self.actions[lower], self.actions[np.minimum(lower + 1, last)], steps - lower)
        return between.astype(np.float32), wanted > last

    def image(self, index: int, camera: str) -> np.ndarray:
        """One decoded image: uint8 (h, w, 3) RGB. `camera` is one of `camera_keys`."""
        index = self._checked(index)
        if camera in self._memory:
            return self._memory[camera][index].copy()
        episode = int(self._episode_of_frame[index])
        record = self._records[episode]
        frame = int(self.frame_numbers[index])
        try:
            if camera in record.videos:
                path, start_s = record.videos[camera]
                if self._hub is not None:
                    self._hub.fetch(path)
                # frame / fps rather than the timestamp column: float32 seconds are coarser than a tick of the video.
                return self._open_files.video(path).frame_at(start_s + frame / self.fps, self.tolerance_s)
            encoded = self._open_files.images(record.data_file, camera).encoded(int(self._row_in_file[index]))
            if self._hub is not None and encoded["bytes"] is None and encoded["path"] is not None:
                self._hub.fetch(self.root / encoded["path"])
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


def _steps_of_times(times_s: Sequence[float] | None, horizon: int, fps: float) -> np.ndarray | None:
    """Times (H,) in seconds as frames, whole numbers where they are nearly whole; `None` for consecutive frames."""
    if times_s is None:
        return None
    steps = np.asarray(times_s, dtype=np.float64) * fps
    if steps.shape != (horizon,) or not np.isfinite(steps).all() or (steps < 0).any() or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"action_times_s is {np.round(times_s, 4).tolist()}; it must be {horizon} (action_horizon) ascending "
            "times from 0 s on."
        )
    return np.where(np.abs(steps - np.round(steps)) < 1e-6, np.round(steps), steps)


class _EpisodeReader:
    """Reads the numbers of episodes out of one data file after the other; see `LeRobotDataset` for the arguments."""

    def __init__(self, state_key, action_key, image_keys, dataset: LeRobotDataset, keep):
        self._state_key, self._action_key, self._image_keys = state_key, action_key, image_keys
        self._features, self._convert, self._keep = dataset.features, dataset._convert, keep
        self._fps, self._tolerance_s = dataset.fps, dataset.tolerance_s

    def open(self, path: Path):
        """Read the numeric columns of a file, rows in file order."""
        columns = [self._state_key, "timestamp", "frame_index", "episode_index", "task_index"]
        names = open_parquet(path).schema_arrow.names
        absent = [key for key in self._image_keys if key not in names]
        if absent:
            raise ValueError(f"{path} has no image column {', '.join(absent)}, which info.json declares.")
        if self._action_key is not None:
            columns.append(self._action_key)
        optional = [name for name in (SUBTASK_INDEX, PERSISTENT) if name in names]
        table = read_parquet(path, columns + optional)
        self._rows = {
            "state": _matrix(table[self._state_key], path, self._state_key, self._features[self._state_key]),
            "timestamp": table["timestamp"].to_numpy().astype(np.float64),
        }
        if self._action_key is not None:
            self._rows["action"] = _matrix(
                table[self._action_key], path, self._action_key, self._features[self._action_key]
            )
        for name in ("frame_index", "episode_index", "task_index", *optional[: SUBTASK_INDEX in optional]):
            self._rows[name] = table[name].to_numpy().astype(np.int64)
        self._language = table[PERSISTENT] if PERSISTENT in optional else None
        self._order = np.argsort(self._rows["episode_index"], kind="stable")
        self._sorted_ids = self._rows["episode_index"][self._order]

    def episode(self, record: EpisodeRecord) -> dict:
        """The columns of one episode, checked, converted, and without the frames that are not kept."""
        first, last = np.searchsorted(self._sorted_ids, [record.index, record.index + 1])
        rows = self._order[first:last]
        keys = {"state": self._state_key} | ({"action": self._action_key} if "action" in self._rows else {})
        _check_episode_rows(self._rows, rows, record, keys)
        self._check_times(rows, record)
        part = {name: column[rows] for name, column in self._rows.items()}
        part["row_in_file"] = rows
        part["language"] = EpisodeLanguage()
        if self._language is not None and len(rows):
            part["language"] = read_persistent(self._language, int(rows[0]))
        kept = self._kept_frames(record)
        if kept is not None:
            part = {name: value if name == "language" else value[kept] for name, value in part.items()}
        if "action" not in part:
            part["action"] = part["state"][1:]  # the next state is what the robot was told, up to its tracking error
            part = {
                name: value if name in ("language", "action") else value[: len(part["action"])]
                for name, value in part.items()
            }
        if self._convert is not None and len(part["state"]):
            part["state"], part["action"] = self._converted(part["state"], part["action"], record.index)
        return part

    def _check_times(self, rows: np.ndarray, record: EpisodeRecord):
        distance = np.abs(self._rows["timestamp"][rows] - np.arange(record.length) / self._fps)
        fits = distance <= self._tolerance_s  # not where a timestamp is NaN
        if not fits.all():
            frame = int(np.argmin(fits))
            raise ValueError(
                f"{record.data_file}: the timestamp of episode {record.index}, frame {frame} is {distance[frame]:.4f} "
                f"s from frame / fps; the tolerance is {self._tolerance_s:.4f} s. Leave the episode out, or raise "
                "tolerance_s if the frames are evenly spaced all the same."
            )

    def _kept_frames(self, record: EpisodeRecord) -> np.ndarray | None:
        if record.index not in self._keep:
            return None
        kept = np.asarray(self._keep[record.index], dtype=np.int64)
        if (np.diff(kept) <= 0).any() or (len(kept) and not 0 <= kept[0] <= kept[-1] < record.length):
            raise ValueError(
                f"keep names frames of episode {record.index} that it does not have (0 to {record.length - 1}), or "
                "not in ascending order. The cleaning plan belongs to another dataset; run `wallvla data clean` again."
            )
        return kept

    def _converted(self, states: np.ndarray, actions: np.ndarray, episode: int) -> tuple[np.ndarray, np.ndarray]:
        converted = [np.asarray(values, dtype=np.float32) for values in self._convert(states, actions)]
        for name, values in zip(("states", "actions"), converted, strict=True):
            if values.ndim != 2 or len(values) != len(states) or not np.isfinite(values).all():
                raise ValueError(
                    f"convert returned {name} of shape {values.shape} for the {len(states)} frames of episode "
                    f"{episode}, or numbers that are not finite; it returns one finite vector per frame."
                )
        return converted[0], converted[1]


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
    rows: dict[str, np.ndarray], selected: np.ndarray, record: EpisodeRecord, keys: dict[str, str]
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
    for name, key in keys.items():
        finite = np.isfinite(rows[name][selected]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{key} of episode {record.index}, frame {int(np.argmin(finite))} is NaN or infinite in "
                f"{record.data_file}; all values must be finite. Leave the episode out with episodes=[...]."
            )
