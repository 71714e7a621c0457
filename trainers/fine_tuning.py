"""Fine-tuning a checkpoint on a LeRobot dataset: what `wallvla train` runs."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from ..action_space_wallvla import Embodiment, short_camera_key
from ..data.collator import Collator
from ..data.lerobot import LeRobotDataset
from ..data.mixture import CoTrainingMixture, compose, drop_state, random_shift
from ..data.multimodal import MultimodalDataset
from ..data.statistics import compute_statistics
from .co_training_config import CoTrainingConfig
from .co_training_trainer import CoTrainingTrainer


@dataclass
class FineTuningArguments:
    """What is trained on what; how it is trained is `CoTrainingConfig`."""

    model: str = field(metadata={"help": "Checkpoint to start from: a folder or a Hub id."})
    dataset: str = field(metadata={"help": "LeRobot v3.0 dataset folder."})
    embodiment: str | None = field(
        default=None, metadata={"help": "Name of the robot in the checkpoint; a new name is added to it."}
    )
    embodiment_file: str | None = field(
        default=None,
        metadata={"help": "JSON of a new robot. Without it a new robot's vectors are used as they are (native)."},
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras of a new robot. Default: all."})
    multimodal: str | None = field(default=None, metadata={"help": "Parquet of questions and answers about images."})
    multimodal_fraction: float = field(default=0.1, metadata={"help": "Share of multimodal samples in every batch."})
    drop_state: float = field(default=0.1, metadata={"help": "Probability of hiding the proprioception."})
    random_shift: int = field(default=0, metadata={"help": "Largest random shift of an image, in pixels."})
    frames_in_memory: bool = field(default=False, metadata={"help": "Decode all video once, into memory."})


def native_embodiment(dataset: LeRobotDataset, action_horizon: int) -> Embodiment:
    """A robot whose state and action vectors are used as the dataset has them."""
    return Embodiment(
        cameras={key: f"{short_camera_key(key).replace('_', ' ')} view" for key in dataset.camera_keys},
        control_frequency=dataset.fps,
        action_horizon=action_horizon,
        state_layout=(("native", dataset.states.shape[1]),),
        action_layout=(("native", dataset.actions.shape[1]),),
    )


def prepare_embodiment(options: FineTuningArguments, processor) -> str:
    """Makes sure that the processor knows the robot of the dataset, statistics included. Returns its name."""
    name = options.embodiment
    if name is None and not options.embodiment_file and len(processor.embodiments) == 1:
        name = next(iter(processor.embodiments))
    if name in processor.embodiments and not options.embodiment_file:
        return name  # the statistics that the checkpoint was trained with stay as they are
    name = name or Path(options.embodiment_file or options.dataset).stem
    if options.embodiment_file:
        embodiment = Embodiment.from_dict(json.loads(Path(options.embodiment_file).read_text()))
        cameras = list(embodiment.cameras)
    else:
        embodiment, cameras = None, options.cameras
    horizon = processor.action_horizon if embodiment is None else embodiment.action_horizon
    dataset = LeRobotDataset(options.dataset, embodiment=name, cameras=cameras, action_horizon=horizon)
    if embodiment is None:
        embodiment = native_embodiment(dataset, horizon)
    values = embodiment.to_dict() | {"statistics": compute_statistics(dataset, embodiment)}
    processor.add_embodiment(name, Embodiment.from_dict(values))
    return name


def fine_tune(options: FineTuningArguments, args: CoTrainingConfig) -> Path:
    """Trains and saves a complete repository in `args.output_dir`. Goes on from its last checkpoint if it has one.

    Raises:
        ValueError: dataset, robot and checkpoint do not fit together.
    """
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype="float32")
    name = prepare_embodiment(options, processor)
    embodiment = processor.embodiments[name]
    dataset = LeRobotDataset(
        options.dataset,
        embodiment=name,
        cameras=list(embodiment.cameras),
        action_horizon=embodiment.action_horizon,
        frames_in_memory=options.frames_in_memory,
    )
    questions = MultimodalDataset(options.multimodal) if options.multimodal else None
    draws_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    mixture = CoTrainingMixture(
        dataset,
        questions,
        multimodal_fraction=options.multimodal_fraction,
        seed=args.seed,
        length=args.max_steps * draws_per_step if args.max_steps > 0 else None,
        augment=compose(random_shift(options.random_shift), drop_state(options.drop_state)),
    )
    trainer = CoTrainingTrainer(
        model=model,
        args=args,
        data_collator=Collator(processor),
        train_dataset=mixture,
        processing_class=processor,
    )
    folder = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    trainer.save_model(str(folder))
    return folder
