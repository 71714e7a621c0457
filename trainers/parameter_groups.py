"""Parts of the model by the names of their parameters: what is frozen, and who learns how fast."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .adapters import HEADS


PARTS = ("vision", "vlm", "action_expert", "heads")


def part_of(name: str) -> str:
    """The part of `PARTS` that a parameter belongs to: the vision tower with its merger, the rest of the VL expert
    with embeddings and LM head, the layers of the action expert with their last norm, the fp32 heads around them."""
    if "state_proj." in name or any(f"{head}." in name for head in HEADS):
        return "heads"
    if "action_expert." in name:
        return "action_expert"
    return "vision" if ".visual." in name else "vlm"


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Stops the training of parts of the model.

    Raises:
        ValueError: an unknown part, or nothing would be left to train.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"There are no parts {unknown} to freeze: choose among {', '.join(PARTS)}.")
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"With {', '.join(parts)} frozen nothing is left to train.")


def split_by_rate(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float | None]) -> None:
    """Splits the optimizer's groups so that each part of the model has the rate that `rates` gives it.

    Args:
        optimizer: before its first step.
        model: whose parameters it has.
        rates: part -> learning rate; `None` keeps the group's.
    """
    parts = {parameter: part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_part: dict[str, list] = {}
        for parameter in group["params"]:
            by_part.setdefault(parts[parameter], []).append(parameter)
        for part, parameters in by_part.items():
            rate = rates.get(part)
            groups.append({**group, "params": parameters, "lr": group["lr"] if rate is None else rate})
    optimizer.param_groups[:] = groups
