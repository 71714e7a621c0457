"""Instruments: callbacks that see every micro batch of training and add figures to the logs."""

from dataclasses import dataclass

from torch import Tensor
from transformers import TrainerCallback

from ..modeling_wallvla import WallVLAOutput


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of training between its forward and its backward pass.

    inputs: what the model got, with `noise` and `time` of the flow.
    outputs: what it returned.
    objectives: "flow", "action_token", "text" -> the scalar term of this objective, weighted and scaled to its share
        of the optimizer step. Their sum is what is differentiated; only objectives that the batch has.
    """

    inputs: dict[str, Tensor]
    outputs: WallVLAOutput
    objectives: dict[str, Tensor]


class Instrument(TrainerCallback):
    """A callback that `CoTrainingTrainer` also calls with every micro batch, and asks for figures at every log.

    It must not change anything: the graph of `MicroBatch.objectives` is still to be differentiated.
    """

    def on_micro_batch(self, step: int, micro_batch: MicroBatch) -> None:
        """`step`: optimizer steps done so far. Called before the backward pass."""

    def take_logs(self) -> dict[str, float]:
        """Figures since the last call, the same on every rank."""
        return {}
