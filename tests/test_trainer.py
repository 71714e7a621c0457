"""The co-training trainer on a tiny random model: every promise of `CoTrainingTrainer`."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ACTION_START, tiny_actions, tiny_batch, tiny_model
from transformers import AutoModel, AutoProcessor

from wallvla import register_auto_classes
from wallvla.action_space_wallvla import Embodiment
from wallvla.data.collator import Collator
from wallvla.data.mixture import CoTrainingMixture
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor, embodiment
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.co_training_trainer import CoTrainingTrainer
from wallvla.trainers.muon import is_muon_parameter


STATISTICS = {
    kind: {
        "q01": [-1.0] * 4,
        "q99": [1.0] * 4,
        "mean": [0.0] * 4,
        "std": [1.0] * 4,
        "min": [-1.0] * 4,
        "max": [1.0] * 4,
    }
    for kind in ("state", "action")
}


class Samples:
    """Action or multimodal samples of random pixels and numbers, the same for the same index."""

    def __init__(self, kind: str, size: int = 24):
        self.kind, self.size = kind, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([index, len(self.kind)])
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if self.kind == "multimodal":
            answer = "<box>[{}, {}, {}, {}]</box>".format(*rng.integers(0, 32, 4))
            return {"images": [image], "text": "Where is the button? Answer with a box.", "answer": answer}
        return {
            "images": {"front": image},
            "instruction": "press the button",
            "state": rng.uniform(-1, 1, 4),
            "embodiment": EMBODIMENT,
            "actions": rng.uniform(-1, 1, (8, 4)),
            "action_is_pad": np.arange(8) >= rng.integers(4, 9),
        }


@pytest.fixture(scope="module")
def processor():
    config = QuickstartConfig(image_size=32)
    return build_processor(config, embodiment(config, STATISTICS))


def make_trainer(processor, folder, mixture=None, model=None, **options) -> CoTrainingTrainer:
    torch.manual_seed(0)
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
    }
    if mixture is None:
        mixture = CoTrainingMixture(Samples("action"), Samples("multimodal"), multimodal_fraction=0.25, length=64)
    return CoTrainingTrainer(
        model=build_model(processor) if model is None else model,
        args=CoTrainingConfig(**defaults | options),
        data_collator=Collator(processor),
        train_dataset=mixture,
        processing_class=processor,
    )


def history(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_one_step_moves_every_parameter(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_muon_gets_the_matrices_of_every_layer():
    """Of both experts and of the vision tower, and nothing else."""
    names = {name for name, p in tiny_model().named_parameters() if is_muon_parameter(name, p)}
    assert len(names) == 4 * 7 + 4 * 7 + 2 * 5
    assert not any(part in name for name in names for part in ("embed", "lm_head", "norm", "bias", "merger"))
    assert not any(name.startswith("action_expert.action_") for name in names)


def test_muon_trains_and_resumes(processor, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "optimizer": "muon"}
    whole = make_trainer(processor, tmp_path, **options)
    whole.train()
    assert any(group["muon"] for group in whole.optimizer.param_groups)
    assert whole.state.log_history[5]["learning_rate"] < whole.state.log_history[0]["learning_rate"]
    resumed = make_trainer(processor, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(resumed, "loss")[-3:] == history(whole, "loss")[-3:]


def test_losses_fall_and_are_logged_apart(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=30, learning_rate=3e-3)
    trainer.train()
    for name in ("flow_loss", "text_loss"):
        values = history(trainer, name)
        assert len(values) == 30 and np.mean(values[-5:]) < np.mean(values[:5])
    # no discrete action tokens in this data: their loss is absent, not zero
    assert history(trainer, "action_token_loss") == []
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["flow_loss"] + 0.01 * first["text_loss"], rel=1e-3)


def test_resuming_equals_not_stopping(processor, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(processor, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(processor, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in ("loss", "flow_loss", "text_loss"):
        assert history(resumed, name)[-3:] == history(whole, name)[-3:]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_of_another_model_is_not_resumed(processor, tmp_path):
    tiny_model(action_expert={"hidden_size": 128, "intermediate_size": 384}).save_pretrained(tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    tensors = {name: p.clone() for name, p in make_trainer(processor, tmp_path).model.state_dict().items()}
    tensors["surplus"] = tensors.pop("action_expert.norm.weight")
    tensors.pop("vlm.lm_head.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing .*norm.weight.* 1 unexpected .*surplus"):
        make_trainer(processor, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_accumulation_equals_one_large_batch(processor, tmp_path):
    """Also when micro batches hold different numbers of tokens and steps, or none of a kind."""
    one = make_trainer(processor, tmp_path / "one", per_device_train_batch_size=8, max_steps=1)
    many = make_trainer(
        processor, tmp_path / "many", per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=1
    )
    gradients = []
    for trainer in (one, many):
        collected = {}
        for name, p in trainer.model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name, c=collected: c.update({name: p.grad.clone()}))
        trainer.args.max_grad_norm = 0
        trainer.train()
        gradients.append(collected)
    assert history(one, "flow_loss") == pytest.approx(history(many, "flow_loss"), rel=1e-4)
    assert history(one, "text_loss") == pytest.approx(history(many, "text_loss"), rel=1e-4)
    assert history(one, "loss") == pytest.approx(history(many, "loss"), rel=1e-3)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_run_without_multimodal_samples(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, mixture=CoTrainingMixture(Samples("action"), length=64), max_steps=2)
    trainer.train()
    assert len(history(trainer, "flow_loss")) == 2 and history(trainer, "text_loss") == []


def test_evaluation_repeats_and_does_not_disturb(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path)
    data = CoTrainingMixture(Samples("action"), Samples("multimodal"), multimodal_fraction=0.25, length=12, seed=7)
    first, second = (trainer.evaluate(data) for _ in range(2))
    assert first["eval_flow_loss"] == second["eval_flow_loss"] > 0
    assert first["eval_text_loss"] == second["eval_text_loss"] > 0
    assert first["eval_loss"] == pytest.approx(first["eval_flow_loss"] + 0.01 * first["eval_text_loss"], rel=0.1)


def test_flow_draws_differ_by_step_and_micro_batch(processor, tmp_path):
    trainer, actions = make_trainer(processor, tmp_path), torch.zeros(3, 8, 4)
    trainer.model.train()
    first = trainer._draw_flow(actions)
    trainer._micro_batch = 1
    second = trainer._draw_flow(actions)
    assert not torch.equal(first["noise"], second["noise"]) and not torch.equal(first["time"], second["time"])
    trainer._micro_batch = 0
    assert torch.equal(trainer._draw_flow(actions)["noise"], first["noise"])
    trainer.state.global_step = 1
    assert not torch.equal(trainer._draw_flow(actions)["noise"], first["noise"])


def test_flow_times_say_nothing_about_the_noise(processor, tmp_path):
    """Both of one stream, the time of a step's first sample would give away how large two of its noise values are."""
    trainer = make_trainer(processor, tmp_path, per_device_train_batch_size=1)
    trainer.model.train()
    rows = []
    for step in range(300):
        trainer.state.global_step = step
        draws = trainer._draw_flow(torch.zeros(1, 8, 4))
        rows.append(torch.cat([draws["time"], draws["noise"].flatten().square()]))
    assert torch.corrcoef(torch.stack(rows).T)[0, 1:].abs().max() < 0.3


def test_the_two_token_losses_are_told_apart(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path)
    trainer.model = tiny_model()
    batch = tiny_batch(action_tokens=5) | {k: v for k, v in tiny_actions(2).items() if "action" in k}
    counts = trainer.count_targets(batch)
    assert counts.tolist() == [batch["action_mask"].sum(), 10, 2]
    assert trainer.model(**batch).loss_counts.tolist() == counts.tolist()
    assert (batch["labels"] >= ACTION_START).sum() == 10


def test_a_loss_that_is_not_finite_stops_the_run(processor, tmp_path):
    """And leaves the batch behind, with the noise and the times, so that the model can be asked again."""
    trainer = make_trainer(processor, tmp_path)
    with torch.no_grad():
        trainer.model.action_expert.action_out_proj.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="step 0.*flow.*nonfinite-step-0-rank-0.safetensors"):
        trainer.train()
    batch = load_file(tmp_path / "nonfinite-step-0-rank-0.safetensors")
    assert not trainer.model(**batch).flow_loss.isfinite()
    trainer.model.action_expert.action_out_proj.weight.data.fill_(0.0)
    assert trainer.model(**batch).flow_loss.isfinite()


def test_activation_checkpointing_trains_the_same(processor, tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            processor, tmp_path / str(checkpointing), max_steps=2, gradient_checkpointing=checkpointing
        )
        trainer.train()
        runs.append(history(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_every_checkpoint_is_a_complete_repository(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("config.json", "model.safetensors", "modeling_wallvla.py", "processing_wallvla.py", "tokenizer.json"):
        assert (checkpoint / name).exists(), name
    register_auto_classes()
    model, reloaded = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    batch = reloaded.encode([Samples("action")[0]])
    assert isinstance(reloaded.embodiments[EMBODIMENT], Embodiment)
    expected = trainer.model.eval()(**batch, noise=torch.zeros(1, 8, 4), time=torch.tensor([0.3])).loss
    assert torch.equal(model(**batch, noise=torch.zeros(1, 8, 4), time=torch.tensor([0.3])).loss, expected)
