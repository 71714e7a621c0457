"""What a policy call computes at the real sizes of Wall-OSS-0.5, counted without its weights."""

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import tiny_actions, tiny_batch, tiny_model
from torch import nn

from wallvla.vl_experts_wallvla import PrefixContext


ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("latency", ROOT / "benchmarks" / "latency.py")
latency = importlib.util.module_from_spec(spec)
spec.loader.exec_module(latency)

# TFLOP of vision and prefill, GFLOP of a step: shared/reference/performance.md, computed by hand from the sizes alone
REFERENCE = {224: (0.995, 1.863, 29.0), 448: (4.029, 5.075, 34.4)}


@pytest.mark.parametrize("image_size", [224, 448])
def test_operations_at_full_size(image_size):
    counts = latency.full_size_counts(image_size, 150)
    vision, prefill, step = REFERENCE[image_size]
    hand = counts["closed_form"]
    assert hand["vision"] == pytest.approx(vision * 1e12, rel=0.01)
    assert hand["prefill"] == pytest.approx(prefill * 1e12, rel=0.01)
    assert hand["step"] == pytest.approx(step * 1e9, rel=0.01)
    assert counts["counted"]["vision"] == pytest.approx(hand["vision"], rel=0.02)
    assert counts["counted"]["denoise"] == pytest.approx(10 * hand["step"], rel=0.02)
    total = hand["vision"] + hand["prefill"] + 10 * hand["step"]
    # What the text before the first image saves in every call but the first of a bucket: 35 layers, and the keys and
    # values of the last, at 2,048 wide with a SwiGLU of 11,008 and keys of 256; attention is counted whole
    tokens = counts["reused_text_tokens"]
    products = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008
    by_hand = 35 * (2 * tokens * products + 4 * tokens**2 * 2048) + 4 * tokens * 2048 * 256
    assert 0 < tokens < 150 and counts["reused_text_flops"] == by_hand
    assert counts["engine_total"] + counts["reused_text_flops"] == pytest.approx(total, rel=0.02)
    assert counts["engine_total"] < 1.02 * total
    assert counts["recompute_language_total"] >= 6 * counts["engine_total"]
    assert counts["recompute_all_total"] >= 9 * counts["engine_total"]


def test_operations_of_a_denoising_step():
    """36 layers; each operation is a launch on a GPU, and the launches are what eager mode waits for."""
    counts = latency.step_operations()
    model, engine, fused = (sum(each.values()) for each in counts.values())
    products = {name: number for name, number in counts["engine"].items() if name in ("mm", "addmm", "linear")}
    assert engine < 0.75 * model, dict(counts["engine"])
    # Per layer four products, two norms, rope with its stores, attention, the copy of its result, SwiGLU
    assert fused <= 10 * 36 + 40, dict(counts["engine with kernels"])
    assert sum(products.values()) == 4 * 36 + 3, "four products a layer, and the heads"


# --- torch.compile and torch.export of the plain model


class Step(nn.Module):
    """One denoising step with tensors for arguments."""

    def __init__(self, model, layers: int):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, noisy, time, channel_mask, step_mask, visible, positions, next_position, hidden, *pairs):
        keys, values = pairs[: self.layers], pairs[self.layers :]
        context = PrefixContext(keys, values, hidden, visible, positions, next_position)
        return self.model.predict_velocity(noisy, time, context, channel_mask, step_mask)


@pytest.fixture(scope="module")
def step():
    """(model, arguments of `predict_velocity`)"""
    model, actions = tiny_model(), tiny_actions(2)
    with torch.no_grad():
        context = model.encode_prefix(**tiny_batch())
    channels, steps = actions["action_mask"].any(1, keepdim=True), actions["action_mask"].any(2)
    return model, (actions["noise"], actions["time"], context, channels, steps)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("room", [False, True])
def test_a_step_compiles_without_graph_breaks(step, backend, room):
    model, (noisy, time, context, channels, steps) = step
    if room:
        context = context.with_room(noisy.shape[1])
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.predict_velocity(noisy, time, context, channels, steps)
        compiled = torch.compile(model.predict_velocity, backend=backend, fullgraph=True)
        found = compiled(noisy, time, context, channels, steps)
        again = compiled(noisy * 2, time, context, channels, steps)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(again, found)


def test_a_step_exports(step):
    model, (noisy, time, context, channels, steps) = step
    names = [field.name for field in fields(PrefixContext)]
    assert names[:6] == ["keys", "values", "last_hidden_state", "visible", "positions", "next_position"]
    arguments = (noisy, time, channels, steps, context.visible, context.positions, context.next_position)
    arguments += (context.last_hidden_state, *context.keys, *context.values)
    with torch.no_grad():
        program = torch.export.export(Step(model, len(context.keys)), arguments)
        expected = model.predict_velocity(noisy, time, context, channels, steps)
    torch.testing.assert_close(program.module()(*arguments), expected, atol=1e-6, rtol=1e-6)


def test_the_compiled_arm_of_the_benchmark(monkeypatch):
    """Its static keys and values give the numbers of `sample_actions`, also for a second observation."""
    monkeypatch.setattr(torch, "compile", lambda function, mode, fullgraph: function)
    processor = latency.make_processor(56)
    model = latency.make_model(latency.scaled_config(), processor, "cpu")
    sampler, noise = latency.CompiledSampler(model, "max-autotune"), torch.randn(1, 32, 26)
    for seed in (0, 1):
        batch = processor.encode([latency.make_observation(processor, 56, 150, seed)])
        with torch.no_grad():
            found, recomputed = sampler(batch, noise), latency.sample_recomputing(model, batch, noise)
        expected = model.sample_actions(**batch, noise=noise)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(recomputed, expected, atol=2e-6, rtol=0)
