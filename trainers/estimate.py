"""What a training run needs, before it runs: bytes on each device and operations of each step.

Parameters, gradients and optimizer state are counted on the meta device, exactly. Activations and operations are
counted while one sample of the real size runs, on the CPU, through a model of the real width that has one layer of
each kind and a small vocabulary; the other layers and samples, and the logits, are multiples of that.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_wallvla import WallVLAConfig
from ..modeling_wallvla import WallVLAForConditionalGeneration
from ..vl_experts_wallvla import VL_EXPERTS
from .co_training_config import CoTrainingConfig
from .muon import (
    BUCKET_SIZE,
    MATRICES,
    count_parts,
    is_muon_parameter,
    logical_matrices,
    newton_schulz_flops,
    plan_buckets,
)


GIB = 2**30
VOCABULARY = 64
ESTIMATED = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")


@dataclass(frozen=True)
class Workload:
    """What a sample is made of, and how samples are shared out.

    batch_size: samples of a micro batch on one rank.
    accumulation: micro batches of an optimizer step.
    ranks: devices, over which FSDP2 shards parameters, gradients and optimizer state.
    images: pictures of a sample.
    image_size: side of a square picture in pixels, a multiple of patch size times merge size. Of no effect on a VLM
        whose images have one size.
    text_tokens: tokens of a sample beside the pictures. Of no effect on rows of one layout.
    labels: of them, tokens that are learned.
    """

    batch_size: int = 1
    accumulation: int = 1
    ranks: int = 1
    images: int = 3
    image_size: int = 224
    text_tokens: int = 150
    labels: int = 40


@dataclass
class EstimateArguments:
    """What `wallvla train --estimate` has to know beside the options of the run."""

    estimate: bool = field(default=False, metadata={"help": "Print what the run needs, and stop."})
    estimate_ranks: int = field(default=1, metadata={"help": "Devices of the run, over which FSDP2 shards."})
    estimate_images: int = field(default=3, metadata={"help": "Pictures of a sample."})
    estimate_image_size: int = field(default=224, metadata={"help": "Side of a picture in pixels."})
    estimate_text_tokens: int = field(default=150, metadata={"help": "Tokens of a sample beside the pictures."})

    def workload(self, args: CoTrainingConfig) -> Workload:
        """The sizes of a run with these training options."""
        return Workload(
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            ranks=self.estimate_ranks,
            images=self.estimate_images,
            image_size=self.estimate_image_size,
            text_tokens=self.estimate_text_tokens,
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes on the fullest rank, and operations of a step.

    parameters, gradients, optimizer_state: float32 shards, frozen parameters in their own dtype; a moving average of
        the weights counts as state.
    optimizer_buffers: Muon's buckets on their way, while activations are gone.
    working_weights: bfloat16 copies, of everything in one process, of two layers at a time where sharded.
    activations: what the backward pass needs.
    total: the largest sum that exists at one time.
    flops: forward, backward and recomputation of a step on one rank; `optimizer_flops`: Newton-Schulz on one rank.
    tokens: of a step over all ranks, prefix and action tokens.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    optimizer_buffers: int
    working_weights: int
    activations: int
    total: int
    flops: int
    optimizer_flops: int
    tokens: int

    def __str__(self) -> str:
        lines = []
        for item in fields(self):
            value, name = vars(self)[item.name], item.name.replace("_", " ")
            if item.name == "tokens":
                lines.append(f"{name:<18}{value:>10,} in a step of all ranks")
            elif item.name.endswith("flops"):
                lines.append(f"{name:<18}{value / 1e12:>10.1f} TFLOP in a step of one rank")
            else:
                lines.append(f"{name:<18}{value / GIB:>10.2f} GiB")
        return "\n".join(lines)


def one_layer_of_each(config: WallVLAConfig) -> WallVLAForConditionalGeneration:
    """A model of the real width with one layer of each kind and a small vocabulary, on the CPU."""
    values = copy.deepcopy(config.to_dict())
    vlm, text, vision = (
        values["vlm_config"],
        values["vlm_config"]["text_config"],
        values["vlm_config"]["vision_config"],
    )
    kinds = list(dict.fromkeys(text.get("layer_types") or ["full_attention"]))
    fewer = {"num_hidden_layers": len(kinds), "layer_types": kinds, "encoder_layers": 1, "decoder_layers": 1}
    text |= {name: value for name, value in fewer.items() if name in text} | {"vocab_size": VOCABULARY}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    text |= {name: None for name in ids if name in text and (text[name] or 0) >= VOCABULARY}
    fewer = {"depth": 1, "num_hidden_layers": 1, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}
    fewer["depths"] = [1 for _ in vision.get("depths", ())]
    vision |= {name: value for name, value in fewer.items() if name in vision}
    vlm["image_token_id"] = VOCABULARY - 1
    values["action_expert"]["num_hidden_layers"] = 1
    values |= {"num_action_tokens": 0, "action_token_start_id": None, "action_tokens_per_chunk": None}
    values |= {"action_token_levels": 1, "state_token_id": VOCABULARY - 2}
    return WallVLAForConditionalGeneration(WallVLAConfig(**values)).train()


def repeated_layers(small: nn.Module, whole: nn.Module) -> dict[str, int]:
    """Path of each layer of the small model -> how many like it the whole model has in the same list."""

    def shapes(layer: nn.Module) -> tuple:
        return type(layer), *((name, p.shape) for name, p in layer.named_parameters())

    result = {}
    for path, module in small.named_modules():
        if isinstance(module, nn.ModuleList):
            layers = list(map(shapes, whole.get_submodule(path)))
            for i, layer in enumerate(module):
                if len(layers) > len(module) or isinstance(layer, GradientCheckpointingLayer):
                    result[f"{path}.{i}"] = layers.count(shapes(layer))
    return result


def one_sample(config: WallVLAConfig, workload: Workload) -> dict[str, Tensor]:
    """A sample of that size, of nothing."""
    vl_expert = VL_EXPERTS[config.vlm_config.model_type](config.vlm_config, config.language_tokens)
    picture, count = vl_expert.blank_image(torch.device("cpu"), workload.image_size)
    image, images = count * [config.vlm_config.image_token_id], workload.images
    if config.language_tokens is None:  # text in between tells pictures apart
        row = images * [1, *image] + (workload.text_tokens - images) * [1]
    else:
        row = image + config.language_tokens * [1] + (images - 1) * image
    ids, shape = torch.tensor([row]), (1, config.action_horizon, config.action_dim)
    sample = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "actions": torch.zeros(shape),
        "noise": torch.ones(shape),
        "time": torch.ones(1) / 2,
        "action_mask": torch.ones(shape, dtype=torch.bool),
        "domain_ids": torch.zeros(1, dtype=torch.long),
    }
    if config.language_tokens is None:  # rows of one layout have no text to learn
        sample["labels"] = torch.full_like(ids, -100)
        sample["labels"][:, ids.shape[1] - workload.labels :] = 1
    if config.proprioception in ("projected", "expert"):
        sample["states"] = torch.zeros(1, config.state_dim)
        sample["state_mask"] = torch.ones(1, config.state_dim, dtype=torch.bool)
    if images:
        sample |= {name: torch.cat(images * [value]) for name, value in picture.items()}
    return sample


@dataclass
class Counts:
    """What one sample costs in the small model, by the path of a layer; "rest" is everything outside of layers.

    saved: bytes that autograd keeps. flops: of the forward pass. inputs: bytes of what goes into a layer.
    differentiated: layers whose input has a gradient. keys_and_values: bytes that one VL layer leaves to the expert.
    """

    saved: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    flops: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    differentiated: set[str] = field(default_factory=set)
    keys_and_values: int = 0


def count_sample(
    model: WallVLAForConditionalGeneration, paths: Iterable[str], workload: Workload, bf16: bool
) -> Counts:
    """Runs one sample through a model of `one_layer_of_each`."""
    result, here = Counts(), ["rest"]
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for path in paths:

        def enter(module, args, path=path):
            here.append(path)
            result.inputs[path] = args[0].nbytes
            if args[0].requires_grad:
                result.differentiated.add(path)

        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(lambda module, args, output: here.pop() and None)

    def see_context(module, args):
        pairs = args[2].keys + args[2].values
        result.keys_and_values = sum(each.nbytes for each in pairs) // max(1, len(args[2].keys))

    model.action_expert.register_forward_pre_hook(see_context)
    weights = {p.shape for p in model.parameters() if p.ndim == 2} | {p.shape[::-1] for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # low-precision copies of weights are counted apart
        if storage.data_ptr() not in seen and not (
            bf16 and tensor.dtype == torch.bfloat16 and tensor.shape in weights
        ):
            seen.add(storage.data_ptr())
            kept.append(tensor)  # so that no other tensor gets its address
            result.saved[here[-1]] += storage.nbytes()
        return tensor

    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        FlopCounterMode(display=False) as counter,
    ):
        model(**one_sample(model.config, workload))
    counts = counter.get_flop_counts()
    result.flops = {path: sum(counts[f"{type(model).__name__}.{path}"].values()) for path in paths}
    result.flops["rest"] = counter.get_total_flops() - sum(result.flops.values())
    return result


def shard(shape: torch.Size, ranks: int) -> int:
    """Elements of the largest shard, cut by rows as torch does it."""
    return shape.numel() if not shape else -(-shape[0] // ranks) * shape[1:].numel()


def state_elements(shape: torch.Size, optim: str, ranks: int) -> int:
    """Numbers that an optimizer of `Trainer` keeps of a parameter on the fullest rank."""
    if optim == "sgd":
        return 0
    if optim == "adafactor" and len(shape) > 1:  # a mean of each row and of each column
        return math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:])
    return shard(shape, ranks) * (1 if optim == "adafactor" else 2)


def check_estimated(optim: str, ranks: int) -> None:
    """Refuses the optimizers of `Trainer` whose state is not counted here."""
    if optim == "adafactor" and ranks > 1:
        raise ValueError(f"There is no estimate of 'adafactor' over {ranks} devices: its means are not cut by rows.")
    if optim not in ESTIMATED:
        raise ValueError(f"There is no estimate of {optim!r}: there is one of {', '.join(ESTIMATED)}, and of Muon.")


def optimizer_needs(
    trained: list[tuple[str, nn.Parameter]], optimizer: str, optim: str, muon_matrices: str, bf16: bool, ranks: int
) -> tuple[int, int, int]:
    """Bytes of state and of buffers, and FLOPs of one step of the busiest rank; arguments of `estimate_training`."""
    if optimizer == "adamw":
        check_estimated(optim, ranks)
        return 4 * sum(state_elements(p.shape, optim, ranks) for _, p in trained), 0, 0
    chosen = [(n, p) for n, p in trained if is_muon_parameter(n, p, muon_matrices)]
    state = 8 * sum(shard(p.shape, ranks) for _, p in trained) - 4 * sum(shard(p.shape, ranks) for _, p in chosen)
    if not chosen:
        return state, 0, 0
    matrices = logical_matrices([tuple(p.shape) for _, p in chosen], [count_parts(n) for n, _ in chosen])
    dtype = torch.bfloat16 if bf16 else torch.float32
    plan = plan_buckets(matrices, ranks, bucket_size=BUCKET_SIZE, dtype=dtype)
    elements = [max(sum(torch.Size(matrices[i].shape).numel() for i in own) for own in bucket) for bucket in plan]
    # a bucket that is orthogonalised (whole, iterate, product), the next one and the last one on their way
    buffers = 6 * max(elements) * dtype.itemsize
    costs = [newton_schulz_flops(*m.shape, dtype=dtype) for m in matrices]
    flops = max(sum(costs[i] for bucket in plan for i in bucket[rank]) for rank in range(ranks))
    return state, buffers, flops


def working_weights(
    named: Sequence[tuple[str, Tensor]], layer_of: Callable[[str], str], bf16: bool, ranks: int
) -> int:
    """Bytes of weights beside the parameters: low-precision copies, or what is gathered from other ranks.

    Args:
        named: parameters.
        layer_of: from the name of one to its layer, "rest" outside of all.
        bf16: as in `estimate_training`.
        ranks: that share the weights.
    """
    if ranks == 1:
        return sum(p.numel() * 2 for _, p in named if p.ndim == 2 and p.dtype == torch.float32) if bf16 else 0
    by_layer = defaultdict(int)
    for name, p in named:
        by_layer[layer_of(name)] += p.numel() * (2 if bf16 else 4)
    # two layers: the one that runs and the next one; what is in no layer stays gathered
    return by_layer.pop("rest") + 2 * max(by_layer.values())


def estimate_training(
    config: WallVLAConfig,
    workload: Workload,
    optimizer: str = "adamw",
    bf16: bool = True,
    gradient_checkpointing: bool = True,
    model: nn.Module | None = None,
    muon_matrices: str = MATRICES,
    has_average: bool = False,
    optim: str = "adamw_torch",
) -> Estimate:
    """What a training run needs on each device.

    Args:
        config: of the model.
        workload: sizes and numbers of samples and ranks.
        optimizer: as in [`CoTrainingConfig`].
        bf16: autocast to bfloat16 over float32 weights.
        gradient_checkpointing: keep the inputs of layers and compute the rest again.
        model: on the meta device, where it is not all trained or not all float32 (adapters, frozen parts); default:
            all of `config`.
        muon_matrices: as in [`CoTrainingConfig`].
        has_average: keep a moving average of the trained weights.
        optim: of `Trainer`, where `optimizer` is "adamw"; one of `ESTIMATED`.

    Raises:
        ValueError: an optimizer whose state is not counted here, or pictures that are not made of whole tokens.
    """
    with torch.device("meta"):
        whole = WallVLAForConditionalGeneration(config)
    model, ranks = whole if model is None else model, workload.ranks
    named = list(model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    parameters = sum(shard(p.shape, ranks) * p.element_size() for _, p in named)
    gradients = sum(shard(p.shape, ranks) * 4 for _, p in trained)
    state, buffers, optimizer_flops = optimizer_needs(trained, optimizer, optim, muon_matrices, bf16, ranks)
    state += has_average * 4 * sum(p.numel() for _, p in trained)
    small = one_layer_of_each(config)
    times = repeated_layers(small, whole)
    lists = sorted({path.rpartition(".")[0] for path in times})

    def part_of(name: str) -> str:
        """The list of layers that a parameter is in (adapters are there too), or else its module."""
        return next((path for path in lists if f"{path}." in name), None) or name.rpartition(".")[0]

    for name, p in small.named_parameters():
        p.requires_grad_(any(f"{part_of(name)}." in each for each, _ in trained))
    counts = count_sample(small, times, workload, bf16)
    text, rows = config.vlm_config.text_config, workload.labels if whole.get_output_embeddings() is not None else 0
    # float32 logits, their log-probabilities, and the low-precision logits before them
    logits = rows * text.vocab_size * (10 if bf16 else 8)
    counts.flops["rest"] += 2 * rows * text.hidden_size * text.vocab_size
    kept, again = {path: counts.saved[path] for path in times}, [0]
    if gradient_checkpointing:
        again = [path for path in times if isinstance(small.get_submodule(path), GradientCheckpointingLayer)]
        again = [path for path in again if counts.saved[path]]  # not those before everything that is trained
        kept |= {path: counts.inputs[path] for path in again}
    activations = counts.saved["rest"] + logits + sum(times[path] * kept[path] for path in times)
    if gradient_checkpointing:  # otherwise they are among what a layer keeps
        activations += counts.keys_and_values * text.num_hidden_layers
        activations += max((counts.saved[path] for path in again), default=0)
    activations *= workload.batch_size

    def share(path: str) -> float:
        """Of the parameters in a list of layers (or outside of all), those that are trained."""
        sizes = [
            (p.numel(), p.requires_grad) for name, p in named if (part_of(name) in lists and part_of(name)) == path
        ]
        return sum(size for size, is_trained in sizes if is_trained) / max(1, sum(size for size, _ in sizes))

    # the gradient of activations costs a forward pass, and so does the gradient of the weights that are trained
    passes = counts.flops["rest"] * (2 + share(False))
    for path, count in times.items():
        of_weights = share(path.rpartition(".")[0])
        of_inputs = of_weights > 0 or path in counts.differentiated
        passes += count * counts.flops[path] * (1 + of_weights + of_inputs + (path in again))

    def layer_of(name: str) -> str:
        """The layer that is gathered together with a parameter."""
        path = part_of(name)
        return f"{path}.{name.partition(f'{path}.')[2].partition('.')[0]}" if path in lists else "rest"

    working = working_weights(named, layer_of, bf16, ranks)
    tokens = one_sample(config, workload)["input_ids"].numel() + config.action_horizon
    fixed = parameters + gradients + state
    return Estimate(
        parameters=parameters,
        gradients=gradients,
        optimizer_state=state,
        optimizer_buffers=buffers,
        working_weights=working,
        activations=activations,
        total=fixed + max(working + activations, buffers),
        flops=int(workload.batch_size * workload.accumulation * passes),
        optimizer_flops=optimizer_flops,
        tokens=tokens * workload.batch_size * workload.accumulation * ranks,
    )
