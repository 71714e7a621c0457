"""Several gloo ranks give what one process gives: FSDP2 by hand, and through `accelerate` and the trainer."""

import shutil

import pytest
import torch
from ranks import run
from test_action_experts import each_pair
from tiny import SHARDING_CASES, loss_and_gradients, tiny_actions, tiny_batch, tiny_batch_of, tiny_model, tiny_model_of
from transformers import AutoModel

from wallvla import register_auto_classes
from wallvla.trainers.distributed import complete_batch


def test_sharded_gradients_equal_those_of_one_process(tmp_path):
    run(2, "layers", tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for (labels, checkpointing), (loss, gradients) in zip(SHARDING_CASES, results, strict=True):
        expected_loss, expected = loss_and_gradients(tiny_model().train(), labels)
        assert loss == pytest.approx(expected_loss.item(), abs=1e-6), (labels, checkpointing)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("without", ["images", "labels", "actions", "states"])
def test_a_completed_batch_runs_every_module_and_changes_nothing(without):
    """All parameters get a gradient, which is zero where the batch said nothing, and the losses stay what they are."""
    projected = {"proprioception": "projected", "state_token_id": 499, "state_dim": 4} if without == "states" else {}
    model = tiny_model(**projected).train()
    batch = tiny_batch(images=(0, 0) if without == "images" else (1, 2), action_tokens=5, padding=1)
    batch |= {} if without == "actions" else tiny_actions(2)
    if without == "images":
        batch = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_grid_thw")}
    if without == "labels":
        batch.pop("labels")
    complete = complete_batch(batch, model)
    if without == "actions":
        complete |= {"noise": torch.ones(2, 8, 4), "time": torch.ones(2) / 2}
    results = []
    for inputs in (batch, complete):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (completed, gradients) = results
    torch.testing.assert_close(completed.loss, plain.loss, atol=1e-6, rtol=1e-6)
    assert completed.loss_counts.tolist() == plain.loss_counts.tolist()
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    skipped = [name for name, gradient in expected.items() if gradient is None]
    assert len(skipped) > 0 or without == "labels"  # without labels the tied LM head is trained as an embedding
    for name, gradient in gradients.items():
        wanted = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@each_pair
def test_a_completed_batch_of_every_kind(kind, vlm):
    """A rank that drew one question in words (Florence-2: an observation that nothing is learned from)."""
    model, batch = tiny_model_of(kind, vlm).train(), tiny_batch_of(vlm, images=(1,))
    for name in ("states", "state_mask", "domain_ids"):
        del batch[name]
    if vlm != "florence2":
        is_image = batch["input_ids"] == model.vlm.config.image_token_id
        batch = {
            "input_ids": batch["input_ids"][~is_image][None],
            "attention_mask": batch["attention_mask"][~is_image][None],
        }
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 0] = -100  # nothing comes before it
    # The dropout of the stock encoder and of an expert would hide an equality
    model.eval()
    complete = complete_batch(batch, model) | {"noise": torch.ones(1, 8, 4), "time": torch.ones(1) / 2}
    found = model(**complete)
    found.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert found.loss_counts[0] == 0 and found.flow_loss == 0
    if vlm == "florence2":
        assert not any(p.grad.any() for p in model.parameters())
        return
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model(**batch)
    plain.loss.backward()
    torch.testing.assert_close(found.loss, plain.loss, atol=1e-6, rtol=1e-6)
    for name, p in model.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradients[name], wanted, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


# ---- through accelerate and the trainer ----------------------------------------------------------------------------

FOUR = {"max_steps": 4, "optimizer": "muon", "learning_rate": 1e-3}


def result(folder, name: str = "result") -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_same_run(found: dict, expected: dict, first: int = 1) -> None:
    """The same losses from step `first` on, and the same weights: four digits after four steps of 1e-3 each."""
    losses = [log for log in expected["losses"] if log["step"] >= first]
    assert len(losses) == 5 - first
    for ours, theirs in zip(found["losses"][-len(losses) :], losses, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=2e-5), (key, theirs["step"])
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], weight, atol=1e-4, rtol=0, msg=lambda text, n=name: n + text
        )


def test_a_rank_may_have_no_action_no_question_and_no_picture(tmp_path):
    """Two ranks of one sample twice, where rank 0 draws actions only and rank 1 questions only, some without a
    picture, and one process of four samples: no rank waits for ever, and all means are over the elements of a step,
    wherever they fall. The same for one sample four times in one process."""
    for name in ("one", "accumulated", "two"):
        (tmp_path / name).mkdir()
    options = FOUR | {"data": "separate"}
    run(1, "train", tmp_path / "one", per_device_train_batch_size=4, **options)
    accumulation = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run(1, "train", tmp_path / "accumulated", **accumulation, **options)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "fsdp": "SHARDED_STATE_DICT"}
    run(2, "train", tmp_path / "two", **split, **options)
    expected = result(tmp_path / "one")
    assert all({"flow_loss", "text_loss"} <= log.keys() for log in expected["losses"])
    assert_same_run(result(tmp_path / "accumulated"), expected)
    assert_same_run(result(tmp_path / "two"), expected)


@pytest.mark.parametrize("kind", ["soft_prompt", "dit"])
def test_ranks_of_other_kinds(kind, tmp_path):
    """As above with parameters of domains, states in the expert, and an LM head that only rank 1 needs."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = FOUR | {"data": "separate", "kind": kind}
    run(1, "train", tmp_path / "one", per_device_train_batch_size=4, **options)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "fsdp": "SHARDED_STATE_DICT"}
    run(2, "train", tmp_path / "two", **split, **options)
    assert_same_run(result(tmp_path / "two"), result(tmp_path / "one"))


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", pytest.param("FULL_STATE_DICT", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(kind, tmp_path):
    """Four ranks stop after two steps; two ranks go on: optimizer, schedule, data and noise. And one process."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    for name in ("one", "four", "two"):
        (tmp_path / name).mkdir()
    run(1, "train", tmp_path / "one", per_device_train_batch_size=4, **FOUR)
    run(4, "train", tmp_path / "four", per_device_train_batch_size=1, fsdp=kind, **saving, **FOUR)
    shutil.copytree(tmp_path / "four" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    run(2, "train", tmp_path / "two", resume=True, per_device_train_batch_size=2, fsdp=kind, **FOUR)
    expected = result(tmp_path / "one")
    assert_same_run(result(tmp_path / "four"), expected)
    assert_same_run(result(tmp_path / "two"), expected, first=3)
    # what a run ends with is a whole model, however its checkpoints are saved
    weights = result(tmp_path / "two")["weights"]
    register_auto_classes()
    final = AutoModel.from_pretrained(tmp_path / "two" / "final")
    for name, value in final.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert (tmp_path / "four" / "checkpoint-2" / "model.safetensors").is_file() == (kind == "FULL_STATE_DICT")
