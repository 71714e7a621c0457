"""Parts of the model: what is frozen, who learns how fast, and what a new domain learns first."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..action_experts_wallvla import DomainTokens, PerDomain


PARTS = ("vision", "vlm", "action_expert", "heads", "domains", "prompts")
# What a domain has of its own
DOMAIN_PARTS = ("domains", "prompts")
VISION_MODULES = {"visual", "vision_tower", "multi_modal_projector"}


def parts_of(model: nn.Module) -> dict[str, str]:
    """The part of `PARTS` that each parameter belongs to, by its name. The model may carry adapters.

    vision: the vision tower with what leads from it to the VL expert. vlm: the rest of the VL expert with embeddings
    and LM head. action_expert: its layers and last norm. heads: the fp32 modules around them. domains: the tables with
    a row for each domain, projections and resamplers. prompts: the learned tokens of each domain.
    """
    tables = {}
    for name, module in model.named_modules():
        if isinstance(module, PerDomain) and not module.is_shared:
            tables[name] = "prompts" if isinstance(module, DomainTokens) else "domains"
    heads = [f"action_expert.{module}." for module in model.action_expert.fp32_modules] + ["state_proj."]

    def part(name: str) -> str:
        if name.rpartition(".")[0] in tables:
            return tables[name.rpartition(".")[0]]
        if any(head in name for head in heads):
            return "heads"
        if "action_expert." in name:
            return "action_expert"
        return "vision" if VISION_MODULES & set(name.split(".")) else "vlm"

    return {name: part(name) for name, _ in model.named_parameters(remove_duplicate=False)}


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Stops the training of parts of the model.

    Raises:
        ValueError: an unknown part, or nothing would be left to train.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"There are no parts {unknown} to freeze: choose among {', '.join(PARTS)}.")
    part_of = parts_of(model)
    for name, parameter in model.named_parameters():
        if part_of[name] in parts:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"With {', '.join(parts)} frozen nothing is left to train.")


def split_by_part(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float | None]) -> None:
    """Splits the optimizer's groups so that each has one `part` and the rate that `rates` gives it.

    What a domain has of its own comes first, and does not decay: a batch of one robot must leave the rows of the
    others as they are.

    Args:
        optimizer: before its first step.
        model: whose parameters it has.
        rates: part -> learning rate; `None` keeps the group's.
    """
    names = parts_of(model)
    parts = {parameter: names[name] for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        by_part: dict[str, list] = {}
        for parameter in group["params"]:
            by_part.setdefault(parts[parameter], []).append(parameter)
        for part, parameters in by_part.items():
            rate = rates.get(part)
            own = {"params": parameters, "part": part, "lr": group["lr"] if rate is None else rate}
            groups.append({**group, **own} | ({"weight_decay": 0.0} if part in DOMAIN_PARTS else {}))
    optimizer.param_groups[:] = sorted(groups, key=lambda group: group["part"] not in DOMAIN_PARTS)


def joint_share(step: int, adaptation_steps: int, warmup_steps: int) -> float:
    """The share of its rate that a parameter which all domains have in common gets after `step` optimizer steps.

    0 in the first `adaptation_steps`, then `warmup_steps` even steps up, then 1 (X-VLA, appendix H).
    """
    return min(1.0, max(0.0, (step - adaptation_steps + 1) / (warmup_steps + 1)))


def adapt_in_two_steps(
    scheduler: LRScheduler, optimizer: torch.optim.Optimizer, adaptation_steps: int, warmup_steps: int
) -> LambdaLR:
    """The schedule whose groups also follow `joint_share`, unless they are of a domain.

    Args:
        scheduler: of the run, at step 0.
        optimizer: whose groups know their part (`split_by_part`).
        adaptation_steps, warmup_steps: of `joint_share`.

    Raises:
        ValueError: a scheduler whose rates are not a function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"adaptation_steps needs a schedule that is a function of the step, and lr_scheduler_type makes a "
            f"{type(scheduler).__name__}: use linear, cosine or constant_with_warmup."
        )

    def factor(group: dict, usual):
        if group["part"] in DOMAIN_PARTS:
            return usual
        return lambda step: usual(step) * joint_share(step, adaptation_steps, warmup_steps)

    pairs = zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True)
    return LambdaLR(optimizer, [factor(group, usual) for group, usual in pairs])
