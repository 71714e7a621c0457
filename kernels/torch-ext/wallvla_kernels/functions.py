"""The operations as functions, their shapes for tracing (fake) and their gradients.

Shapes: B samples, S tokens, N heads (Nq of queries, Nkv of keys and values), P width of a head, L places of a cache.
Tensors are float32, float16 or bfloat16; all arithmetic is in float32. What an operation cannot take is an error that
says what it found.
"""

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops


def _refuse_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("This operation writes in place and has no gradient: use `rope`, or torch.no_grad().")


def rope(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads by their positions: `x cos + rotate_half(x) sin`. Differentiable in `states`.

    Args:
        states: queries or keys, (B, N, S, P); any strides with a contiguous last dimension.
        cos, sin: of the angles, (B, S, P) or (1, S, P) float32, contiguous.

    Returns:
        (B, N, S, P), contiguous.
    """
    return ops.rope(states, cos, sin, False)


def qkv_rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Rotates queries and keys of a packed projection and writes keys and values to their places in a cache.

    Args:
        qkv: heads of queries, then of keys, then of values, (B, S, (Nq + 2 Nkv) P), contiguous.
        cos, sin: as in `rope`.
        keys, values: caches, (B, Nkv, L, P), any strides with a contiguous last dimension; [start, start + S) is
            overwritten.
        start: first place to write.

    Returns:
        Rotated queries, (B, Nq, S, P), contiguous. No gradient.
    """
    _refuse_gradient(qkv, keys, values)
    return ops.qkv_rope_store(qkv, cos, sin, keys, values, start)


def vision_rope_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates queries and keys of a packed projection in place. No gradient.

    Args:
        qkv: (S, 3, N, P), contiguous.
        cos, sin: (S, P) float32, contiguous.
    """
    _refuse_gradient(qkv)
    ops.vision_rope_(qkv, cos, sin)


def rms_norm(states: Tensor, weight: Tensor, eps: float, float32_weight: bool) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`. Differentiable.

    Args:
        states: (..., C), contiguous.
        weight: (C,), of the dtype of `states`; or float32 with `float32_weight`.
        eps: added to the mean square.
        float32_weight: multiply by the weight before rounding to the dtype (Wall-OSS) instead of after (Qwen).

    Returns:
        (..., C).
    """
    return ops.rms_norm(states, weight, eps, float32_weight)


def add_rms_norm(
    states: Tensor, residual: Tensor, weight: Tensor, eps: float, float32_weight: bool
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream and norms the sum. Differentiable.

    Args:
        states, residual: (..., C), contiguous.
        weight, eps, float32_weight: see `rms_norm`.

    Returns:
        The normed sum and the sum `residual + states`, both (..., C).
    """
    return ops.add_rms_norm(states, residual, weight, eps, float32_weight)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`. Differentiable.

    Args:
        gate_up: gate in the first half of the last dimension, up in the second, (..., 2F), contiguous.

    Returns:
        (..., F).
    """
    return ops.swiglu(gate_up)


# Fake: the shapes that tracing needs


@torch.library.register_fake(add_op_namespace_prefix("rope"))
def _(states, cos, sin, transposed):
    return states.new_empty(states.shape)


@torch.library.register_fake(add_op_namespace_prefix("qkv_rope_store"))
def _(qkv, cos, sin, keys, values, start):
    batch, length, packed = qkv.shape
    kv_heads, width = keys.shape[1], keys.shape[3]
    return qkv.new_empty(batch, packed // width - 2 * kv_heads, length, width)


@torch.library.register_fake(add_op_namespace_prefix("vision_rope_"))
def _(qkv, cos, sin):
    return None


@torch.library.register_fake(add_op_namespace_prefix("rms_norm"))
def _(states, weight, eps, float32_weight):
    return torch.empty_like(states)


@torch.library.register_fake(add_op_namespace_prefix("add_rms_norm"))
def _(states, residual, weight, eps, float32_weight):
    return torch.empty_like(states), torch.empty_like(states)


@torch.library.register_fake(add_op_namespace_prefix("rms_norm_backward"))
def _(grad_normed, grad_total, total, weight, eps):
    return torch.empty_like(total), weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.register_fake(add_op_namespace_prefix("swiglu"))
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.register_fake(add_op_namespace_prefix("swiglu_backward"))
def _(grad, gate_up):
    return torch.empty_like(gate_up)


# Gradients. Incoming ones may be expanded or transposed, so they are made contiguous.


def _rope_setup(ctx, inputs, output):
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, grad):
    # A rotation is linear in the states: its gradient is its transpose. Angles are positions and get none.
    return ops.rope(grad.contiguous(), *ctx.saved_tensors, not ctx.transposed), None, None, None


def _rms_norm_setup(ctx, inputs, output):
    states, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(states, weight)


def _rms_norm_backward(ctx, grad):
    states, weight = ctx.saved_tensors
    grad_states, grad_weight = ops.rms_norm_backward(grad.contiguous(), None, states, weight, ctx.eps)
    return grad_states, grad_weight.to(weight.dtype), None, None


def _add_rms_norm_setup(ctx, inputs, output):
    *_, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_backward(ctx, grad_normed, grad_total):
    total, weight = ctx.saved_tensors
    grad, grad_weight = ops.rms_norm_backward(
        grad_normed.contiguous(), grad_total.contiguous(), total, weight, ctx.eps
    )
    return grad, grad, grad_weight.to(weight.dtype), None, None


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    return ops.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


for _name, _backward, _setup in (
    ("rope", _rope_backward, _rope_setup),
    ("rms_norm", _rms_norm_backward, _rms_norm_setup),
    ("add_rms_norm", _add_rms_norm_backward, _add_rms_norm_setup),
    ("swiglu", _swiglu_backward, _swiglu_setup),
):
    torch.library.register_autograd(add_op_namespace_prefix(_name), _backward, setup_context=_setup)
