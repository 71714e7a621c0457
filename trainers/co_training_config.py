"""Options of `CoTrainingTrainer`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from .muon import MATRICES


# The stages of Qwen-VLA's recipe (section 3.1) but for the fourth, reinforcement learning, which has its own trainer.
# Their data (no images and whole trajectories for t2a, balanced sampling for sft) are the mixture's business.
STAGES = {
    "t2a": {"freeze": ["vision", "vlm"], "time_sampler": "logit_normal", "max_steps": 2000},
    "cpt": {"time_sampler": "beta"},
    "sft": {"time_sampler": "beta", "text_loss_weight": 0.1},
}


@dataclass
class CoTrainingConfig(TrainingArguments):
    r"""
    Training options of gradient-bridged co-training (Wall-OSS-0.5, section 2.2). The definition of the losses (space,
    weights, times) lives in [`WallVLAConfig`] and travels with the checkpoint.

    strategy (`str`, *optional*, defaults to `"co_training"`):
        What trains the VL expert (section 5.1). `"co_training"`: all three objectives. `"stop_gradient"`: all but the
        flow. `"stop_gradient_then_co_training"`: the one, and from `switch_step` on the other. `"flow_only"`: flow
        and text; the discrete action tokens of a batch, if it has any, are not learned.
    switch_step (`float`, *optional*, defaults to 6/7):
        Step of the switch; a value below 1 is a share of all steps (the paper: 60,000 of 70,000).
    loss_space (`str`, *optional*):
        `"action"` or `"velocity"`: where the flow loss of this run is measured (sections 2.2.2 and 5.2). It becomes
        the checkpoint's; by default it stays what the checkpoint says.
    time_sampler (`str`, *optional*), text_loss_weight (`float`, *optional*):
        As in [`WallVLAConfig`], for this run and from then on; by default what the checkpoint says.
    stage (`str`, *optional*):
        A stage of Qwen-VLA's recipe: `"t2a"` trains the action expert alone, at logit-normal times, for 2,000 steps;
        `"cpt"` everything at Beta times; `"sft"` too, with 0.1 as the weight of text. It only chooses defaults
        (`STAGES`): an option that is given wins.
    gradient_bridge_steps (`int`, *optional*, defaults to 0):
        Steps between two measurements of [`GradientBridgeCallback`]; 0: none.
    log_loss_breakdown (`bool`, *optional*, defaults to `False`):
        Logs the flow loss by noise level, channel and domain ([`LossBreakdown`]).
    peak_flops (`float`, *optional*):
        What one device can do in a second, for instance 989e12 (H100, bf16): logs the share of it that is used, `mfu`.
        Samples per second, waiting for data and memory are always logged ([`Throughput`]).
    ema_decay (`float`, *optional*, defaults to 0):
        Keeps a moving average of the weights ([`WeightAverage`]); 0: none. Not with adapters.
    freeze (`list[str]`, *optional*, defaults to none):
        Parts that are not trained in this run: `"vision"`, `"vlm"`, `"action_expert"`, `"heads"`, `"domains"`,
        `"prompts"` (`parts_of`). A stage of a recipe is a run: start the next one from the last one's folder with
        other parts.
    vision_learning_rate, vlm_learning_rate, action_expert_learning_rate, heads_learning_rate,
    domains_learning_rate, prompts_learning_rate (`float`, *optional*):
        Peak rate of a part; `learning_rate` when absent.
    adaptation_steps (`int`, *optional*, defaults to 0):
        In the first so many optimizer steps only what domains have of their own learns, its projections and prompts:
        the rate of everything else is exactly 0 (X-VLA, section 4.2.2 and appendix H: 1,000).
    adaptation_warmup_steps (`int`, *optional*, defaults to 1000):
        After these, steps in which the rates of everything else grow to what they would be.
    optimizer (`str`, *optional*, defaults to `"adamw"`):
        `"adamw"`, or `"muon"`: Muon on the matrices of the layers and AdamW on the rest (section 2.2.4,
        [`MuonWithAdamW`]). `"muon_naive"` and `"torch_muon"` are its baselines, for measurements.
    muon_matrices (`str`, *optional*):
        Regular expression: Muon gets the 2-D parameters in whose name it is found. By default those of the layers of
        both experts and of the blocks of the vision tower.

    All of [`~transformers.TrainingArguments`], with these other defaults:

    - `learning_rate`: 1e-4 (peak of pretraining; the paper fine-tunes at 5e-5), `lr_scheduler_type`: cosine,
      `max_grad_norm`: 1.0, `adam_beta2`: 0.95.
    - `remove_unused_columns`: `False`, the collator reads raw samples.
    - `train_sampling_strategy`: sequential, because `CoTrainingMixture` shuffles by itself, reproducibly.
    - `logging_nan_inf_filter`: `False`, a loss that is not finite stops the run instead of being hidden.
    - `logging_steps`: 10.
    """

    strategy: Literal["co_training", "stop_gradient", "stop_gradient_then_co_training", "flow_only"] = field(
        default="co_training", metadata={"help": "Which objectives train the VL expert."}
    )
    switch_step: float = field(
        default=6 / 7,
        metadata={"help": "Where stop_gradient_then_co_training switches: a step, or a share of all steps below 1."},
    )
    loss_space: Literal["action", "velocity"] | None = field(
        default=None, metadata={"help": "Where the flow loss is measured. Default: as the checkpoint says."}
    )
    time_sampler: Literal["beta", "uniform", "logit_normal", "stratified"] | None = field(
        default=None, metadata={"help": "Distribution of flow times. Default: as the checkpoint says."}
    )
    text_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the text loss. Default: as the checkpoint says."}
    )
    stage: Literal["t2a", "cpt", "sft"] | None = field(
        default=None, metadata={"help": "Defaults of a stage of Qwen-VLA's recipe."}
    )
    gradient_bridge_steps: int = field(
        default=0, metadata={"help": "Steps between two measurements of each objective's gradient; 0: none."}
    )
    log_loss_breakdown: bool = field(
        default=False, metadata={"help": "Log the flow loss by noise level, channel and domain."}
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "FLOPs of one device in a second; logs the share that is used."}
    )
    ema_decay: float = field(default=0.0, metadata={"help": "Decay of a moving average of the weights; 0: none."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that are not trained: vision, vlm, action_expert, heads, domains, prompts."},
    )
    vision_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the vision tower."})
    vlm_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the rest of the VL expert."})
    action_expert_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the layers of the action expert."}
    )
    heads_learning_rate: float | None = field(default=None, metadata={"help": "Peak rate of the fp32 action heads."})
    domains_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the projections that each domain has."}
    )
    prompts_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the learned tokens of each domain."}
    )
    adaptation_steps: int = field(
        default=0, metadata={"help": "First steps, in which only what domains have of their own learns."}
    )
    adaptation_warmup_steps: int = field(
        default=1000, metadata={"help": "Steps after these in which the other rates grow from 0."}
    )
    optimizer: Literal["adamw", "muon", "muon_naive", "torch_muon"] = field(
        default="adamw",
        metadata={"help": "muon: Muon on the matrices of the layers, AdamW on the rest. The other two are baselines."},
    )
    muon_matrices: str = field(
        default=MATRICES, metadata={"help": "Regular expression: names of the matrices that Muon gets."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs; max_steps wins. Default: 3, or the steps of the stage."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second moment of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: a number of steps, or a share below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide non-finite losses."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads raw samples."})
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "The mixture is already shuffled: keep its order."}
    )

    def __post_init__(self):
        stage = dict(STAGES[self.stage]) if self.stage is not None else {}
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
        else:
            stage.pop("max_steps", None)  # which would win over the epochs
        for name, value in stage.items():
            if vars(self)[name] in (None, [], -1):  # not given
                setattr(self, name, value)
        super().__post_init__()
        if self.switch_step < 0:
            raise ValueError(
                f"switch_step is {self.switch_step}: give a step, or a share of all steps below 1; it is not negative."
            )
        if self.adaptation_steps < 0 or self.adaptation_warmup_steps < 0:
            raise ValueError(
                f"adaptation_steps is {self.adaptation_steps} and adaptation_warmup_steps "
                f"{self.adaptation_warmup_steps}: numbers of steps are not negative."
            )
        if self.gradient_bridge_steps < 0:
            raise ValueError(f"gradient_bridge_steps is {self.gradient_bridge_steps}: 0 means none, else at least 1.")

    def stops_gradient(self, step: int, max_steps: int) -> bool:
        """Whether the flow is kept from the VL expert in the optimizer step after `step` steps of `max_steps`."""
        if self.strategy == "stop_gradient_then_co_training":
            switch = self.switch_step if self.switch_step >= 1 else math.ceil(self.switch_step * max_steps)
            return step < switch
        return self.strategy == "stop_gradient"

    @property
    def learning_rates(self) -> dict[str, float | None]:
        """Peak rate of each part of the model, `None` for `learning_rate`."""
        return {
            "vision": self.vision_learning_rate,
            "vlm": self.vlm_learning_rate,
            "action_expert": self.action_expert_learning_rate,
            "heads": self.heads_learning_rate,
            "domains": self.domains_learning_rate,
            "prompts": self.prompts_learning_rate,
        }

    @property
    def draws_per_step(self) -> int:
        """Samples of one optimizer step, over all ranks and micro batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size
