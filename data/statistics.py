"""Normalisation statistics of an embodiment, over exactly the numbers that the model will see.

One pass in parallel threads over blocks of episodes. Quantiles are exact while the values fit into memory, and beyond
that from a sketch whose error is bounded; the sketch, like everything else here, does not depend on the order or the
number of blocks.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..action_space_wallvla import Embodiment
from .lerobot import LeRobotDataset


CHUNKS_AT_ONCE = 1024  # chunks that are transformed together: bounds the memory of the float64 intermediates
EXACT_BYTES = 2**30  # values beyond this are sketched
VERSION = 1  # of what is cached; raise it when a number changes its meaning
QUANTILES = (0.01, 0.99)


class QuantileSketch:
    """Quantiles of many columns in constant memory, in one pass, mergeable in any order.

    DDSketch (Masson, Rim and Lee, VLDB 2019): values are counted in bins whose borders grow by a constant factor, so
    every quantile is within `accuracy` of the true one, relative to its size; values below `smallest` count as 0.

    Args:
        columns: K.
        accuracy: relative error bound.
        smallest, largest: magnitudes that are told apart. Larger ones go to the last bin.
    """

    def __init__(self, columns: int, accuracy: float = 1e-3, smallest: float = 1e-7, largest: float = 1e6):
        self._log = np.log((1 + accuracy) / (1 - accuracy))
        self._offset = np.log(smallest)
        self._half = int(np.ceil((np.log(largest) - self._offset) / self._log)) + 1
        self._counts = np.zeros((columns, 2 * self._half + 1), dtype=np.int64)

    def add(self, values: np.ndarray):
        """Count values (N, K)."""
        magnitude = np.abs(values)
        with np.errstate(divide="ignore"):
            bins = np.ceil((np.log(magnitude) - self._offset) / self._log)
        bins = np.clip(bins, 0, self._half).astype(np.int64)
        bins = np.where(values < 0, -bins, bins) + self._half
        for column in range(values.shape[1]):
            self._counts[column] += np.bincount(bins[:, column], minlength=self._counts.shape[1])

    def merge(self, other: "QuantileSketch"):
        """Count what another sketch of the same size has counted."""
        self._counts += other._counts

    def quantile(self, share: float) -> np.ndarray:
        """Estimate (K,) of the quantile: within the accuracy of a value at the ranks around share * (N - 1)."""
        rank = share * (self._counts[0].sum() - 1)
        bins = (np.cumsum(self._counts, axis=1) > rank + 1e-9).argmax(axis=1) - self._half
        # The middle of a bin, so that both of its borders are equally far in relative terms.
        upper = np.exp(self._offset + np.abs(bins) * self._log)
        return np.where(bins == 0, 0.0, np.sign(bins) * upper * 2 / (1 + np.exp(self._log)))


class _Column:
    """Count, mean, sum of squared deviations, minimum and maximum (K,) of blocks (N, K), mergeable."""

    def __init__(self, values: np.ndarray, exact: bool):
        values = values.astype(np.float64)
        self.count, self.mean = len(values), values.mean(axis=0)
        self.deviation = ((values - self.mean) ** 2).sum(axis=0)
        self.low, self.high = values.min(axis=0), values.max(axis=0)
        self.values = [values.astype(np.float32)] if exact else []
        self.sketch = QuantileSketch(values.shape[1])
        if not exact:
            self.sketch.add(values)

    def merge(self, other: "_Column"):
        """Chan, Golub and LeVeque's update of mean and deviation."""
        total = self.count + other.count
        distance = other.mean - self.mean
        self.deviation += other.deviation + distance**2 * self.count * other.count / total
        self.mean += distance * other.count / total
        self.count = total
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.values += other.values
        self.sketch.merge(other.sketch)

    def summary(self) -> dict[str, list[float]]:
        if self.values:
            width = self.values[0].shape[1]
            # Column by column, to keep the float64 copies small.
            columns = [np.concatenate([part[:, k] for part in self.values]).astype(np.float64) for k in range(width)]
            low, high = np.array([np.quantile(column, QUANTILES) for column in columns]).reshape(width, 2).T
        else:
            low, high = (np.clip(self.sketch.quantile(share), self.low, self.high) for share in QUANTILES)
        numbers = {"q01": low, "q99": high, "mean": self.mean, "std": np.sqrt(self.deviation / self.count)}
        numbers |= {"min": self.low, "max": self.high}
        return {name: [float(value) for value in values] for name, values in numbers.items()}


def compute_statistics(
    dataset: LeRobotDataset | Sequence[LeRobotDataset],
    embodiment: Embodiment,
    *,
    chunk_stride: int = 1,
    progress: bool = True,
    exact: bool | None = None,
    num_threads: int | None = None,
    cache: str | Path | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Statistics of states and actions after the embodiment's change of layout and reference frame.

    States count once per frame. Actions in reference frame "absolute" count once per frame too; in the other frames
    they depend on where a chunk starts, so every step of every chunk counts, without the steps past the end of the
    episode. No image is decoded.

    Args:
        dataset: one dataset or several of the same robot.
        embodiment: anything with `transform_state`, `transform_actions`, `state_width`, `action_width`,
            `reference_frame` and `action_horizon`; its own statistics are not used.
        chunk_stride: use only the chunks that start at every n-th frame of an episode. Only for reference frames other
            than "absolute".
        progress: whether to show a progress bar.
        exact: quantiles of all values (numpy's linear interpolation; 4 bytes per channel and step of memory), or from
            a sketch, within 0.1% of their size, in constant memory. Default: exact up to 1 GiB.
        num_threads: default: one per core.
        cache: folder in which results are kept under a fingerprint of all numbers and settings that they depend on.

    Returns:
        `{"state": {...}, "action": {...}}` of q01, q99, mean, std, min and max, lists of one float per column of
        `transform_state` and `transform_actions`: what `Embodiment(statistics=...)` takes.

    Raises:
        ValueError: the dataset's vectors do not fit the embodiment's layouts, or its chunks have another length.
    """
    datasets = [dataset] if isinstance(dataset, LeRobotDataset) else list(dataset)
    if not datasets:
        raise ValueError("Found no dataset. Give at least one.")
    if chunk_stride < 1:
        raise ValueError(f"chunk_stride is {chunk_stride}; it must be at least 1.")
    for each in datasets:
        check_fit(each, embodiment)
    if exact is None:
        exact = sum(_num_bytes(each, embodiment, chunk_stride) for each in datasets) <= EXACT_BYTES
    file = None
    if cache is not None:
        file = Path(cache) / f"{statistics_fingerprint(datasets, embodiment, chunk_stride, exact)}.json"
        if file.is_file():
            return json.loads(file.read_text())
    statistics = _one_pass(datasets, embodiment, chunk_stride, exact, num_threads or os.cpu_count() or 1, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.writing-{os.getpid()}")
        partial.write_text(json.dumps(statistics) + "\n")
        os.replace(partial, file)
    return statistics


def _one_pass(datasets, embodiment, chunk_stride, exact, num_threads, progress) -> dict:
    jobs = [(each, start, stop) for each in datasets for start, stop in each.episode_bounds]
    totals: dict[str, _Column] = {}

    def work(job) -> dict[str, _Column]:
        each, start, stop = job
        blocks = [("state", _transformed_states(each, embodiment, start, stop))]
        blocks += [("action", part) for part in _transformed_actions(each, embodiment, start, stop, chunk_stride)]
        columns: dict[str, _Column] = {}
        for kind, values in blocks:
            _add(columns, kind, _Column(values, exact))
        return columns

    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(jobs), desc="statistics", unit="episode", disable=None if progress else True) as bar,
    ):
        # In the order of the episodes, so that the last digit does not depend on the threads; a few at a time, so that
        # results do not pile up.
        for first in range(0, len(jobs), 8 * num_threads):
            for columns in pool.map(work, jobs[first : first + 8 * num_threads]):
                for kind, column in columns.items():
                    _add(totals, kind, column)
                bar.update()
    return {kind: column.summary() for kind, column in totals.items()}


def _add(totals: dict[str, _Column], kind: str, column: _Column):
    if kind in totals:
        totals[kind].merge(column)
    else:
        totals[kind] = column


def _num_bytes(dataset: LeRobotDataset, embodiment: Embodiment, chunk_stride: int) -> int:
    """Memory of all transformed values as float32."""
    steps = 1 if embodiment.reference_frame == "absolute" else embodiment.action_horizon / chunk_stride
    return int(len(dataset) * 4 * (len(embodiment.state_channels) + steps * len(embodiment.action_channels)))


def statistics_fingerprint(
    datasets: Sequence[LeRobotDataset], embodiment: Embodiment, chunk_stride: int = 1, exact: bool = True
) -> str:
    """Hash of everything that the statistics depend on: all states and actions, episodes, chunks, and the robot but
    for its prompt, cameras and earlier statistics."""
    robot = embodiment.to_dict()
    for name in ("prompt", "cameras", "statistics", "domain"):
        robot.pop(name)
    digest = hashlib.sha256(json.dumps([VERSION, robot, chunk_stride, exact], sort_keys=True).encode())
    for each in datasets:
        chunks, is_pad = each.action_chunks(np.zeros(1, dtype=np.int64))  # shows the times of a chunk
        for values in (each.states, each.actions, each.episode_bounds, chunks, is_pad):
            digest.update(str(values.shape).encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]


def check_fit(dataset: LeRobotDataset, embodiment: Embodiment) -> None:
    """Raises ValueError unless the widths of the dataset's vectors and its horizon are the embodiment's."""
    for kind, found, expected in (
        # An empty state layout is a robot without proprioception: whatever the dataset has is not used.
        ("state", dataset.states.shape[1], embodiment.state_width or dataset.states.shape[1]),
        ("action", dataset.actions.shape[1], embodiment.action_width),
    ):
        if found != expected:
            raise ValueError(
                f"{dataset.root} has {found} {kind} numbers per frame; the embodiment's {kind}_layout has {expected}. "
                "Correct the layout, or choose the robot that recorded it (--embodiment), or describe a new one "
                "(--embodiment_file)."
            )
    if embodiment.reference_frame != "absolute" and dataset.action_horizon != embodiment.action_horizon:
        raise ValueError(
            f"{dataset.root} is read with action_horizon {dataset.action_horizon}; the embodiment has "
            f"{embodiment.action_horizon}. Statistics of actions in reference frame {embodiment.reference_frame!r} "
            "depend on it: read the dataset with the embodiment's."
        )


def _transformed_states(dataset: LeRobotDataset, embodiment: Embodiment, start: int, stop: int) -> np.ndarray:
    """float32 (frames, K)."""
    if embodiment.state_width == 0:
        return np.empty((stop - start, 0), dtype=np.float32)
    return embodiment.transform_state(dataset.states[start:stop]).astype(np.float32)


def _transformed_actions(
    dataset: LeRobotDataset, embodiment: Embodiment, start: int, stop: int, chunk_stride: int
) -> list[np.ndarray]:
    """Model actions of one episode: a list of float32 (values, K)."""
    if embodiment.reference_frame == "absolute":
        actions = embodiment.transform_actions(dataset.actions[start:stop, None], dataset.states[start:stop])
        return [actions[:, 0].astype(np.float32)]
    parts = []
    starts = np.arange(start, stop, chunk_stride)
    for first in range(0, len(starts), CHUNKS_AT_ONCE):
        indices = starts[first : first + CHUNKS_AT_ONCE]
        chunks, is_pad = dataset.action_chunks(indices)
        model_actions = embodiment.transform_actions(chunks, dataset.states[indices])  # (chunks, H, K)
        parts.append(model_actions[~is_pad].astype(np.float32))
    return parts
