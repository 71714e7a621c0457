"""Adapting to a new domain: who learns when and how fast, adapters beside tables of domains, the command, the plot."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import PeftModel
from safetensors.torch import load_file
from test_train_mixture import SIZE, write_dataset
from test_train_mixture import train as train_command
from test_trainer import STATISTICS, history, make_trainer
from tiny import TINY_EXPERTS, tiny_model_of
from transformers import TrainerCallback, set_seed

from wallvla import cli
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.evaluation.plots import plot_domains, principal_components
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor, embodiment
from wallvla.trainers.adapters import add_adapters, heads_of, linear_layers
from wallvla.trainers.parameter_groups import DOMAIN_PARTS, adapt_in_two_steps, joint_share, parts_of


DOMAINS = ["first", "second", "third"]
TABLES = {"prompts", "domains"}


@pytest.fixture(scope="module")
def processor():
    """One robot, of the third domain."""
    config = QuickstartConfig(image_size=SIZE)
    robot = replace(embodiment(config, STATISTICS), domain=2)
    return build_processor(config, robot, proprioception="expert", state_dim=4)


def soft_prompt_model(processor, conditioning: str = "soft_prompt") -> WallVLAForConditionalGeneration:
    set_seed(0)
    return build_model(
        processor,
        action_expert=TINY_EXPERTS["soft_prompt"] | {"conditioning": conditioning, "dropout": 0.0},
        prediction="action",
        sampler="renoise",
        time_sampler="stratified",
        domains=DOMAINS,
        proprioception="expert",
        state_dim=4,
    )


class RateRecorder(TrainerCallback):
    """The rate of each part in every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append({group["part"]: group["lr"] for group in optimizer.param_groups})


def adapting_trainer(processor, folder, **options):
    defaults = {"weight_decay": 0.1, "adaptation_steps": 3, "adaptation_warmup_steps": 2, "max_steps": 6}
    return make_trainer(processor, folder, model=soft_prompt_model(processor), **defaults | options)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved_parts(model, before: dict[str, torch.Tensor]) -> set[str]:
    part_of = parts_of(model)
    return {part_of[name] for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


# --- the schedule


def test_rates_of_every_step(processor, tmp_path):
    """Linear warm-up and decay for the domains; times the share for the rest, at the rate of each part."""
    trainer = adapting_trainer(
        processor, tmp_path, learning_rate=1e-3, prompts_learning_rate=1e-4, vlm_learning_rate=2e-4,
        lr_scheduler_type="linear", warmup_steps=2,
    )  # fmt: skip
    recorder = RateRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    peaks = {"prompts": 1e-4, "domains": 1e-3, "vlm": 2e-4, "vision": 1e-3, "action_expert": 1e-3}
    usual = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]
    share = [0, 0, 0, 1 / 3, 2 / 3, 1]
    for step, rates in enumerate(recorder.rates):
        expected = {p: peak * usual[step] * (1 if p in TABLES else share[step]) for p, peak in peaks.items()}
        assert rates == pytest.approx(expected, rel=1e-12, abs=0)
    assert len(recorder.rates) == 6
    # The rate that is logged is that of the domains
    assert history(trainer, "learning_rate") == pytest.approx([peaks["domains"] * each for each in usual])


def test_share_in_closed_form():
    """The paper's numbers: 0 for 1,000 steps, 1 after 2,000, straight between them; without warm-up a step."""
    shares = np.array([joint_share(step, 1000, 1000) for step in range(3000)])
    assert not shares[:1000].any() and (shares[2000:] == 1).all()
    np.testing.assert_allclose(np.diff(shares[999:2001]), 1 / 1001, atol=1e-12)
    assert [joint_share(step, 2, 0) for step in range(4)] == [0, 0, 1, 1]
    assert {joint_share(step, 0, 0) for step in range(4)} == {1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_the_domain_alone(processor, tmp_path, optimizer):
    """Everything else stays as it was, to the bit and in spite of weight decay; so do the rows of other domains."""
    trainer = adapting_trainer(processor, tmp_path, max_steps=4, optimizer=optimizer, lr_scheduler_type="constant")
    before, model, after = weights(trainer.model), trainer.model, []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after.append((moved_parts(model, before), weights(model)))

    trainer.add_callback(Snapshot())
    trainer.train()
    assert [parts for parts, _ in after[:3]] == [TABLES] * 3
    assert after[3][0] == TABLES | {"vision", "vlm", "action_expert"}
    part_of = parts_of(model)
    for name, value in after[3][1].items():
        if part_of[name] in DOMAIN_PARTS:
            assert torch.equal(value[:2], before[name][:2]) and not torch.equal(value[2], before[name][2]), name


@pytest.mark.parametrize("stop", [2, 4])
def test_resuming_in_either_phase_equals_not_stopping(processor, tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": stop}
    whole = adapting_trainer(processor, tmp_path / "whole", **options)
    whole.train()
    resumed = adapting_trainer(processor, tmp_path / "resumed", **options)
    recorder = RateRecorder()
    resumed.add_callback(recorder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert len(recorder.rates) == 6 - stop
    if stop == 2:
        assert recorder.rates[0]["vlm"] == 0 < recorder.rates[1]["vlm"]
    assert history(resumed, "loss")[-(6 - stop) :] == history(whole, "loss")[-(6 - stop) :]
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_two_steps_that_cannot_be(processor, tmp_path):
    with pytest.raises(ValueError, match="adaptation_steps is 1, but no parameters of domains"):
        model = build_model(processor, proprioception="expert", state_dim=4)
        make_trainer(processor, tmp_path, model=model, adaptation_steps=1)
    with pytest.raises(ValueError, match="freeze neither domains nor prompts"):
        adapting_trainer(processor, tmp_path, freeze=["domains", "prompts"])
    with pytest.raises(ValueError, match="makes a ReduceLROnPlateau: use linear"):
        optimizer = torch.optim.SGD([torch.zeros(1)])
        adapt_in_two_steps(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), optimizer, 1, 1)
    with pytest.raises(ValueError, match="adaptation_steps is -1"):
        adapting_trainer(processor, tmp_path, adaptation_steps=-1)


def test_a_loss_that_the_model_does_not_have_is_refused_before_the_run(processor, tmp_path):
    """A clean-action predictor has no velocity loss; saving its config would fail, and that is hours later."""
    with pytest.raises(StrictDataclassClassValidationError, match='use loss_space "action"'):
        make_trainer(processor, tmp_path, model=soft_prompt_model(processor), loss_space="velocity")


def test_a_domain_that_the_model_lacks(processor, tmp_path):
    """Before training, by name; on a device it would be an assertion of a kernel."""
    robot = replace(processor.embodiments[EMBODIMENT], domain=3)
    other = build_processor(QuickstartConfig(image_size=SIZE), robot, proprioception="expert", state_dim=4)
    with pytest.raises(ValueError, match="metaworld_sawyer': 3.* the model has 3: first, second, third"):
        make_trainer(other, tmp_path, model=soft_prompt_model(other))


# --- parts


@pytest.mark.parametrize(
    "kind, expert, sizes",
    [
        ("soft_prompt", {}, {"prompts": 1, "domains": 4}),
        ("soft_prompt", {"conditioning": "hpt"}, {"prompts": 1, "domains": 8}),
        ("soft_prompt", {"conditioning": "none"}, {"domains": 4}),
        ("dit", {}, {"heads": 8 + 4}),
        ("dit", {"action_projection": "concatenated"}, {"domains": 4, "heads": 4 + 4}),
        ("dit", {"action_projection": "per_domain"}, {"domains": 8, "heads": 4}),
    ],
)
def test_parts_are_found_by_what_modules_are(kind, expert, sizes):
    model = tiny_model_of(kind, action_expert=expert)
    found = Counter(parts_of(model).values())
    assert {part: found[part] for part in ("heads", "domains", "prompts") if found[part]} == sizes
    # Every fp32 parameter is one of a head or a table, and is trained whole beside adapters
    whole = heads_of(model)
    for name, part in parts_of(model).items():
        assert (part in ("heads", *DOMAIN_PARTS)) == any(name.startswith(f"{head}.") for head in whole), name
    adapted = add_adapters(model, rank=2)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    part_of = parts_of(adapted)
    assert {name for name in trained if "lora_" not in name} == {n for n in part_of if "modules_to_save" in n}
    assert Counter(part_of[name] for name in trained if "lora_" not in name) == Counter(sizes)


@pytest.mark.parametrize("vlm", ["florence2", "internvl", "qwen3_5"])
def test_vision_of_every_vlm(vlm):
    model = tiny_model_of("soft_prompt", vlm)
    part_of = parts_of(model)
    of_vision = {name for name, part in part_of.items() if part == "vision"}
    assert of_vision and all("visual" in n or "vision" in n or "projector" in n for n in of_vision)
    layers = linear_layers(model, ["vision", "vlm", "action_expert"])
    assert not any("lm_head" in name for name in layers)
    assert {part_of[f"{name}.weight"] for name in layers} == {"vision", "vlm", "action_expert"}


# --- adapters


def test_adapters_change_adapters_and_tables_alone(processor, tmp_path):
    """One step of LoRA; what is merged is a plain checkpoint that acts as the unmerged model does."""
    base = soft_prompt_model(processor)
    before = weights(base)
    everywhere = ["vision", "vlm", "action_expert"]
    adapted = add_adapters(base, rank=2, alpha=4, experts=everywhere)
    trainer = make_trainer(processor, tmp_path, model=adapted, max_steps=2, weight_decay=0.1, learning_rate=1e-2)
    unmerged = weights(adapted)
    trainer.train()
    moved = {name for name, value in adapted.named_parameters() if not torch.equal(value, unmerged[name])}
    expected = {n for n in unmerged if "lora_" in n or "modules_to_save" in n}
    assert moved == expected
    adapted.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {
        f"base_model.model.action_expert.{name}"
        for name in ("action_encoder.weight", "action_encoder.bias", "action_decoder.weight", "action_decoder.bias")
    } | {"base_model.model.action_expert.soft_prompts.tokens"}

    robot = {
        "images": {"front": np.zeros((SIZE, SIZE, 3), np.uint8)},
        "instruction": "press",
        "embodiment": EMBODIMENT,
    }
    batch = processor.encode([robot | {"state": np.zeros(4)}])
    noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    adapted.eval()
    acted = adapted.sample_actions(**batch, noise=noise)
    fresh = PeftModel.from_pretrained(soft_prompt_model(processor), tmp_path / "adapter").eval()
    assert torch.equal(fresh.sample_actions(**batch, noise=noise), acted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = WallVLAForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged.sample_actions(**batch, noise=noise), acted, atol=1e-5, rtol=1e-5)
    part_of, layers = parts_of(merged), linear_layers(merged, everywhere)
    for name, value in merged.named_parameters():
        same = torch.equal(value, before[name])
        if part_of[name] in DOMAIN_PARTS:  # the other robots keep their rows
            assert not same and torch.equal(value[:2], before[name][:2])
        else:
            assert same == (name.removesuffix(".weight") not in layers), name


def test_adapters_of_x_vla_at_full_size():
    """Rank 8 on every linear layer; the paper counts about 9M, a percent, with what a domain has of its own."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.x_vla())
        whole = model.num_parameters()
        adapted = add_adapters(model, rank=8, alpha=16, experts=["vision", "vlm", "action_expert"])
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = sum(size for name, size in trained.items() if "lora_" in name)
    tables = sum(trained.values()) - adapters
    assert (whole, adapters, tables) == (879_482_456, 8_052_736, 3_840_600)
    assert tables == 30 * (72 * 1024 + 1024 + 1024 * 20 + 20 + 32 * 1024)
    assert (adapters + tables // 30) / whole == pytest.approx(0.0093, abs=5e-5)


# --- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A checkpoint with three domains, a dataset, and a recipe with a new robot."""
    folder = tmp_path_factory.mktemp("domains")
    soft_prompt_model(processor).save_pretrained(folder / "hub")
    processor.save_pretrained(folder / "hub")
    write_dataset(folder / "data", 2, "press the button")
    robot = embodiment(QuickstartConfig(image_size=SIZE), STATISTICS)
    (folder / "robot.json").write_text(json.dumps(robot.to_dict()))
    (folder / "mixture.yaml").write_text(
        "robots: {newcomer: robot.json}\nactions:\n"
        f"  - {{dataset: data, embodiment: newcomer}}\n  - {{dataset: data, embodiment: {EMBODIMENT}, name: again}}\n"
    )
    return folder


QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-3}


def adapt(folder, output, **options) -> tuple[WallVLAForConditionalGeneration, WallVLAProcessor]:
    words = ["train", "--model", folder / "hub", "--output_dir", output, "--use_cpu", "True", "--bf16", "False"]
    words += ["--report_to", "none", "--disable_tqdm", "True", "--dataloader_pin_memory", "False"]
    words += [word for name, value in (QUICK | options).items() for word in (f"--{name}", value)]
    cli.main(list(map(str, words)))
    return WallVLAForConditionalGeneration.from_pretrained(output), WallVLAProcessor.from_pretrained(output)


def test_one_command_adds_a_robot(folder, tmp_path):
    options = {"dataset": folder / "data", "embodiment": "visitor", "embodiment_file": folder / "robot.json"}
    options |= {"add_domain": "fourth:copy:second", "adaptation_steps": 2}
    model, processor = adapt(folder, tmp_path / "run", **options)
    assert list(model.config.domains) == [*DOMAINS, "fourth"]
    assert processor.embodiments["visitor"].domain == 3 and processor.embodiments[EMBODIMENT].domain == 2
    before = WallVLAForConditionalGeneration.from_pretrained(folder / "hub")
    ours, theirs = dict(model.named_parameters()), dict(before.named_parameters())
    part_of = parts_of(model)
    for name, value in theirs.items():
        if part_of[name] in DOMAIN_PARTS:
            assert torch.equal(ours[name][:3], value)
            assert 0 < (ours[name][3] - value[1]).abs().max() < 0.01  # it started there, and has learned
        else:
            assert torch.equal(ours[name], value), name


def test_the_example_runs(folder, tmp_path):
    """Its options are real ones; steps and sizes are made small, and float32 where the CPU has nothing else."""
    example = Path(cli.__file__).parent / "examples" / "train_adapt_domain.yaml"
    options = {"config": example, "dataset": folder / "data", "embodiment_file": folder / "robot.json"}
    options |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    model, processor = adapt(folder, tmp_path / "run", **options)
    assert list(model.config.domains)[3] == "my_robot" and processor.embodiments["my_robot"].domain == 3


def test_a_mixture_gives_the_domain_to_the_robot_of_its_name(folder, tmp_path):
    model, processor = adapt(folder, tmp_path / "run", mixture=folder / "mixture.yaml", add_domain="newcomer")
    assert list(model.config.domains)[3] == "newcomer" and processor.embodiments["newcomer"].domain == 3


def test_an_adapted_run_goes_on(folder, tmp_path):
    """The domain is added again before the checkpoint is loaded, adapters too."""
    options = {"mixture": folder / "mixture.yaml", "add_domain": "newcomer:random", "save_strategy": "steps"}
    options |= {"save_steps": 2, "adapter_rank": 1, "adaptation_steps": 1, "adaptation_warmup_steps": 1}
    options |= {"lr_scheduler_type": "constant"}
    adapt(folder, tmp_path / "run", **options)
    resumed, _ = adapt(folder, tmp_path / "run", **options | {"max_steps": 4})
    whole, _ = adapt(folder, tmp_path / "whole", **options | {"max_steps": 4})
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_domains_that_cannot_be_added(folder, tmp_path, capsys):
    for domain, message in (
        ("first", "Found embodiment 'first'. Known: "),
        ("newcomer:copy:nobody", "Found init 'copy:nobody'"),
        ("stranger", "Found embodiment 'stranger'. Known: "),
    ):
        with pytest.raises(SystemExit, match="2"):
            train_command(folder, tmp_path / "run", max_steps=1, add_domain=domain)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        adapt(folder, tmp_path / "run", dataset=folder / "data", add_domain="first")
    assert "There is a domain 'first' already" in capsys.readouterr().err


# --- the plot


def test_principal_components_against_the_covariance():
    points = np.random.default_rng(0).normal(size=(12, 5)) * [3, 2, 1, 0.5, 0.1]
    found, shares = principal_components(points)
    values, vectors = np.linalg.eigh(np.cov(points.T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum(), rtol=1e-10)
    expected = (points - points.mean(axis=0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-10)


def test_domains_are_drawn(folder, tmp_path, capsys):
    cli.main(["plot-domains", str(folder / "hub"), "--output", str(tmp_path / "domains.png")])
    assert (tmp_path / "domains.png").stat().st_size > 1000
    assert "first, second, third" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least two domains"):
        plot_domains({"alone": np.zeros((3, 4))}, tmp_path / "none.png")
