"""Balanced sampling: shares against their closed form, exact counts, streams that are functions of (seed, draw)."""

import json
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from wallvla.data.mixture import CoTrainingMixture
from wallvla.data.sampling import (
    BalancedSources,
    Source,
    apportion,
    power_shares,
    sample_source,
    shuffled,
    stream_key,
)


settings.register_profile("wallvla", max_examples=60, deadline=None)
settings.load_profile("wallvla")

sizes = st.lists(st.integers(1, 10**6), min_size=1, max_size=30)
powers = st.floats(0, 1)


class Numbers:
    """Samples that say where they come from."""

    def __init__(self, name: str, count: int, kind: str = "instruction"):
        self.name, self.count, self.kind = name, count, kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {self.kind: "x", "name": self.name, "number": index, "embodiment": "robot", "images": {}}


def trajectories(name: str, lengths: list[int], labels: list[str] | None = None, **options) -> Source:
    ends = np.cumsum(lengths)
    bounds = np.stack([ends - lengths, ends], axis=1)
    return Source(name, Numbers(name, int(ends[-1])), bounds, labels or [name] * len(lengths), **options)


def two_sources(**options) -> list[Source]:
    rng = np.random.default_rng(0)
    many = rng.integers(3, 9, size=40).tolist()
    return [
        trajectories("a", many, ["common"] * 36 + ["rare"] * 4, **options),
        trajectories("b", rng.integers(3, 9, size=9).tolist(), **options),
    ]


# ---- shares ----------------------------------------------------------------------------------------------------


@given(sizes, powers)
def test_power_shares_are_the_closed_form(sizes, power):
    expected = np.asarray(sizes, dtype=float) ** power
    np.testing.assert_allclose(power_shares(sizes, power), expected / expected.sum(), rtol=1e-12)


def test_square_root_example():
    np.testing.assert_allclose(power_shares([1, 4, 9, 100]), np.array([1, 2, 3, 10]) / 16)


@given(sizes, powers, st.floats(0, 1))
def test_capped_shares(sizes, power, slack):
    """Sum 1, nothing over the cap, groups below the cap keep their proportions: these three determine the shares."""
    cap = 1 / len(sizes) + slack * (1 - 1 / len(sizes))
    shares = power_shares(sizes, power, cap)
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    assert (shares <= cap + 1e-9).all()
    weights = np.asarray(sizes, dtype=float) ** power
    ratio = shares / weights
    below = shares < cap - 1e-9
    if below.any():
        np.testing.assert_allclose(ratio[below], ratio[below][0], rtol=1e-6)
        # A capped group has at least the weight that would bring it to the cap.
        assert (weights[~below] * ratio[below][0] >= cap - 1e-6).all()


def test_reallocation_is_repeated():
    # After the first group is capped at 0.4, the second gets 0.6 * 8 / 11 = 0.44: over the cap in its turn.
    shares = power_shares([100, 8, 2, 1], 1.0, 0.4)
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.2 * 2 / 3, 0.2 / 3])


@given(sizes, powers, st.integers(1, 10**5))
def test_apportion_is_exact(sizes, power, budget):
    shares = power_shares(sizes, power)
    counts = apportion(shares, budget)
    assert counts.sum() == budget
    assert (np.abs(counts - shares * budget) < 1 + 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 0],), "at least one group, each with a trajectory"),
        (([],), "at least one group"),
        (([1, 2], 1.5), "power is 1.5"),
        (([1, 2], 0.5, 0.4), "cap is 0.4 for 2 groups"),
        (([1, 2], 0.5, 1.4), "cap is 1.4"),
    ],
)
def test_share_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        power_shares(*arguments)


# ---- shuffling -------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(size, key):
    assert sorted(shuffled(place, size, key) for place in range(size)) == list(range(size))


def test_shuffled_looks_random():
    """Where a place goes is uniform, and neighbours do not stay together."""
    size, keys = 97, 4000
    first = Counter(shuffled(0, size, stream_key(7, key)) for key in range(keys))
    chi_square = sum((first[place] - keys / size) ** 2 / (keys / size) for place in range(size))
    assert chi_square < 150  # 96 degrees of freedom: mean 96, standard deviation 14
    order = np.array([shuffled(place, 10_000, 5) for place in range(10_000)])
    assert (np.abs(np.diff(order)) == 1).mean() < 1e-3
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


# ---- balanced sources ------------------------------------------------------------------------------------------


def test_an_epoch_has_exactly_its_budget_and_shares():
    sources = BalancedSources(two_sources(), budget=60, seed=3)
    expected = apportion(power_shares([36, 4, 9]), 60)
    assert sources.groups == [("a", "common"), ("a", "rare"), ("b", "b")]
    np.testing.assert_array_equal(sources.group_counts, expected)
    group_of = np.repeat([0, 1, 2], [36, 4, 9])
    for epoch in range(4):
        picks = sources.epoch_trajectories(epoch)
        np.testing.assert_array_equal(np.bincount(group_of[picks]), expected)
        lengths = np.concatenate([np.diff(source.bounds)[:, 0] for source in sources.sources])
        assert sources.epoch_length(epoch) == lengths[picks].sum()


def test_no_trajectory_is_seen_more_than_once_more_than_its_group():
    sources = BalancedSources(two_sources(), budget=25, seed=3)
    seen = np.zeros(49, dtype=int)
    for epoch in range(7):
        np.add.at(seen, sources.epoch_trajectories(epoch), 1)
        for members in ((0, 36), (36, 40), (40, 49)):
            group = seen[slice(*members)]
            assert group.max() - group.min() <= 1


def test_draws_are_the_frames_of_the_epoch():
    sources = BalancedSources(two_sources(), budget=30, seed=5)
    bounds = np.concatenate([two_sources()[0].bounds, two_sources()[1].bounds + len(two_sources()[0].dataset)])
    start = 0
    for epoch in range(3):
        length = sources.epoch_length(epoch)
        expected = Counter(
            index for pick in sources.epoch_trajectories(epoch).tolist() for index in range(*bounds[pick].tolist())
        )
        found = [sources.draw(start + place) for place in range(length)]
        assert Counter(found) == expected
        assert found != sorted(found)
        start += length


def test_draws_mix_sources_and_trajectories():
    sources = BalancedSources(two_sources(), budget=49, power=1.0, seed=5)
    names = [sources[sources.draw(k)]["name"] for k in range(sources.epoch_length())]
    share = names.count("b") / len(names)
    for start in range(0, len(names) - 50, 50):
        assert abs(names[start : start + 50].count("b") / 50 - share) < 0.3
    trajectory = [sources.draw(k) // 6 for k in range(len(names))]
    assert np.mean(np.diff(trajectory) == 0) < 0.1


def test_frame_step_size_takes_every_nth_frame_and_reaches_all():
    source = trajectories("a", [10, 7, 1], frame_step_size=3)
    sources = BalancedSources([source], seed=1)
    seen, start = set(), 0
    for epoch in range(12):
        length = sources.epoch_length(epoch)
        found = sorted(sources.draw(start + place) for place in range(length))
        for low, high in source.bounds:
            frames = [index for index in found if low <= index < high]
            assert set(np.diff(frames)) <= {3} and frames[0] < low + 3 and frames[-1] + 3 >= high
        seen |= set(found)
        start += length
    assert seen == set(range(18))


def test_fixed_weights_and_cap():
    weighted = two_sources()
    weighted = [
        Source(s.name, s.dataset, s.bounds, s.labels, weight) for s, weight in zip(weighted, (3.0, 1.0), strict=True)
    ]
    counts = BalancedSources(weighted, budget=400).group_counts
    assert counts.tolist() == [225, 75, 100]  # sqrt(36) : sqrt(4) = 3 : 1 inside the first source
    assert BalancedSources(weighted, budget=400, cap=0.5).group_counts.tolist() == [200, 100, 100]
    with pytest.raises(ValueError, match="Source a has 0.75 of the epoch: cap is 0.2666.* for 2 groups"):
        BalancedSources(weighted, budget=400, cap=0.2)
    with pytest.raises(ValueError, match="Sources b have no weight"):
        BalancedSources([weighted[0], two_sources()[1]])


def test_source_errors():
    with pytest.raises(ValueError, match="1 of 3 groups get no trajectory in an epoch of 2, such as task 'rare' of a"):
        BalancedSources(two_sources(), budget=2)
    with pytest.raises(ValueError, match="each another name"):
        BalancedSources([trajectories("a", [3]), trajectories("a", [3])])
    with pytest.raises(ValueError, match="budget is 0"):
        BalancedSources(two_sources(), budget=0)
    with pytest.raises(ValueError, match="trajectory 1 has no frame"):
        trajectories("a", [3, 0])
    with pytest.raises(ValueError, match="frame_step_size 0"):
        trajectories("a", [3], frame_step_size=0)
    with pytest.raises(ValueError, match="weight -1"):
        trajectories("a", [3], weight=-1)


# ---- in a mixture ----------------------------------------------------------------------------------------------


def balanced_mixture(length=None, seed=2, **options) -> CoTrainingMixture:
    questions = BalancedSources(
        [
            sample_source("q", Numbers("q", 30, "text"), weight=2.0),
            sample_source("p", Numbers("p", 5, "text"), weight=1.0),
        ],
        seed=seed + 1,
    )
    return CoTrainingMixture(
        BalancedSources(two_sources(), budget=30, seed=seed), questions, multimodal_fraction=0.1, seed=seed,
        length=length, **options,
    )  # fmt: skip


def tags(mixture, indices) -> list[tuple[str, int]]:
    return [(mixture[i]["name"], mixture[i]["number"]) for i in indices]


def test_every_batch_is_nine_to_one_and_an_epoch_is_exact():
    mixture = balanced_mixture()
    kinds = [mixture.locate(i)[0] for i in range(len(mixture))]
    actions = BalancedSources(two_sources(), budget=30, seed=2).epoch_length()
    assert kinds.count("action") == actions  # exactly one epoch
    for start in range(0, len(mixture) - 20, 20):
        assert kinds[start : start + 20].count("multimodal") == 2
    # two thirds of the questions of an epoch (35) come from q
    long = balanced_mixture(length=3500)
    names = Counter(long[i]["name"] for i in range(3500))
    assert names["q"] + names["p"] == 350 and abs(names["q"] - 350 * 2 / 3) <= 10


@given(st.integers(0, 2**31), st.integers(1, 250))
def test_resumed_draws_are_those_of_the_uninterrupted_run(seed, stop):
    whole = balanced_mixture(300, seed)
    expected = [whole.locate(i) for i in range(300)]
    state = json.loads(json.dumps(balanced_mixture(300, seed).state(stop)))
    resumed = balanced_mixture(300 - stop, seed)
    resumed.resume(state)
    assert [resumed.locate(i) for i in range(300 - stop)] == expected[stop:]


def test_resume_with_another_batch_size_and_number_of_workers():
    """A trainer that did 5 steps of 24 draws goes on with steps of 16, by its own count from step 5."""
    expected = tags(balanced_mixture(400), range(400))
    state = balanced_mixture(400).state(5 * 24)
    for workers in (0, 1, 2):
        resumed = balanced_mixture(400)
        resumed.resume(state, index=5 * 16)
        loader = DataLoader(
            resumed, batch_size=16, num_workers=workers, sampler=range(5 * 16, 5 * 16 + 160), collate_fn=list
        )
        found = [(sample["name"], sample["number"]) for batch in loader for sample in batch]
        assert found == expected[120:280]
        with pytest.raises(IndexError, match="before the point"):
            balanced = balanced_mixture(400)
            balanced.resume(balanced.state(3), index=50)
            balanced[4]


def test_two_ranks_read_disjoint_parts_of_the_same_stream():
    expected = tags(balanced_mixture(160), range(160))
    found = {}
    for rank in range(2):
        mixture = pickle.loads(pickle.dumps(balanced_mixture(160)))
        for step in range(5):
            for place in range(16):
                index = (step * 2 + rank) * 16 + place
                found[index] = (mixture[index]["name"], mixture[index]["number"])
    assert [found[i] for i in range(160)] == expected


def test_resume_refuses_another_mixture():
    state = balanced_mixture(100).state(10)
    with pytest.raises(ValueError, match="differs in seed, sources: saved"):
        balanced_mixture(100, seed=3).resume(state)


class Broken(Numbers):
    """Every third sample cannot be read."""

    def __getitem__(self, index):
        if index % 3 == 0:
            raise ValueError(f"sample {index} is broken")
        return super().__getitem__(index)


def test_sources_and_mixture_share_no_stream(monkeypatch):
    """Of one seed, whatever the zeros at the end of their keys: trajectories, places and augmentations are apart."""
    users: dict[tuple, set] = {}

    def record(key):
        state = tuple(np.random.SeedSequence(key).generate_state(4))
        users.setdefault(state, set()).add(sys._getframe(1).f_code.co_name)
        return np.random.Generator(np.random.PCG64(key))

    sources = BalancedSources(two_sources(), seed=3)
    monkeypatch.setattr(np.random, "default_rng", record)
    mixture = CoTrainingMixture(
        sources,
        Numbers("m", 50, "question"),
        multimodal_fraction=0.1,
        seed=3,
        augment=lambda sample, rng: sample,
    )
    for index in range(60):
        mixture[index]
    assert {len(names) for names in users.values()} == {1} and len(set.union(*users.values())) == 4


def test_errors_are_raised_or_replaced_deterministically(caplog):
    def make(skip):
        return CoTrainingMixture(Broken("a", 60), length=60, seed=1, skip_errors=skip)

    with pytest.raises(ValueError, match="is broken"):
        [make(False)[i] for i in range(60)]
    mixture = make(True)
    found = tags(mixture, range(60))
    assert [number for _, number in found] == [number for _, number in tags(make(True), reversed(range(60)))][::-1]
    assert all(number % 3 for _, number in found)
    assert mixture.num_skipped >= 20 and "is broken" in caplog.text
    with pytest.raises(ValueError, match="20 samples in a row cannot be read"):
        hopeless = CoTrainingMixture(Broken("a", 1), skip_errors=True, length=2)
        hopeless[0]
