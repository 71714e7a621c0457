"""What a number of trials can and cannot tell: intervals, paired comparisons, sample sizes, task progress.

wilson_interval(45, 50)                      95% interval of a success rate
compare_paired(successes_a, successes_b)     two policies on the same scenes: McNemar's exact test, bootstrap interval
compare_unpaired(45, 50, 38, 50)             two policies on different scenes: Fisher's exact test
trials_to_tell_apart(0.95, 0.90)             how many trials a difference needs
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np


Z_95 = 1.959964
LEVEL = 0.05  # a difference with a smaller p value is called one
POWER = 0.8
Z_POWER = 0.841621  # the normal quantile of POWER
BOOTSTRAP_DRAWS = 4000


def wilson_interval(successes: int, episodes: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a success rate, 95% by default; it stays inside [0, 1], also at 0 and at 100%."""
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"An interval needs 0 <= successes <= episodes, episodes > 0; got {successes} of {episodes}.")
    rate = successes / episodes
    denominator = 1 + z * z / episodes
    center = (rate + z * z / (2 * episodes)) / denominator
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) / denominator
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p value of McNemar's exact test.

    Args:
        only_first, only_second: pairs that only the first, only the second policy solved. Pairs on which both did the
            same say nothing about a difference and do not enter.

    Returns:
        Probability of a split at least this uneven if both were equally good: twice the smaller tail of a fair coin.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"Counts of pairs cannot be negative, got {only_first} and {only_second}.")
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def fisher_exact(successes_a: int, trials_a: int, successes_b: int, trials_b: int) -> float:
    """Two-sided p value of Fisher's exact test for two independent success counts."""
    for successes, trials in ((successes_a, trials_a), (successes_b, trials_b)):
        if not 0 <= successes <= trials or trials == 0:
            raise ValueError(f"A comparison needs 0 <= successes <= trials, trials > 0; got {successes} of {trials}.")
    total, solved = trials_a + trials_b, successes_a + successes_b

    def weight(k: int) -> int:
        return math.comb(trials_a, k) * math.comb(trials_b, solved - k)

    observed = weight(successes_a)
    possible = range(max(0, solved - trials_b), min(trials_a, solved) + 1)
    return sum(w for w in map(weight, possible) if w <= observed) / math.comb(total, solved)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values corrected for their number by Holm's method, in the order given."""
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], groups: Sequence | None = None, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of mean(first) - mean(second) over the same scenes.

    Args:
        first, second: outcomes (0 or 1, or progress in any unit) of N scenes, in the same order.
        groups: of the N scenes, usually their tasks; scenes are drawn again within each group, so that the tasks
            keep their shares.
        seed: of the draws.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    labels = np.zeros(len(difference), np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    totals = np.zeros(BOOTSTRAP_DRAWS)
    for label in np.unique(labels):
        members = difference[labels == label]
        # In slices, so that a thousand scenes do not need 4000 x 1000 numbers at once
        for start in range(0, BOOTSTRAP_DRAWS, 500):
            draws = rng.integers(0, len(members), (min(500, BOOTSTRAP_DRAWS - start), len(members)))
            totals[start : start + 500] += members[draws].sum(axis=1)
    low, high = np.quantile(totals / len(difference), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of N values, for task progress."""
    if len(values) == 0:
        raise ValueError("There are no values to take the mean of.")
    return paired_bootstrap(values, np.zeros(len(values)), seed=seed)


def newcombe_interval(successes_a: int, trials_a: int, successes_b: int, trials_b: int) -> tuple[float, float]:
    """95% interval of rate_a - rate_b for independent trials (Newcombe 1998, method 10: from the Wilson intervals)."""
    rate_a, rate_b = successes_a / trials_a, successes_b / trials_b
    low_a, high_a = wilson_interval(successes_a, trials_a)
    low_b, high_b = wilson_interval(successes_b, trials_b)
    difference = rate_a - rate_b
    return (
        difference - math.hypot(rate_a - low_a, high_b - rate_b),
        difference + math.hypot(high_a - rate_a, rate_b - low_b),
    )


def compare_paired(first: Sequence[bool], second: Sequence[bool], groups: Sequence | None = None) -> dict:
    """Compares two policies that met the same scenes.

    Args:
        first, second: success in each of the N scenes, in the same order.
        groups: of the scenes, usually their tasks.

    Returns:
        `trials`, `rate_a`, `rate_b`, `difference`, `low`, `high` (95% bootstrap), `only_a`, `only_b`, `p` (McNemar),
        `different` (p below `LEVEL`), `advice` (a sentence).

    Raises:
        ValueError: no scenes, or different numbers of them.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(
            f"A paired comparison needs the same scenes for both, got {first.shape} and {second.shape} outcomes."
        )
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    low, high = paired_bootstrap(first, second, groups)
    p = mcnemar_exact(only_a, only_b)
    return {
        "trials": len(first),
        "rate_a": float(first.mean()),
        "rate_b": float(second.mean()),
        "difference": float(first.mean() - second.mean()),
        "low": low,
        "high": high,
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
        "different": p < LEVEL,
        "advice": advice(float(first.mean()), float(second.mean()), len(first), p),
    }


def compare_unpaired(successes_a: int, trials_a: int, successes_b: int, trials_b: int) -> dict:
    """Compares two policies on different scenes or on a real robot; the keys of `compare_paired` without the pairs."""
    p = fisher_exact(successes_a, trials_a, successes_b, trials_b)
    low, high = newcombe_interval(successes_a, trials_a, successes_b, trials_b)
    rate_a, rate_b = successes_a / trials_a, successes_b / trials_b
    return {
        "trials": min(trials_a, trials_b),
        "rate_a": rate_a,
        "rate_b": rate_b,
        "difference": rate_a - rate_b,
        "low": low,
        "high": high,
        "p": p,
        "different": p < LEVEL,
        "advice": advice(rate_a, rate_b, min(trials_a, trials_b), p),
    }


def trials_to_tell_apart(rate_a: float, rate_b: float) -> int | None:
    """Trials that each policy needs so that rates this far apart are found 8 times in 10 at the 5% level.

    Independent trials, normal approximation with unpooled variances (Fleiss, Levin & Paik, chapter 4) and rates kept
    away from 0 and 1 by a percent. None if the rates are equal. Pairs on the same scenes need fewer as a rule.
    """
    for rate in (rate_a, rate_b):
        if not 0 <= rate <= 1:
            raise ValueError(f"A success rate lies in [0, 1], got {rate}.")
    if rate_a == rate_b:
        return None
    a, b = (min(0.99, max(0.01, rate)) for rate in (rate_a, rate_b))
    mean = (a + b) / 2
    spread = Z_95 * math.sqrt(2 * mean * (1 - mean)) + Z_POWER * math.sqrt(a * (1 - a) + b * (1 - b))
    return math.ceil((spread / abs(rate_a - rate_b)) ** 2)


def smallest_difference(trials: int, rate: float = 0.5) -> float:
    """The distance from `rate`, towards the farther end, that `trials` trials of each policy find 8 times in 10.

    At most the distance to that end, also where even that is not found.
    """
    if trials < 1:
        raise ValueError(f"trials must be positive, got {trials}.")
    room = rate if rate >= 0.5 else rate - 1
    for step in range(1, 1001):
        if trials_to_tell_apart(rate, rate - room * step / 1000) <= trials:
            return abs(room) * step / 1000
    return abs(room)


def advice(rate_a: float, rate_b: float, trials: int, p: float) -> str:
    """One sentence about what the trials say and, where they say nothing, how many would."""
    if p < LEVEL:
        return f"The difference of {abs(rate_a - rate_b):.1%} is more than chance (p = {p:.2g})."
    needed = trials_to_tell_apart(rate_a, rate_b)
    if needed is None:
        hidden = smallest_difference(trials, rate_a)
        return f"{trials} trials each show no difference; one of less than {hidden:.0%} could hide in them."
    if needed <= trials:
        return (
            f"{trials} trials each cannot tell these apart (p = {p:.2g}), though they might: repeat with other seeds."
        )
    return (
        f"{trials} trials each cannot tell these apart (p = {p:.2g}): "
        f"a difference of {abs(rate_a - rate_b):.1%} needs about {needed} each."
    )


def planted_study(
    simulations: int = 500,
    tasks: int = 3,
    episodes_per_task: int = 50,
    rate: float = 0.9,
    weak_rate: float = 0.75,
    scene_spread: float = 1.0,
    seed: int = 0,
) -> dict:
    """How often the comparison finds a planted weak policy, and how often it accuses a planted copy.

    Outcomes are simulated: every scene has a difficulty (normal on the logit scale, standard deviation
    `scene_spread`), which all policies share, as they do when they meet the same seeds; given the scene, they succeed
    independently. The copy has the rate of the original and its own noise.

    Returns:
        `weak` and `copy`, each `{"called_different", "rate", "low", "high"}` (95% Wilson), for the paired test and, as
        `weak_unpaired` and `copy_unpaired`, for independent scenes and Fisher's test.
    """
    rng = np.random.default_rng(seed)
    trials = tasks * episodes_per_task
    found = dict.fromkeys(("weak", "copy", "weak_unpaired", "copy_unpaired"), 0)
    offsets = {value: _logit_offset(value, scene_spread) for value in (rate, weak_rate)}

    def outcomes(value: float, scenes: np.ndarray) -> np.ndarray:
        return rng.random(len(scenes)) < 1 / (1 + np.exp(-(offsets[value] + scenes)))

    for _ in range(simulations):
        scenes = rng.normal(0.0, scene_spread, trials)
        original = outcomes(rate, scenes)
        for name, value in (("weak", weak_rate), ("copy", rate)):
            other = outcomes(value, scenes)
            found[name] += mcnemar_exact(int((original & ~other).sum()), int((other & ~original).sum())) < LEVEL
            elsewhere = outcomes(value, rng.normal(0.0, scene_spread, trials))
            p = fisher_exact(int(original.sum()), trials, int(elsewhere.sum()), trials)
            found[f"{name}_unpaired"] += p < LEVEL
    result = {"simulations": simulations, "trials": trials, "rate": rate, "weak_rate": weak_rate, "level": LEVEL}
    for name, count in found.items():
        low, high = wilson_interval(count, simulations)
        result[name] = {"called_different": count, "rate": count / simulations, "low": low, "high": high}
    return result


def _logit_offset(rate: float, spread: float) -> float:
    """The logit at which the success rate, averaged over scenes, is `rate`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if (weights / (1 + np.exp(-(middle + spread * nodes)))).sum() < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
