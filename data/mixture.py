"""Co-training mixture of action and multimodal samples.

Sample i of the mixture depends on (seed, i) and nothing else: not on the number of workers, not on what was read
before, so a resumed run sees what an uninterrupted one would have seen. Read it in order (a sequential sampler): the
order is already shuffled, and consecutive blocks hold the exact proportion.
"""

import logging
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .augmentation import Augmentation, compose, drop_state, random_shift
from .sampling import BalancedSources


__all__ = ["Augmentation", "CoTrainingMixture", "compose", "drop_state", "random_shift"]

logger = logging.getLogger(__name__)

# Names of independent random streams of one seed; `BalancedSources` have theirs after these.
_ACTION, _MULTIMODAL, _POSITIONS, _AUGMENTATION, _REPLACEMENT = range(5)
_CACHED_PASSES = 2  # workers that read around the end of a pass need this one and the next
REPLACEMENTS = 20  # draws that are tried in the place of one that cannot be read


class _Passes:
    """An endless stream of draws from one dataset, in passes: each draws every sample once, in an order of its own."""

    def __init__(self, dataset: Sequence[dict], seed: int, stream: int):
        self._dataset, self._seed, self._stream = dataset, seed, stream
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        return self._dataset[index]

    def epoch_length(self, epoch: int = 0) -> int:
        return len(self._dataset)

    def draw(self, number: int) -> int:
        """Index of the `number`-th draw."""
        pass_number, position = divmod(number, len(self._dataset))
        if pass_number not in self._orders:
            if len(self._orders) == _CACHED_PASSES:
                del self._orders[next(iter(self._orders))]
            rng = np.random.default_rng([self._seed, self._stream, pass_number])
            self._orders[pass_number] = rng.permutation(len(self._dataset))
        return int(self._orders[pass_number][position])

    def fingerprint(self) -> dict:
        return {"seed": self._seed, "samples": len(self._dataset)}

    def __getstate__(self) -> dict:
        # Orders are recomputed where they are needed; for a large dataset they would dominate the pickle.
        return self.__dict__ | {"_orders": {}}


class CoTrainingMixture:
    """Map-style mixture over a fixed number of draws.

    With multimodal_fraction = p / q in lowest terms, each block of q consecutive indices (q k to q k + q - 1) holds
    exactly p multimodal samples at random places. A plain dataset is read in passes: a pass draws every one of its
    samples once, in an order of its own. `BalancedSources` decide by themselves what an epoch holds.

    Args:
        action_dataset: anything with `len` and integer indexing that yields action samples; `BalancedSources` for
            several datasets with balanced tasks.
        multimodal_dataset: the same for multimodal samples; `None` for actions only (the fraction then has no effect).
        multimodal_fraction: share of multimodal samples, 0 <= p / q < 1 with q at most 1000.
        seed: of every random choice (`BalancedSources` have their own).
        length: number of draws. Default: as many as it takes to see every action sample once, or one epoch of
            `BalancedSources`.
        augment: called as `augment(sample, rng)` on every sample, with a generator of this draw; returns the sample to
            use and must not write into the given arrays.
        skip_errors: a sample that cannot be read (ValueError or FileNotFoundError, but no failing network) is replaced
            by another one of its kind, which depends on the draw alone, and logged. Otherwise the error is raised.
        first_draw: number of the draw at index 0; see `resume`.

    Raises:
        ValueError: an empty source, or a number out of range.

    Attributes:
        action_dataset: what it was made with,
        num_skipped (`int`): draws that this process replaced, of which each is logged.
    """

    def __init__(
        self,
        action_dataset: Sequence[dict],
        multimodal_dataset: Sequence[dict] | None = None,
        *,
        multimodal_fraction: float = 0.1,
        seed: int = 0,
        length: int | None = None,
        augment: Augmentation | None = None,
        skip_errors: bool = False,
        first_draw: int = 0,
    ):
        if not 0 <= multimodal_fraction < 1:
            raise ValueError(f"multimodal_fraction is {multimodal_fraction}; it must be at least 0 and below 1.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative.")
        fraction = Fraction(0)
        if multimodal_dataset is not None:
            fraction = Fraction(multimodal_fraction).limit_denominator(1000)
            if abs(float(fraction) - multimodal_fraction) > 1e-9 or fraction == 1:
                raise ValueError(
                    f"multimodal_fraction is {multimodal_fraction}, which is no p/q with q up to 1000, so blocks with "
                    f"the exact proportion do not exist. The nearest is {fraction} = {float(fraction)}."
                )
        self._multimodal_per_block, self._block_size = fraction.numerator, fraction.denominator
        self.seed = seed
        datasets = {_ACTION: action_dataset}
        if self._multimodal_per_block:
            datasets[_MULTIMODAL] = multimodal_dataset
        for kind, dataset in datasets.items():
            if len(dataset) == 0:
                raise ValueError(f"The {'action' if kind == _ACTION else 'multimodal'} dataset is empty.")
        self._sources = {
            kind: dataset if isinstance(dataset, BalancedSources) else _Passes(dataset, seed, kind)
            for kind, dataset in datasets.items()
        }
        self.action_dataset = action_dataset
        self._augment = augment
        self._skip_errors = skip_errors
        self._first_draw = first_draw
        self.num_skipped = 0
        self.set_length(self.epochs_length() if length is None else length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """Draw `index`: an action or a multimodal sample, augmented.

        Raises:
            IndexError: index outside the mixture.
            ValueError: the sample cannot be read; with `skip_errors` only if no replacement can be read either.
        """
        number = self._number(index)
        sample = self._read(number)
        if self._augment is not None:
            sample = self._augment(sample, np.random.default_rng([self.seed, _AUGMENTATION, number]))
        return sample

    def locate(self, index: int) -> tuple[str, int]:
        """Where draw `index` comes from: ("action" or "multimodal", index in that dataset)."""
        source, sample_index = self._locate(self._number(index))
        return ("action" if source == _ACTION else "multimodal"), sample_index

    def _number(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Draw {index} is outside the mixture, which has {len(self)} draws.")
        number = int(index) % len(self) + self._first_draw
        if number < 0:
            raise IndexError(f"Draw {index} lies before the point from which this mixture was resumed.")
        return number

    def _read(self, number: int) -> dict:
        source, sample_index = self._locate(number)
        if not self._skip_errors:
            return self._sources[source][sample_index]
        rng = np.random.default_rng([self.seed, _REPLACEMENT, number])
        for _ in range(REPLACEMENTS):
            try:
                return self._sources[source][sample_index]
            except (ValueError, FileNotFoundError) as error:
                self.num_skipped += 1
                logger.warning("Draw %d skipped (number %d in this process): %s", number, self.num_skipped, error)
            sample_index = int(rng.integers(len(self._sources[source])))
        raise ValueError(
            f"{REPLACEMENTS} samples in a row cannot be read in the place of draw {number}. The errors are in the "
            "log; look at the dataset with `wallvla data inspect`."
        )

    def _locate(self, number: int) -> tuple[int, int]:
        block, place = divmod(number, self._block_size)
        multimodal_places = self._multimodal_places(block)
        before = int(np.searchsorted(multimodal_places, place))  # multimodal draws of this block before this one
        if before < len(multimodal_places) and multimodal_places[before] == place:
            source, draw = _MULTIMODAL, block * self._multimodal_per_block + before
        else:
            source, draw = _ACTION, block * (self._block_size - self._multimodal_per_block) + place - before
        return source, self._sources[source].draw(draw)

    def _multimodal_places(self, block: int) -> np.ndarray:
        """Sorted places of the multimodal samples in a block. Random, because regular places would hand all of them
        to one rank whenever ranks take turns with a period that divides the block."""
        if not self._multimodal_per_block:
            return np.empty(0, dtype=np.int64)
        rng = np.random.default_rng([self.seed, _POSITIONS, block])
        return np.sort(rng.choice(self._block_size, self._multimodal_per_block, replace=False))

    def epochs_length(self, epochs: float = 1) -> int:
        """Draws of so many epochs from the first draw on: all action samples of each, with their multimodal ones."""
        source = self._sources[_ACTION]
        whole = sum(source.epoch_length(epoch) for epoch in range(int(epochs)))
        actions = whole + round((epochs - int(epochs)) * source.epoch_length(int(epochs)))
        actions_per_block = self._block_size - self._multimodal_per_block
        blocks, rest = divmod(actions, actions_per_block)
        if rest == 0:
            return blocks * self._block_size
        places = np.setdiff1d(np.arange(self._block_size), self._multimodal_places(blocks))  # of action samples
        return blocks * self._block_size + int(places[rest - 1]) + 1

    def set_length(self, length: int) -> None:
        """Change the number of draws; the draws themselves stay what they are."""
        if length < 1:
            raise ValueError(f"length is {length}; a mixture has at least one draw.")
        self._length = length

    # ---- stopping and going on --------------------------------------------------------------------------------------

    def state(self, draws: int) -> dict:
        """What a run has to remember to go on after `draws` draws of this mixture, as JSON."""
        return {"draws": draws + self._first_draw, **self._fingerprint()}

    def resume(self, state: dict, index: int = 0) -> None:
        """Make `index` the first draw that the run which saved `state` has not used.

        Batch size, workers and ranks may have changed. A trainer that skips what it has done by counting its *own*
        steps and batches gets `index` = steps done * draws per step now; indices before it may not be read.

        Raises:
            ValueError: the state belongs to another mixture (seed, sources, weights or proportions).
        """
        ours = self._fingerprint()
        differing = [name for name, value in ours.items() if state.get(name) != value]
        if differing or "draws" not in state:
            saved = {name: state.get(name) for name in differing}
            here = {name: ours[name] for name in differing}
            raise ValueError(
                f"The saved state of the mixture differs in {', '.join(differing) or 'draws'}: saved {saved}, here "
                f"{here}. Resume with the same sources and settings, or start a new run."
            )
        self._first_draw = state["draws"] - index

    def _fingerprint(self) -> dict:
        names = {_ACTION: "action", _MULTIMODAL: "multimodal"}
        return {
            "seed": self.seed,
            "block": [self._multimodal_per_block, self._block_size],
            "sources": {names[kind]: source.fingerprint() for kind, source in self._sources.items()},
        }
