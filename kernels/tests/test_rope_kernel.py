"""rope, qkv_rope_store and vision_rope_ against float64, over sizes, strides and dtypes."""

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


dtypes = st.sampled_from(DTYPES)
# Widths with and without whole vectors in half a head: 128 and 80 are those of the model
widths = st.sampled_from([2, 6, 8, 16, 20, 32, 80, 128])


def angles(*shape: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin in form only: any numbers, of different sizes in the two halves."""
    return randn(*shape, device=device, seed=11), randn(*shape, device=device, seed=12)


def doubled(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


@property_test
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 5),
    length=st.integers(0, 7),
    width=widths,
    dtype=dtypes,
    layout=st.sampled_from(["contiguous", "transposed", "unaligned", "part"]),
    shared_angles=st.booleans(),
)
def test_rope(kernels, reference, device, batch, heads, length, width, dtype, layout, shared_angles):
    if layout == "transposed":  # how a projection gives it
        states = randn(batch, length, heads, width, device=device, dtype=dtype).transpose(1, 2)
    elif layout == "part":  # rows of another pitch
        states = randn(batch, heads, length, width + 3, device=device, dtype=dtype)[..., 2:-1]
    else:
        states = randn(batch, heads, length, width, device=device, dtype=dtype)
        states = unaligned(states) if layout == "unaligned" else states
    cos, sin = angles(1 if shared_angles else batch, length, width, device=device)
    rotated = kernels.rope(states, cos, sin)
    assert rotated.is_contiguous()
    assert_as_exact_as(rotated, reference.rope(states, cos, sin), reference.rope(*doubled(states, cos, sin)))


@property_test
@given(
    batch=st.integers(1, 3),
    query_heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    length=st.integers(0, 6),
    start=st.integers(0, 4),
    room=st.integers(0, 3),
    width=widths,
    dtype=dtypes,
    layout=st.sampled_from(["contiguous", "layers", "part", "unaligned qkv", "unaligned caches"]),
)
def test_qkv_rope_store(
    kernels, reference, device, batch, query_heads, kv_heads, length, start, room, width, dtype, layout
):
    qkv = randn(batch, length, (query_heads + 2 * kv_heads) * width, device=device, dtype=dtype)
    cos, sin = angles(batch, length, width, device=device)
    shape = (batch, kv_heads, start + length + room, width)
    if layout == "layers":  # one buffer for the keys and values of all layers, tokens before heads
        memory = randn(batch, shape[2], 2, kv_heads, width, device=device, dtype=dtype, seed=1).permute(2, 0, 3, 1, 4)
        keys, values = memory
    elif layout == "part":  # a shorter bucket of a longer buffer
        keys, values = (randn(*shape[:2], shape[2] + 5, width, device=device, dtype=dtype, seed=s) for s in (1, 2))
        keys, values = keys[:, :, 2 : 2 + shape[2]], values[:, :, 2 : 2 + shape[2]]
    else:
        keys, values = (randn(*shape, device=device, dtype=dtype, seed=s) for s in (1, 2))
        if layout == "unaligned qkv":
            qkv = unaligned(qkv)
        elif layout == "unaligned caches":
            keys, values = unaligned(keys), unaligned(values)
    expected, exact = [keys.clone(), values.clone()], doubled(keys, values)

    queries = kernels.qkv_rope_store(qkv, cos, sin, keys, values, start)
    expected_queries = reference.qkv_rope_store(qkv, cos, sin, *expected, start)
    exact_queries = reference.qkv_rope_store(*doubled(qkv, cos, sin), *exact, start)
    assert queries.is_contiguous()
    assert_as_exact_as(queries, expected_queries, exact_queries)
    written = slice(start, start + length)
    assert_as_exact_as(keys[:, :, written], expected[0][:, :, written], exact[0][:, :, written])
    assert torch.equal(values, expected[1])
    others = [place for place in range(shape[2]) if not start <= place < start + length]
    assert torch.equal(keys[:, :, others], expected[0][:, :, others])


@property_test
@given(length=st.integers(0, 9), heads=st.integers(1, 5), width=widths, dtype=dtypes, at_an_odd_address=st.booleans())
def test_vision_rope(kernels, reference, device, length, heads, width, dtype, at_an_odd_address):
    qkv = randn(length, 3, heads, width, device=device, dtype=dtype)
    qkv = unaligned(qkv) if at_an_odd_address else qkv
    cos, sin = angles(length, width, device=device)
    expected, exact = qkv.clone(), qkv.double()
    reference.vision_rope_(expected, cos, sin)
    reference.vision_rope_(exact, *doubled(cos, sin))
    values = qkv[:, 2].clone()
    assert kernels.vision_rope_(qkv, cos, sin) is None
    assert torch.equal(qkv[:, 2], values)
    assert_as_exact_as(qkv[:, :2], expected[:, :2], exact[:, :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_of_the_model(kernels, reference, device, dtype):
    """The action expert (16 and 2 heads of 128) behind a prefix, and a vision block (16 heads of 80)."""
    qkv = randn(1, 32, 20 * 128, device=device, dtype=dtype)
    cos, sin = angles(1, 32, 128, device=device)
    keys, values = (randn(1, 2, 342 + 32, 128, device=device, dtype=dtype, seed=s) for s in (1, 2))
    expected, exact = [keys.clone(), values.clone()], doubled(keys, values)
    queries = kernels.qkv_rope_store(qkv, cos, sin, keys, values, 342)
    expected_queries = reference.qkv_rope_store(qkv, cos, sin, *expected, 342)
    exact_queries = reference.qkv_rope_store(*doubled(qkv, cos, sin), *exact, 342)
    assert_as_exact_as(queries, expected_queries, exact_queries)
    assert_as_exact_as(keys, expected[0], exact[0])
    assert torch.equal(values, expected[1])

    qkv = randn(256, 3, 16, 80, device=device, dtype=dtype)
    cos, sin = angles(256, 80, device=device)
    expected, exact = qkv.clone(), qkv.double()
    kernels.vision_rope_(qkv, cos, sin)
    reference.vision_rope_(expected, cos, sin)
    reference.vision_rope_(exact, *doubled(cos, sin))
    assert_as_exact_as(qkv, expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 16])
def test_gradient(kernels, reference, device, dtype, width):
    states = randn(2, 5, 3, width, device=device, dtype=dtype).transpose(1, 2)
    cos, sin = angles(1, 5, width, device=device)
    grad = randn(2, 5, 3, width, device=device, dtype=dtype, seed=3).transpose(1, 2)

    def gradient(function, states, cos, sin, grad):
        return torch.autograd.grad(function(states, cos, sin), states, grad)[0]

    states.requires_grad_()
    of_kernel = gradient(kernels.rope, states, cos, sin, grad)
    of_torch = gradient(reference.rope, states, cos, sin, grad)
    assert_as_exact_as(of_kernel, of_torch, gradient(reference.rope, *doubled(states, cos, sin, grad)))


def test_turning_back_gives_the_states(ops, device):
    states = randn(2, 3, 5, 16, device=device)
    half = randn(2, 5, 8, device=device, seed=4)
    angle = torch.cat([half, half], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    turned = ops.rope(states, cos, sin, False)
    torch.testing.assert_close(ops.rope(turned, cos, sin, True), states)
    torch.testing.assert_close(turned.square().sum(-1), states.square().sum(-1))


def test_writing_in_place_refuses_gradients(kernels, device):
    qkv = randn(4, 3, 2, 8, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        kernels.vision_rope_(qkv * 1, *angles(4, 8, device=device))
    with pytest.raises(RuntimeError, match="has no gradient"):
        cache = randn(1, 1, 4, 8, device=device)
        kernels.qkv_rope_store(qkv.view(1, 4, 48), *angles(1, 4, 8, device=device), cache, cache.clone(), 0)


@compiled_backends
def test_opcheck(ops, device):
    states, (cos, sin) = randn(2, 3, 5, 16, device=device), angles(2, 5, 16, device=device)
    assert_opcheck(ops.rope, (states.requires_grad_(), cos, sin, False))
    caches = randn(2, 2, 9, 16, device=device), randn(2, 2, 9, 16, device=device)
    assert_opcheck(ops.qkv_rope_store, (randn(2, 5, 8 * 16, device=device), cos, sin, *caches, 3))
    assert_opcheck(ops.vision_rope_, (randn(5, 3, 2, 16, device=device), cos[0], sin[0]))


BAD_ROPE = {
    "B, N, S, P": lambda x, cos, sin: (x[0], cos, sin),
    "takes? float32, float16": lambda x, cos, sin: (x.double(), cos, sin),
    "must be even": lambda x, cos, sin: (x[..., :7], cos[..., :7].contiguous(), sin[..., :7].contiguous()),
    "heads must be contiguous": lambda x, cos, sin: (x.transpose(2, 3).contiguous().transpose(2, 3), cos, sin),
    "cos is BFloat16; it must be float32": lambda x, cos, sin: (x, cos.bfloat16(), sin),
    "sin has shape .* need": lambda x, cos, sin: (x, cos, sin[:, :4].contiguous()),
    "they must be the same": lambda x, cos, sin: (x, cos, sin[:1]),
    "cos .* must be contiguous": lambda x, cos, sin: (x, cos.mT.contiguous().mT, sin),
}


@pytest.mark.parametrize("message", BAD_ROPE)
def test_rope_says_what_is_wrong(kernels, device, message):
    arguments = BAD_ROPE[message](randn(2, 3, 5, 8, device=device), *angles(2, 5, 8, device=device))
    with pytest.raises(RuntimeError, match=message):
        kernels.rope(*arguments)


BAD_STORE = {
    "do not fit into caches of length 9": {"start": 5},
    r"Tokens \[-1, 4\)": {"start": -1},
    "is expanded along dimension 0": {"keys": torch.zeros(1, 2, 9, 8).expand(2, 2, 9, 8)},
    "keys has shape .* and values": {"values": torch.zeros(2, 1, 9, 8)},
    "one dtype": {"values": torch.zeros(2, 2, 9, 8, dtype=torch.bfloat16)},
    "needs .B, Nkv, L, P.": {"keys": torch.zeros(3, 2, 9, 8)},
    "which is not": {"qkv": torch.zeros(2, 5, 3 * 8)},
    "qkv .* must be contiguous": {"qkv": torch.zeros(5, 2, 8 * 8).transpose(0, 1)},
}


@pytest.mark.parametrize("message", BAD_STORE)
def test_qkv_rope_store_says_what_is_wrong(kernels, device, message):
    cos, sin = angles(2, 5, 8, device=device)
    arguments = {"qkv": torch.zeros(2, 5, 8 * 8), "keys": torch.zeros(2, 2, 9, 8), "values": torch.zeros(2, 2, 9, 8)}
    arguments = {**arguments, "start": 3, **BAD_STORE[message]}
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        kernels.qkv_rope_store(cos=cos, sin=sin, **arguments)


def test_vision_rope_says_what_is_wrong(kernels, device):
    cos, sin = angles(4, 8, device=device)
    with pytest.raises(RuntimeError, match=r"must be \(S, 3, N, P\)"):
        kernels.vision_rope_(randn(4, 2, 2, 8, device=device), cos, sin)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.vision_rope_(randn(4, 2, 3, 8, device=device).transpose(1, 2), cos, sin)
    with pytest.raises(RuntimeError, match=r"need \(S, P\)"):
        kernels.vision_rope_(randn(5, 3, 2, 8, device=device), cos, sin)


@pytest.mark.gpu
def test_devices_must_agree(load_variant):
    kernels = load_variant("cuda")
    cos, sin = angles(1, 5, 8, device="cpu")
    with pytest.raises(RuntimeError, match="different devices"):
        kernels.rope(randn(1, 2, 5, 8, device="cuda"), cos, sin)
