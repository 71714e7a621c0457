"""An exponential moving average of the weights, beside those that are trained."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


WEIGHTS_FILE = "ema.safetensors"
EXPORT_FOLDER = "ema"


class WeightAverage(TrainerCallback):
    """Keeps `average <- decay * average + (1 - decay) * weights` of the trained parameters, in float32.

    The average starts at the first weights. The trainer saves it with every checkpoint and names the checkpoint to go
    on from; at the end of training it is written as a complete repository to `<output_dir>/ema`.

    Args:
        decay: in (0, 1).
        processing_class: saved beside the exported weights, *optional*.

    Attributes:
        checkpoint: folder to go on from, or `None`.

    Raises:
        ValueError: a decay out of range, sharded parameters, a checkpoint of other parameters or without an average.
    """

    def __init__(self, decay: float, processing_class=None):
        if not 0 < decay < 1:
            raise ValueError(f"The decay of the weight average is {decay}: it lies between 0 and 1, such as 0.999.")
        self.decay, self.processing_class = decay, processing_class
        self.checkpoint: Path | None = None
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(isinstance(p, DTensor) for p in trained.values()):
            raise ValueError(
                "The weight average needs whole parameters, and here they are sharded: leave ema_decay out."
            )
        if self.checkpoint is None:
            self.average = {name: p.detach().float().clone() for name, p in trained.items()}
            return
        file = self.checkpoint / WEIGHTS_FILE
        if not file.exists():
            raise ValueError(f"{self.checkpoint} has no weight average: go on without ema_decay, or start anew.")
        saved = load_file(file)
        if saved.keys() != trained.keys():
            raise ValueError(
                f"{file} averages {len(saved)} parameters and {len(trained)} are trained; they differ in "
                f"{sorted(saved.keys() ^ trained.keys())[:8]}. Go on with the options that wrote it."
            )
        self.average = {name: saved[name].to(p.device) for name, p in trained.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.float(), 1 - self.decay)

    def save(self, checkpoint: Path) -> None:
        """Writes the average into a checkpoint."""
        save_file(self.average, checkpoint / WEIGHTS_FILE)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            self.export(model, Path(args.output_dir) / EXPORT_FOLDER)

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes a repository with the averaged weights; the model keeps its own."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.average}
        try:
            self._put(model, self.average)
            model.save_pretrained(folder)
        finally:
            self._put(model, own)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _put(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
