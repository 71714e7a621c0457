"""`wallvla train`: adapters, parts of the model with their own rate or none, options from YAML, and bad input."""

import json
import shutil
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_train_mixture import folder, train  # noqa: F401
from test_trainer import make_trainer
from tiny import tiny_actions, tiny_batch, tiny_model

from wallvla import cli
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.trainers.adapters import add_adapters
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.co_training_trainer import CoTrainingTrainer
from wallvla.trainers.fine_tuning import FineTuningArguments, prepare_mixture
from wallvla.trainers.parameter_groups import PARTS, freeze, parts_of


HEADS = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2}


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_change_adapters_and_heads_alone(folder, tmp_path, dora):  # noqa: F811
    """What `wallvla train` writes: merged = unmerged output, and nothing else has moved."""
    output = tmp_path / "run"
    train(folder, output, adapter_rank=2, adapter_dora=dora, **QUICK)
    before, merged = (
        WallVLAForConditionalGeneration.from_pretrained(path).eval() for path in (folder / "hub", output)
    )
    base = WallVLAForConditionalGeneration.from_pretrained(folder / "hub")
    unmerged = PeftModel.from_pretrained(base, output / "adapter").eval()
    processor = WallVLAProcessor.from_pretrained(output)
    assert set(processor.embodiments) == {"metaworld_sawyer", "visitor"}

    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or any(head in name for head in HEADS) for name in saved)
    assert {head for head in HEADS if any(head in name for name in saved)} == set(HEADS)
    assert sum(tensor.numel() for tensor in saved.values()) < 0.2 * base.num_parameters()

    moved = {
        name
        for (name, ours), theirs in zip(merged.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    assert moved and all(
        any(head in name for head in HEADS) or (".layers." in name and name.endswith("_proj.weight")) for name in moved
    )
    assert {parts_of(merged)[name] for name in moved} == {"vlm", "action_expert", "heads"}

    batch = processor.encode([_sample("metaworld_sawyer")])
    flow = {"noise": torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)), "time": torch.tensor([0.3])}
    outputs = [model(**batch, **flow).action_prediction for model in (before, merged, unmerged)]
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def _sample(embodiment: str) -> dict:
    rng = torch.Generator().manual_seed(0)
    return {
        "images": {"front": torch.randint(0, 256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()},
        "instruction": "press the button",
        "state": torch.randn(4, generator=rng).numpy(),
        "embodiment": embodiment,
        "actions": torch.randn(8, 4, generator=rng).numpy(),
    }


def test_adapters_in_bf16_keep_what_is_trained_in_float32(folder, tmp_path):  # noqa: F811
    """Frozen weights need no float32 copy; adapters and heads do, and the run still learns."""
    train(folder, tmp_path / "run", adapter_rank=2, **QUICK | {"bf16": True})
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    merged = load_file(tmp_path / "run" / "model.safetensors")
    kinds = {merged[name].dtype for name in merged if any(head in name for head in HEADS)}
    assert kinds == {torch.float32}
    assert merged["action_expert.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def test_out_of_memory_says_what_is_needed(folder, tmp_path, monkeypatch):  # noqa: F811
    def fail(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CoTrainingTrainer, "train", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*activations.*total.*adapter_rank"):
        train(folder, tmp_path / "run", **QUICK)
    with pytest.raises(torch.OutOfMemoryError, match="(?s)CUDA out of memory.*no estimate of 'adagrad'"):
        train(folder, tmp_path / "run", optim="adagrad", **QUICK)


def test_adapters_on_one_expert():
    model = add_adapters(tiny_model(), rank=2, experts=["action_expert"], modules_to_save=[])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2 and all("action_expert.layers" in name for name in trained)
    for options, message in (
        ({"experts": ["wheels"]}, "no experts .'wheels'"),
        ({"rank": 0}, "rank of the adapters is 0"),
        ({"modules_to_save": ["action_out"]}, "no modules .'action_out'"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapters(tiny_model(), **{"rank": 2} | options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_have_rates_of_their_own_or_none(folder, tmp_path, optimizer):  # noqa: F811
    """A rate of zero and a frozen part move nothing; the others move."""
    processor = WallVLAProcessor.from_pretrained(folder / "hub")
    trainer = make_trainer(
        processor,
        tmp_path,
        max_steps=1,
        optimizer=optimizer,
        weight_decay=0.1,
        freeze=["vision"],
        vlm_learning_rate=0.0,
        heads_learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainer.model.named_parameters()}
    part_of = parts_of(trainer.model)
    assert {part_of[name] for name, change in moved.items() if change == 0} == {"vision", "vlm"}
    assert {part_of[name] for name, change in moved.items() if change > 0} == {"action_expert", "heads"}
    rates = {part_of[n]: g["lr"] for g in trainer.optimizer.param_groups for n, p in _named(trainer.model, g)}
    assert rates == {"vlm": 0.0, "action_expert": 1e-3, "heads": 1e-2}


def _named(model, group: dict) -> list:
    return [(name, p) for name, p in model.named_parameters() if any(p is q for q in group["params"])]


def test_every_parameter_has_a_part():
    sizes = Counter(parts_of(tiny_model()).values())
    assert sizes["heads"] == 4 and sizes["domains"] == sizes["prompts"] == 0
    assert min(sizes[part] for part in ("vision", "vlm", "action_expert")) > 0
    adapted = parts_of(add_adapters(tiny_model(), rank=1))
    assert adapted["base_model.model.action_expert.action_in_proj.modules_to_save.default.weight"] == "heads"
    with pytest.raises(ValueError, match="no parts .'wheels'"):
        freeze(tiny_model(), ["wheels"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(tiny_model(), PARTS)


def test_options_from_yaml(folder, tmp_path, capsys):  # noqa: F811
    """Every field of both dataclasses; the command line wins; a typo is answered by the nearest name."""
    (tmp_path / "run.yaml").write_text(
        "strategy: stop_gradient\nfreeze: [vision]\nmax_steps: 7\nloss_space: velocity\n"
    )
    train(folder, tmp_path / "run", config=tmp_path / "run.yaml", **QUICK)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss_space"] == "velocity"
    before, after = (load_file(path / "model.safetensors") for path in (folder / "hub", tmp_path / "run"))
    part_of = parts_of(WallVLAForConditionalGeneration.from_pretrained(tmp_path / "run"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and {part_of[name] for name in same} == {"vision"}
    (tmp_path / "typo.yaml").write_text("stratgy: flow_only\n")
    with pytest.raises(SystemExit, match="2"):
        train(folder, tmp_path / "run", config=tmp_path / "typo.yaml")
    assert "unknown option stratgy; did you mean strategy?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train(folder, tmp_path / "run", strategy="flow_first")
    assert "invalid choice: 'flow_first'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_dora": True, "adapter_alpha": 8}, "adapter_alpha, adapter_dora without adapter_rank"),
        ({"adapter_experts": ["vision"]}, "adapter_experts without adapter_rank"),
        ({"multimodal_fraction": 0.3}, "multimodal_fraction without multimodal"),
        ({"mixture": "m.yaml", "dataset": None, "multimodal_fraction": 0.3}, "multimodal_fraction beside mixture"),
    ],
)
def test_options_of_no_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FineTuningArguments(**{"model": "none", "dataset": "none"} | options)
    FineTuningArguments(model="none", dataset="none", adapter_rank=2, adapter_dora=True, adapter_experts=["vision"])
    FineTuningArguments(model="none", dataset="none", multimodal="q.parquet", multimodal_fraction=0.3)


def test_cameras_are_those_of_a_robot_that_is_known(folder, tmp_path):  # noqa: F811
    processor = WallVLAProcessor.from_pretrained(folder / "hub")
    args = CoTrainingConfig(str(tmp_path / "run"), max_steps=1, use_cpu=True, bf16=False)
    for more, where in (
        ({"embodiment": "metaworld_sawyer"}, "the checkpoint"),
        ({"embodiment_file": str(folder / "robot.json")}, "robot.json"),
    ):
        options = FineTuningArguments(model="none", dataset=str(folder / "first"), cameras=["front"], **more)
        with pytest.raises(ValueError, match=f"cameras .'front'., but .*{where} says"):
            prepare_mixture(options, args, processor)


def test_a_dataset_of_another_robot_is_refused(folder, tmp_path, capsys):  # noqa: F811
    """Before training, and with what to do."""
    shutil.copytree(folder / "hub", tmp_path / "hub")
    file = tmp_path / "hub" / "processor_config.json"
    values = json.loads(file.read_text())
    robot = values["embodiments"]["metaworld_sawyer"]
    robot["action_layout"] = [["native", 3]]
    robot["statistics"]["action"] = {name: numbers[:3] for name, numbers in robot["statistics"]["action"].items()}
    file.write_text(json.dumps(values))
    arguments = ["train", "--model", str(tmp_path / "hub"), "--dataset", str(folder / "first"), "--use_cpu"]
    arguments += ["--bf16", "False", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--report_to", "none"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    message = capsys.readouterr().err
    assert "has 4 action numbers per frame; the embodiment's action_layout has 3" in message
    assert "--embodiment_file" in message


def test_a_misspelt_robot_and_a_used_folder_are_told(folder, tmp_path, caplog):  # noqa: F811
    """Both are allowed: a new name is a new robot, and a run goes on. Neither happens without a word."""
    arguments = ["train", "--model", folder / "hub", "--dataset", folder / "first", "--embodiment", "metaworld_swayer"]
    arguments += ["--output_dir", tmp_path / "run", "--max_steps", "1", "--use_cpu", "--bf16", "False"]
    arguments = list(map(str, [*arguments, "--report_to", "none"]))
    cli.main(arguments)
    assert "metaworld_swayer is a new robot" in caplog.text and "the checkpoint knows metaworld_sawyer" in caplog.text
    assert "Going on" not in caplog.text
    cli.main(arguments)
    assert f"Going on from {tmp_path / 'run' / 'checkpoint-1'}" in caplog.text


def test_actions_alone_and_questions_alone_are_not_biased(folder, tmp_path):  # noqa: F811
    """A micro batch without a kind of sample adds exactly nothing to that kind's loss."""
    processor = WallVLAProcessor.from_pretrained(folder / "hub")
    trainer = make_trainer(processor, tmp_path, gradient_accumulation_steps=2)
    trainer.model = trainer.model_wrapped = tiny_model()
    actions = {k: v for k, v in tiny_actions(2).items() if k in ("actions", "action_mask")}
    acting = tiny_batch(seed=1) | actions
    talking = tiny_batch(action_tokens=3, seed=2)
    talking["labels"] = talking["labels"].masked_fill(trainer.model.is_action_token(talking["labels"]), -100)
    totals = trainer._get_num_items_in_batch([acting, talking], torch.device("cpu"))
    trainer.model.train()
    together = sum(trainer.compute_loss(trainer.model, b, num_items_in_batch=totals) for b in (acting, talking))
    trainer._micro_batch = 0
    alone = [trainer.compute_loss(trainer.model, b, return_outputs=True)[1] for b in (acting, talking)]
    expected = alone[0].flow_loss + 0.01 * alone[1].text_loss
    assert together.item() == pytest.approx(expected.item(), rel=1e-6)
    assert alone[1].flow_loss is None and alone[0].text_loss is None
