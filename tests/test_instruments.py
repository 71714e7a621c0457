"""What the trainer logs beside its losses, and the average of the weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_action_experts import each_pair
from test_strategies import processor, token_batch  # noqa: F401
from test_trainer import history, make_trainer
from tiny import tiny_actions, tiny_batch_of, tiny_model, tiny_model_of

from wallvla.flow_matching_wallvla import interpolate, velocity_from_action
from wallvla.quickstart import build_model
from wallvla.trainers.adapters import add_adapters
from wallvla.trainers.instrument import MicroBatch
from wallvla.trainers.loss_breakdown import LossBreakdown, Throughput
from wallvla.trainers.weight_average import WeightAverage


@pytest.mark.parametrize("space", ["action", "velocity"])
def test_the_breakdown_is_the_loss_cut_into_pieces(space):
    """Every piece against a loop over single elements; their mean over elements is the model's own loss."""
    model = tiny_model(loss_space=space)
    breakdown = LossBreakdown(4, space, num_domains=3)
    elements: dict[str, list[float]] = {}
    total = []
    for seed, domains in ((1, [0, 2]), (2, [2, 2, 0])):
        generator = torch.Generator().manual_seed(seed)
        batch = token_batch(seed, len(domains)) | {"domain_ids": torch.tensor(domains)}
        batch["noise"] = torch.randn(batch["actions"].shape, generator=generator)
        batch["time"] = 0.999 * torch.rand(len(domains), generator=generator)
        with torch.no_grad():
            output = model(**batch)
        breakdown.on_micro_batch(0, MicroBatch(batch, output, {}))
        predicted, target = output.action_prediction, batch["actions"]
        if space == "velocity":
            noisy = interpolate(target, batch["noise"], batch["time"])
            predicted = velocity_from_action(noisy, predicted, batch["time"])
            target = batch["actions"] - batch["noise"]
        for b, h, d in batch["action_mask"].nonzero().tolist():
            value = (predicted[b, h, d].item() - target[b, h, d].item()) ** 2
            total.append(value)
            level = int(batch["time"][b].item() / 0.999 * 5)
            for key in (f"time_{level}", f"channel_{d}", f"domain_{domains[b]}"):
                elements.setdefault(f"flow_loss_{key}", []).append(value)
    logs = breakdown.take_logs()
    assert logs == pytest.approx({key: float(np.mean(values)) for key, values in elements.items()}, rel=1e-3)
    assert "flow_loss_channel_3" not in logs and "flow_loss_domain_1" not in logs
    assert output.flow_loss.item() == pytest.approx(np.mean(total[-int(batch["action_mask"].sum()) :]), rel=1e-4)
    assert breakdown.take_logs() == {}


def test_throughput_counts_samples_and_flops(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model = tiny_model()
    throughput = Throughput(model, peak_flops=1e6)
    throughput.on_train_begin(None, None, None)
    batch = token_batch(0, 3)
    for wait, work in ((1.0, 3.0), (2.0, 4.0)):
        clock[0] += wait
        throughput.on_step_begin(None, None, None)
        throughput.on_micro_batch(0, MicroBatch(batch, None, {}))
        clock[0] += work
        throughput.on_step_end(None, None, None)
    sizes = [
        sum(p.numel() for p in e.layers.parameters()) for e in (model.vlm.model.language_model, model.action_expert)
    ]
    flops = 2 * 6 * (sizes[0] * batch["input_ids"].numel() + sizes[1] * 3 * 8)
    expected = {"samples_per_second": 0.6, "tflops": flops / 10 / 1e12, "data_wait": 0.3, "mfu": flops / 10 / 1e6}
    logs = throughput.take_logs()
    assert {name: logs[name] for name in expected} == pytest.approx(expected)
    assert throughput.take_logs() == {}


@each_pair
def test_tokens_that_go_through_the_layers(kind, vlm):
    """What the throughput multiplies by, against what the first layers get."""
    model, batch = tiny_model_of(kind, vlm), tiny_batch_of(vlm) | tiny_actions(2)
    throughput, seen = Throughput(model), {}
    decoder = model.vlm.get_encoder() if vlm == "florence2" else model.vlm.model.language_model
    for name, expert in (("vlm", decoder), ("expert", model.action_expert)):
        expert.layers[0].register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].shape[1]}))
    with torch.no_grad():
        model(**batch)
    throughput.on_micro_batch(0, MicroBatch(batch, None, {}))
    sizes = {"vlm": decoder.layers, "expert": model.action_expert.layers}
    expected = sum(seen[name] * sum(p.numel() for p in layers.parameters()) for name, layers in sizes.items())
    assert throughput._flops == 6 * 2 * expected


def test_a_run_logs_them(processor, tmp_path):  # noqa: F811
    trainer = make_trainer(processor, tmp_path, max_steps=2, log_loss_breakdown=True, peak_flops=1e12)
    trainer.train()
    assert len(history(trainer, "samples_per_second")) == 2 and min(history(trainer, "mfu")) > 0
    entry = next(e for e in trainer.state.log_history if "flow_loss" in e)
    channels = [entry[f"flow_loss_channel_{d}"] for d in range(4)]
    assert min(channels) <= entry["flow_loss"] <= max(channels)


def test_the_average_of_the_weights_is_saved_resumed_and_exported(processor, tmp_path):  # noqa: F811
    """Against the recursion over the checkpoints of every step, in float64."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.7}
    trainer = make_trainer(processor, tmp_path / "run", **options)
    name = "action_expert.layers.0.mlp.up_proj.weight"
    expected = dict(trainer.model.named_parameters())[name].detach().double().clone()
    trainer.train()
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        expected = 0.7 * expected + 0.3 * load_file(folder / "model.safetensors")[name].double()
        np.testing.assert_allclose(load_file(folder / "ema.safetensors")[name], expected, atol=1e-6)
    exported = load_file(tmp_path / "run" / "ema" / "model.safetensors")[name]
    np.testing.assert_allclose(exported, expected, atol=1e-6)
    assert json.loads((tmp_path / "run" / "ema" / "processor_config.json").read_text())["embodiments"]
    assert not torch.equal(exported, dict(trainer.model.named_parameters())[name])

    resumed = make_trainer(processor, tmp_path / "resumed", **options | {"save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    ours = load_file(tmp_path / "resumed" / "ema" / "model.safetensors")
    theirs = load_file(tmp_path / "run" / "ema" / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    (tmp_path / "run" / "checkpoint-1" / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weight average"):
        make_trainer(processor, tmp_path / "other", **options).train(str(tmp_path / "run" / "checkpoint-1"))
    with pytest.raises(ValueError, match="decay of the weight average is 1.5"):
        WeightAverage(1.5)


def test_an_average_of_adapters_is_refused(processor, tmp_path):  # noqa: F811
    """What it would export are adapters without the model."""
    with pytest.raises(ValueError, match="ema_decay is 0.9, but the model has adapters"):
        make_trainer(processor, tmp_path, model=add_adapters(build_model(processor), rank=2), ema_decay=0.9)


def test_bf16_leaves_heads_losses_and_masters_in_float32(processor, tmp_path):  # noqa: F811
    """Under autocast the layers compute in bf16; heads, losses, gradients and weights stay in float32."""
    trainer = make_trainer(processor, tmp_path, max_steps=1, bf16=True)
    seen = {}
    modules = dict(trainer.model.named_modules())
    for name in ("vlm.model.language_model.layers.1.mlp.up_proj", "action_expert.layers.1.mlp.up_proj"):
        modules[name].register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    heads = ["action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj"]
    for name in heads:
        modules[f"action_expert.{name}"].register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    trainer.train()
    assert {seen.pop(name) for name in heads} == {torch.float32}
    assert set(seen.values()) == {torch.bfloat16} and len(seen) == 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    batch = token_batch(0)
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, noise=torch.zeros(2, 8, 4), time=torch.tensor([0.2, 0.4]))
    losses = (output.flow_loss, output.action_token_loss, output.text_loss)
    assert {loss.dtype for loss in losses} == {torch.float32}
