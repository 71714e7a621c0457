"""Vision features of every frame of a dataset, computed once and kept on disk.

The file grows batch by batch and says how far it got, so an interrupted run goes on. A fingerprint of the frames and
of the model that looks at them keeps features of one from being read as features of another.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .lerobot import LeRobotDataset


def dataset_fingerprint(dataset: LeRobotDataset) -> str:
    """16 hexadecimal digits of which frames a dataset holds, in which order: its numbers, episodes and cameras."""
    digest = hashlib.sha256()
    digest.update(json.dumps([dataset.fps, dataset.camera_keys, dataset.episode_bounds.tolist()]).encode())
    for array in (dataset.episode_ids, dataset.states, dataset.actions, dataset.timestamps):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def cache_vision_features(
    dataset: LeRobotDataset,
    embed: Callable[[list[np.ndarray]], np.ndarray],
    model_fingerprint: str,
    folder: str | Path,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Features (N, F) float32 of all N frames of a dataset, memory-mapped from `folder`; computed where missing.

    Args:
        dataset: with at least one camera. F is the width of a feature times the number of cameras, in their order.
        embed: images, uint8 (h, w, 3) each, to features (images, width).
        model_fingerprint: names the model behind `embed`.
        folder: gets `features-FINGERPRINT.npy` and `features-FINGERPRINT.json`.
        batch_size: frames that are embedded together.

    Raises:
        ValueError: a dataset without cameras, or `embed` returns something that is not finite.
    """
    if not dataset.camera_keys:
        raise ValueError(f"{dataset.root} is read without cameras: vision features need at least one.")
    key = hashlib.sha256(f"{dataset_fingerprint(dataset)} {model_fingerprint}".encode()).hexdigest()[:16]
    path = Path(folder) / f"features-{key}.npy"
    progress = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(progress.read_text())["frames"] if progress.exists() and path.exists() else 0
    array = np.load(path, mmap_mode="r+") if done else None
    with tqdm(total=len(dataset), initial=done, desc="vision features", unit="frame", disable=None) as bar:
        for start in range(done, len(dataset), batch_size):
            stop = min(start + batch_size, len(dataset))
            images = [dataset.image(index, key) for index in range(start, stop) for key in dataset.camera_keys]
            features = np.asarray(embed(images), dtype=np.float32).reshape(stop - start, -1)
            if not np.isfinite(features).all():
                row = start + int(np.argmin(np.isfinite(features).all(axis=1)))
                raise ValueError(f"The vision features of frame {row} are not finite. Load the model in float32.")
            if array is None:
                shape = (len(dataset), features.shape[1])
                array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            array[start:stop] = features
            # The count is written after the numbers, so that what it counts is really there
            array.flush()
            partial = progress.with_suffix(".partial")
            partial.write_text(json.dumps({"frames": stop}))
            os.replace(partial, progress)
            bar.update(stop - start)
    return np.load(path, mmap_mode="r")
