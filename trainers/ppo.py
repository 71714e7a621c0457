"""The formulas of PPO on action chunks, as pure functions (Qwen-VLA, section 4.2; Schulman et al., 2015 and 2017)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates of the chunks of one whole episode. (T,) float32.

    `A_t = sum_l (gamma * lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})`, with V = 0 after the last chunk: an episode
    ends with success or with its time, and a task that was not solved in time is worth nothing afterwards.

    Args:
        rewards: of the chunks, each the sum of the rewards of its steps, (T,).
        values: V of the observations before them, (T,).
        gamma: discount of one chunk.
        gae_lambda: decay of the trace.
    """
    advantages = torch.zeros_like(values)
    following, trace = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        trace = rewards[t] + gamma * following - values[t] + gamma * gae_lambda * trace
        advantages[t], following = trace, values[t]
    return advantages


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped surrogate (equation 6) of each chunk, (B,): `-min(r A, clip(r, 1 - eps, 1 + eps) A)`."""
    ratio = torch.exp(log_ratio.float())
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """The clipped squared error of each chunk, (B,): the worse of the value and of the value that is kept within
    `clip_range` of the one at the rollout."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square())


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Estimates KL(old || new) from samples of the old policy, (B,): `r - 1 - log r`, which is never negative."""
    return torch.expm1(log_ratio) - log_ratio


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """`1 - Var(returns - values) / Var(returns)`: 1 is a perfect critic, 0 a constant one; 0 if all returns agree."""
    variance = returns.var(correction=0)
    return 0.0 if variance == 0 else float(1 - (returns - values).var(correction=0) / variance)


def allocate_episodes(episodes: int, outcomes: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    """Shares the episodes of an iteration among tasks in proportion to their difficulty, at least one each.

    The difficulty of a task is the failure rate that its outcomes suggest, `1 - (successes + 1) / (episodes + 2)`
    (Laplace's rule: 1/2 for a task that was never tried). What is left after one episode each is shared in proportion,
    rounded by largest remainders; the earlier task wins a tie. The paper says "proportional to task difficulty" alone.

    Args:
        episodes: of the iteration.
        outcomes: task -> (successes, episodes) so far, which may be decayed counts.

    Raises:
        ValueError: there are fewer episodes than tasks.
    """
    if episodes < len(outcomes):
        raise ValueError(f"Found {episodes} episodes for {len(outcomes)} tasks: an iteration needs one of each.")
    difficulty = {task: 1 - (solved + 1) / (tried + 2) for task, (solved, tried) in outcomes.items()}
    total, spare = sum(difficulty.values()), episodes - len(outcomes)
    shares = {task: spare * value / total for task, value in difficulty.items()}
    counts = {task: 1 + int(share) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: int(shares[task]) - shares[task])
    for task in by_remainder[: episodes - sum(counts.values())]:
        counts[task] += 1
    return counts
