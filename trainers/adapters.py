"""Low-rank adapters on the experts, through PEFT: LoRA and DoRA (papers 2106.09685 and 2402.09353)."""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from ..modeling_wallvla import WallVLAForConditionalGeneration


ADAPTER_FOLDER = "adapter"
EXPERTS = {"vlm": r"vlm\.model\.language_model", "action_expert": "action_expert"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")


def add_adapters(
    model: WallVLAForConditionalGeneration,
    rank: int,
    alpha: float | None = None,
    dora: bool = False,
    dropout: float = 0.0,
    experts: Sequence[str] = tuple(EXPERTS),
    modules_to_save: Sequence[str] = HEADS,
) -> PeftModel:
    """Freezes the model and adds adapters to every projection of the layers of `experts`.

    Args:
        model: the whole model; it is changed in place.
        rank: of the adapters.
        alpha: their output is scaled by `alpha / rank`; `rank` when absent.
        dora: learn the size of each output channel apart from its direction.
        dropout: on what the adapters read.
        experts: "vlm", "action_expert" or both.
        modules_to_save: modules that are trained whole and saved with the adapters, by the end of their name.

    Raises:
        ValueError: an unknown expert or module, or a rank below 1.
    """
    unknown = sorted(set(experts) - set(EXPERTS))
    if unknown or not experts:
        raise ValueError(
            f"There are no experts {unknown or list(experts)} to adapt: choose among {', '.join(EXPERTS)}."
        )
    if rank < 1:
        raise ValueError(f"The rank of the adapters is {rank}; it must be at least 1.")
    names = [name for name, _ in model.named_modules()]
    absent = [module for module in modules_to_save if not any(name.split(".")[-1] == module for name in names)]
    if absent:
        raise ValueError(f"The model has no modules {absent} to train whole; its heads are {', '.join(HEADS)}.")
    layers = "|".join(EXPERTS[expert] for expert in experts)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_dora=dora,
        lora_dropout=dropout,
        target_modules=rf"(?:{layers})\.layers\.\d+\.\w+\.(?:{'|'.join(PROJECTIONS)})",
        modules_to_save=list(modules_to_save) or None,
    )
    return get_peft_model(model, config)


def save_adapted(model: PeftModel, processor, folder: Path | str) -> None:
    """Writes `folder/adapter` (adapters and whole modules alone) and, in `folder`, the merged model: a complete
    repository that loads without PEFT. `model` is merged and must not be trained afterwards."""
    folder = Path(folder)
    model.save_pretrained(folder / ADAPTER_FOLDER)
    model.merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)
