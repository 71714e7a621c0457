"""Options of `FlowPPOTrainer`."""

from dataclasses import dataclass, field
from typing import Literal

from .parameter_groups import PARTS


@dataclass
class FlowPPOConfig:
    """Options of reinforcement learning on a flow policy (Qwen-VLA, section 4.2). Defaults are the paper's where it
    states them; they are made for billions of parameters and thousands of chunks an iteration."""

    output_dir: str = field(default="runs/rl", metadata={"help": "Checkpoints, metrics and the trained repository."})
    iterations: int = field(default=100, metadata={"help": "Rollouts, each followed by an update."})
    episodes: int = field(default=64, metadata={"help": "Episodes of an iteration."})
    execute_steps: int = field(default=4, metadata={"help": "Actions of a chunk that are executed."})
    score_whole_chunk: bool = field(
        default=False,
        metadata={
            "help": "Log-probability over all steps of a chunk instead of those that were executed. Right where "
            "executed steps attend to later ones (experts that are not causal within the chunk)."
        },
    )

    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Euler steps, from then on the checkpoint's; default: what it says."}
    )
    noise_level: float = field(
        default=0.5, metadata={"help": "Share of the noise that a stochastic step draws anew, in (0, 1]."}
    )
    stochastic_steps: Literal["one", "all"] = field(
        default="one", metadata={"help": "Euler steps of a chunk that are stochastic: one at random, or all."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Scale of the initial noise and of the fresh noise."})

    gamma: float = field(default=0.99, metadata={"help": "Discount of a chunk."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Decay of the advantage's trace."})
    clip_range: float = field(default=0.2, metadata={"help": "Of the importance ratio around 1."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Of the value around what it was at the rollout."})
    value_coefficient: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    epochs: int = field(default=4, metadata={"help": "Passes over the chunks of an iteration."})
    target_kl: float | None = field(
        default=None, metadata={"help": "Ends the update of an iteration at this KL divergence; default: never."}
    )

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak rate of the policy."})
    value_learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate of the value head."})
    lr_scheduler_type: Literal["cosine", "constant"] = field(
        default="cosine", metadata={"help": "Of both rates, over the iterations."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "First moment of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second moment of AdamW."})
    weight_decay: float = field(
        default=0.01, metadata={"help": "Of the policy's matrices; tables of domains and the value head have none."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Of the policy and of the value head, each apart."})
    batch_size: int = field(default=64, metadata={"help": "Chunks of one forward and backward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of one optimizer step."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": f"Parts that are not trained: {', '.join(PARTS)}."}
    )
    cache_context: bool = field(
        default=False,
        metadata={
            "help": "Keep the encoded prefix of every chunk for the epochs of an update; only where freeze holds "
            "vision and vlm, and where keys and values of all chunks fit into memory."
        },
    )

    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    bf16: bool = field(default=False, metadata={"help": "Layers in bfloat16 under autocast; weights stay in float32."})
    seed: int = field(default=0, metadata={"help": "Of scenes, noise and order."})
    save_steps: int = field(default=10, metadata={"help": "Iterations between two checkpoints."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self):
        counts = ("iterations", "episodes", "execute_steps", "epochs", "batch_size", "gradient_accumulation_steps")
        for name in (*counts, "save_steps", "save_total_limit"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: it must be at least 1.")
        for name in ("temperature", "learning_rate", "value_learning_rate", "max_grad_norm", "clip_range"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} is {vars(self)[name]}: it must be positive.")
        if not 0 < self.noise_level <= 1:
            raise ValueError(
                f"noise_level is {self.noise_level}: it lies in (0, 1]. Without fresh noise an action has no density."
            )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} is {vars(self)[name]}: it lies in [0, 1].")
