"""From demonstrations to a closed-loop policy in a Hub-ready folder: `wallvla quickstart`.

    record       scripted experts in Meta-World -> a LeRobot v3.0 dataset, and grounding samples of the same frames
    build        normalisation statistics, a small tokenizer, a processor, a model of a few million parameters
    train        flow matching on the actions and cross-entropy on the grounding answers, together
    save         a folder that AutoModel and AutoProcessor load with trust_remote_code, without this package
    evaluate     in processes that cannot import this package: the policy, its controls and two baselines
    report       curves, pictures, a video and summary.json

Every stage leaves its result on disk and is skipped when it is already there, so an interrupted run goes on where it
stopped. Nothing here is special: each stage is a few calls of the library.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer, TrainerCallback, set_seed
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint

from . import register_auto_classes
from .action_space_wallvla import Embodiment
from .baseline_codecs_wallvla import ActionCodec, load_action_codec
from .configuration_wallvla import WallVLAConfig
from .data.collator import Collator
from .data.lerobot import LeRobotDataset
from .data.lerobot_writer import LeRobotWriter
from .data.mixture import CoTrainingMixture, compose, drop_state, random_shift
from .data.multimodal import MultimodalDataset, MultimodalWriter
from .data.statistics import compute_statistics
from .evaluation.closed_loop import closed_loop_spec, evaluate, format_summary
from .evaluation.demonstrations import record_demonstrations, record_scenes
from .evaluation.grounding import evaluate_grounding
from .evaluation.grounding_subjects import CheckpointSubject
from .evaluation.metaworld import (
    ACTION_NAMES,
    ACTION_UNITS,
    CONTROL_FREQUENCY,
    EVALUATION_SEED_START,
    INSTRUCTIONS,
    STATE_NAMES,
    check_task,
)
from .evaluation.open_loop import format_open_loop, open_loop_metrics, predict_demonstration
from .evaluation.plots import grounding_picture, plot_losses, plot_open_loop, save_pictures
from .evaluation.policy import HubPolicy
from .grounding_wallvla import grounding_prompt
from .modeling_wallvla import WallVLAForConditionalGeneration
from .processing_wallvla import WallVLAProcessor
from .trainers.co_training_config import CoTrainingConfig
from .trainers.co_training_trainer import LOSS_NAMES, CoTrainingTrainer


EMBODIMENT = "metaworld_sawyer"
DEFAULT_TASKS = ("button-press-topdown-v3", "window-close-v3", "drawer-open-v3")
# Held-out demonstrations of the open-loop plot: seeds that neither training nor closed-loop evaluation uses
OPEN_LOOP_SEED = 90_000
OPTIONS_FILE = "quickstart.json"  # marks a folder as a run of ours, which --overwrite may delete


@dataclass
class QuickstartConfig:
    """Options of `quickstart`. All but `output` and `overwrite` are written to `quickstart.json` in the run folder."""

    output: str = field(default="runs/quickstart", metadata={"help": "Run folder."})
    task: list[str] = field(default_factory=lambda: list(DEFAULT_TASKS), metadata={"help": "Meta-World tasks."})
    episodes: int = field(default=30, metadata={"help": "Demonstrations of each task."})
    steps: int = field(default=1500, metadata={"help": "Training steps."})
    batch_size: int = field(default=32, metadata={"help": "Samples of a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    multimodal_fraction: float = field(default=0.2, metadata={"help": "Share of grounding questions in a batch."})
    text_loss_weight: float = field(default=0.01, metadata={"help": "Weight of the grounding answers in the loss."})
    image_size: int = field(default=64, metadata={"help": "Side of the camera images in pixels."})
    cameras: list[str] = field(
        default_factory=lambda: ["front"], metadata={"help": "What the policy sees: front, wrist."}
    )
    eval_episodes: int = field(default=50, metadata={"help": "Closed-loop episodes of each task."})
    control_episodes: int = field(default=20, metadata={"help": "Episodes of each task for the controls."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    num_processes: int = field(default=2, metadata={"help": "Simulators that run at the same time."})
    seed: int = field(default=0, metadata={"help": "Of initialisation, data order and noise."})
    overwrite: bool = field(default=False, metadata={"help": "Delete a run that the folder holds."})
    codec: str | None = field(
        default=None, metadata={"help": "Folder of an action codec: co-trains its discrete tokens."}
    )

    def __post_init__(self):
        for task in self.task:
            check_task(task)
        positive = ("episodes", "steps", "batch_size", "eval_episodes", "control_episodes", "num_processes")
        for name in positive:
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: it must be at least 1.")
        if not set(self.cameras) <= {"front", "wrist"} or not self.cameras:
            raise ValueError(f"cameras is {self.cameras}: choose among front and wrist, which the dataset holds.")


def quickstart(config: QuickstartConfig) -> dict:
    """Runs all stages and returns what `report/summary.json` holds.

    Raises:
        FileExistsError: the output folder holds a finished run, or one with other options.
    """
    started = time.perf_counter()
    folder = _prepare_folder(config)
    seconds = {}

    def stage(name: str, result: Path, run: Callable[[Path], None]) -> None:
        """Runs a stage whose result is not there yet; a result appears only when it is complete."""
        if result.exists():
            print(f"[{name}] {result} is there, skipping")
            return
        print(f"[{name}]")
        begun = time.perf_counter()
        run(result)
        seconds[name] = round(time.perf_counter() - begun, 1)

    stage("record", folder / "grounding.parquet", lambda _: record(config, folder))
    stage("train", folder / "hub", lambda result: train(config, folder, result))
    stage("evaluate", folder / "evaluation" / "summary.json", lambda result: evaluate_policy(config, folder, result))
    seconds["total"] = round(time.perf_counter() - started, 1)
    summary = write_report(config, folder, seconds)
    print(f"[done] {seconds['total']:.0f} s. The model is in {folder / 'hub'}, the report in {folder / 'report'}.")
    return summary


def _prepare_folder(config: QuickstartConfig) -> Path:
    """The run folder, new or of the same interrupted run."""
    folder = Path(config.output)
    options = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("output", "overwrite")
    }
    if config.overwrite and (folder / OPTIONS_FILE).exists():
        shutil.rmtree(folder)
    if (folder / OPTIONS_FILE).exists():
        found = json.loads((folder / OPTIONS_FILE).read_text())
        differing = {name: (found.get(name), value) for name, value in options.items() if found.get(name) != value}
        if differing:
            raise FileExistsError(
                f"{folder} holds a run with other options (there, here): {differing}. Choose another --output, or "
                "--overwrite to delete that run."
            )
        if (folder / "report" / "summary.json").exists():
            raise FileExistsError(
                f"{folder} holds a finished run: see {folder / 'report'}. Choose another --output, or --overwrite to "
                "delete that run."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no quickstart run. Choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / OPTIONS_FILE, options)
    return folder


# --- record


def record(config: QuickstartConfig, folder: Path) -> None:
    """Writes `dataset/` (LeRobot v3.0) and `grounding.parquet` (boxes and points of the objects in its frames)."""
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    camera = {
        "dtype": "video",
        "shape": [config.image_size, config.image_size, 3],
        "names": ["height", "width", "channel"],
    }
    features = {
        "observation.state": {"dtype": "float32", "shape": [len(STATE_NAMES)], "names": list(STATE_NAMES)},
        "action": {"dtype": "float32", "shape": [len(ACTION_NAMES)], "names": list(ACTION_NAMES)},
        "observation.images.front": camera,
        "observation.images.wrist": camera,
    }
    objects = []
    with LeRobotWriter(folder / "dataset", fps=CONTROL_FREQUENCY, features=features, robot_type="sawyer") as writer:
        demonstrations = record_demonstrations(
            config.task, config.episodes, image_size=config.image_size, num_processes=config.num_processes
        )
        for demonstration in demonstrations:
            frames = {f"observation.images.{name}": images for name, images in demonstration.frames.items()}
            columns = {"observation.state": demonstration.states, "action": demonstration.actions, **frames}
            for step in range(len(demonstration.states)):
                writer.add_frame({name: values[step] for name, values in columns.items()})
            writer.save_episode(demonstration.instruction)
            objects += demonstration.grounding
    # The format of the answers is the processor's
    processor = build_processor(config, embodiment(config))
    size = (config.image_size, config.image_size)
    with MultimodalWriter(folder / "grounding.parquet") as writer:
        for sample in objects:
            center = ((sample.box[0] + sample.box[2]) / 2, (sample.box[1] + sample.box[3]) / 2)
            answers = {"box": processor.format_box(sample.box, size), "point": processor.format_point(center, size)}
            for kind, answer in answers.items():
                metadata = {"object": sample.name, "task": sample.task, "box": list(map(float, sample.box))}
                writer.add(sample.image, grounding_prompt(kind, sample.name), answer, metadata)


# --- build


def embodiment(config: QuickstartConfig, statistics: dict | None = None) -> Embodiment:
    """Meta-World's Sawyer: end-effector position and gripper in, displacement and gripper effort out."""
    return Embodiment(
        cameras={f"observation.images.{name}": f"{name} view" for name in config.cameras},
        control_frequency=CONTROL_FREQUENCY,
        action_horizon=8,
        state_layout=(("native", len(STATE_NAMES)),),
        action_layout=(("native", len(ACTION_NAMES)),),
        statistics=statistics,
    )


def build_tokenizer(config: QuickstartConfig) -> Qwen2Tokenizer:
    """A Qwen tokenizer of a few hundred tokens, in which the fixed phrases and the numbers are one token each.

    The prompt is the same text as for a tokenizer of 150,000 tokens, and a third as long: on a CPU the length of the
    prefix decides how fast training goes.
    """
    words = [f"Instruction: {text}" for text in INSTRUCTIONS.values()]
    words += [
        grounding_prompt(kind, name) for name in ("button", "window handle", "robot hand") for kind in ("point", "box")
    ]
    words += ["You are a helpful assistant.", "Observation: front view: wrist view: left right", "drawer cabinet box"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(words * 8, vocab_size=900, show_progress=False)
    special = ["im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in special]})
    tokenizer.eos_token = "<|im_end|>"  # ends a turn, as in Qwen's instruction-tuned models
    phrases = [
        "system\nYou are a helpful assistant.",
        "user\n",
        "user\nObservation:",
        " front view: ",
        " wrist view: ",
        "\nInstruction:",
        "\nPredict the next action in robot action.\nProprioception:",
        "assistant\n",
        "? Answer with a box.",
        "Point to the",
        "Where is the",
        *("<box>[", "]</box>", "<point>[", "]</point>"),
    ]
    # lstrip: a number takes the blank before it along
    numbers = [
        AddedToken(str(number), lstrip=True, normalized=False) for number in range(max(100, config.image_size + 1))
    ]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases] + numbers)
    return tokenizer


def build_processor(
    config: QuickstartConfig, robot: Embodiment, codec: ActionCodec | None = None, **options
) -> WallVLAProcessor:
    """The processor of the small model: 64 bins of proprioception, patches of 8 pixels, images at their own size.

    `options`: more arguments of `WallVLAProcessor`.
    """
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=1, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 512 * 512}
    )
    return WallVLAProcessor(
        image_processor,
        build_tokenizer(config),
        {EMBODIMENT: robot},
        action_dim=int(robot.action_channels[-1]) + 1,
        action_horizon=robot.action_horizon,
        state_bins=64,
        longest_side=config.image_size,
        action_codec=codec,
        **options,
    )


def build_model(
    processor: WallVLAProcessor, text_loss_weight: float = 0.01, **fields
) -> WallVLAForConditionalGeneration:
    """`WallVLAConfig.tiny()` with the token ids of the processor's tokenizer, randomly initialised.

    `fields`: more of `WallVLAConfig.tiny`.
    """
    tokenizer = processor.tokenizer
    discrete = {} if processor.action_codec is None else processor.action_token_config()
    config = WallVLAConfig.tiny(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        text_loss_weight=text_loss_weight,
        **{"action_dim": processor.action_dim, "action_horizon": processor.action_horizon, **discrete, **fields},
    )
    vlm, text = config.vlm_config, config.vlm_config.text_config
    for name in ("image", "video"):
        setattr(vlm, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(vlm, f"vision_{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>"))
    text.eos_token_id = processor.end_token_id
    text.pad_token_id = tokenizer.pad_token_id
    return WallVLAForConditionalGeneration(config)


# --- train


def train(
    config: QuickstartConfig,
    folder: Path,
    result: Path,
    options: Mapping | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Builds the model and the processor, co-trains, and saves the Hub-ready folder `result`.

    `options`: more fields of `CoTrainingConfig`; `callbacks`: of the trainer.
    """
    set_seed(config.seed)
    dataset = LeRobotDataset(
        folder / "dataset", embodiment=EMBODIMENT, cameras=config.cameras, action_horizon=8, frames_in_memory=True
    )
    grounding = MultimodalDataset(folder / "grounding.parquet")
    robot = embodiment(config)
    codec = None if config.codec is None else load_action_codec(config.codec)
    processor = build_processor(config, embodiment(config, compute_statistics(dataset, robot)), codec)
    model = build_model(processor, config.text_loss_weight)
    print(f"{len(dataset)} frames, {len(grounding)} questions, {model.num_parameters() / 1e6:.2f}M parameters")
    mixture = CoTrainingMixture(
        dataset,
        grounding,
        multimodal_fraction=config.multimodal_fraction,
        seed=config.seed,
        length=config.steps * config.batch_size,
        augment=compose(random_shift(2), drop_state(0.1)),
    )
    fit(config, model, processor, mixture, folder, result, options, callbacks)


def fit(
    config: QuickstartConfig,
    model: WallVLAForConditionalGeneration,
    processor: WallVLAProcessor,
    mixture: CoTrainingMixture,
    folder: Path,
    result: Path,
    options: Mapping | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains `model` on `mixture`, from the last checkpoint in `folder` if there is one, and saves it as `result`.

    `options` and `callbacks` are those of `train`. `folder` also gets `losses.json`.
    """
    on_cpu = config.device == "cpu"
    arguments = CoTrainingConfig(
        output_dir=str(folder / "training"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=min(100, config.steps // 4),
        weight_decay=0.01,
        save_steps=max(1, config.steps // 3),
        save_total_limit=1,
        use_cpu=on_cpu,
        bf16=not on_cpu or cpu_has_bf16(),
        seed=config.seed,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=False,
        **options or {},
    )
    trainer = CoTrainingTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=mixture,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    checkpoint = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    _write_json(folder / "losses.json", trainer.state.log_history)
    save_repository(trainer.model, processor, result, config)


def cpu_has_bf16() -> bool:
    """Whether bf16 is faster than float32 on this CPU: it multiplies bf16 matrices in hardware, and not by AMX tiles.

    With AMX torch 2.13 spends half of a training step of this size in the backward pass of attention and of the patch
    embedding (one core: 48 samples/s in bf16, 85 in float32).
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def save_repository(
    model: WallVLAForConditionalGeneration, processor: WallVLAProcessor, folder: Path, config: QuickstartConfig
) -> None:
    """Writes what the Hub needs, weights, processor, code and card; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    write_model_card(partial, config, {})
    partial.rename(folder)


def write_model_card(folder: Path, config: QuickstartConfig, results: dict) -> None:
    """Fills `model_card.md` into `README.md` of a repository."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="robotics",
        tags=["robotics", "vision-language-action", "flow-matching", "wallvla", "metaworld"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "model_card.md"),
        embodiment=EMBODIMENT,
        tasks={task: INSTRUCTIONS[task] for task in config.task},
        config=dataclasses.asdict(config),
        results=results,
    )
    partial = folder / ".README.md.partial"
    card.save(partial)
    os.replace(partial, folder / "README.md")


# --- evaluate


def evaluate_policy(config: QuickstartConfig, folder: Path, result: Path) -> None:
    """Closed loop on unseen seeds, open loop on unseen demonstrations, grounding on unseen scenes."""
    trained = {
        "kind": "hub",
        "path": str((folder / "hub").resolve()),
        "embodiment": EMBODIMENT,
        "device": config.device,
    }
    instructions = [INSTRUCTIONS[task] for task in config.task]
    told = dict(zip(instructions, instructions[1:] + instructions[:1], strict=True))
    common = {"tasks": config.task, "image_size": config.image_size, "max_steps": 200, "trust_remote_code": True}
    main = closed_loop_spec(
        {"trained policy": trained, "scripted expert": {"kind": "expert"}, "random policy": {"kind": "random"}},
        episodes_per_task=config.eval_episodes,
        videos_per_task=1,
        **common,
    )
    controls = {"images blanked": {**trained, "blank_images": True}}
    if len(config.task) > 1:
        controls["instructions swapped"] = {**trained, "instruction": told}
    control = closed_loop_spec(controls, episodes_per_task=config.control_episodes, **common)
    closed_loop = evaluate(main, result.parent / "closed_loop", config.num_processes)
    closed_loop_controls = evaluate(control, result.parent / "controls", config.num_processes)

    register_auto_classes()  # the open-loop and grounding figures use the installed code
    model = WallVLAForConditionalGeneration.from_pretrained(folder / "hub").to(config.device)
    processor = WallVLAProcessor.from_pretrained(folder / "hub")
    summary = {
        "closed_loop": closed_loop["summary"] | closed_loop_controls["summary"],
        "videos": closed_loop["videos"],
        "open_loop": _open_loop(config, folder, HubPolicy(model, processor, EMBODIMENT)),
        "grounding": _grounding(config, folder, model, processor),
    }
    _write_json(result, summary)


def _open_loop(config: QuickstartConfig, folder: Path, policy: HubPolicy) -> dict:
    """Errors along one unseen demonstration of each task, and a plot of the first."""
    demonstrations = record_demonstrations(
        config.task,
        1,
        seed0=OPEN_LOOP_SEED,
        image_size=config.image_size,
        cameras=config.cameras,
        noise=0.0,
        grounding_every=0,
        num_processes=config.num_processes,
    )
    chunks = []
    for demonstration in demonstrations:
        chunks.append(predict_demonstration(policy, demonstration))
        if len(chunks) == 1:
            title = f"{demonstration.instruction} (unseen demonstration, seed {demonstration.seed})"
            picture = folder / "report" / "open_loop.png"
            plot_open_loop(*chunks[0], ACTION_NAMES, ACTION_UNITS, CONTROL_FREQUENCY, picture, title)
    predicted, demonstrated, is_pad = (np.concatenate([chunk[i] for chunk in chunks]) for i in (1, 2, 3))
    return open_loop_metrics(predicted, demonstrated, is_pad, ACTION_NAMES)


def _grounding(config: QuickstartConfig, folder: Path, model, processor: WallVLAProcessor) -> dict:
    """Accuracy on unseen scenes, asked with the right and with a swapped name, and a sheet of pictures."""
    seeds = range(EVALUATION_SEED_START, EVALUATION_SEED_START + config.control_episodes)
    scenes = record_scenes(config.task, seeds, config.image_size, config.cameras[0], config.num_processes)
    samples = [sample for scene in scenes for sample in scene]
    report = evaluate_grounding(CheckpointSubject(model, processor), samples, kind="box")
    answers = report.pop("answers")
    pictures = [
        grounding_picture(sample.image, grounding_prompt("box", sample.name), sample.box, answer["box"])
        for sample, answer in zip(samples[:9], answers[:9], strict=True)
    ]
    save_pictures(pictures, folder / "report" / "grounding.png")
    return report


# --- report


def write_report(config: QuickstartConfig, folder: Path, seconds: dict) -> dict:
    """Collects everything in `report/` and prints the figures; `summary.json` is written last."""
    evaluation = json.loads((folder / "evaluation" / "summary.json").read_text())
    losses = json.loads((folder / "losses.json").read_text())
    report = folder / "report"
    names = [name for name in ("loss", *LOSS_NAMES) if any(name in entry for entry in losses)]
    plot_losses(losses, report / "losses.png", names)
    # Failures come first in the list; a first look wants a success, and the folder keeps them all
    shutil.copyfile(evaluation["videos"][-1], report / "rollout.mp4")
    write_model_card(folder / "hub", config, evaluation)
    print(format_summary(evaluation["closed_loop"]))
    print(format_open_loop(evaluation["open_loop"], ACTION_UNITS))
    grounding = evaluation["grounding"]
    print(f"grounding, {grounding['samples']} questions on unseen scenes:")
    for name in ("point_in_object", "point_in_object_when_swapped"):
        if grounding[name] is not None:
            print(f"  {name}: " + "{rate:.0%} [{low:.0%}, {high:.0%}]".format(**grounding[name]))
    summary = {"config": json.loads((folder / OPTIONS_FILE).read_text()), "seconds": seconds, **evaluation}
    _write_json(report / "summary.json", summary)
    return summary


def _write_json(path: Path, value) -> None:
    """Writes a JSON file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)
