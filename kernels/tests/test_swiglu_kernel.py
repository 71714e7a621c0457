"""swiglu against float64, over sizes and dtypes; and all kernels together in one compiled graph."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_testing import (
    DTYPES,
    assert_as_exact_as,
    assert_opcheck,
    compiled_backends,
    property_test,
    randn,
    unaligned,
)


@property_test
@given(
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 1, 2)]),
    width=st.sampled_from([0, 1, 3, 8, 64, 1023, 1024, 2048, 11008]),
    dtype=st.sampled_from(DTYPES),
    at_an_odd_address=st.booleans(),
)
def test_swiglu(kernels, reference, device, shape, width, dtype, at_an_odd_address):
    gate_up = 4 * randn(*shape, 2 * width, device=device, dtype=dtype)
    gate_up = unaligned(gate_up) if at_an_odd_address else gate_up
    result = kernels.swiglu(gate_up)
    assert_as_exact_as(result, reference.swiglu(gate_up), reference.swiglu(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
def test_gradient(kernels, reference, device, dtype, width, layout):
    gate_up = (4 * randn(3, 7, 2 * width, device=device, dtype=dtype)).requires_grad_()
    grad = randn(7, 3, width, device=device, dtype=dtype, seed=1).transpose(0, 1)
    grad = unaligned(grad) if layout == "unaligned" else grad

    def gradient(function, gate_up, grad):
        return torch.autograd.grad(function(gate_up), gate_up, grad)[0]

    exact = gradient(reference.swiglu, gate_up.detach().double().requires_grad_(), grad.double())
    of_kernel, of_torch = (gradient(module.swiglu, gate_up, grad) for module in (kernels, reference))
    assert_as_exact_as(of_kernel, of_torch, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates(kernels, reference, device, dtype):
    """exp overflows in float32 below -88; silu is 0 there and the gate itself far above 0."""
    gates = torch.tensor([-3e4, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 3e4], device=device, dtype=dtype)
    gate_up = torch.cat([gates, torch.ones_like(gates)]).requires_grad_()
    result = kernels.swiglu(gate_up)
    torch.testing.assert_close(result, reference.swiglu(gate_up))
    assert torch.equal(result[-3:], gates[-3:])
    of_kernel, of_torch = (torch.autograd.grad(m.swiglu(gate_up).sum(), gate_up)[0] for m in (kernels, reference))
    torch.testing.assert_close(of_kernel, of_torch)


@compiled_backends
def test_opcheck(ops, device):
    gate_up = randn(3, 16, device=device).requires_grad_()
    assert_opcheck(ops.swiglu, (gate_up,))
    assert_opcheck(ops.swiglu_backward, (randn(3, 8, device=device), gate_up.detach()))


def test_says_what_is_wrong(kernels, device):
    with pytest.raises(RuntimeError, match="so it must be even"):
        kernels.swiglu(randn(3, 5, device=device))
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.swiglu(randn(6, 4, device=device).mT)
    with pytest.raises(RuntimeError, match="takes? float32, float16"):
        kernels.swiglu(torch.zeros(3, 4, device=device, dtype=torch.int32))


# All kernels in one graph


def layer(ops, hidden, residual, weight, cos, sin, keys, values, packed):
    """A layer's worth of operations on (B, S, C): every kernel that has no gradient, then those that have."""
    batch, length, width = hidden.shape
    queries = ops.qkv_rope_store(hidden.detach().repeat(1, 1, 4), cos, sin, keys, values, 2)
    ops.vision_rope_(packed, cos[0], sin[0])
    normed, residual = ops.add_rms_norm(hidden, residual, weight, 1e-6, True)
    heads = ops.rope(normed.view(batch, length, -1, cos.shape[-1]).transpose(1, 2), cos, sin)
    mixed = (heads + queries[:, : heads.shape[1]]).transpose(1, 2).reshape(batch, length, width)
    mixed = ops.rms_norm(mixed + packed.sum(), weight, 1e-6, False)
    return ops.swiglu(mixed) + residual[..., : width // 2] + keys.sum() + values.sum()


@compiled_backends
def test_all_kernels_compile_into_one_graph(kernels, reference, device):
    width, head = 32, 16
    cos, sin = randn(1, 5, head, device=device, seed=1), randn(1, 5, head, device=device, seed=2)

    def run(function, ops):
        hidden = randn(2, 5, width, device=device, seed=3).requires_grad_()
        weight = randn(width, device=device, seed=4).requires_grad_()
        caches = [randn(2, 2, 9, head, device=device, seed=s) for s in (5, 6)]
        packed = randn(5, 3, 2, head, device=device, seed=7)
        result = function(ops, hidden, hidden * 2, weight, cos, sin, *caches, packed)
        return [result, *torch.autograd.grad(result.square().sum(), [hidden, weight]), *caches, packed]

    compiled = run(torch.compile(layer, fullgraph=True, dynamic=False), kernels)
    torch.testing.assert_close(compiled, run(layer, kernels))
    torch.testing.assert_close(compiled, run(layer, reference))
