"""Fine-tuning a checkpoint on a LeRobot dataset: what `wallvla train` runs."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..action_space_wallvla import Embodiment, short_camera_key
from ..configuration_wallvla import WallVLAConfig
from ..data.augmentation import (
    Augmentation,
    color_jitter,
    compose,
    drop_cameras,
    drop_state,
    perturb_state,
    random_crop,
    random_shift,
    vary_instruction,
)
from ..data.collator import Collator
from ..data.lerobot import LeRobotDataset
from ..data.mixture import CoTrainingMixture
from ..data.multimodal import MultimodalDataset
from ..data.recipe import ActionEntry, build_mixture, open_entry, read_recipe
from ..data.statistics import compute_statistics
from ..data.unification import read_conversion
from ..modeling_wallvla import WallVLAForConditionalGeneration
from .adapters import EXPERTS, add_adapters, save_adapted
from .co_training_config import CoTrainingConfig
from .co_training_trainer import CoTrainingTrainer
from .distributed import DATA_STATE, last_checkpoint
from .estimate import Estimate, EstimateArguments, estimate_training
from .parameter_groups import freeze


logger = logging.getLogger(__name__)


@dataclass
class FineTuningArguments:
    """What is trained on what; how it is trained is `CoTrainingConfig`."""

    model: str = field(metadata={"help": "Checkpoint to start from: a folder or a Hub id."})
    dataset: str | None = field(default=None, metadata={"help": "LeRobot dataset: a folder or a Hub id."})
    mixture: str | None = field(
        default=None, metadata={"help": "YAML of several datasets (data/recipe.py), instead of --dataset."}
    )
    embodiment: str | None = field(
        default=None, metadata={"help": "Name of the robot in the checkpoint; a new name is added to it."}
    )
    embodiment_file: str | None = field(
        default=None,
        metadata={"help": "JSON of a new robot. Without it a new robot's vectors are used as they are (native)."},
    )
    cameras: list[str] | None = field(default=None, metadata={"help": "Cameras of a new robot. Default: all."})
    add_domain: str | None = field(
        default=None,
        metadata={
            "help": "NAME:INIT gives the model a new domain and the robot to it: the one of the dataset or, in a "
            "mixture, the one of this name. INIT: mean (default), copy:NAME or random."
        },
    )
    multimodal: str | None = field(default=None, metadata={"help": "Parquet of questions and answers about images."})
    multimodal_fraction: float = field(default=0.1, metadata={"help": "Share of multimodal samples in every batch."})
    drop_state: float = field(default=0.1, metadata={"help": "Probability of hiding the proprioception."})
    perturb_state: float = field(
        default=0.0, metadata={"help": "Noise on the shown proprioception, as a fraction of its range."}
    )
    drop_cameras: float = field(default=0.0, metadata={"help": "Probability of leaving a camera out; one stays."})
    random_shift: int = field(default=0, metadata={"help": "Largest random shift of an image, in pixels."})
    random_crop: float = field(default=1.0, metadata={"help": "Side of a random crop, as a share of the image's."})
    color_jitter: float = field(default=0.0, metadata={"help": "Jitter of brightness, contrast and saturation."})
    step_probability: float = field(
        default=0.5, metadata={"help": "Probability of the step-level instruction, where a dataset has them."}
    )
    paraphrases: str | None = field(default=None, metadata={"help": "JSON: other wordings by instruction."})
    clean: str | None = field(default=None, metadata={"help": "What `wallvla data clean` wrote for the dataset."})
    convert: str | None = field(
        default=None, metadata={"help": "YAML of kinematics or relative commands (data/unification.py)."}
    )
    state_key: str = field(default="observation.state", metadata={"help": "Feature with the proprioception."})
    action_key: str = field(default="action", metadata={"help": "Feature with the action; 'none' if there is none."})
    resample: bool = field(
        default=False, metadata={"help": "Steps at the robot's control_frequency, between frames where need be."}
    )
    on_error: str = field(
        default="raise",
        metadata={"help": "Samples that cannot be read: raise, or skip and log.", "choices": ["raise", "skip"]},
    )
    adapter_rank: int = field(
        default=0, metadata={"help": "Rank of low-rank adapters (LoRA); 0 trains the weights themselves."}
    )
    adapter_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by alpha / rank. Default: the rank."}
    )
    adapter_dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout on what the adapters read."})
    adapter_experts: list[str] = field(
        default_factory=lambda: list(EXPERTS), metadata={"help": "Where adapters go: vision, vlm, action_expert."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are trained whole beside the adapters. Default: heads and tables of domains."},
    )
    frames_in_memory: bool = field(default=False, metadata={"help": "Decode all video once, into memory."})

    def __post_init__(self):
        if (self.dataset is None) == (self.mixture is None):
            raise ValueError("Give either a dataset or a mixture.")
        of_dataset = (
            "embodiment",
            "embodiment_file",
            "cameras",
            "multimodal",
            "multimodal_fraction",
            "clean",
            "convert",
        )
        of_dataset += ("state_key", "action_key", "resample", "frames_in_memory")
        of_adapters = ("adapter_alpha", "adapter_dora", "adapter_dropout", "adapter_experts", "modules_to_save")
        rules = (
            (self.mixture is not None, of_dataset, "beside mixture, whose YAML says this for each dataset"),
            (self.multimodal is None, ("multimodal_fraction",), "without multimodal, the file of the questions"),
            (not self.adapter_rank, of_adapters, "without adapter_rank, so the weights themselves would be trained"),
        )
        for is_broken, names, reason in rules:
            unused = [name for name in names if is_broken and name in self._given()]
            if unused:
                raise ValueError(f"Found {', '.join(unused)} {reason}.")

    def _given(self) -> set[str]:
        """Names of the options that are not at their defaults."""
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {name for name, value in vars(self).items() if value != defaults[name]}


def native_embodiment(dataset: LeRobotDataset, action_horizon: int) -> Embodiment:
    """A robot whose state and action vectors are used as the dataset has them."""
    return Embodiment(
        cameras={key: f"{short_camera_key(key).replace('_', ' ')} view" for key in dataset.camera_keys},
        control_frequency=dataset.fps,
        action_horizon=action_horizon,
        state_layout=(("native", dataset.states.shape[1]),),
        action_layout=(("native", dataset.actions.shape[1]),),
    )


def entry_of(options: FineTuningArguments, name: str) -> ActionEntry:
    """The dataset of the options as the entry that a mixture would have for it."""
    return ActionEntry(
        options.dataset,
        name,
        clean=options.clean,
        convert=options.convert,
        state_key=options.state_key,
        action_key=None if options.action_key == "none" else options.action_key,
        resample=options.resample,
        frames_in_memory=options.frames_in_memory,
    )


def prepare_embodiment(options: FineTuningArguments, processor) -> str:
    """Makes sure that the processor knows the robot of the dataset. Returns its name."""
    name = options.embodiment
    if name is None and not options.embodiment_file and len(processor.embodiments) == 1:
        name = next(iter(processor.embodiments))
    is_known = name in processor.embodiments
    if options.cameras is not None and (is_known or options.embodiment_file):
        raise ValueError(
            f"Found cameras {options.cameras}, but {options.embodiment_file or 'the checkpoint'} says which ones the "
            "robot has: leave the option out, or change it there."
        )
    if is_known and not options.embodiment_file:
        return name  # the statistics that the checkpoint was trained with stay as they are
    known = ", ".join(processor.embodiments) or "none"
    name = name or Path(options.embodiment_file or options.dataset).stem
    if options.embodiment_file:
        processor.add_embodiment(name, json.loads(Path(options.embodiment_file).read_text()))
    else:
        entry = entry_of(options, name)
        dataset = LeRobotDataset(
            options.dataset,
            embodiment=name,
            cameras=options.cameras,
            action_horizon=processor.action_horizon,
            state_key=entry.state_key,
            action_key=entry.action_key,
            convert=read_conversion(options.convert) if options.convert else None,
            skip_errors=options.on_error == "skip",
        )
        processor.add_embodiment(name, native_embodiment(dataset, processor.action_horizon))
        logger.warning(
            "%s is a new robot, its vectors taken as they are (native); the checkpoint knows %s.", name, known
        )
    return name


def add_statistics(processor, datasets: Sequence[LeRobotDataset]) -> None:
    """Computes the statistics of the robots that have none, each over all of its datasets."""
    for name in dict.fromkeys(dataset.embodiment for dataset in datasets):
        robot = processor.embodiments[name]
        if robot.statistics is None and robot.normalization != "none":
            own = [dataset for dataset in datasets if dataset.embodiment == name]
            processor.add_embodiment(name, replace(robot, statistics=compute_statistics(own, robot)))


def add_robots(path: str, processor) -> None:
    """Adds the robots that a recipe brings along (`robots`) to the processor."""
    recipe = read_recipe(path)
    for name, file in recipe.robots.items():
        processor.add_embodiment(name, json.loads((recipe.folder / file).read_text()))


def build_augmentation(options: FineTuningArguments, processor) -> Augmentation:
    """The augmentations of the options; those that do nothing are left out, so they draw nothing either."""
    chosen = [random_shift(options.random_shift), drop_state(options.drop_state)]
    if options.random_crop < 1:
        chosen.append(random_crop(options.random_crop))
    if options.color_jitter:
        chosen.append(color_jitter(*[options.color_jitter] * 3))
    if options.drop_cameras:
        chosen.append(drop_cameras(options.drop_cameras))
    if options.perturb_state:
        chosen.append(perturb_state(options.perturb_state))
    paraphrases = json.loads(Path(options.paraphrases).read_text()) if options.paraphrases else {}
    chosen.append(vary_instruction(options.step_probability, paraphrases))
    return compose(*chosen)


def prepare_mixture(options: FineTuningArguments, args: CoTrainingConfig, processor) -> CoTrainingMixture:
    """Training samples: for `max_steps` steps, or for exactly `num_train_epochs` epochs (then sets `max_steps`)."""
    common = {
        "seed": args.seed,
        "augment": build_augmentation(options, processor),
        "skip_errors": options.on_error == "skip",
    }
    if options.mixture:
        add_robots(options.mixture, processor)
        recipe = read_recipe(options.mixture)
        mixture = build_mixture(recipe, processor.embodiments, processor=processor, **common)
        add_statistics(processor, [source.dataset for source in mixture.action_dataset.sources])
    else:
        name = prepare_embodiment(options, processor)
        dataset = open_entry(entry_of(options, name), processor.embodiments[name], skip_errors=common["skip_errors"])
        add_statistics(processor, [dataset])
        questions = MultimodalDataset(options.multimodal) if options.multimodal else None
        mixture = CoTrainingMixture(dataset, questions, multimodal_fraction=options.multimodal_fraction, **common)
    draws_per_step = args.draws_per_step
    if args.max_steps <= 0:
        args.max_steps = math.ceil(mixture.epochs_length(args.num_train_epochs) / draws_per_step)
    mixture.set_length(args.max_steps * draws_per_step)
    return mixture


def resume_mixture(mixture: CoTrainingMixture, checkpoint: str | Path, draws_per_step: int) -> None:
    """Makes the mixture go on where the run that wrote `checkpoint` stopped; the trainer counts steps of its own."""
    file = Path(checkpoint) / DATA_STATE
    if not file.is_file():
        return  # of a version that did not write it: right if the batch size is what it was
    step = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
    mixture.resume(json.loads(file.read_text()), index=step * draws_per_step)


def parse_domain(domain: str) -> tuple[str, str]:
    """Name and start of a domain that is written "NAME:INIT" or "NAME"."""
    name, _, start = domain.partition(":")
    return name, start or "mean"


def add_domain(model: WallVLAForConditionalGeneration, processor, robot: str, domain: str, seed: int) -> None:
    """Gives the model a domain and a robot to it.

    Args:
        model, processor: both are changed.
        robot: name of the embodiment.
        domain: "NAME:INIT" or "NAME", as in `WallVLAForConditionalGeneration.add_domain`.
        seed: of a random start.

    Raises:
        ValueError: no such robot, a domain that is there already, or an unknown start.
    """
    embodiment = processor.get_embodiment(robot)
    index = model.add_domain(*parse_domain(domain), torch.Generator().manual_seed(seed))
    processor.add_embodiment(robot, replace(embodiment, domain=index))


def weight_dtype(options: FineTuningArguments, args: CoTrainingConfig) -> torch.dtype:
    """float32 for weights that are trained; those that only carry adapters need no more than what multiplies them."""
    return torch.bfloat16 if options.adapter_rank and args.bf16 else torch.float32


def adapt(model: WallVLAForConditionalGeneration, options: FineTuningArguments) -> PeftModel:
    """The model with the adapters of the options."""
    return add_adapters(
        model,
        options.adapter_rank,
        options.adapter_alpha,
        options.adapter_dora,
        options.adapter_dropout,
        options.adapter_experts,
        options.modules_to_save,
    )


def estimate_run(
    config: WallVLAConfig, options: FineTuningArguments, args: CoTrainingConfig, sizes: EstimateArguments
) -> Estimate:
    """What a run with these options needs: `wallvla train --estimate`. No weight is made."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(config)
        if options.add_domain is not None:
            model.add_domain(*parse_domain(options.add_domain))
        if options.adapter_rank:
            for name, parameter in model.named_parameters():
                if not any(f"{kept}." in name for kept in model._keep_in_fp32_modules_strict):
                    parameter.data = parameter.data.to(weight_dtype(options, args))
            model = adapt(model, options)
        if args.freeze:
            freeze(model, args.freeze)
    return estimate_training(
        model.config,
        sizes.workload(args),
        args.optimizer,
        args.bf16,
        args.gradient_checkpointing,
        model,
        args.muon_matrices,
        args.ema_decay > 0,
        args.optim.value + (f" with optim_args {args.optim_args}" if args.optim_args else ""),
    )


def fine_tune(options: FineTuningArguments, args: CoTrainingConfig, sizes: EstimateArguments | None = None) -> Path:
    """Trains and saves a complete repository in `args.output_dir`. Goes on from its last checkpoint if it has one.

    Raises:
        ValueError: dataset, robot and checkpoint do not fit together.
        torch.OutOfMemoryError: with the estimate of what the run needs, for samples of `sizes`.
    """
    sizes = EstimateArguments() if sizes is None else sizes
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype=weight_dtype(options, args))
    mixture = prepare_mixture(options, args, processor)
    if options.add_domain is not None:
        robot = parse_domain(options.add_domain)[0] if options.mixture else mixture.action_dataset.embodiment
        add_domain(model, processor, robot, options.add_domain, args.seed)
    if options.adapter_rank:
        model = adapt(model, options)
    folder = Path(args.output_dir)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        logger.warning("Going on from %s. A new run needs another output_dir.", checkpoint)
        resume_mixture(mixture, checkpoint, args.draws_per_step)
    trainer = CoTrainingTrainer(
        model=model,
        args=args,
        data_collator=Collator(processor),
        train_dataset=mixture,
        processing_class=processor,
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        try:
            need = estimate_run(AutoConfig.from_pretrained(options.model), options, args, sizes)
        except ValueError as refusal:  # which must not take the place of the error that stopped the run
            need = refusal
        raise torch.OutOfMemoryError(
            f"{error}\nA run with these options needs about (--estimate, which takes the sizes of a sample):\n{need}\n"
            "Lower per_device_train_batch_size and raise gradient_accumulation_steps, set gradient_checkpointing, "
            "shard over more devices, or train adapters (adapter_rank)."
        ) from error
    if not options.adapter_rank:
        trainer.save_model(str(folder))
    elif args.should_save:
        save_adapted(trainer.accelerator.unwrap_model(trainer.model), processor, folder)
    return folder
