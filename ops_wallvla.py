"""Small tensor operations of the model, as plain torch: the reference that a fused kernel has to equal."""

import math

import torch
from torch import Tensor


def sinusoidal_embedding(time: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embeds a scalar as `[sin(t w_i), cos(t w_i)]` with `w_i = max_period ** (-i / (dim / 2 - 1))`.

    The divisor is half minus one, and time enters unscaled, as in the published Wall-OSS-0.5 weights.

    Args:
        time: flow times in [0, 1], (B,).
        dim: even width of the result.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / max(half - 1, 1)
    angles = time.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def action_attention_mask(visible: Tensor, step_mask: Tensor, causal: bool) -> Tensor:
    """What each action token may read: the visible prefix, and its own chunk.

    Padded steps are never read by another step, so that they cannot reach a loss; every step reads itself, so that no
    row is empty.

    Args:
        visible: prefix tokens that actions may read, (B, S) bool.
        step_mask: valid steps of the chunk, (B, H) bool.
        causal: whether a step reads only itself and earlier steps.

    Returns:
        (B, 1, H, S + H) bool, True where attention is allowed.
    """
    batch, horizon = step_mask.shape
    diagonal = torch.eye(horizon, dtype=torch.bool, device=visible.device)
    chunk = torch.ones_like(diagonal).tril() if causal else torch.ones_like(diagonal)
    chunk = (chunk & step_mask[:, None, :]) | diagonal  # (B, H, H)
    return torch.cat([visible[:, None, :].expand(batch, horizon, -1), chunk], dim=-1)[:, None]
