"""Balanced sampling of many sources (Wall-OSS-0.5, section 3.1.3): how many trajectories of each group, and which.

A *group* is a source and a task label. Group i with n_i trajectories gets the share n_i^p / sum_j n_j^p of an epoch;
what a cap takes from large groups goes to the others in the same proportions.

Everything here is a pure function of (seed, number of the draw): no state, so a run resumes exactly, with any number
of workers and ranks. Memory grows with the number of trajectories, never with the number of frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


_ROUNDS = 6  # of the Feistel network; four are indistinguishable from random for ideal rounds, ours are simple hashes
_WORD = (1 << 64) - 1
# Names of independent random streams of one seed; those of a mixture come before
_FRAMES, _TRAJECTORIES, _OFFSETS = range(5, 8)
_CACHED_EPOCHS = 2  # workers that read around the end of an epoch need this one and the next


# --------------------------------------------------------------------------------------------------------------------
# Shares and counts
# --------------------------------------------------------------------------------------------------------------------


def power_shares(sizes: Sequence[int], power: float = 0.5, cap: float | None = None) -> np.ndarray:
    """Share of an epoch of each group, n_i^p / sum_j n_j^p, none above the cap.

    The surplus of capped groups is shared among the others in proportion to n^p, which can lift one of them over the
    cap; that is repeated until none is.

    Args:
        sizes: n_i (G,), trajectories of each group, at least 1.
        power: p. 1 is proportional, 0 gives every group the same, 0.5 is the paper's.
        cap: largest share of one group, above 0; `None` for none.

    Returns:
        float64 (G,) with sum 1.

    Raises:
        ValueError: an empty group, a power or a cap out of range, or a cap under which the shares cannot reach 1.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    if sizes.ndim != 1 or not len(sizes) or (sizes < 1).any():
        raise ValueError(f"Found group sizes {sizes.tolist()}; at least one group, each with a trajectory, is needed.")
    if not 0 <= power <= 1:
        raise ValueError(f"power is {power}; it must lie between 0 (all groups alike) and 1 (proportional).")
    if cap is not None and not 1 / len(sizes) - 1e-12 <= cap <= 1:
        raise ValueError(
            f"cap is {cap} for {len(sizes)} groups; it must lie between 1/{len(sizes)} = {1 / len(sizes):.4g}, below "
            "which the groups cannot fill an epoch, and 1."
        )
    weights = sizes**power
    shares, free = np.zeros(len(sizes)), np.ones(len(sizes), dtype=bool)
    while free.any():
        rest = 1.0 - (0.0 if cap is None else cap * (~free).sum())
        shares[free] = rest * weights[free] / weights[free].sum()
        over = free & (shares > (1.0 if cap is None else cap) + 1e-12)
        if not over.any():
            break
        shares[over], free = cap, free & ~over
    return shares


def apportion(shares: np.ndarray, budget: int) -> np.ndarray:
    """Whole numbers (G,) that sum to `budget` exactly, each the share times the budget rounded up or down.

    Largest remainders are rounded up; ties go to the group that comes first.
    """
    exact = np.round(np.asarray(shares, dtype=np.float64) * budget, 9)
    counts = np.floor(exact).astype(np.int64)
    missing = budget - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


# --------------------------------------------------------------------------------------------------------------------
# Shuffling without memory
# --------------------------------------------------------------------------------------------------------------------


def stream_key(*numbers: int) -> int:
    """A 64-bit key of an independent random stream, from non-negative integers such as (seed, epoch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def shuffled(position: int, size: int, key: int) -> int:
    """Place `position` of a pseudo-random permutation of range(size) that is never stored.

    A Feistel network permutes the next power of four; numbers beyond `size` are permuted again until they fall inside
    (cycle walking), which keeps it a permutation of range(size).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + key + number * 0x9E3779B97F4A7C15) & mask)
        position = (left << half) | right
        if position < size:
            return position


def _mixed(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value &= _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


# --------------------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Args:
        name: for messages and reports.
        dataset: map-style dataset of samples.
        bounds: int (E, 2), first and past-the-end sample index of each trajectory. Questions about images are
            trajectories of one sample.
        labels: task label of each trajectory (E,).
        weight: fixed share of the source among all sources; either all sources have one, or none.
        frame_step_size: only every n-th frame of a trajectory is drawn, from a new first one each time: neighbours of
            a recording at 50 Hz are nearly equal.
    """

    name: str
    dataset: Sequence[dict]
    bounds: np.ndarray
    labels: Sequence[str]
    weight: float | None = None
    frame_step_size: int = 1

    def __post_init__(self):
        if len(self.bounds) == 0 or len(self.bounds) != len(self.labels):
            raise ValueError(
                f"Source {self.name} has {len(self.bounds)} trajectories and {len(self.labels)} labels; it needs at "
                "least one trajectory, and a label for each."
            )
        if self.weight is not None and not self.weight > 0:
            raise ValueError(
                f"Source {self.name} has weight {self.weight}; a weight is above 0. Leave the source out."
            )
        if self.frame_step_size < 1:
            raise ValueError(f"Source {self.name} has frame_step_size {self.frame_step_size}; it is at least 1.")
        empty = np.flatnonzero(self.bounds[:, 1] <= self.bounds[:, 0])
        if len(empty):
            raise ValueError(f"Source {self.name}: trajectory {empty[0]} has no frame. Leave it out.")


def trajectory_source(name: str, dataset, weight: float | None = None, frame_step_size: int = 1) -> Source:
    """A `Source` of a `LeRobotDataset`; trajectories are labelled by the instruction of their first frame."""
    tasks = dataset.task_indices[dataset.episode_bounds[:, 0]]
    labels = [dataset.tasks[int(task)] for task in tasks]
    return Source(name, dataset, dataset.episode_bounds, labels, weight, frame_step_size)


def sample_source(name: str, dataset: Sequence[dict], weight: float | None = None) -> Source:
    """A `Source` of independent samples, such as a `MultimodalDataset`: one group."""
    starts = np.arange(len(dataset))
    return Source(name, dataset, np.stack([starts, starts + 1], axis=1), [name] * len(starts), weight)


@dataclass(frozen=True)
class _Epoch:
    """Trajectories of one epoch: `picks` (N,) trajectory numbers, `offsets` (N,) first frame of each pick, `ends` (N,)
    frames up to and including each pick; `key` of the order of the frames."""

    key: int
    picks: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray

    @property
    def length(self) -> int:
        return int(self.ends[-1])


class BalancedSources:
    """Several sources behind one index, and an endless balanced stream of draws from them.

    `len(self)` and `self[i]` are those of the concatenated datasets. `draw(k)` is the index of the k-th sample of the
    stream: epoch after epoch, each of exactly `budget` trajectories, whose frames are shuffled together across
    trajectories and sources. A group visits its trajectories in passes, each once per pass, so over the epochs none is
    seen more than once more than another.

    Args:
        sources: the datasets.
        budget: N, trajectories per epoch. Default: as many as the sources have.
        power, cap: see `power_shares`. With fixed weights they act on the tasks inside each source, and the cap still
            limits the share of a group in the whole epoch.
        seed: of every random choice.

    Raises:
        ValueError: weights for some sources only, equal names, or a group that gets no trajectory.

    Attributes:
        groups (`list[tuple[str, str]]`): (source name, task label) of each group,
        group_sizes (`(G,)` int64): trajectories of each, group_counts (`(G,)` int64): trajectories per epoch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        budget: int | None = None,
        power: float = 0.5,
        cap: float | None = None,
        seed: int = 0,
    ):
        self.sources = list(sources)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Found sources {names}. Give at least one, and each another name.")
        self.seed = seed
        self._firsts = np.cumsum([0] + [len(source.dataset) for source in self.sources])
        self._bounds = np.concatenate(
            [source.bounds + first for source, first in zip(self.sources, self._firsts[:-1], strict=True)]
        )
        steps = [np.full(len(source.bounds), source.frame_step_size) for source in self.sources]
        self._steps = np.concatenate(steps)
        self._index_groups()
        self.budget = len(self._bounds) if budget is None else budget
        if self.budget < 1:
            raise ValueError(f"budget is {budget}; an epoch has at least one trajectory.")
        self.group_counts = apportion(self._shares(power, cap), self.budget)
        starved = [self.groups[i] for i in np.flatnonzero(self.group_counts == 0)]
        if starved:
            raise ValueError(
                f"{len(starved)} of {len(self.groups)} groups get no trajectory in an epoch of {self.budget}, such as "
                f"task {starved[0][1]!r} of {starved[0][0]}. Raise the budget, or lower the power."
            )
        self._epochs: dict[int, _Epoch] = {}
        self._starts = [0]  # first draw of each epoch that is known so far

    def _index_groups(self):
        members: dict[tuple[str, str], list[int]] = {}
        number = 0
        for source in self.sources:
            for label in source.labels:
                members.setdefault((source.name, label), []).append(number)
                number += 1
        self.groups = list(members)
        self._members = [np.asarray(trajectories) for trajectories in members.values()]
        self.group_sizes = np.asarray([len(trajectories) for trajectories in self._members])

    def _shares(self, power: float, cap: float | None) -> np.ndarray:
        """Share of each group (G,)."""
        weights = {source.name: source.weight for source in self.sources}
        unweighted = [name for name, weight in weights.items() if weight is None]
        if len(unweighted) == len(weights):
            return power_shares(self.group_sizes, power, cap)
        if unweighted:
            raise ValueError(
                f"Sources {', '.join(unweighted)} have no weight and others have one. Give every source a weight, or "
                "none: then all groups share by power sampling."
            )
        shares = np.zeros(len(self.groups))
        for name, weight in weights.items():
            share = weight / sum(weights.values())
            inside = [i for i, (source, _) in enumerate(self.groups) if source == name]
            # The cap is a share of the whole epoch; inside the source that is a larger share.
            limit = None if cap is None else min(1.0, cap / share)
            try:
                shares[inside] = share * power_shares(self.group_sizes[inside], power, limit)
            except ValueError as error:
                raise ValueError(f"Source {name} has {share:.4g} of the epoch: {error}") from error
        return shares

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> dict:
        """Sample `index` of the concatenated datasets."""
        source, sample_index = self.locate(index)
        return source.dataset[sample_index]

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of sample `index`, and its index there. Raises IndexError outside the sources."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} is outside the sources, which have {len(self)} samples.")
        index = int(index) % len(self)
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.sources[number], index - int(self._firsts[number])

    def epoch_length(self, epoch: int = 0) -> int:
        """Draws of an epoch: the frames of its trajectories."""
        return self._epoch(epoch).length

    def epoch_trajectories(self, epoch: int = 0) -> np.ndarray:
        """Numbers (N,) of the trajectories of an epoch, in the order of the concatenated sources."""
        return self._epoch(epoch).picks.copy()

    def draw(self, number: int) -> int:
        """Index of the `number`-th draw of the endless stream, a pure function of (seed, number)."""
        while number >= self._starts[-1]:
            self._starts.append(self._starts[-1] + self.epoch_length(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        plan = self._epoch(epoch)
        place = shuffled(number - self._starts[epoch], plan.length, plan.key)
        pick = int(np.searchsorted(plan.ends, place, side="right"))
        trajectory = plan.picks[pick]
        step = place - int(plan.ends[pick - 1] if pick else 0)
        return int(self._bounds[trajectory, 0] + plan.offsets[pick] + step * self._steps[trajectory])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) == _CACHED_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._plan(epoch)
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> _Epoch:
        picks = []
        for group, (members, count) in enumerate(zip(self._members, self.group_counts, strict=True)):
            # Visits of this group since the first epoch; every pass has an order of its own.
            passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(members))
            for number in np.unique(passes):
                order = np.random.default_rng([self.seed, _TRAJECTORIES, group, int(number)]).permutation(len(members))
                picks.append(members[order[places[passes == number]]])
        picks = np.concatenate(picks)
        steps = self._steps[picks]
        lengths = self._bounds[picks, 1] - self._bounds[picks, 0]
        # A first frame beyond the end would leave a short trajectory without any.
        offsets = np.random.default_rng([self.seed, _OFFSETS, epoch]).integers(0, np.minimum(steps, lengths))
        key = stream_key(self.seed, _FRAMES, epoch)
        return _Epoch(key, picks, offsets, np.cumsum(-(-(lengths - offsets) // steps)))

    def fingerprint(self) -> dict:
        """What a stream depends on, as JSON: a run may only resume where this is equal."""
        counts = {
            f"{source}: {label}": int(n) for (source, label), n in zip(self.groups, self.group_counts, strict=True)
        }
        return {"seed": self.seed, "budget": self.budget, "samples": len(self), "groups": counts}

    def __getstate__(self) -> dict:
        # Plans are recomputed where they are needed; for many trajectories they would dominate the pickle.
        return self.__dict__ | {"_epochs": {}}
