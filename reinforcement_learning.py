"""From a checkpoint to a better one by its own episodes in simulators: `wallvla train-rl`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModel, AutoProcessor

from .evaluation.environments import expand_names
from .evaluation.rollouts import RolloutPool, rollout_spec
from .trainers.flow_ppo_config import FlowPPOConfig
from .trainers.flow_ppo_trainer import FlowPPOTrainer


@dataclass
class RolloutArguments:
    """What acts where: the checkpoint, the simulators and what they pay."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub id."})
    env: list[str] = field(metadata={"help": "Simulators, as `wallvla eval --env` takes them: metaworld/TASK, ..."})
    embodiment: str | None = field(default=None, metadata={"help": "Robot of the checkpoint; default: its only one."})
    reward: Literal["success", "environment"] = field(
        default="success", metadata={"help": "1 where the task is solved, else 0; or the simulator's own reward."}
    )
    max_steps: int | None = field(
        default=300, metadata={"help": "Steps of an episode without success; none: when the simulator says so."}
    )
    image_size: int = field(default=64, metadata={"help": "Side of the camera images in pixels."})
    num_workers: int = field(default=2, metadata={"help": "Processes with simulators."})
    envs_per_worker: int = field(
        default=8, metadata={"help": "Simulators of a process, whose observations meet the policy as one batch."}
    )


@contextmanager
def make_trainer(options: RolloutArguments, args: FlowPPOConfig) -> Iterator[FlowPPOTrainer]:
    """A trainer of the checkpoint with its simulators, which are closed at the end.

    Raises:
        ValueError: options that do not fit the checkpoint or the simulators.
    """
    processor = AutoProcessor.from_pretrained(options.model)
    robot = processor.get_embodiment(options.embodiment)
    spec = rollout_spec(
        expand_names(options.env),
        cameras=[key.rsplit(".", 1)[-1] for key in robot.cameras],
        image_size=options.image_size,
        max_steps=options.max_steps,
        reward=options.reward,
    )
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    logs = Path(args.output_dir) / "logs"
    with RolloutPool(spec, options.num_workers, options.envs_per_worker, logs) as rollouts:
        yield FlowPPOTrainer(model, processor, args, rollouts, options.embodiment)


def train_rl(options: RolloutArguments, args: FlowPPOConfig) -> Path:
    """Trains and returns the folder of the result, `args.output_dir/hub`. Goes on from the last checkpoint there.

    Raises:
        ValueError: as `make_trainer`.
        WorkerError: the simulators die again and again.
    """
    with make_trainer(options, args) as trainer:
        return trainer.train()
