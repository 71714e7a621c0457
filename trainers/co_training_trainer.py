"""Gradient-bridged co-training as a `transformers.Trainer` (Wall-OSS-0.5, section 2.2.1)."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..data.mixture import CoTrainingMixture
from ..flow_matching_wallvla import loss_count, sample_time
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .co_training_config import CoTrainingConfig
from .distributed import DATA_STATE, complete_batch, discard_unfinished, last_checkpoint, unfinished_marker
from .gradient_bridge import OBJECTIVES, GradientBridgeCallback
from .instrument import Instrument, MicroBatch
from .loss_breakdown import LossBreakdown, Throughput
from .muon import OPTIMIZERS, is_muon_parameter
from .parameter_groups import DOMAIN_PARTS, adapt_in_two_steps, freeze, parts_of, split_by_part
from .weight_average import WeightAverage


LOSS_NAMES = tuple(f"{name}_loss" for name in OBJECTIVES)


class LossBarCallback(ProgressCallback):
    """A progress bar with the latest losses and the time that is left, instead of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {k: f"{v:.4g}" for k, v in logs.items() if k.endswith("loss") or k == "learning_rate"}
            self.training_bar.set_postfix(shown, refresh=False)


def build_instruments(model: nn.Module, args: CoTrainingConfig, processing_class=None) -> list[Instrument]:
    """The instruments that the options ask for."""
    config = model.config
    instruments: list[Instrument] = [Throughput(model, args.peak_flops)]
    if args.log_loss_breakdown:
        robots = [] if processing_class is None else processing_class.embodiments.values()
        domains = 1 + max((robot.domain for robot in robots), default=0)
        instruments.append(LossBreakdown(config.action_dim, config.loss_space, config.time_scale, domains))
    if args.gradient_bridge_steps:
        plot = Path(args.output_dir) / "gradient_bridge.png"
        instruments.append(GradientBridgeCallback(args.gradient_bridge_steps, plot=plot))
    return instruments


class CoTrainingTrainer(Trainer):
    r"""
    Trains the three objectives of a [`WallVLAForConditionalGeneration`] together (equation 1).

    Each loss is averaged over all its own elements in the whole optimizer step: over the micro batches that are
    accumulated and over all ranks. A batch or a rank without a kind of sample biases nothing.

    The noise and the time of the flow are drawn from (seed, step, place in the step), so a resumed run sees the draws
    it would have seen, also with other ranks and micro batches.

    A checkpoint is whole or it is absent: while it is written a file `checkpoint-N.unfinished` lies beside it, and
    what a killed run left behind is deleted when training starts.

    Args:
        model: the model to train.
        args: training options.
        data_collator: makes a batch of samples, `wallvla.data.collator.Collator`.
        train_dataset: yields samples, `wallvla.data.mixture.CoTrainingMixture`.
        eval_dataset: yields samples, *optional*.
        processing_class: the processor, saved with every checkpoint so that each is a complete repository. Its action
            codec must be the model's.
        callbacks: more `TrainerCallback`s, *optional*; an [`Instrument`] among them also sees every micro batch.
    """

    # The loss that compute_loss returns is already a share of the accumulated batch
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: WallVLAForConditionalGeneration,
        args: CoTrainingConfig,
        data_collator,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if processing_class is not None:
            processing_class.check_model(model.config)
        for name in ("loss_space", "time_sampler", "text_loss_weight"):
            if vars(args)[name] is not None:
                setattr(model.config, name, vars(args)[name])
        model.config.validate()  # also when it is saved, which is too late
        if args.freeze:
            freeze(model, args.freeze)
        part_of = parts_of(model)
        learned = {part_of[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._has_domains = not learned.isdisjoint(DOMAIN_PARTS)
        if args.adaptation_steps and not self._has_domains:
            raise ValueError(
                f"adaptation_steps is {args.adaptation_steps}, but no parameters of domains are trained: leave it at "
                "0, or start from a model with domains and freeze neither domains nor prompts."
            )
        if args.ema_decay and isinstance(model, PeftModel):
            raise ValueError(
                f"ema_decay is {args.ema_decay}, but the model has adapters, whose average is no whole model: leave "
                "ema_decay or adapter_rank out."
            )
        callbacks = [*(callbacks or ()), *build_instruments(model, args, processing_class)]
        self._average = WeightAverage(args.ema_decay, processing_class) if args.ema_decay else None
        if self._average is not None:
            callbacks.append(self._average)
        self.instruments = [callback for callback in callbacks if isinstance(callback, Instrument)]
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossBarCallback)
        # Our batches always carry what a loss needs, whichever keys those are
        self.can_return_loss = True
        self.label_names = []
        self._micro_batch = 0
        self._metrics = {"train": torch.zeros(2, 3), "eval": torch.zeros(2, 3)}  # sums and counts of each loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as in `Trainer`, or Muon with AdamW; each part of the model at its own rate, if it has one."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        if self.args.optimizer == "adamw":
            super().create_optimizer(model)
        else:
            self.optimizer = OPTIMIZERS[self.args.optimizer](
                model.named_parameters(),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                is_muon=partial(is_muon_parameter, matrices=self.args.muon_matrices),
                dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
        if self._has_domains or any(rate is not None for rate in self.args.learning_rates.values()):
            split_by_part(self.optimizer, model, self.args.learning_rates)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`, and the parameters of domains go ahead (`adaptation_steps`)."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = self.optimizer if optimizer is None else optimizer
        super().create_scheduler(num_training_steps, optimizer)
        steps, warmup = self.args.adaptation_steps, self.args.adaptation_warmup_steps
        if steps:
            self.lr_scheduler = adapt_in_two_steps(self.lr_scheduler, optimizer, steps, warmup)
        return self.lr_scheduler

    def _labels(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The labels (B, S) that the strategy learns: `flow_only` leaves the discrete action tokens out."""
        labels = batch["labels"]
        if self.args.strategy != "flow_only":
            return labels
        return labels.masked_fill(self.accelerator.unwrap_model(self.model).is_action_token(labels), -100)

    def count_targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many action elements, discrete action tokens and text tokens a batch trains on. (3,) float32."""
        counts = torch.zeros(3)
        if "action_mask" in batch and "actions" in batch:
            reduction = self.accelerator.unwrap_model(self.model).config.loss_reduction
            counts[0] = loss_count(batch["action_mask"], reduction)
        if "labels" in batch:
            targets = self._labels(batch)[:, 1:]
            of_action = self.accelerator.unwrap_model(self.model).is_action_token(targets)
            counts[1] = of_action.sum()
            counts[2] = (targets != -100).sum() - counts[1]
        return counts

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """The counts of `count_targets` over all micro batches of the step and all ranks."""
        self._micro_batch = 0
        if not batch_samples:
            return None
        counts = torch.stack([self.count_targets(batch) for batch in batch_samples]).sum(dim=0).to(device)
        return self.accelerator.reduce(counts, reduction="sum")

    def _draw_flow(self, actions: Tensor) -> dict[str, Tensor]:
        """Noise (B, H, D) and times (B,) that depend only on seed, step and the place of a sample in the step.

        So it does not matter how ranks and micro batches share a step, and a run may go on with other ones.
        """
        config = self.accelerator.unwrap_model(self.model).config
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.model.training:
            # The loader deals out batches rank by rank, then the next micro batch
            step, batch_size = self.state.global_step, self._train_batch_size
            first = (self._micro_batch * ranks + rank) * batch_size
            total = ranks * batch_size * self.args.gradient_accumulation_steps
        else:  # the same draws at every evaluation
            step, batch_size = self._micro_batch, self.args.eval_batch_size
            first, total = rank * batch_size, ranks * batch_size
        key = [self.args.seed, step, int(self.model.training)]

        # On the CPU, so that a run gives the same draws on every device
        def generator(*place: int) -> torch.Generator:
            return torch.Generator().manual_seed(int(np.random.SeedSequence([*key, *place]).generate_state(1)[0]))

        # From 1: a `SeedSequence` with a zero at its end is the one without it, which is that of the times
        noise = torch.stack(
            [torch.randn(actions.shape[1:], generator=generator(1 + first + i)) for i in range(len(actions))]
        )
        time = sample_time(total, config.time_sampler, config.time_alpha, config.time_scale, generator())
        return {"noise": noise.to(actions.device), "time": time[first : first + len(actions)].to(actions.device)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """The weighted sum of the losses, each scaled to this micro batch's share of the optimizer step."""
        if self.accelerator.num_processes > 1:
            inputs = complete_batch(inputs, self.accelerator.unwrap_model(model))
        if "actions" in inputs:
            inputs = {**inputs, **self._draw_flow(inputs["actions"])}
        self._micro_batch += 1  # also without actions: it is the place in the step
        if "labels" in inputs:
            inputs = {**inputs, "labels": self._labels(inputs)}
        stop_gradient = self.args.stops_gradient(self.state.global_step, self.state.max_steps)
        outputs = model(**inputs, stop_gradient=stop_gradient)
        config = self.accelerator.unwrap_model(model).config
        weights = (1.0, config.action_token_loss_weight, config.text_loss_weight)
        counts = outputs.loss_counts
        totals = counts if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over ranks afterwards; the shares have to be summed
        shares = counts / totals.clamp(min=1) * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        sums = torch.zeros(3, device=counts.device)
        objectives = {}
        for i, (name, weight) in enumerate(zip(OBJECTIVES, weights, strict=True)):
            value = outputs.get(f"{name}_loss")
            if value is not None:
                objectives[name] = weight * shares[i] * value
                sums[i] = value.detach() * counts[i]
        loss = sum(objectives.values(), torch.zeros((), device=counts.device))
        mode = "train" if model.training else "eval"
        if model.training:
            if not loss.isfinite():
                self._stop_at(inputs, {name: value.item() for name, value in objectives.items()})
            for instrument in self.instruments:
                instrument.on_micro_batch(self.state.global_step, MicroBatch(inputs, outputs, objectives))
        self._metrics[mode] = self._metrics[mode].to(counts.device) + torch.stack([sums, counts])
        return (loss, outputs) if return_outputs else loss

    def _stop_at(self, inputs: Mapping[str, Tensor], objectives: dict[str, float]) -> None:
        """Saves the micro batch whose loss is not finite, as the model got it, and stops the run."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        step, rank = self.state.global_step, self.accelerator.process_index
        file = folder / f"nonfinite-step-{step}-rank-{rank}.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in inputs.items()}, file)
        raise FloatingPointError(
            f"The loss is not finite at step {step}: {objectives}. The batch is in {file}: look there for extreme "
            f"actions, lower the learning rate (it is {self.args.learning_rate}), or go on from the last checkpoint."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last log, and what the instruments found."""
        mode = "train" if self.model.training else "eval"
        sums, counts = self.accelerator.reduce(self._metrics[mode], reduction="sum").tolist()
        for name, total, count in zip(LOSS_NAMES, sums, counts, strict=True):
            if count > 0:
                logs[name if mode == "train" else f"eval_{name}"] = total / count
        self._metrics[mode].zero_()
        if mode == "train":
            for instrument in self.instruments:
                logs |= instrument.take_logs()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options):
        """As `Trainer.train`; first deletes checkpoints that a killed run was writing, and never resumes from one."""
        if self.args.should_save:
            discard_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if self._average is not None and resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            self._average.checkpoint = Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **options)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As in `Trainer`, with the state of the data, and so that being killed at any moment does no harm."""
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            run.mkdir(parents=True, exist_ok=True)
            unfinished_marker(checkpoint).touch()
        self.accelerator.wait_for_everyone()
        # Older checkpoints may go when this one is whole, on all ranks, and not before
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and isinstance(self.train_dataset, CoTrainingMixture):
            state = self.train_dataset.state(self.state.global_step * self.args.draws_per_step)
            (checkpoint / DATA_STATE).write_text(json.dumps(state, indent=1) + "\n")
        if self.args.should_save and self._average is not None:
            self._average.save(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            unfinished_marker(checkpoint).unlink()
            rotate_checkpoints(str(run), limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, but the model that a run ends with is always whole, also where checkpoints are sharded."""
        if not self.is_fsdp_enabled or _internal_call:
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        kept = plugin.state_dict_type.name
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(kept)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in `Trainer`; weights that were gathered from shards hold tied ones twice, and are written once."""
        if state_dict is not None:
            tied = self.accelerator.unwrap_model(self.model).all_tied_weights_keys
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuses to go on from a checkpoint that does not match; the parent class only warns."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint to resume from does not match the model: {len(missing)} missing "
                f"{sorted(missing)[:8]}, {len(load_result.unexpected_keys)} unexpected "
                f"{sorted(load_result.unexpected_keys)[:8]}. Resume with the code and the config that wrote it."
            )

    def evaluation_loop(self, *args, **kwargs):
        self._micro_batch = 0
        return super().evaluation_loop(*args, **kwargs)
