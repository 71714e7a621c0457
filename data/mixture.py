"""Co-training mixture of an action dataset and a multimodal dataset, and the augmentations of its samples.

Sample i of the mixture depends on (seed, i) and nothing else: not on the number of workers, not on what was read
before, so a resumed run sees what an uninterrupted one would have seen. Read it in order (a sequential sampler): the
order is already shuffled, and consecutive blocks hold the exact proportion.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import numpy as np


Augmentation = Callable[[dict, np.random.Generator], dict]

# Names of independent random streams of one seed.
_ACTION, _MULTIMODAL, _POSITIONS, _AUGMENTATION = range(4)
_CACHED_PASSES = 2  # workers that read around the end of a pass need this one and the next


class CoTrainingMixture:
    """Map-style mixture over a fixed number of draws.

    With multimodal_fraction = p / q in lowest terms, each block of q consecutive indices (q k to q k + q - 1) holds
    exactly p multimodal samples at random places. Each source is read in passes: a pass draws every one of its samples
    once, in an order of its own.

    Args:
        action_dataset: anything with `len` and integer indexing that yields action samples.
        multimodal_dataset: the same for multimodal samples; `None` for actions only (the fraction then has no effect).
        multimodal_fraction: share of multimodal samples, 0 <= p / q < 1 with q at most 1000.
        seed: of every random choice.
        length: number of draws. Default: as many as it takes to see every action sample once.
        augment: called as `augment(sample, rng)` on every sample, with a generator of this draw; returns the sample to
            use and must not write into the given arrays.

    Raises:
        ValueError: an empty source, or a number out of range.
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
        self._sources = {_ACTION: action_dataset}
        if self._multimodal_per_block:
            self._sources[_MULTIMODAL] = multimodal_dataset
        for source, dataset in self._sources.items():
            if len(dataset) == 0:
                raise ValueError(f"The {'action' if source == _ACTION else 'multimodal'} dataset is empty.")
        self.seed = seed
        self._augment = augment
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._length = self._draws_of_one_action_pass() if length is None else length
        if self._length < 1:
            raise ValueError(f"length is {length}; a mixture has at least one draw.")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """Draw `index`: an action or a multimodal sample, augmented.

        Raises:
            IndexError: index outside the mixture.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Draw {index} is outside the mixture, which has {len(self)} draws.")
        index = int(index) % len(self)
        source, sample_index = self._locate(index)
        sample = self._sources[source][sample_index]
        if self._augment is not None:
            sample = self._augment(sample, np.random.default_rng([self.seed, _AUGMENTATION, index]))
        return sample

    def locate(self, index: int) -> tuple[str, int]:
        """Where draw `index` comes from: ("action" or "multimodal", index in that dataset)."""
        source, sample_index = self._locate(index)
        return ("action" if source == _ACTION else "multimodal"), sample_index

    def _locate(self, index: int) -> tuple[int, int]:
        block, place = divmod(index, self._block_size)
        multimodal_places = self._multimodal_places(block)
        before = int(np.searchsorted(multimodal_places, place))  # multimodal draws of this block before `index`
        if before < len(multimodal_places) and multimodal_places[before] == place:
            source, draw = _MULTIMODAL, block * self._multimodal_per_block + before
        else:
            source, draw = _ACTION, block * (self._block_size - self._multimodal_per_block) + place - before
        pass_number, position = divmod(draw, len(self._sources[source]))
        return source, int(self._order(source, pass_number)[position])

    def _multimodal_places(self, block: int) -> np.ndarray:
        """Sorted places of the multimodal samples in a block. Random, because regular places would hand all of them
        to one rank whenever ranks take turns with a period that divides the block."""
        if not self._multimodal_per_block:
            return np.empty(0, dtype=np.int64)
        rng = np.random.default_rng([self.seed, _POSITIONS, block])
        return np.sort(rng.choice(self._block_size, self._multimodal_per_block, replace=False))

    def _order(self, source: int, pass_number: int) -> np.ndarray:
        """The order in which a pass visits a source: a permutation of its indices."""
        key = (source, pass_number)
        if key not in self._orders:
            cached = [other for other in self._orders if other[0] == source]
            if len(cached) == _CACHED_PASSES:
                del self._orders[cached[0]]
            rng = np.random.default_rng([self.seed, source, pass_number])
            self._orders[key] = rng.permutation(len(self._sources[source]))
        return self._orders[key]

    def _draws_of_one_action_pass(self) -> int:
        actions_per_block = self._block_size - self._multimodal_per_block
        blocks, rest = divmod(len(self._sources[_ACTION]), actions_per_block)
        if rest == 0:
            return blocks * self._block_size
        places = np.setdiff1d(np.arange(self._block_size), self._multimodal_places(blocks))  # of action samples
        return blocks * self._block_size + int(places[rest - 1]) + 1

    def __getstate__(self) -> dict:
        # Orders are recomputed where they are needed; for a large dataset they would dominate the pickle.
        return self.__dict__ | {"_orders": {}}


def compose(*augmentations: Augmentation) -> Augmentation:
    """One augmentation that applies several, in the given order."""
    return partial(_compose, augmentations=augmentations)


def _compose(sample: dict, rng: np.random.Generator, *, augmentations: tuple[Augmentation, ...]) -> dict:
    for augmentation in augmentations:
        sample = augmentation(sample, rng)
    return sample


def random_shift(pixels: int) -> Augmentation:
    """Moves every camera image of an action sample by up to `pixels` in each direction, repeating the edge.

    Cameras move independently: a common shift would leave their relation unchanged, so a policy could still read exact
    distances from it. Multimodal samples stay as they are, because their answers may hold pixel positions.
    """
    if pixels < 0:
        raise ValueError(f"pixels is {pixels}; it must not be negative.")
    return partial(_random_shift, pixels=pixels)


def _random_shift(sample: dict, rng: np.random.Generator, *, pixels: int) -> dict:
    if not _is_action_sample(sample):
        return sample
    shifted = {}
    for camera, image in sample["images"].items():
        image = np.asarray(image)
        down, right = rng.integers(-pixels, pixels + 1, size=2)
        rows = np.clip(np.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
        columns = np.clip(np.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
        shifted[camera] = image[rows[:, None], columns]
    return sample | {"images": shifted}


def drop_state(probability: float) -> Augmentation:
    """Marks action samples, with the given probability, as seen without proprioception.

    Adds `state_is_dropped` (bool), with which the processor leaves the state out of the prompt. The state itself stays
    in the sample: relative actions are measured from it.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}; it must be between 0 and 1.")
    return partial(_drop_state, probability=probability)


def _drop_state(sample: dict, rng: np.random.Generator, *, probability: float) -> dict:
    if not _is_action_sample(sample):
        return sample
    return sample | {"state_is_dropped": bool(rng.random() < probability)}


def _is_action_sample(sample: dict) -> bool:
    return "instruction" in sample  # the processor's own criterion
