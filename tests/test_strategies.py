"""Training strategies and the gradient bridge: what reaches the VL expert, when, and how much of it."""

import json
import math

import numpy as np
import pytest
import torch
from test_trainer import STATISTICS, history, make_trainer
from tiny import tiny_actions, tiny_batch, tiny_model

from wallvla.quickstart import QuickstartConfig, build_processor, embodiment
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.gradient_bridge import (
    OBJECTIVES,
    GradientBridgeCallback,
    plot_gradient_bridge,
    sampled_parameters,
    shares_and_cosines,
)


@pytest.fixture(scope="module")
def processor():
    config = QuickstartConfig(image_size=32)
    return build_processor(config, embodiment(config, STATISTICS))


def token_batch(seed: int, size: int = 2) -> dict[str, torch.Tensor]:
    """Actions, five discrete tokens and a text token of each sample."""
    actions = {k: v for k, v in tiny_actions(size, seed).items() if k in ("actions", "action_mask")}
    return tiny_batch(images=(1,) * size, action_tokens=5, seed=seed) | actions


def step_gradients(trainer, batches: list[dict], model) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step of the trainer over these micro batches."""
    trainer.model = trainer.model_wrapped = model.train()
    totals = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(model, batch, num_items_in_batch=totals).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy, reached", [("co_training", True), ("flow_only", True), ("stop_gradient", False)])
def test_what_reaches_the_vl_expert(processor, tmp_path, strategy, reached):
    """Without labels only the flow is left."""
    trainer = make_trainer(processor, tmp_path, strategy=strategy)
    batch = token_batch(0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    gradients = step_gradients(trainer, [batch], tiny_model())
    moved = {name for name, g in gradients.items() if g.abs().max() > 0}
    assert any(name.startswith("action_expert.") for name in moved)
    assert any(name.startswith("vlm.") for name in moved) == reached


def test_flow_only_is_training_without_action_tokens(processor, tmp_path):
    """The tokens in the batch change nothing: same gradients as if they were not there."""
    trainer = make_trainer(processor, tmp_path, strategy="flow_only")
    batch = token_batch(0)
    batch["labels"][:, -1] = -100  # the end of turn, a text token, has its answer in the tokens before it
    without = {k: v[:, :-6] if k in ("input_ids", "attention_mask", "labels") else v for k, v in batch.items()}
    ours = step_gradients(trainer, [batch], tiny_model())
    assert trainer.count_targets(batch).tolist()[1:] == [0, 0]
    theirs = step_gradients(trainer, [without], tiny_model())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_step_of_the_switch():
    def stops(switch_step: float) -> list[bool]:
        options = CoTrainingConfig(
            output_dir="unused", use_cpu=True, strategy="stop_gradient_then_co_training", switch_step=switch_step
        )
        return [options.stops_gradient(step, 7) for step in range(7)]

    assert stops(2) == [True] * 2 + [False] * 5
    assert stops(6 / 7) == [True] * 6 + [False]
    assert stops(0) == [False] * 7
    with pytest.raises(ValueError, match="switch_step is -1"):
        stops(-1)


def test_the_switch_happens_once_and_resumes(processor, tmp_path):
    """The same as stop_gradient up to the switch, not after; stopped before or after it, a run goes on the same."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_bridge_steps": 1}
    whole = make_trainer(
        processor, tmp_path / "whole", strategy="stop_gradient_then_co_training", switch_step=2, **options
    )
    whole.train()
    stopped = make_trainer(processor, tmp_path / "stopped", strategy="stop_gradient", **options)
    stopped.train()
    shares = history(whole, "gradient_share_flow")
    assert shares[:2] == [0, 0] and min(shares[2:]) > 0
    assert history(stopped, "gradient_share_flow") == [0] * 5
    assert history(whole, "flow_loss")[:3] == history(stopped, "flow_loss")[:3]
    assert history(whole, "flow_loss")[3:] != history(stopped, "flow_loss")[3:]
    for step in (1, 3):
        resumed = make_trainer(
            processor,
            tmp_path / f"resumed-{step}",
            strategy="stop_gradient_then_co_training",
            switch_step=2,
            **options | {"save_strategy": "no"},
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in ("loss", "flow_loss", "gradient_share_flow", "gradient_cosine_flow_text"):
            assert history(resumed, name)[step - 5 :] == history(whole, name)[step - 5 :], name
        for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


def test_the_loss_space_of_a_run_becomes_the_checkpoints(processor, tmp_path):
    batch, losses = token_batch(0), []
    for space in ("action", "velocity"):
        trainer = make_trainer(processor, tmp_path / space, loss_space=space)
        trainer.save_model(str(tmp_path / space))
        assert json.loads((tmp_path / space / "config.json").read_text())["loss_space"] == space
        trainer.model = tiny_model(loss_space=space)
        losses.append(trainer.compute_loss(trainer.model, batch, return_outputs=True)[1].flow_loss)
    assert losses[1] > losses[0]  # by (1 - tau)^-2 in each element
    assert make_trainer(processor, tmp_path).model.config.loss_space == "action"


def test_the_bridge_measures_the_gradients_of_a_step(processor, tmp_path):
    """Over two micro batches, against a separate backward pass of each loss through the whole model."""
    trainer = make_trainer(processor, tmp_path, gradient_accumulation_steps=2)
    callback = GradientBridgeCallback(every=1, num_layers=2)
    trainer.instruments = [callback]
    model = tiny_model()
    callback.on_train_begin(None, None, None, model=model)
    batches = [token_batch(1), token_batch(2, size=3)]
    drawn = []
    draw = trainer._draw_flow
    trainer._draw_flow = lambda actions: drawn.append(draw(actions)) or drawn[-1]
    gradients = step_gradients(trainer, batches, model)
    callback.on_pre_optimizer_step(None, None, None)
    measured = callback.take_logs()
    assert callback.take_logs() == {}

    exact = tiny_model()
    chosen = [n for n, _ in exact.named_parameters() if ".language_model.layers.0." in n or ".layers.3." in n]
    chosen = [name for name in chosen if name.startswith("vlm.model.language_model")]
    parameters = dict(exact.named_parameters())
    totals = sum(trainer.count_targets(batch) for batch in batches)
    brute = []
    for i, weight in enumerate((1.0, 0.01, 0.01)):
        exact.zero_grad()
        for batch, draws in zip(batches, drawn, strict=True):
            output = exact(**batch, **draws)
            loss = (output.flow_loss, output.action_token_loss, output.text_loss)[i]
            (weight * output.loss_counts[i] / totals[i] * loss).backward()
        grads = [
            parameters[n].grad if parameters[n].grad is not None else torch.zeros_like(parameters[n]) for n in chosen
        ]
        brute.append(torch.cat([g.flatten() for g in grads]).double().numpy())
    norms = [np.linalg.norm(g) for g in brute]
    for i, name in enumerate(OBJECTIVES):
        assert measured[f"gradient_norm_{name}"] == pytest.approx(norms[i], rel=1e-4)
        assert measured[f"gradient_share_{name}"] == pytest.approx(norms[i] / sum(norms), rel=1e-4)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        cosine = brute[i] @ brute[j] / (norms[i] * norms[j])
        assert measured[f"gradient_cosine_{OBJECTIVES[i]}_{OBJECTIVES[j]}"] == pytest.approx(cosine, abs=1e-5)

    # The instrument disturbs nothing: the gradients are those of a trainer without it, and the sum of the three
    trainer.instruments, trainer._draw_flow = [], draw
    alone = step_gradients(trainer, batches, tiny_model())
    assert all(torch.equal(gradients[name], alone[name]) for name in gradients)
    total = np.concatenate([gradients[name].flatten().numpy() for name in chosen])
    np.testing.assert_allclose(sum(brute), total, atol=1e-6)


def test_the_bridge_samples_layers_and_every_few_steps(processor, tmp_path):
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    layers = [{names[id(p)].split(".")[4] for p in sampled_parameters(model, n)} for n in (1, 2, 3, 99)]
    assert layers == [{"0"}, {"0", "3"}, {"0", "2", "3"}, {"0", "1", "2", "3"}]
    model.vlm.requires_grad_(False)
    with pytest.raises(ValueError, match="gradient_bridge_steps 0"):
        sampled_parameters(model, 2)
    trainer = make_trainer(processor, tmp_path, gradient_bridge_steps=3, max_steps=5)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "gradient_share_flow" in e] == [1, 4]
    assert (tmp_path / "gradient_bridge.png").stat().st_size > 0


def test_shares_of_objectives_that_a_batch_does_not_have():
    figures = shares_and_cosines(torch.tensor([[9.0, 6.0, 0], [6.0, 16.0, 0], [0, 0, 0]], dtype=torch.float64))
    assert figures["gradient_share_flow"] == pytest.approx(3 / 7) and figures["gradient_share_text"] == 0
    assert figures["gradient_cosine_flow_action_token"] == 0.5
    assert not any("text" in name for name in figures if "cosine" in name)
    assert shares_and_cosines(torch.zeros(3, 3, dtype=torch.float64)) == {f"gradient_norm_{n}": 0 for n in OBJECTIVES}
    with pytest.raises(ValueError, match="no gradient_share"):
        plot_gradient_bridge({"run": [{"loss": math.pi, "step": 1}]}, "unused.png")


def test_a_stage_chooses_defaults_and_an_option_wins(processor, tmp_path):
    """Qwen-VLA, section 3.1: the decoder alone at logit-normal times, then everything at Beta times."""
    t2a = CoTrainingConfig(output_dir=str(tmp_path), stage="t2a")
    assert (t2a.freeze, t2a.time_sampler, t2a.max_steps) == (["vision", "vlm"], "logit_normal", 2000)
    own = CoTrainingConfig(output_dir=str(tmp_path), stage="t2a", freeze=["vision"], max_steps=7, time_sampler="beta")
    assert (own.freeze, own.time_sampler, own.max_steps) == (["vision"], "beta", 7)
    for epochs in (1.0, 3.0):  # the second is what it would be without the stage
        own = CoTrainingConfig(output_dir=str(tmp_path), stage="t2a", num_train_epochs=epochs)
        assert (own.max_steps, own.num_train_epochs) == (-1, epochs)
    plain = CoTrainingConfig(output_dir=str(tmp_path))
    assert (plain.time_sampler, plain.max_steps, plain.num_train_epochs) == (None, -1, 3.0)
    trainer = make_trainer(processor, tmp_path / "t2a", stage="t2a", max_steps=1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("action_expert.") for name in moved)
    assert json.loads((tmp_path / "t2a" / "config.json").read_text())["time_sampler"] == "logit_normal"
    sft = make_trainer(processor, tmp_path / "sft", stage="sft")
    assert (sft.model.config.time_sampler, sft.model.config.text_loss_weight) == ("beta", 0.1)
