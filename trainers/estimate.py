"""What a training run needs, before it runs: bytes on each device and operations of each step.

Parameters, gradients and optimizer state are counted on the meta device, exactly. Activations and operations are
counted while one sample of the real size runs, on the CPU, through a model of the real width that has one layer of
each kind and a small vocabulary; the other layers and samples, and the logits, are multiples of that.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_wallvla import WallVLAConfig
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .co_training_config import CoTrainingConfig
from .muon import BUCKET_SIZE, count_parts, is_muon_parameter, logical_matrices, newton_schulz_flops, plan_buckets


GIB = 2**30
VOCABULARY = 64
# The layers that are repeated, and where they are
LAYERS = {
    "vision": "vlm.model.visual.blocks",
    "language": "vlm.model.language_model.layers",
    "action": "action_expert.layers",
}


@dataclass(frozen=True)
class Workload:
    """What a sample is made of, and how samples are shared out.

    batch_size: samples of a micro batch on one rank.
    accumulation: micro batches of an optimizer step.
    ranks: devices, over which FSDP2 shards parameters, gradients and optimizer state.
    images: pictures of a sample.
    image_size: side of a square picture in pixels, a multiple of patch size times merge size.
    text_tokens: tokens of a sample beside the pictures.
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

    parameters, gradients, optimizer_state: float32 shards, frozen parameters in their own dtype.
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
    text, vision = values["vlm_config"]["text_config"], values["vlm_config"]["vision_config"]
    text |= {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "layer_types": ["full_attention"]}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    vision |= {"depth": 1, "fullatt_block_indexes": [0]}
    values["vlm_config"]["image_token_id"] = VOCABULARY - 1
    values["action_expert"]["num_hidden_layers"] = 1
    values |= {"num_action_tokens": 0, "action_token_start_id": None, "action_tokens_per_chunk": None}
    values |= {"action_token_levels": 1, "state_token_id": VOCABULARY - 2}
    return WallVLAForConditionalGeneration(WallVLAConfig(**values)).train()


def one_sample(config: WallVLAConfig, workload: Workload) -> dict[str, Tensor]:
    """A sample of that size, of nothing."""
    vision = config.vlm_config.vision_config
    side = workload.image_size // vision.patch_size
    merged = (side // vision.spatial_merge_size) ** 2
    picture = [1] + merged * [config.vlm_config.image_token_id]  # text in between tells pictures apart
    ids = torch.tensor([workload.images * picture + (workload.text_tokens - workload.images) * [1]])
    targets = torch.full_like(ids, -100)
    targets[:, ids.shape[1] - workload.labels :] = 1
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    shape = (1, config.action_horizon, config.action_dim)
    sample = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": targets,
        "actions": torch.zeros(shape),
        "noise": torch.ones(shape),
        "time": torch.ones(1) / 2,
        "action_mask": torch.ones(shape, dtype=torch.bool),
    }
    if workload.images:
        sample["pixel_values"] = torch.zeros(workload.images * side * side, patch)
        sample["image_grid_thw"] = torch.tensor([[1, side, side]] * workload.images)
    return sample


def count_sample(config: WallVLAConfig, workload: Workload, bf16: bool) -> tuple[dict, dict, dict]:
    """Bytes that autograd keeps, operations of the forward pass, and bytes of a layer's input (hidden states, and the
    keys and values that leave it), by kind of layer; "rest" is everything else."""
    model = one_layer_of_each(config)
    saved, inputs, seen = (
        defaultdict(int),
        defaultdict(int),
        {p.untyped_storage().data_ptr() for p in model.parameters()},
    )
    here = ["rest"]
    for kind, path in LAYERS.items():
        layer = model.get_submodule(path)[0]

        def enter(module, args, kind=kind):
            here.append(kind)
            inputs[kind] = args[0].nbytes

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(lambda module, args, output: here.pop() and None)

    weights = {p.shape for p in model.parameters() if p.ndim == 2} | {p.shape[::-1] for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # low-precision copies of weights are counted apart
        if storage.data_ptr() not in seen and not (
            bf16 and tensor.dtype == torch.bfloat16 and tensor.shape in weights
        ):
            seen.add(storage.data_ptr())
            kept.append(tensor)  # so that no other tensor gets its address
            saved[here[-1]] += storage.nbytes()
        return tensor

    kept: list[Tensor] = []
    sample = one_sample(model.config, workload)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        FlopCounterMode(display=False) as counter,
    ):
        model(**sample)
    counts = counter.get_flop_counts()
    flops = {kind: sum(counts[f"WallVLAForConditionalGeneration.{path}.0"].values()) for kind, path in LAYERS.items()}
    flops["rest"] = counter.get_total_flops() - sum(flops.values())
    text = config.vlm_config.text_config
    head = text.hidden_size // text.num_attention_heads
    keys_and_values = 2 * sample["input_ids"].numel() * text.num_key_value_heads * head * (2 if bf16 else 4)
    inputs["language"] += keys_and_values
    return saved, flops, inputs


def shard(shape: torch.Size, ranks: int) -> int:
    """Elements of the largest shard, cut by rows as torch does it."""
    return shape.numel() if not shape else -(-shape[0] // ranks) * shape[1:].numel()


def estimate_training(
    config: WallVLAConfig,
    workload: Workload,
    optimizer: str = "adamw",
    bf16: bool = True,
    gradient_checkpointing: bool = True,
    model: nn.Module | None = None,
) -> Estimate:
    """What a training run needs on each device.

    Args:
        config: of the model.
        workload: sizes and numbers of samples and ranks.
        optimizer: as in [`CoTrainingConfig`].
        bf16: autocast to bfloat16 over float32 weights.
        gradient_checkpointing: keep the inputs of layers and compute the rest again.
        model: on the meta device, where it is not all trained or not all float32 (adapters); default: all of `config`.
    """
    if model is None:
        with torch.device("meta"):
            model = WallVLAForConditionalGeneration(config)
    ranks = workload.ranks
    named = list(model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    parameters = sum(shard(p.shape, ranks) * p.element_size() for _, p in named)
    gradients = sum(shard(p.shape, ranks) * 4 for _, p in trained)
    chosen = [(n, p) for n, p in trained if optimizer != "adamw" and is_muon_parameter(n, p)]
    state = 8 * sum(shard(p.shape, ranks) for _, p in trained) - 4 * sum(shard(p.shape, ranks) for _, p in chosen)
    buffers = optimizer_flops = 0
    if chosen:
        matrices = logical_matrices([tuple(p.shape) for _, p in chosen], [count_parts(n) for n, _ in chosen])
        dtype = torch.bfloat16 if bf16 else torch.float32
        plan = plan_buckets(matrices, ranks, bucket_size=BUCKET_SIZE, dtype=dtype)
        elements = [max(sum(torch.Size(matrices[i].shape).numel() for i in own) for own in bucket) for bucket in plan]
        # a bucket that is orthogonalised (whole, iterate, product), the next one and the last one on their way
        buffers = 6 * max(elements) * dtype.itemsize
        costs = [newton_schulz_flops(*m.shape, dtype=dtype) for m in matrices]
        optimizer_flops = max(sum(costs[i] for bucket in plan for i in bucket[rank]) for rank in range(ranks))

    saved, flops, inputs = count_sample(config, workload, bf16)
    depth = {
        "vision": config.vlm_config.vision_config.depth,
        "language": config.vlm_config.text_config.num_hidden_layers,
        "action": config.action_expert.num_hidden_layers,
    }
    rows = workload.labels
    # float32 logits, their log-probabilities, and the low-precision logits before them
    logits = rows * config.vlm_config.text_config.vocab_size * (10 if bf16 else 8)
    flops["rest"] += 2 * rows * config.vlm_config.text_config.hidden_size * config.vlm_config.text_config.vocab_size
    if gradient_checkpointing:
        layers = sum(depth[kind] * inputs[kind] for kind in LAYERS) + max(saved[kind] for kind in LAYERS)
    else:
        layers = sum(depth[kind] * saved[kind] for kind in LAYERS)
    activations = workload.batch_size * (layers + saved["rest"] + logits)
    repeated = sum(depth[kind] * flops[kind] for kind in LAYERS)
    forward = repeated + flops["rest"]
    # the gradient of activations costs a forward pass, and so does the gradient of the weights that are trained
    share = sum(p.numel() for _, p in trained) / sum(p.numel() for _, p in named)
    passes = forward * (2 + share) + (repeated if gradient_checkpointing else 0)
    size = 2 if bf16 else 4
    if ranks == 1:
        working = sum(p.numel() * 2 for _, p in named if p.ndim == 2 and p.dtype == torch.float32) if bf16 else 0
    else:
        by_layer = defaultdict(int)
        for name, p in named:
            kind = next((path for path in LAYERS.values() if name.startswith(path)), None)
            by_layer[".".join(name.split(".")[: kind.count(".") + 2]) if kind else "rest"] += p.numel() * size
        # two layers: the one that runs and the next one; what is in no layer stays gathered
        working = by_layer.pop("rest") + 2 * max(by_layer.values())
    tokens = one_sample_tokens(config, workload)
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


def one_sample_tokens(config: WallVLAConfig, workload: Workload) -> int:
    """Prefix and action tokens of a sample."""
    vision = config.vlm_config.vision_config
    merged = (workload.image_size // vision.patch_size // vision.spatial_merge_size) ** 2
    return workload.images * merged + workload.text_tokens + config.action_horizon
