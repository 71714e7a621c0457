"""The estimate of a run's memory and operations, against what is counted in real runs of tiny models."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from test_action_experts import each_pair
from tiny import tiny_config_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser, Trainer

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.estimate import GIB, EstimateArguments, Workload, estimate_training, one_sample
from wallvla.trainers.fine_tuning import FineTuningArguments, adapt, estimate_run
from wallvla.trainers.muon import MuonWithAdamW
from wallvla.trainers.parameter_groups import freeze


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {"images": 2, "image_size": 32, "text_tokens": 20, "labels": 5}


def counted_run(config, workload: Workload, bf16: bool, frozen: tuple = ()) -> tuple[int, int]:
    """Bytes that autograd keeps in a forward pass of the whole model, and operations of forward and backward."""
    model = WallVLAForConditionalGeneration(config).train()
    if frozen:
        freeze(model, frozen)
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {p.shape for p in model.parameters() if p.ndim == 2} | {p.shape[::-1] for p in model.parameters()}
    kept, total = [], 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        copy_of_weight = bf16 and tensor.dtype == torch.bfloat16 and tensor.shape in weights
        if storage.data_ptr() not in seen and not copy_of_weight:
            seen.add(storage.data_ptr())
            kept.append(tensor)
            total += storage.nbytes()
        return tensor

    sample = one_sample(config, workload)
    batch = {key: torch.cat([value] * workload.batch_size) for key, value in sample.items()}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        FlopCounterMode(display=False) as counter,
    ):
        model(**batch).loss.backward()
    return total, counter.get_total_flops()


def config() -> WallVLAConfig:
    config = WallVLAConfig.tiny(vocab_size=512)
    config.vlm_config.image_token_id = 500
    return config


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_and_operations_of_a_tiny_run(bf16):
    workload = Workload(batch_size=3, **SMALL)
    estimate = estimate_training(config(), workload, bf16=bf16, gradient_checkpointing=False)
    saved, flops = counted_run(config(), workload, bf16)
    assert estimate.activations == pytest.approx(saved, rel=0.1)
    assert estimate.flops == pytest.approx(flops, rel=0.1)


@each_pair
def test_activations_and_operations_of_every_kind(kind, vlm):
    """Dropout, prompts, resamplers, linear attention, towers in stages: counted, not computed."""
    config, workload = tiny_config_of(kind, vlm), Workload(batch_size=2, **SMALL)
    estimate = estimate_training(config, workload, bf16=False, gradient_checkpointing=False)
    saved, flops = counted_run(config, workload, False)
    assert estimate.activations == pytest.approx(saved, rel=0.1)
    # The backward pass of linear attention as torch code repeats more than its two products
    assert estimate.flops == pytest.approx(flops, rel=0.2 if vlm == "qwen3_5" else 0.1)


@each_pair
def test_bytes_of_every_kind(kind, vlm):
    config = tiny_config_of(kind, vlm)
    model = WallVLAForConditionalGeneration(config)
    optimizer = MuonWithAdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    estimate = estimate_training(config, Workload(**SMALL), optimizer="muon", bf16=False)
    assert estimate.parameters == estimate.gradients == sum(p.nbytes for p in model.parameters())
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert estimate.optimizer_state == sum(value.nbytes for value in states)


@pytest.mark.parametrize("parts", [["vision"], ["vision", "vlm"], ["action_expert"]])
def test_frozen_parts_cost_no_gradient(parts):
    """Weights stay, their gradients and states go, and so do activations before everything that is trained."""
    model = WallVLAForConditionalGeneration(config())
    freeze(model, parts)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    options = FineTuningArguments(model="none", dataset="none")
    args = CoTrainingConfig(output_dir="none", use_cpu=True, bf16=False, freeze=parts)
    estimate = estimate_run(config(), options, args, EstimateArguments(estimate_image_size=SMALL["image_size"]))
    assert estimate.parameters == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients == trained and estimate.optimizer_state == 2 * trained
    workload = Workload(**SMALL)
    saved, flops = counted_run(config(), workload, False, parts)
    with torch.device("meta"):
        frozen = WallVLAForConditionalGeneration(config())
    freeze(frozen, parts)
    found = estimate_training(config(), workload, bf16=False, gradient_checkpointing=False, model=frozen)
    assert found.activations == pytest.approx(saved, rel=0.1)
    assert found.flops == pytest.approx(flops, rel=0.1)


def test_parameters_gradients_and_state_are_exact():
    model = WallVLAForConditionalGeneration(config())
    optimizer = MuonWithAdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    estimate = estimate_training(config(), Workload(**SMALL), optimizer="muon")
    assert estimate.parameters == sum(p.nbytes for p in model.parameters())
    assert estimate.gradients == estimate.parameters
    # the step counters of AdamW are four bytes each, on the host
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert estimate.optimizer_state == sum(value.nbytes for value in states)
    assert estimate_training(config(), Workload(**SMALL)).optimizer_state == 2 * estimate.parameters


def test_ranks_checkpointing_and_adapters_need_less():
    whole = estimate_training(config(), Workload(**SMALL), gradient_checkpointing=False)
    assert estimate_training(config(), Workload(**SMALL)).activations < whole.activations
    shared = estimate_training(config(), Workload(ranks=4, **SMALL))
    assert whole.parameters / 4 <= shared.parameters < whole.parameters / 3.9
    with torch.device("meta"):
        adapted = get_peft_model(
            WallVLAForConditionalGeneration(config()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
    adapters = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    estimate = estimate_training(config(), Workload(**SMALL), model=adapted)
    assert estimate.gradients == adapters and estimate.optimizer_state == 2 * adapters
    assert estimate.parameters == whole.parameters + adapters


def test_a_run_with_adapters_needs_what_its_model_needs():
    """Frozen weights in bfloat16, heads and adapters in float32: the bytes of the model that is really made."""
    options = FineTuningArguments(model="none", dataset="none", adapter_rank=4)
    args = CoTrainingConfig(output_dir="none", use_cpu=True, bf16=True)
    estimate = estimate_run(config(), options, args, EstimateArguments(estimate_image_size=SMALL["image_size"]))
    model = adapt(WallVLAForConditionalGeneration(config()).to(torch.bfloat16), options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    # modules that are trained whole are there twice: as they were, in float32, and as they become
    heads = sum(p.numel() for name, p in model.named_parameters() if "original_module" in name)
    assert estimate.gradients == 4 * trained and estimate.optimizer_state == 8 * trained
    assert estimate.parameters == 4 * trained + 2 * sum(p.numel() for p in frozen) + 2 * heads


def needs(config: WallVLAConfig, **options):
    """The estimate of a run in float32; `add_domain` is an option of the data, the others are of the training."""
    data = FineTuningArguments(model="none", dataset="none", add_domain=options.pop("add_domain", None))
    args = CoTrainingConfig(output_dir="none", use_cpu=True, bf16=False, **options)
    sizes = EstimateArguments(estimate_image_size=SMALL["image_size"], estimate_text_tokens=SMALL["text_tokens"])
    return estimate_run(config, data, args, sizes)


@pytest.mark.parametrize("init", ["", ":mean", ":copy:second", ":random"])
def test_a_new_domain_needs_its_rows(init):
    model = WallVLAForConditionalGeneration(tiny_config_of("soft_prompt"))
    before = sum(p.nbytes for p in model.parameters())
    model.add_domain("fourth")
    with_row = sum(p.nbytes for p in model.parameters())
    estimate = needs(tiny_config_of("soft_prompt"), add_domain=f"fourth{init}")
    assert estimate.parameters == estimate.gradients == with_row > before
    with pytest.raises(ValueError, match="a domain 'second' already"):
        needs(tiny_config_of("soft_prompt"), add_domain="second")


def test_muon_has_the_matrices_that_the_run_gives_it():
    """It keeps one moment of each, where AdamW keeps two."""
    model = WallVLAForConditionalGeneration(config())
    trained = sum(p.nbytes for p in model.parameters())
    chosen = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 2 and "action_expert.layers." in name)
    estimate = needs(config(), optimizer="muon", muon_matrices=r"action_expert\.layers\.")
    assert estimate.optimizer_state == 2 * trained - chosen
    assert estimate.optimizer_flops < needs(config(), optimizer="muon").optimizer_flops


def test_a_weight_average_is_a_copy_of_what_is_trained():
    model = WallVLAForConditionalGeneration(config())
    freeze(model, ["vision"])
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    estimate = needs(config(), freeze=["vision"], ema_decay=0.99)
    assert estimate.optimizer_state == 3 * trained
    assert estimate.total - needs(config(), freeze=["vision"]).total == trained


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_state_is_that_of_the_optimizer_of_the_run(optim):
    """As `Trainer` makes it, after a step."""
    model = WallVLAForConditionalGeneration(config())
    args = CoTrainingConfig(output_dir="none", use_cpu=True, bf16=False, optim=optim)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = cls(model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # counters and norms are numbers, which do not count
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert needs(config(), optim=optim).optimizer_state == sum(
        v.nbytes for v in values if torch.is_tensor(v) and v.ndim
    )


def test_what_has_no_estimate_is_refused():
    with pytest.raises(ValueError, match="no estimate of 'adagrad'.*adamw_torch_fused, adafactor, sgd"):
        needs(config(), optim="adagrad")
    with pytest.raises(ValueError, match="no estimate of 'sgd with optim_args momentum=0.9'"):
        needs(config(), optim="sgd", optim_args="momentum=0.9")
    with pytest.raises(ValueError, match="no estimate of 'adafactor' over 2 devices"):
        estimate_training(config(), Workload(ranks=2, **SMALL), optim="adafactor")
    for side in (0, 36):  # a token covers 16 pixels
        with pytest.raises(ValueError, match=f"picture of {side} pixels.*multiple of 16"):
            estimate_training(config(), Workload(**SMALL | {"image_size": side}))


FITS = {
    "train_lora_24gb.yaml": 24e9,
    "train_full_80gb.yaml": 80e9,
    "train_8xh100.yaml": 80e9,
    "train_multinode.yaml": 80e9,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_examples_parse_and_fit_their_gpu(name):
    """The real dataclasses read them, and the estimate in the comment is the one that the command prints."""
    text = (EXAMPLES / name).read_text()
    values = yaml.safe_load(text)
    parser = HfArgumentParser((FineTuningArguments, CoTrainingConfig, EstimateArguments))
    options, args, sizes = parser.parse_dict(values | {"use_cpu": True})
    assert values["bf16"] and (args.optimizer == "muon") != bool(options.adapter_rank)
    estimate = estimate_run(WallVLAConfig.wall_oss_05(), options, args, sizes)
    assert estimate.total < 0.9 * FITS[name]
    for line in str(estimate).splitlines():
        assert f"# {line}" in text, f"{name} should say\n{estimate}"
    accelerate = yaml.safe_load((EXAMPLES / "accelerate" / name.replace("train_", "")).read_text())
    assert accelerate["num_processes"] == sizes.estimate_ranks
    assert accelerate["mixed_precision"] == "bf16"
    if accelerate["num_processes"] > 1:
        assert accelerate["fsdp_config"]["fsdp_version"] == 2
    assert estimate.total / GIB > 1
