"""Layers that `kernelize` puts in the place of a model's own: a `forward` and no state, as the Kernel Hub asks."""

import torch
from torch import Tensor, nn

from .functions import rms_norm, rope


class WallVLARMSNorm(nn.Module):
    """RMS norm that multiplies by its weight before it rounds, for WallVLA's layer of that name."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    eps: float

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden.contiguous(), self.weight, self.eps, True)


class RMSNorm(nn.Module):
    """RMS norm that rounds before it multiplies by its weight, for the layers that transformers calls `RMSNorm`."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states.contiguous(), self.weight, self.variance_epsilon, False)


class RotaryPosEmb(nn.Module):
    """Rotation of queries and keys, for the function that transformers calls `rotary_pos_emb`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1:
            raise ValueError(f"unsqueeze_dim is {unsqueeze_dim}; this kernel takes heads at 1: (B, N, S, P).")
        cos, sin = cos.to(torch.float32), sin.to(torch.float32)
        return rope(q, cos, sin), rope(k, cos, sin)
