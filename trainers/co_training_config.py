"""Options of `CoTrainingTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class CoTrainingConfig(TrainingArguments):
    r"""
    Training options of gradient-bridged co-training (Wall-OSS-0.5, section 2.2). What the weights depend on (loss
    space, loss weights, gradient bridge) lives in [`WallVLAConfig`] and travels with the checkpoint.

    `use_muon` (`bool`, *optional*, defaults to `False`) chooses [`MuonWithAdamW`] instead of AdamW for everything.

    All of [`~transformers.TrainingArguments`], with these other defaults:

    - `learning_rate`: 1e-4 (peak of pretraining; the paper fine-tunes at 5e-5), `lr_scheduler_type`: cosine,
      `max_grad_norm`: 1.0, `adam_beta2`: 0.95.
    - `remove_unused_columns`: `False`, the collator reads raw samples.
    - `train_sampling_strategy`: sequential, because `CoTrainingMixture` shuffles by itself, reproducibly.
    - `logging_nan_inf_filter`: `False`, a loss that is not finite stops the run instead of being hidden.
    - `logging_steps`: 10.
    """

    use_muon: bool = field(
        default=False, metadata={"help": "Muon on the matrices of the layers, AdamW on the rest (section 2.2.4)."}
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
