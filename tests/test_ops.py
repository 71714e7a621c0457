"""The torch references: formulas computed another way, in float64, and agreement with the stock layers."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HTTPError
from kernels import use_kernel_mapping
from tiny import tiny_batch, tiny_model
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from wallvla import ops_wallvla
from wallvla.action_experts_wallvla import WallVLARMSNorm
from wallvla.ops_wallvla import (
    TORCH_OPS,
    HubLayer,
    Ops,
    add_rms_norm,
    fast_ops,
    qkv_rope_store,
    rms_norm,
    rope,
    swiglu,
    vision_rope_,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(*shape: int, width: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (*shape, width) of random angles, the same in both halves of the width."""
    half = 3 * randn(*shape, width // 2, seed=seed)
    angle = torch.cat([half, half], dim=-1)
    return angle.cos(), angle.sin()


def test_rope_is_a_product_of_complex_numbers():
    states, (cos, sin) = randn(2, 3, 5, 8), angles(2, 5, width=8)
    turned = torch.complex(states[..., :4], states[..., 4:]).to(torch.complex128)
    turned = turned * torch.complex(cos, sin)[:, None, :, :4]
    torch.testing.assert_close(rope(states, cos, sin), torch.cat([turned.real, turned.imag], -1).float())


def test_rope_equals_the_stock_layers():
    queries, keys, (cos, sin) = randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1), angles(2, 5, width=8)
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    for states, theirs in zip((queries, keys), expected, strict=True):
        torch.testing.assert_close(rope(states, cos, sin), theirs, rtol=0, atol=0)


def test_rope_gives_contiguous_heads_of_a_transposed_projection():
    states, (cos, sin) = randn(2, 5, 3, 8).transpose(1, 2), angles(1, 5, width=8)
    rotated = rope(states, cos, sin)
    assert rotated.is_contiguous()
    torch.testing.assert_close(rotated, rope(states.contiguous(), cos.expand(2, 5, 8), sin.expand(2, 5, 8)))


@pytest.mark.parametrize("start", [0, 4])
def test_qkv_rope_store_writes_its_places_and_no_other(start):
    qkv, (cos, sin) = randn(2, 5, (4 + 2 * 2) * 8), angles(2, 5, width=8)
    keys, values = randn(2, 2, 9, 8, seed=2), randn(2, 2, 9, 8, seed=3)
    before = keys.clone(), values.clone()
    rotated = qkv_rope_store(qkv, cos, sin, keys, values, start)

    heads = qkv.view(2, 5, 8, 8).transpose(1, 2)
    expected_queries, expected_keys = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], cos, sin)
    torch.testing.assert_close(rotated, expected_queries)
    assert rotated.is_contiguous()
    torch.testing.assert_close(keys[:, :, start : start + 5], expected_keys)
    assert torch.equal(values[:, :, start : start + 5], heads[:, 6:])
    elsewhere = [place for place in range(9) if not start <= place < start + 5]
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, elsewhere], old[:, :, elsewhere])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vision_rope_equals_the_stock_layers_to_the_bit(dtype):
    qkv, (cos, sin) = randn(6, 3, 4, 20, dtype=dtype), angles(6, width=20)
    queries, keys, values = qkv.clone().unbind(1)
    expected = apply_rotary_pos_emb_vision(queries, keys, cos, sin)
    assert vision_rope_(qkv, cos, sin) is None
    assert torch.equal(qkv, torch.stack([*expected, values], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_the_layers_of_both_families_to_the_bit(dtype):
    states, residual, weight = randn(3, 5, 16, dtype=dtype), randn(3, 5, 16, seed=1, dtype=dtype), randn(16, seed=2)
    wall_oss, qwen = WallVLARMSNorm(16, 1e-6), Qwen2RMSNorm(16, 1e-6).to(dtype)
    with torch.no_grad():
        wall_oss.weight.copy_(weight)
        qwen.weight.copy_(weight)
    total = residual + states
    for layer, float32_weight in ((wall_oss, True), (qwen, False)):
        normed, summed = add_rms_norm(states, residual, layer.weight, 1e-6, float32_weight)
        assert torch.equal(summed, total)
        assert torch.equal(normed, layer(total))
        assert torch.equal(rms_norm(total, layer.weight, 1e-6, float32_weight), layer(total))


def test_a_normed_row_has_a_root_mean_square_of_one():
    normed = rms_norm(1e3 * randn(4, 64), torch.ones(64), 1e-6, True).double()
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_swiglu_in_scalars():
    gate_up = randn(3, 2 * 7)
    expected = [[g / (1 + math.exp(-g)) * u for g, u in zip(r[:7], r[7:], strict=True)] for r in gate_up.tolist()]
    torch.testing.assert_close(swiglu(gate_up), torch.tensor(expected))


@pytest.fixture
def fresh_load():
    ops_wallvla._load_kernels.cache_clear()
    yield
    ops_wallvla._load_kernels.cache_clear()


@pytest.mark.parametrize(
    "cause, reason",
    [("no package", "not installed"), ("not cached", "not available in the local cache"), ("no network", "refused")],
)
def test_absent_kernels_fall_back_with_one_line_that_says_why(
    fresh_load, monkeypatch, tmp_path, caplog, cause, reason
):
    def unreachable(repository, **options):
        raise HTTPError("connection refused")

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if cause != "not cached":
        monkeypatch.setattr(ops_wallvla, "get_kernel", None if cause == "no package" else unreachable)
    monkeypatch.setattr(ops_wallvla.logger.parent, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert fast_ops("cpu") is TORCH_OPS
        assert fast_ops(torch.device("cpu")) is TORCH_OPS
    lines = [record.getMessage() for record in caplog.records if "torch takes its place" in record.getMessage()]
    assert len(lines) == 1
    assert reason in lines[0]


def test_a_device_without_a_backend_falls_back(fresh_load):
    assert fast_ops("meta") is TORCH_OPS


def test_the_torch_ops_are_the_functions_of_their_names():
    assert TORCH_OPS == Ops(*(vars(ops_wallvla)[name] for name in Ops._fields))


class CountedNorm(nn.Module):
    """Stands for the layer of the Hub kernels; it must not have state, so it counts elsewhere."""

    def forward(self, hidden):
        CALLS.append(self)
        return rms_norm(hidden, self.weight, self.eps, True)


CALLS: list[nn.Module] = []


@pytest.mark.parametrize("present", [True, False])
def test_set_use_kernels_reaches_the_norms_of_both_experts(fresh_load, monkeypatch, present):
    def get_kernel(repository, version, backend, trust_remote_code):
        assert (repository, version, backend) == ("x-square/wallvla-kernels", 1, "cpu")
        if present:
            return SimpleNamespace(layers=SimpleNamespace(WallVLARMSNorm=CountedNorm))
        raise FileNotFoundError("no build for this machine")

    monkeypatch.setattr(ops_wallvla, "get_kernel", get_kernel)
    CALLS.clear()
    model, batch = tiny_model(norm_in_float32=True), tiny_batch()
    noise = randn(2, model.config.action_horizon, model.config.action_dim)
    expected = model.sample_actions(**batch, noise=noise)
    with use_kernel_mapping({"WallVLARMSNorm": {"cpu": HubLayer("WallVLARMSNorm", "cpu")}}):
        model.set_use_kernels(True)
    torch.testing.assert_close(model.sample_actions(**batch, noise=noise), expected)
    ours = [module for module in model.modules() if isinstance(module, WallVLARMSNorm)]
    assert {id(module) for module in CALLS} == ({id(module) for module in ours} if present else set())
    assert len(ours) > 4
