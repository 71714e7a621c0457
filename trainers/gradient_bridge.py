"""How much each objective moves the VL expert, and whether they pull the same way (Wall-OSS-0.5, 1 and 2.2.1)."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import reduce
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .instrument import Instrument, MicroBatch


OBJECTIVES = ("flow", "action_token", "text")
# The language model of every VLM; Florence-2 has its encoder alone
VL_LAYER = re.compile(r"(?:^|\.)vlm\.(?:model\.)?language_model\.(?:encoder\.)?layers\.(\d+)\.")


def sampled_parameters(model: nn.Module, num_layers: int) -> list[nn.Parameter]:
    """The trained parameters of `num_layers` evenly spaced layers of the VL expert, first and last among them.

    Raises:
        ValueError: nothing of the VL expert's layers is trained.
    """
    by_layer: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        found = VL_LAYER.search(name)
        if found and parameter.requires_grad:
            by_layer.setdefault(int(found.group(1)), []).append(parameter)
    if not by_layer:
        raise ValueError(
            "No layer of the VL expert is trained, so no objective has a gradient on it. Leave the gradient bridge "
            "out (gradient_bridge_steps 0), or train the VL expert."
        )
    layers = sorted(by_layer)
    count = min(num_layers, len(layers))
    chosen = {layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)}
    return [parameter for layer in sorted(chosen) for parameter in by_layer[layer]]


def shares_and_cosines(gram: Tensor) -> dict[str, float]:
    """Figures of the inner products of the objectives' gradients.

    Args:
        gram: (3, 3) float64, in the order of `OBJECTIVES`; a row of zeros where an objective has no gradient.

    Returns:
        `gradient_norm_<a>`; `gradient_share_<a>` = |g_a| / sum of all norms; `gradient_cosine_<a>_<b>`, only where
        both norms are positive.
    """
    norms = gram.diagonal().sqrt().tolist()
    figures = {f"gradient_norm_{name}": norm for name, norm in zip(OBJECTIVES, norms, strict=True)}
    total = sum(norms)
    if total > 0:
        figures |= {f"gradient_share_{name}": norm / total for name, norm in zip(OBJECTIVES, norms, strict=True)}
    for (i, first), (j, second) in itertools.combinations(enumerate(OBJECTIVES), 2):
        if norms[i] > 0 and norms[j] > 0:
            figures[f"gradient_cosine_{first}_{second}"] = gram[i, j].item() / (norms[i] * norms[j])
    return figures


class GradientBridgeCallback(Instrument):
    """Measures the gradient of each objective on the VL expert, apart, every few steps.

    The gradients are those of the whole optimizer step, as the optimizer would see them: weighted, summed over the
    micro batches, averaged over ranks, before clipping. A measured step costs one more backward pass per objective;
    memory for three gradients of the sampled layers.

    Args:
        every: steps between two measurements; the first is at step 0.
        num_layers: layers of the VL expert that are measured, evenly spaced.
        plot: a picture to write at the end of training, *optional*.

    Raises:
        ValueError: the parameters are sharded: a gradient of one objective does not exist as a whole there.
    """

    def __init__(self, every: int = 50, num_layers: int = 4, plot: Path | str | None = None):
        if every < 1 or num_layers < 1:
            raise ValueError(f"every is {every} and num_layers {num_layers}: both must be at least 1.")
        self.every, self.num_layers, self.plot = every, num_layers, plot
        self._parameters: list[nn.Parameter] = []
        self._gradients: dict[str, list[Tensor]] = {}
        self._figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._parameters = sampled_parameters(model, self.num_layers)
        if any(isinstance(parameter, DTensor) for parameter in self._parameters):
            raise ValueError(
                "The gradient bridge needs whole parameters, and here they are sharded. Measure in one process or "
                "with replicas, or leave it out (gradient_bridge_steps 0)."
            )

    def on_micro_batch(self, step: int, micro_batch: MicroBatch) -> None:
        if step % self.every:
            return
        for name, objective in micro_batch.objectives.items():
            # The graph of a forward pass under autocast is differentiated outside of it
            with torch.autocast(objective.device.type, enabled=False):
                gradients = torch.autograd.grad(objective, self._parameters, retain_graph=True, allow_unused=True)
            sums = self._gradients.setdefault(name, [torch.zeros_like(p) for p in self._parameters])
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._gradients:
            return
        gram = torch.zeros(3, 3, dtype=torch.float64)
        none = [torch.zeros_like(p) for p in self._parameters]
        rows = [[reduce(g, "mean") for g in self._gradients.get(name, none)] for name in OBJECTIVES]
        for i, j in itertools.combinations_with_replacement(range(3), 2):
            product = sum(torch.sum(a * b, dtype=torch.float64) for a, b in zip(rows[i], rows[j], strict=True))
            gram[i, j] = gram[j, i] = product
        self._figures = shares_and_cosines(gram)
        self._gradients = {}

    def take_logs(self) -> dict[str, float]:
        figures, self._figures = self._figures, {}
        return figures

    def on_train_end(self, args, state, control, **kwargs):
        if self.plot is not None and state.is_world_process_zero:
            plot_gradient_bridge({"": state.log_history}, self.plot)


def plot_gradient_bridge(histories: Mapping[str, Sequence[Mapping]], path: Path | str) -> Path:
    """Shares (above) and cosines (below) over the steps, one column for each run.

    Args:
        histories: title -> `trainer.state.log_history`.
        path: the picture to write.

    Raises:
        ValueError: none of the logs holds a measurement.
    """
    rows = (
        ("share of the gradient norm", [(f"gradient_share_{a}", a.replace("_", " ")) for a in OBJECTIVES]),
        (
            "cosine",
            [
                (f"gradient_cosine_{a}_{b}", f"{a} · {b}".replace("_", " "))
                for a, b in itertools.combinations(OBJECTIVES, 2)
            ],
        ),
    )
    if not any("gradient_share_flow" in entry for history in histories.values() for entry in history):
        raise ValueError("The logs hold no gradient_share_*: train with a GradientBridgeCallback first.")
    figure = Figure(figsize=(1.4 + 2.9 * len(histories), 4.8), layout="constrained")
    axes = figure.subplots(2, len(histories), squeeze=False, sharex=True, sharey="row")
    for column, (title, history) in enumerate(histories.items()):
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel("training step")
        for line, (label, curves) in enumerate(rows):
            axis = axes[line, column]
            for key, name in curves:
                points = [(entry["step"], entry[key]) for entry in history if key in entry]
                axis.plot(*zip(*points, strict=True) if points else ((), ()), label=name, linewidth=1.5)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
                axis.legend(fontsize=7, frameon=False)
        axes[1, column].axhline(0, color="#999999", linewidth=0.6)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
