"""rms_norm and add_rms_norm against float64, over sizes and dtypes, in both orders of rounding."""

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


EPS = 1e-6


def exact_norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    states = states.double()
    return states / (states.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@property_test
@given(
    rows=st.integers(0, 9),
    # 1030 and 4500 take a thread more than one step without vectors
    width=st.sampled_from([1, 3, 8, 24, 100, 1024, 1030, 1280, 2048, 4500]),
    dtype=st.sampled_from(DTYPES),
    float32_weight=st.booleans(),
    at_an_odd_address=st.sampled_from([None, 0, 1, 2]),
)
def test_add_rms_norm(kernels, reference, device, rows, width, dtype, float32_weight, at_an_odd_address):
    inputs = [3 * randn(rows, width, device=device, dtype=dtype, seed=s) for s in (0, 1)]
    inputs.append(randn(width, device=device, dtype=torch.float32 if float32_weight else dtype, seed=2))
    if at_an_odd_address is not None:
        inputs[at_an_odd_address] = unaligned(inputs[at_an_odd_address])
    states, residual, weight = inputs
    normed, total = kernels.add_rms_norm(states, residual, weight, EPS, float32_weight)
    expected, expected_total = reference.add_rms_norm(states, residual, weight, EPS, float32_weight)
    assert torch.equal(total, expected_total)
    exact = exact_norm(states.double() + residual.double(), weight)
    assert_as_exact_as(normed, expected, exact)
    normed, expected = (module.rms_norm(total, weight, EPS, float32_weight) for module in (kernels, reference))
    assert_as_exact_as(normed, expected, exact_norm(total, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float32_weight", [True, False])
@pytest.mark.parametrize(
    "rows, width, at_an_odd_address", [(37, 120, None), (37, 120, 0), (37, 120, 1), (300, 70, None), (3, 1030, None)]
)
def test_gradient(kernels, reference, device, dtype, float32_weight, rows, width, at_an_odd_address):
    """More rows than parts of the weight's gradient (256), and more columns than threads, among them."""
    states, residual = (randn(rows, width, device=device, dtype=dtype, seed=s).requires_grad_() for s in (0, 1))
    weight = randn(width, device=device, dtype=torch.float32 if float32_weight else dtype, seed=2).requires_grad_()
    grads = [randn(rows, width, device=device, dtype=dtype, seed=s) for s in (3, 4)]
    if at_an_odd_address is not None:
        grads[at_an_odd_address] = unaligned(grads[at_an_odd_address])
    inputs = [states, residual, weight]

    of_kernel = torch.autograd.grad(kernels.add_rms_norm(*inputs, EPS, float32_weight), inputs, grads)
    of_torch = torch.autograd.grad(reference.add_rms_norm(*inputs, EPS, float32_weight), inputs, grads)
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    total = doubles[0] + doubles[1]
    exact = torch.autograd.grad([exact_norm(total, doubles[2]), total], doubles, [grad.double() for grad in grads])
    for gradients in zip(of_kernel, of_torch, exact, strict=True):
        assert_as_exact_as(*gradients)

    of_kernel = torch.autograd.grad(kernels.rms_norm(states, weight, EPS, float32_weight), [states, weight], grads[0])
    of_torch = torch.autograd.grad(reference.rms_norm(states, weight, EPS, float32_weight), [states, weight], grads[0])
    exact = torch.autograd.grad(exact_norm(doubles[0], doubles[2]), doubles[::2], grads[0].double())
    for gradients in zip(of_kernel, of_torch, exact, strict=True):
        assert_as_exact_as(*gradients)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_may_go_unused(kernels, reference, device, used):
    inputs = [randn(4, 8, device=device, seed=0), randn(4, 8, device=device, seed=1), randn(8, device=device, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    of_kernel = torch.autograd.grad(kernels.add_rms_norm(*inputs, EPS, True)[used].sum(), inputs[:2])
    of_torch = torch.autograd.grad(reference.add_rms_norm(*inputs, EPS, True)[used].sum(), inputs[:2])
    torch.testing.assert_close(of_kernel, of_torch)


def test_the_orders_of_rounding_differ(kernels, device):
    states, weight = randn(64, 128, device=device, dtype=torch.bfloat16), randn(128, device=device).bfloat16()
    wall_oss, qwen = (kernels.rms_norm(states, weight, EPS, order) for order in (True, False))
    assert not torch.equal(wall_oss, qwen)
    exact = exact_norm(states, weight)
    assert (wall_oss - exact).abs().mean() < (qwen - exact).abs().mean()


@compiled_backends
def test_opcheck(ops, device):
    states, residual = randn(2, 3, 8, device=device).requires_grad_(), randn(2, 3, 8, device=device)
    weight = randn(8, device=device).requires_grad_()
    assert_opcheck(ops.rms_norm, (states, weight, EPS, True))
    assert_opcheck(ops.add_rms_norm, (states, residual, weight, EPS, False))
    grad, total, weight = residual, states.detach(), weight.detach()
    assert_opcheck(ops.rms_norm_backward, (grad, None, total, weight, EPS))
    assert_opcheck(ops.rms_norm_backward, (grad, grad, total, weight, EPS))


BAD = {
    "weight has shape": lambda x, r, w: (x, r, w[:-1]),
    "or be float32 with float32_weight": lambda x, r, w: (x.bfloat16(), r.bfloat16(), w),
    "states .* must be contiguous": lambda x, r, w: (x.mT, r.mT, w[:4]),
    "residual .* must be contiguous": lambda x, r, w: (x, r.mT.contiguous().mT, w),
    "residual has shape": lambda x, r, w: (x, r[:-1], w),
    "they must have one dtype": lambda x, r, w: (x, r.half(), w),
    "takes? float32, float16": lambda x, r, w: (x.double(), r.double(), w.double()),
}


@pytest.mark.parametrize("message", BAD)
def test_says_what_is_wrong(kernels, device, message):
    arguments = BAD[message](randn(4, 8, device=device), randn(4, 8, device=device), randn(8, device=device))
    with pytest.raises(RuntimeError, match=message):
        kernels.add_rms_norm(*arguments, EPS, False)
