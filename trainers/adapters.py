"""Low-rank adapters on the experts, through PEFT: LoRA and DoRA (papers 2106.09685 and 2402.09353)."""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..action_experts_wallvla import Modulation
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .parameter_groups import parts_of


ADAPTER_FOLDER = "adapter"
ADAPTABLE = ("vision", "vlm", "action_expert")
EXPERTS = ("vlm", "action_expert")


def heads_of(model: WallVLAForConditionalGeneration) -> list[str]:
    """Names of the modules that are trained whole beside adapters: the heads, and the tables of domains."""
    names = []
    for name, module in model.action_expert.named_children():
        if name in model.action_expert.fp32_modules:
            parts = (
                [f"{name}.{index}" for index in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
            )
            names += [f"action_expert.{part}" for part in parts]  # PEFT wraps no lists
    return names


def linear_layers(model: WallVLAForConditionalGeneration, parts: Sequence[str]) -> list[str]:
    """Names of the linear layers of parts of the model, but for the LM head and the modulation of a DiT, whose outputs
    are several."""
    part_of, lm_head = parts_of(model), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, Modulation) and module is not lm_head
        if part_of[f"{name}.weight"] in parts
    ]


def add_adapters(
    model: WallVLAForConditionalGeneration,
    rank: int,
    alpha: float | None = None,
    dora: bool = False,
    dropout: float = 0.0,
    experts: Sequence[str] = EXPERTS,
    modules_to_save: Sequence[str] | None = None,
) -> PeftModel:
    """Freezes the model and adds adapters to every linear layer of `experts`.

    Args:
        model: the whole model; it is changed in place.
        rank: of the adapters.
        alpha: their output is scaled by `alpha / rank`; `rank` when absent.
        dora: learn the size of each output channel apart from its direction.
        dropout: on what the adapters read.
        experts: parts of the model, of `ADAPTABLE`.
        modules_to_save: modules that are trained whole and saved with the adapters, by the end of their name;
            `heads_of` when absent.

    Raises:
        ValueError: an unknown expert or module, or a rank below 1.
    """
    unknown = sorted(set(experts) - set(ADAPTABLE))
    if unknown or not experts:
        raise ValueError(
            f"There are no experts {unknown or list(experts)} to adapt: choose among {', '.join(ADAPTABLE)}."
        )
    if rank < 1:
        raise ValueError(f"The rank of the adapters is {rank}; it must be at least 1.")
    heads = heads_of(model)
    names = [name for name, _ in model.named_modules()]
    absent = [module for module in modules_to_save or () if not any(f".{n}".endswith(f".{module}") for n in names)]
    if absent:
        raise ValueError(f"The model has no modules {absent} to train whole; its heads are {', '.join(heads)}.")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_dora=dora,
        lora_dropout=dropout,
        target_modules=linear_layers(model, experts),
        modules_to_save=(heads if modules_to_save is None else list(modules_to_save)) or None,
    )
    return get_peft_model(model, config)


def save_adapted(model: PeftModel, processor, folder: Path | str) -> None:
    """Writes `folder/adapter` (adapters and whole modules alone) and, in `folder`, the merged model: a complete
    repository that loads without PEFT. `model` is merged and must not be trained afterwards."""
    folder = Path(folder)
    model.save_pretrained(folder / ADAPTER_FOLDER)
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
