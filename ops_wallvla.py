"""Small tensor operations of the model: plain torch, and the one place that asks the Kernel Hub for fast ones.

`fast_ops(device)` gives the fused kernels of `kernels/` where they can be loaded and `TORCH_OPS`, the functions below,
where they cannot. Both are an `Ops`: the same names, arguments and results, so that whoever runs them takes either.
`model.set_use_kernels(True)` reaches the same kernels through `HubLayer`.

Shapes: B samples, S tokens, N heads (Nq of queries, Nkv of keys and values), P width of a head, L places of a cache.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from huggingface_hub.errors import HTTPError  # of the HTTP library that this release of the Hub's client uses
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging


try:
    from kernels import get_kernel, register_kernel_mapping
except ImportError:  # optional; in a checkout without the package, `kernels` is the folder of that name
    get_kernel = register_kernel_mapping = None

logger = logging.get_logger(__name__)

KERNELS_REPOSITORY, KERNELS_VERSION = "x-square/wallvla-kernels", 1


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


def rotate_half(states: Tensor) -> Tensor:
    """`(a, b) -> (-b, a)` on the halves of the last dimension."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads by their positions, `x cos + rotate_half(x) sin`, in float32 (RoFormer, equation 34).

    Differentiable in `states`.

    Args:
        states: queries or keys, (B, N, S, P); any strides with a contiguous last dimension.
        cos, sin: of the angles, sections of a multimodal rope already merged, (B, S, P) or (1, S, P) float32.

    Returns:
        (B, N, S, P), contiguous, dtype of `states`.
    """
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, S, P)
    return (states * cos + rotate_half(states) * sin).to(states.dtype).contiguous()


def multimodal_rope(positions: Tensor, sections: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `rope` at positions on several axes: pair i turns by `theta ** (-i / pairs)` times the
    position on its axis, and each axis has a run of pairs (Qwen2-VL, section 2.1).

    Args:
        positions: (axes, B, S) int64.
        sections: pairs of each axis; together P / 2.
        theta: base of the frequencies.

    Returns:
        Two of (B, S, P) float32.
    """
    pairs = sum(sections)
    frequencies = theta ** (-torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    angles = positions.float()[..., None] * frequencies  # (axes, B, S, P / 2)
    angles = torch.cat([part[axis] for axis, part in enumerate(angles.split(list(sections), dim=-1))], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def qkv_rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Rotates queries and keys of a packed projection and writes keys and values to their places in a cache.

    For inference: the writes have no gradient.

    Args:
        qkv: heads of queries, then of keys, then of values, (B, S, (Nq + 2 Nkv) P), contiguous.
        cos, sin: as in `rope`, (B, S, P) or (1, S, P) float32.
        keys, values: caches, (B, Nkv, L, P), any strides with a contiguous last dimension; [start, start + S) is
            overwritten.
        start: first place to write.

    Returns:
        Rotated queries, (B, Nq, S, P), contiguous.
    """
    batch, length, _ = qkv.shape
    kv_heads, width = keys.shape[1], keys.shape[3]
    heads = qkv.unflatten(-1, (-1, width)).transpose(1, 2)  # (B, Nq + 2 Nkv, S, P)
    rotated = rope(heads[:, :-kv_heads], cos, sin)
    keys[:, :, start : start + length] = rotated[:, -kv_heads:]
    values[:, :, start : start + length] = heads[:, -kv_heads:]
    return rotated[:, :-kv_heads].contiguous()


def vision_rope_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates queries and keys of a packed projection in place; values stay as they are.

    In place because a copy would move the values too, half as many bytes again. For inference: no gradient.

    Args:
        qkv: (S, 3, N, P), contiguous.
        cos, sin: as in `rope`, (S, P) float32.
    """
    cos, sin = cos[:, None, None], sin[:, None, None]  # (S, 1, 1, P)
    states = qkv[:, :2]
    states.copy_(states * cos + rotate_half(states) * sin)


def rms_norm(states: Tensor, weight: Tensor, eps: float, float32_weight: bool) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` in float32 (Zhang and Sennrich 2019, equation 4). Differentiable.

    Args:
        states: (..., C).
        weight: (C,), of the dtype of `states`; or float32 with `float32_weight`.
        eps: added to the mean square.
        float32_weight: multiply by the weight before casting back (Wall-OSS) instead of after (Qwen).

    Returns:
        (..., C), dtype of `states`.
    """
    scaled = states.float()
    scaled = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps)
    if float32_weight:
        return (weight.float() * scaled).to(states.dtype)
    return weight * scaled.to(states.dtype)


def add_rms_norm(
    states: Tensor, residual: Tensor, weight: Tensor, eps: float, float32_weight: bool
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and norms the sum. Differentiable.

    Args:
        states, residual: (..., C), of one dtype.
        weight, eps, float32_weight: see `rms_norm`.

    Returns:
        The normed sum and the sum `residual + states`, both (..., C), dtype of `states`.
    """
    total = residual + states
    return rms_norm(total, weight, eps, float32_weight), total


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020, equation 6). Differentiable.

    Args:
        gate_up: gate in the first half of the last dimension, up in the second, (..., 2F).

    Returns:
        (..., F), dtype of `gate_up`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Ops(NamedTuple):
    """One implementation of each operation that has a kernel; signatures as those of the functions above."""

    rope: Callable[..., Tensor]
    qkv_rope_store: Callable[..., Tensor]
    vision_rope_: Callable[..., None]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]


TORCH_OPS = Ops(rope, qkv_rope_store, vision_rope_, rms_norm, add_rms_norm, swiglu)


@functools.cache
def _load_kernels(device_type: str, trust_remote_code: bool) -> ModuleType | None:
    try:
        if get_kernel is None:
            raise ImportError("the package `kernels` is not installed")
        return get_kernel(
            KERNELS_REPOSITORY, version=KERNELS_VERSION, backend=device_type, trust_remote_code=trust_remote_code
        )
    # Not installed; not in the cache, no network or no build for this machine; not trusted; for other GPUs
    except (ImportError, OSError, HTTPError, ValueError, RuntimeError) as error:
        logger.warning(f"{KERNELS_REPOSITORY} is not used on {device_type}, torch takes its place: {error}")
        return None


def fast_ops(device: torch.device | str, trust_remote_code: bool = False) -> Ops:
    """The Hub kernels for a device, or `TORCH_OPS` with one log line that says why.

    Loads at the first call for a kind of device, from `LOCAL_KERNELS`, the Hub's cache or the Hub.

    Args:
        device: where the tensors will be.
        trust_remote_code: load the kernels although the Hub does not list their publisher as trusted.
    """
    module = _load_kernels(torch.device(device).type, trust_remote_code)
    return TORCH_OPS if module is None else Ops(*(vars(module)[name] for name in Ops._fields))


class HubLayer:
    """A layer of the Hub kernels for `kernels.register_kernel_mapping`.

    Unlike `kernels.LayerRepository`, one that cannot be loaded leaves the model's own layer in its place, with the log
    line of `fast_ops`.

    Args:
        layer_name: name of the layer in the kernels.
        device_type: "cuda" or "cpu".
        trust_remote_code: see `fast_ops`.
    """

    def __init__(self, layer_name: str, device_type: str, trust_remote_code: bool = False):
        self.layer_name, self.device_type, self.trust_remote_code = layer_name, device_type, trust_remote_code

    def __str__(self) -> str:
        return f"`{KERNELS_REPOSITORY}` (version {KERNELS_VERSION}), layer `{self.layer_name}`"

    def load(self) -> type[nn.Module]:
        """The class; raises FileNotFoundError, after which `kernelize` falls back."""
        module = _load_kernels(self.device_type, self.trust_remote_code)
        if module is None:
            raise FileNotFoundError(f"{self} cannot be loaded, see the log.")
        return vars(module.layers)[self.layer_name]


if register_kernel_mapping is not None:  # a dictionary entry; nothing is loaded until a model asks
    register_kernel_mapping({"WallVLARMSNorm": {"cuda": HubLayer("WallVLARMSNorm", "cuda")}})
