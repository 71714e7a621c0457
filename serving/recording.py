"""Episodes as they are served, on disk at every moment, and as LeRobot datasets in the end.

    recordings/
      journal/<episode>.journal     one file per episode, append-only: what a killed server leaves behind is complete
                                    up to the frame that it was writing
      round-000.journal/            journals that are being turned into
      round-000/                    a LeRobot v3.0 dataset; when it is there, its journals are deleted

A frame is one request: what the robot saw, and the chunk that it was sent. A client that asks at every step makes a
dataset at its control frequency; one that executes k actions of each chunk makes one at a k-th of it, which
`frames_per_second` should say. `served_time_s` holds the true times.
"""

import fcntl
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .wire import MAX_FRAME, WireError, pack, unpack


logger = logging.getLogger(__name__)

MAX_EPISODE_FRAMES = 20_000
MIN_FREE_BYTES = 2**30  # with less free disk nothing is recorded
_HEAD = 8  # bytes before a record: its length and its CRC-32


class EpisodeJournal:
    """Appends the frames of one episode to a file. A frame is on its way to the disk when `add` returns.

    Args:
        path: file to create.
        header: what the whole episode has in common: "fps", "robot_type", "instruction", "seed".
    """

    def __init__(self, path: Path, header: dict) -> None:
        self.path, self.num_frames = path, 0
        # Unbuffered: what was written survives the process, and the disk's own failure is not our subject
        self._file = open(path, "xb", buffering=0)
        self._append(header)
        self._started = time.monotonic()

    def add(self, observation: dict, chunk: np.ndarray) -> None:
        """Appends one frame: the observation of a request, and the chunk (H, D) that was sent."""
        self._append(
            {
                "images": observation["images"],
                "state": observation["state"],
                "chunk": np.asarray(chunk, dtype=np.float32),
                "time": time.monotonic() - self._started,
            }
        )
        self.num_frames += 1

    def close(self) -> None:
        """Ends the episode; one without frames leaves no file."""
        self._file.close()
        if self.num_frames == 0:
            self.path.unlink()

    def _append(self, record: dict) -> None:
        data = pack(record)
        head = len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little")
        self._file.write(head + data)  # one call: a kill leaves a prefix of it, never a mixture


def read_journal(path: Path) -> Iterator[dict]:
    """The records of a journal, the header first, up to the first incomplete or damaged one."""
    with open(path, "rb") as file:
        while True:
            head = file.read(_HEAD)
            length = int.from_bytes(head[:4], "little")
            data = file.read(length) if len(head) == _HEAD and length <= 2 * MAX_FRAME else b""
            if len(head) < _HEAD or len(data) < length or zlib.crc32(data) != int.from_bytes(head[4:], "little"):
                return
            try:
                yield unpack(data, max_bytes=2 * MAX_FRAME)
            except WireError:
                return


class Recorder:
    """The episodes of one served model.

    Args:
        folder: where everything lies; created if needed.
        frames_per_second: of the dataset (a whole number, as the format demands); see the module.
        robot_type: of the dataset.
        make_writer: `LeRobotWriter`, or the same calls: `make_writer(root, fps=, features=, robot_type=)`.

    Raises:
        ValueError: another process records there.
    """

    def __init__(self, folder: str | Path, frames_per_second: int, robot_type: str, make_writer: Callable) -> None:
        self.folder, self._journals = Path(folder), Path(folder) / "journal"
        self._fps, self._robot_type, self._make_writer = frames_per_second, robot_type, make_writer
        self._journals.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._lock = open(self.folder / ".lock", "w")  # of the process: a killed one leaves it free
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another server records to {self.folder}. Choose another folder.") from error

    def close(self) -> None:
        """Lets another process record there."""
        self._lock.close()

    def start_episode(self, instruction: str, seed: int) -> EpisodeJournal | None:
        """A journal for a new episode; None, with a warning, when the disk is nearly full."""
        if shutil.disk_usage(self.folder).free < MIN_FREE_BYTES:
            logger.warning("not recording: less than %d MB free below %s", MIN_FREE_BYTES >> 20, self.folder)
            return None
        self._count += 1
        name = f"{time.time_ns():020d}-{os.getpid()}-{self._count:06d}.journal"
        header = {"fps": self._fps, "robot_type": self._robot_type, "instruction": instruction, "seed": seed}
        return EpisodeJournal(self._journals / name, header)

    def finish(self) -> list[Path]:
        """Turns all closed journals, also those of a killed server, into datasets; returns the new folders.

        May be interrupted at any point and called again: nothing is lost or written twice. No journal may be open.
        """
        datasets = []
        for batch in sorted(self.folder.glob("round-*.journal")):
            root = batch.with_suffix("")
            if not root.exists():  # else the last run was stopped between writing it and deleting this
                datasets += self._write(batch, root)
            shutil.rmtree(batch)
        groups: dict[str, list[Path]] = {}
        for journal in sorted(self._journals.glob("*.journal")):
            groups.setdefault(_signature(journal), []).append(journal)
        for signature, journals in groups.items():
            if not signature:  # killed before its first frame
                for journal in journals:
                    journal.unlink()
                continue
            root = self._next_root()
            batch = root.with_suffix(".journal")
            batch.mkdir()
            for journal in journals:
                journal.rename(batch / journal.name)
            datasets += self._write(batch, root)
            shutil.rmtree(batch)
        return datasets

    def _next_root(self) -> Path:
        taken = [int(path.name[6:9]) for path in self.folder.glob("round-[0-9][0-9][0-9]*")]
        return self.folder / f"round-{max(taken, default=-1) + 1:03d}"

    def _write(self, batch: Path, root: Path) -> list[Path]:
        journals = sorted(batch.glob("*.journal"))
        features = None
        for hidden in root.parent.glob(f".{root.name}.writing-*"):  # of a writer that was killed
            shutil.rmtree(hidden)
        for journal in journals:
            records = read_journal(journal)
            header = next(records)
            for frame in records:
                if features is None:
                    features = _features(frame)
                    writer = self._make_writer(
                        root, fps=header["fps"], features=features, robot_type=header["robot_type"]
                    )
                writer.add_frame(_lerobot_frame(frame))
            writer.save_episode(header["instruction"])
        writer.finalize()
        logger.info("recorded %d episodes in %s", len(journals), root)
        return [root]


def _signature(journal: Path) -> str:
    """What the episodes of one dataset must share: rate, robot and shapes. Empty for an episode without a frame."""
    records = read_journal(journal)
    header, frame = next(records, None), next(records, None)
    if frame is None:
        return ""
    return json.dumps([header["fps"], header["robot_type"], _features(frame)], sort_keys=True)


def _features(frame: dict) -> dict:
    state, (steps, channels) = len(frame["state"]), frame["chunk"].shape
    features = {
        "action": {"dtype": "float32", "shape": [channels], "names": None},
        "action_chunk": {"dtype": "float32", "shape": [steps * channels], "names": None},
        "served_time_s": {"dtype": "float32", "shape": [1], "names": None},
    }
    if state:
        features["observation.state"] = {"dtype": "float32", "shape": [state], "names": None}
    for camera, image in frame["images"].items():
        even = image.shape[0] % 2 == 0 and image.shape[1] % 2 == 0  # video needs that
        features[_camera_key(camera)] = {
            "dtype": "video" if even else "image",
            "shape": list(image.shape),
            "names": ["height", "width", "channel"],
        }
    return features


def _camera_key(camera: str) -> str:
    return camera if camera.startswith("observation.images.") else f"observation.images.{camera}"


def _lerobot_frame(frame: dict) -> dict:
    values = {
        "action": frame["chunk"][0],
        "action_chunk": frame["chunk"].ravel(),
        "served_time_s": np.float32(frame["time"]),
    }
    if len(frame["state"]):
        values["observation.state"] = frame["state"]
    return values | {_camera_key(camera): image for camera, image in frame["images"].items()}
