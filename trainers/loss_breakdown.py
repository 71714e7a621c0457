"""Where the flow loss comes from, and where the time goes."""

import time

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from ..flow_matching_wallvla import interpolate, velocity_from_action, velocity_of
from .gradient_bridge import VL_LAYER
from .instrument import Instrument, MicroBatch


class LossBreakdown(Instrument):
    """The flow loss by noise level, by channel and by embodiment, in the loss space of the run.

    Logs `flow_loss_time_<i>` for equal intervals of the flow time, `flow_loss_channel_<d>` for channels of the model,
    and `flow_loss_domain_<k>` for the embodiments' domains if there are several. Each is a mean over its own elements,
    over all ranks and steps since the last log; what no element fell into is left out.

    Args:
        action_dim: channels D of the model.
        loss_space: "action" or "velocity", the run's.
        time_scale: largest flow time.
        num_domains: domains 0 to num_domains - 1 are told apart.
        num_levels: intervals of the flow time.
    """

    def __init__(
        self, action_dim: int, loss_space: str, time_scale: float = 0.999, num_domains: int = 1, num_levels: int = 5
    ):
        self.loss_space, self.time_scale = loss_space, time_scale
        self.sizes = {"time": num_levels, "channel": action_dim, "domain": num_domains}
        self._totals: dict[str, Tensor] = {}

    def on_micro_batch(self, step: int, micro_batch: MicroBatch) -> None:
        inputs, prediction = micro_batch.inputs, micro_batch.outputs.action_prediction
        if prediction is None:
            return
        actions, noise, times = inputs["actions"], inputs["noise"], inputs["time"]
        mask = inputs["action_mask"]
        with torch.no_grad():
            error = prediction.detach() - actions
            if self.loss_space == "velocity":
                noisy = interpolate(actions, noise, times)
                error = velocity_from_action(noisy, prediction.detach(), times) - velocity_of(actions, noise)
            squares = torch.where(mask, error, 0.0).double().square()  # (B, H, D)
            levels = (times / self.time_scale * self.sizes["time"]).long().clamp(max=self.sizes["time"] - 1)
            places = {"time": levels, "domain": inputs["domain_ids"]} if "domain_ids" in inputs else {"time": levels}
            self._add("channel", squares.sum((0, 1)), mask.sum((0, 1)))
            for name, place in places.items():
                zeros = torch.zeros(self.sizes[name], dtype=torch.float64, device=place.device)
                self._add(
                    name,
                    zeros.index_add(0, place, squares.sum((1, 2))),
                    zeros.index_add(0, place, mask.sum((1, 2)).double()),
                )

    def _add(self, name: str, sums: Tensor, counts: Tensor) -> None:
        both = torch.stack([sums, counts.double()])
        self._totals[name] = self._totals[name] + both if name in self._totals else both

    def take_logs(self) -> dict[str, float]:
        logs = {}
        for name, size in self.sizes.items():
            if name not in self._totals or (name == "domain" and size == 1):
                continue
            sums, counts = reduce(self._totals[name], "sum").tolist()
            logs |= {f"flow_loss_{name}_{i}": sums[i] / counts[i] for i in range(size) if counts[i] > 0}
        self._totals = {}
        return logs


class Throughput(Instrument):
    """Samples per second, the share of time spent waiting for data, model FLOPs per second and peak device memory.

    `data_wait`: share of the time between the end of an optimizer step and the first forward pass of the next one,
    which is what the loader and the collator take in the training process. FLOPs are 6 per parameter of a layer and
    position that goes through it (paper 2001.08361), for the layers of the language model and of the action expert:
    the vision tower is not counted, and neither is attention.

    Args:
        model: a [`WallVLAForConditionalGeneration`].
        peak_flops: of one device; with it `mfu`, the share of it that is used, is logged.
    """

    def __init__(self, model: nn.Module, peak_flops: float | None = None):
        self.model, self.peak_flops = model, peak_flops
        self.vlm_parameters = sum(p.numel() for name, p in model.named_parameters() if VL_LAYER.search(name))
        self.expert_parameters = sum(p.numel() for p in model.action_expert.layers.parameters())
        self._clear()

    def _clear(self) -> None:
        self._samples, self._flops, self._waited = 0, 0.0, 0.0
        self._began = self._step_ended = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._clear()

    def on_micro_batch(self, step: int, micro_batch: MicroBatch) -> None:
        inputs = micro_batch.inputs
        rows, length = inputs["input_ids"].shape
        of_row = self.vlm_parameters * self.model.vl_expert.encoded_length(inputs)
        if "actions" in inputs:
            tokens = self.model.action_expert.sequence_length(length, inputs["actions"].shape[1])
            of_row += self.expert_parameters * tokens
        self._samples += rows
        self._flops += 6 * rows * of_row

    def on_step_begin(self, args, state, control, **kwargs):
        self._waited += time.perf_counter() - self._step_ended

    def on_step_end(self, args, state, control, **kwargs):
        self._step_ended = time.perf_counter()

    def take_logs(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._began
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        samples = reduce(torch.tensor(self._samples, device=device), "sum").item()
        if samples == 0:  # the summary after the last step
            return {}
        logs = {
            "samples_per_second": samples / seconds,
            "tflops": self._flops / seconds / 1e12,
            "data_wait": self._waited / seconds,
        }
        if self.peak_flops is not None:
            logs["mfu"] = self._flops / seconds / self.peak_flops
        if device.type == "cuda":
            logs["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._clear()
        return logs
