"""The `wallvla` command. Each subcommand parses its options and calls one function of the library."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


EXAMPLES = {
    "quickstart": "wallvla quickstart --output runs/quickstart",
    "train": "wallvla train --config examples/finetune_lerobot.yaml --dataset path/to/dataset",
    "eval": "wallvla eval runs/quickstart/hub --env metaworld/button-press-topdown-v3 --episodes 50",
    "sample": "wallvla sample runs/quickstart/hub --dataset runs/quickstart/dataset --index 100",
    "stats": "wallvla stats runs/quickstart/dataset --output robot.json",
    "compose": "wallvla compose Qwen/Qwen3.5-4B ./qwen-vla --system qwen_vla",
    "convert": "wallvla convert x-square-robot/wall-oss-0.5 ./wall-oss --dtype bfloat16",
    "inspect": "wallvla inspect ./wall-oss",
    "plot-domains": "wallvla plot-domains x-vla --output domains.png",
    "export": "wallvla export ./wall-oss ./wall-oss-published",
    "data inspect": "wallvla data inspect runs/quickstart/dataset --images 4",
    "data bridge": "wallvla data bridge runs/quickstart/hub --env metaworld/drawer-open-v3 --output bridge.parquet",
    "data clean": "wallvla data clean runs/quickstart/dataset --output clean.json --dry-run",
    "data text-actions": "wallvla data text-actions --output runs/text-actions --trajectories 1000 --workers 2",
    "serve": "wallvla serve runs/quickstart/hub --port 8000 --record runs/served",
    "replay": "wallvla replay runs/eval-hub --task drawer-open-v3 --seed 1000007",
    "report": "wallvla report runs/eval-a runs/eval-b --reference wall-oss-0.5",
    "score": "wallvla score trials.jsonl --task fruit_sorting --policy wall-oss --operator ada",
    "blind": "wallvla blind create study --models a b c --tasks stack_bowls wipe_board --group-size 3 --trials 10",
    "open-loop": "wallvla open-loop runs/quickstart/hub --dataset held_out --episodes 0 1 2",
    "eval-grounding": "wallvla eval-grounding runs/quickstart/hub --benchmark simulator/unseen simulator/colors",
    "demo": "wallvla demo runs/quickstart/hub",
    "push": "wallvla push runs/quickstart/hub OWNER/NAME",
    "train-codec": "wallvla train-codec --dataset runs/quickstart/dataset --vision runs/quickstart/hub "
    "--model runs/quickstart/hub --output-dir runs/codec",
    "train-rl": "wallvla train-rl --config examples/train_rl.yaml --model runs/quickstart/hub",
}
SUMMARIES = {
    "quickstart": "demonstrations -> dataset -> training -> closed loop -> a Hub-ready folder, on a CPU in minutes",
    "train": "co-train a checkpoint on a LeRobot dataset",
    "eval": "success rate of a checkpoint in a simulator, with 95% intervals",
    "sample": "one action chunk for a recorded observation, or the answer to a question about an image",
    "stats": "normalisation statistics of a dataset, as an embodiment file",
    "compose": "a pretrained VLM and a new action expert: where Qwen-VLA and the MoT testbed start",
    "convert": "a published checkpoint becomes a repository of this layout: every tensor accounted for, or nothing",
    "inspect": "what a checkpoint is: family, parameters, robots, tokens; reads no weights",
    "plot-domains": "the learned prompts of a checkpoint's domains, on their principal axes",
    "export": "back to the published layout",
    "data inspect": "what a LeRobot dataset holds, and what is wrong with it",
    "data bridge": "questions about the robot's own view, from a simulator or a LeRobot dataset",
    "data clean": "which frames of a LeRobot dataset to train on; the dataset itself is not changed",
    "data text-actions": "sentences and the motions of an arm that they say, without images",
    "serve": "policy server for robots; openpi's client can talk to it",
    "replay": "run an episode of an evaluation again from its seed, with a video, and check that it goes the same way",
    "report": "a report of one evaluation, or of two side by side with tests (HTML, Markdown, JSON)",
    "score": "score trials on a real robot by rubric, in the terminal or in a browser; 31 + 4 published rubrics",
    "blind": "grouped blind ensemble: compare models on a robot without knowing which one is running",
    "open-loop": "errors along recorded episodes, and whether the policy looks at images, instruction and state",
    "eval-grounding": "points, boxes and visual questions: a checkpoint beside a baseline",
    "demo": "the Space in your browser, for a checkpoint on this machine",
    "push": "a model, Space, kernel or dataset folder to the Hub",
    "train-codec": "train an action codec, the tokens of the discrete pathway, on LeRobot datasets",
    "train-rl": "improve a checkpoint by its own episodes in simulators: PPO on the flow policy",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and examples on lines of their own."""


def _finish(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """What all commands share: the example below the help, and `--config`."""
    parser.prog = f"wallvla {name}"
    parser.description = SUMMARIES[name]
    parser.epilog = f"example:\n  {EXAMPLES[name]}"
    parser.formatter_class = _HelpFormatter
    if type(parser) is not argparse.ArgumentParser:  # of dataclasses, with 150 options: an error would drown in them
        parser.usage = f"wallvla {name} [--config FILE] [--OPTION VALUE ...]    (--help lists the options)"
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same options; the command line wins")
    return parser


def _read_config(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Makes the values of `--config FILE` the defaults of the parser. Returns the other arguments.

    An option that does not exist, here or there, ends the command and is answered by the nearest one.
    """
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    for flag in flags:
        if not any(option.startswith(flag) for option in parser._option_string_actions):
            nearest = difflib.get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.0)[0]
            parser.error(f"unknown option {flag}; did you mean {nearest}? --help lists them all")
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(arguments)
    if found.config is None:
        return rest
    import yaml

    try:
        values = yaml.safe_load(Path(found.config).read_text())
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {found.config}: {error}")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if not isinstance(values, dict):
        parser.error(f"{found.config} holds {values!r}: write one `option: value` a line")
    for name in sorted(set(values) - set(known)):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        parser.error(f"{found.config} has the unknown option {name}; did you mean {nearest}? --help lists them all")
    for name, value in values.items():
        known[name].default, known[name].required = value, False
        if not known[name].option_strings:
            known[name].nargs = "?"
    return rest


def _checkpoint(path: str, file: str = "config.json") -> str:
    """`path`, if it is a folder with `file` in it or may be a Hub id; said before anything slow starts."""
    if Path(path).is_dir():
        if not (Path(path) / file).is_file():
            raise argparse.ArgumentTypeError(f"{path} is no checkpoint: it has no {file}")
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise argparse.ArgumentTypeError(f"there is no folder {path}, and a Hub id would be OWNER/NAME")
    return path


def _robot_name(parser: argparse.ArgumentParser, robots: dict, name: str | None) -> str:
    """`name`, or the only robot of a checkpoint."""
    if name is None and len(robots) == 1:
        return next(iter(robots))
    if name not in robots:
        found = "is needed" if name is None else f"{name} is unknown"
        parser.error(f"--embodiment {found}: the checkpoint knows {', '.join(robots) or 'no robot'}")
    return name


def _quickstart(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from .quickstart import QuickstartConfig, quickstart

    parser = _finish(HfArgumentParser(QuickstartConfig), "quickstart")
    quickstart(parser.parse_args_into_dataclasses(_read_config(parser, arguments))[0])


def _train(arguments: list[str]) -> None:
    from transformers import AutoConfig
    from trl import TrlParser

    from . import register_auto_classes
    from .trainers.co_training_config import CoTrainingConfig
    from .trainers.estimate import EstimateArguments
    from .trainers.fine_tuning import FineTuningArguments, estimate_run, fine_tune

    parser = _finish(TrlParser((FineTuningArguments, CoTrainingConfig, EstimateArguments)), "train")
    parser._option_string_actions["--model"].type = _checkpoint
    options, args, sizes = parser.parse_args_into_dataclasses(_read_config(parser, arguments))[:3]
    register_auto_classes()
    if sizes.estimate:
        print(estimate_run(AutoConfig.from_pretrained(options.model), options, args, sizes))
        return
    print(f"wrote {fine_tune(options, args, sizes)}")


def _sample(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "sample")
    parser.add_argument("path", type=_checkpoint, help="checkpoint folder or Hub id")
    parser.add_argument("--dataset", help="LeRobot dataset to take an observation from")
    parser.add_argument("--index", type=int, default=0, help="frame of the dataset")
    parser.add_argument("--embodiment", help="robot of the checkpoint; default: its only one")
    parser.add_argument("--image", help="picture to ask about")
    parser.add_argument("--text", help="question about the picture")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(_read_config(parser, arguments))
    if (options.dataset is None) == (options.image is None) or (options.image is None) != (options.text is None):
        parser.error("give either --dataset, or --image together with --text")
    from . import register_auto_classes
    from .evaluation.sampling import answer_question, sample_chunk

    register_auto_classes()
    if options.dataset is None:
        print(json.dumps(answer_question(options.path, options.image, options.text), indent=2))
        return
    from transformers import AutoProcessor

    from .data.lerobot import LeRobotDataset

    robots = AutoProcessor.from_pretrained(options.path).embodiments
    name = _robot_name(parser, robots, options.embodiment)
    dataset = LeRobotDataset(
        options.dataset,
        embodiment=name,
        cameras=list(robots[name].cameras),
        action_horizon=robots[name].action_horizon,
    )
    if not 0 <= options.index < len(dataset):
        parser.error(f"--index {options.index}: the dataset has the frames 0 to {len(dataset) - 1}")
    print(sample_chunk(options.path, dataset[options.index], options.num_inference_steps, options.seed))


def _stats(arguments: list[str]) -> None:
    from .action_space_wallvla import Embodiment
    from .data.lerobot import LeRobotDataset
    from .data.recipe import ActionEntry, open_entry
    from .data.statistics import compute_statistics
    from .trainers.fine_tuning import native_embodiment

    parser = _finish(argparse.ArgumentParser(), "stats")
    parser.add_argument("dataset", help="LeRobot dataset folder or Hub id")
    parser.add_argument(
        "--cache", default="~/.cache/wallvla/statistics", help="folder in which results are kept; 'none' for none"
    )
    parser.add_argument("--embodiment-file", help="JSON of the robot; default: its vectors as they are (native)")
    parser.add_argument("--action-horizon", type=int, default=32, help="steps of a chunk, without --embodiment-file")
    parser.add_argument("--clean", help="what `wallvla data clean` wrote for the dataset")
    parser.add_argument("--resample", action="store_true", help="steps at the robot's control_frequency")
    _add_source_options(parser, on_error="raise")
    parser.add_argument("--output", help="JSON file to write; default: print the statistics")
    options = parser.parse_args(_read_config(parser, arguments))
    if options.embodiment_file:
        embodiment = Embodiment.from_dict(json.loads(Path(options.embodiment_file).read_text()))
    else:
        dataset = LeRobotDataset(
            options.dataset, embodiment="robot", action_horizon=options.action_horizon, **_source_options(options)
        )
        embodiment = native_embodiment(dataset, options.action_horizon)
    entry = ActionEntry(
        options.dataset,
        "robot",
        clean=options.clean,
        convert=options.convert,
        state_key=options.state_key,
        action_key=None if options.action_key == "none" else options.action_key,
        resample=options.resample,
    )
    dataset = open_entry(entry, embodiment, skip_errors=options.on_error == "skip")
    cache = None if options.cache == "none" else Path(options.cache).expanduser()
    values = embodiment.to_dict() | {"statistics": compute_statistics(dataset, embodiment, cache=cache)}
    if options.output is None:
        print(json.dumps(values["statistics"], indent=2))
        return
    Path(options.output).write_text(json.dumps(values, indent=2) + "\n")
    print(f"wrote {options.output}")


def _add_source_options(parser: argparse.ArgumentParser, on_error: str) -> None:
    """Options of every command that reads a LeRobot dataset: which features, in whose form."""
    parser.add_argument("--state-key", default="observation.state", help="feature with the proprioception")
    parser.add_argument("--action-key", default="action", help="feature with the action; 'none' if there is none")
    parser.add_argument("--convert", help="YAML of kinematics or relative commands (docs/data.md)")
    parser.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default=on_error,
        help="at an unreadable episode (default: %(default)s)",
    )


def _source_options(options: argparse.Namespace) -> dict:
    """What `_add_source_options` added, as arguments of `LeRobotDataset`."""
    from .data.unification import read_conversion

    return {
        "state_key": options.state_key,
        "action_key": None if options.action_key == "none" else options.action_key,
        "convert": read_conversion(options.convert) if options.convert else None,
        "skip_errors": options.on_error == "skip",
    }


def _bytes(text: str) -> int:
    """A size such as 4GB or 500MB, as in the framework's `max_shard_size`."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text[:-2]
    if text[-2:].upper() not in units or not number.replace(".", "", 1).isdigit() or float(number) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size; write for instance 4GB or 500MB")
    return int(float(number) * units[text[-2:].upper()])


def _convert(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "convert")
    parser.add_argument("source", help="published checkpoint: a folder or a Hub id")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--embodiment",
        action="append",
        default=[],
        metavar="NAME[=FILE]",
        help="keep only this robot; with FILE, a JSON file that describes it. Several times for several robots",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto keeps what is stored; norms and heads are never cast",
    )
    parser.add_argument("--max-shard-size", type=_bytes, default="4GB", help="of a weight file")
    parser.add_argument("--state-bins", type=int, help="bins of the proprioception in the prompt, if you know better")
    parser.add_argument("--longest-side", type=int, help="longer side of an image in pixels, if you know better")
    parser.add_argument(
        "--tables", choices=["weights", "files"], help="which normalisers count where weights and .pth files disagree"
    )
    parser.add_argument("--action-tokens", type=int, default=0, help="discrete action tokens to add to a Qwen2.5-VL")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer of an X-VLA that has none")
    parser.add_argument("--seed", type=int, default=0, help="of the action expert that a Qwen2.5-VL does not have")
    options = vars(parser.parse_args(_read_config(parser, arguments)))
    from .conversion import Options, convert

    source, output = options.pop("source"), options.pop("output")
    options.pop("config")
    report = convert(source, output, Options(**options), show_progress=True)
    print(
        f"{report['family']}: {len(report['source_keys'])} published tensors, {len(report['parameters'])} parameters; "
        f"embodiments: {', '.join(report['embodiments']) or 'none'}"
    )
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"wrote {output}; conversion_report.txt says where every tensor went")


def _compose(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "compose")
    parser.add_argument("vlm", type=_checkpoint, help="pretrained VLM: a folder or a Hub id")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--system", choices=["qwen_vla", "mot_testbed", "x_vla"], required=True)
    parser.add_argument(
        "--embodiment",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a robot, a JSON file that describes it; more can be added in training",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the action expert")
    options = parser.parse_args(_read_config(parser, arguments))
    unnamed = [text for text in options.embodiment if "=" not in text]
    if unnamed:
        parser.error(f"--embodiment {unnamed[0]}: write NAME=FILE")
    robots = dict(text.split("=", 1) for text in options.embodiment)
    import torch

    from .conversion import compose

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    compose(options.vlm, options.output, options.system, robots, dtype, options.seed)
    print(f"wrote {options.output}; its action expert is random: train it (wallvla train --model {options.output})")


def _inspect(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "inspect")
    parser.add_argument("path", help="checkpoint, published or of this layout: a folder or a Hub id")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(_read_config(parser, arguments))
    from .conversion import inspect, inspection_text

    found = inspect(options.path)
    print(json.dumps(found, indent=2) if options.json else inspection_text(found))


def _plot_domains(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "plot-domains")
    parser.add_argument("path", type=_checkpoint, help="checkpoint whose domains have prompts: a folder or a Hub id")
    parser.add_argument("--output", default="domains.png", help="picture to write")
    options = parser.parse_args(_read_config(parser, arguments))
    from transformers import AutoModel

    from . import register_auto_classes
    from .evaluation.plots import plot_domains

    register_auto_classes()
    tokens = AutoModel.from_pretrained(options.path).domain_tokens()
    print(f"wrote {plot_domains(tokens, options.output)}: {', '.join(tokens)}")


def _export(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "export")
    parser.add_argument("source", help="folder in the layout of this package")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--max-shard-size", type=_bytes, help="of a weight file; default: one file, as upstream")
    options = parser.parse_args(_read_config(parser, arguments))
    from .conversion import export

    print(f"wrote {export(options.source, options.output, options.max_shard_size, show_progress=True)}")


def _cleaning_options(parser: argparse.ArgumentParser, arguments: list[str]):
    """Parses what the commands on data have in common. Returns (options, dataset, thresholds)."""
    from .data.cleaning import CleaningOptions
    from .data.lerobot import LeRobotDataset

    default = CleaningOptions()
    parser.add_argument("dataset", help="LeRobot dataset folder or Hub id")
    parser.add_argument("--images", type=int, default=default.frames_per_episode, help="frames looked at per episode")
    parser.add_argument("--stationary", type=float, default=default.stationary, help="idle below this share of range")
    parser.add_argument("--min-motion", type=float, default=default.min_motion, help="near-constant below this share")
    parser.add_argument("--min-frames", type=int, default=default.min_frames, help="shorter episodes are left out")
    parser.add_argument("--length-deviations", type=float, default=default.length_deviations)
    _add_source_options(parser, on_error="skip")
    options = parser.parse_args(_read_config(parser, arguments))
    dataset = LeRobotDataset(
        options.dataset,
        embodiment="inspected",
        action_horizon=1,
        cameras=None if options.images else [],
        **_source_options(options),
    )
    thresholds = CleaningOptions(
        stationary=options.stationary,
        min_motion=options.min_motion,
        length_deviations=options.length_deviations,
        min_frames=options.min_frames,
        frames_per_episode=options.images,
    )
    return options, dataset, thresholds


def _data_inspect(arguments: list[str]) -> None:
    from .data.cleaning import format_inspection, inspect_dataset

    parser = _finish(argparse.ArgumentParser(), "data inspect")
    _, dataset, thresholds = _cleaning_options(parser, arguments)
    print(format_inspection(inspect_dataset(dataset, thresholds)))


def _data_clean(arguments: list[str]) -> None:
    from .data.cleaning import format_inspection, inspect_dataset, make_plan, write_plan

    parser = _finish(argparse.ArgumentParser(), "data clean")
    parser.add_argument("--output", help="JSON file with the frames to keep")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be left out")
    options, dataset, thresholds = _cleaning_options(parser, arguments)
    if options.output is None and not options.dry_run:
        parser.error("give --output FILE, or --dry-run to see what would be left out")
    inspection = inspect_dataset(dataset, thresholds)
    print(format_inspection(inspection))
    if options.dry_run:
        print("dry run: nothing was written")
    else:
        print(f"wrote {write_plan(make_plan(inspection), options.output)}")


def _data_bridge(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "data bridge")
    parser.add_argument(
        "checkpoint",
        type=partial(_checkpoint, file="processor_config.json"),
        help="whose processor writes boxes and points: a folder or a Hub id",
    )
    parser.add_argument("--env", nargs="+", help="metaworld/TASK, one or more: from the simulator's ground truth")
    parser.add_argument("--episodes", type=int, default=10, help="demonstrations of each task")
    parser.add_argument("--image-size", type=int, default=128, help="pixels of the simulator's images")
    parser.add_argument("--dataset", help="LeRobot dataset: from its trajectories")
    parser.add_argument("--embodiment", help="robot of the dataset in the checkpoint; default: its only one")
    parser.add_argument(
        "--camera", nargs="+", help="one or two fixed cameras of the dataset; default: the robot's first"
    )
    parser.add_argument(
        "--calibration", nargs="+", default=[], help="JSON of these cameras: intrinsics, extrinsics, size"
    )
    parser.add_argument("--annotator", help="image-text model for captions and next steps: a folder or a Hub id")
    parser.add_argument(
        "--annotator-coordinates",
        choices=["pixel", "unit", "percent", "thousand"],
        help="the annotator gives boxes of objects too, which count this",
    )
    _add_source_options(parser, on_error="raise")
    parser.add_argument("--every", type=int, default=25, help="frames between two images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="parquet file to create")
    options = parser.parse_args(_read_config(parser, arguments))
    if (options.env is None) == (options.dataset is None):
        parser.error("give either --env or --dataset")
    from transformers import AutoProcessor

    from . import register_auto_classes
    from .data.annotator import TransformersAnnotator
    from .data.bridge import frames_of_demonstration, write_bridge_samples
    from .evaluation.demonstrations import record_demonstrations
    from .evaluation.metaworld import CONTROL_FREQUENCY

    register_auto_classes()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    if options.env:
        frames = (
            frame
            for demonstration in record_demonstrations(
                [name.removeprefix("metaworld/") for name in options.env],
                options.episodes,
                image_size=options.image_size,
                grounding_every=options.every,
                all_views=True,
                progress=False,
            )
            for frame in frames_of_demonstration(demonstration, fps=CONTROL_FREQUENCY)
        )
    else:
        frames = _recorded_frames(options, processor)
    annotator = TransformersAnnotator(options.annotator) if options.annotator else None
    counts = write_bridge_samples(
        frames,
        options.output,
        processor,
        seed=options.seed,
        annotator=annotator,
        coordinates=options.annotator_coordinates,
    )
    print("\n".join(f"{count:>7} {kind}" for kind, count in sorted(counts.items())))
    print(f"wrote {options.output}")


def _recorded_frames(options: argparse.Namespace, processor):
    """Facts of all episodes of a LeRobot dataset, for `_data_bridge`."""
    from .data.bridge import Camera, frames_of_episode
    from .data.lerobot import LeRobotDataset

    robot = processor.get_embodiment(options.embodiment)
    names = options.camera or [next(iter(robot.cameras))]
    if len(options.calibration) not in (0, len(names)) or len(names) > 2:
        raise ValueError(
            f"Found {len(names)} cameras and {len(options.calibration)} calibrations. Give one or two cameras, and a "
            "calibration for each or for none."
        )
    dataset = LeRobotDataset(
        options.dataset, embodiment="bridge", cameras=names, action_horizon=1, **_source_options(options)
    )
    calibrations = [Camera.from_dict(json.loads(Path(file).read_text())) for file in options.calibration]
    cameras = dict(zip(dataset.camera_keys, calibrations or [None] * len(names), strict=True))
    for position in range(dataset.num_episodes):
        yield from frames_of_episode(dataset, position, robot, cameras, stride=options.every)


def _data_text_actions(arguments: list[str]) -> None:
    from .data.text_actions import ARMS, format_report, generate

    parser = _finish(argparse.ArgumentParser(), "data text-actions")
    parser.add_argument("--output", required=True, help="folder to create; the same command resumes")
    parser.add_argument("--trajectories", type=int, default=1200, help="of each arm; six templates take turns")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="a dataset for each")
    parser.add_argument("--workers", type=int, default=1, help="processes; the data do not depend on it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--action-horizon", type=int, default=64, help="steps of a chunk, in the embodiment files")
    options = parser.parse_args(_read_config(parser, arguments))
    report = generate(
        options.output,
        trajectories=options.trajectories,
        arms=options.arms,
        workers=options.workers,
        seed=options.seed,
        action_horizon=options.action_horizon,
    )
    print(format_report(report))
    print(f"wrote {options.output}; report.json counts the tasks that were out of reach")


def _serve(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "serve")
    parser.add_argument("path", nargs="+", help="checkpoint folders or Hub ids; NAME=PATH serves one at /NAME")
    parser.add_argument("--embodiment", help="robot of the checkpoints; default: their only one")
    parser.add_argument("--host", default="127.0.0.1", help="any but this machine's own needs --token-file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-file", help="file with the token that clients must send")
    parser.add_argument("--certificate", help="PEM file; with --private-key it turns on TLS")
    parser.add_argument("--private-key", help="PEM file")
    parser.add_argument("--client-keys", help="JSON file with [client key, what it holds] pairs; see docs/serving.md")
    parser.add_argument("--instruction", help="the task of clients that send none")
    parser.add_argument("--safety", help="JSON file with the fields of SafetyLimits")
    parser.add_argument("--record", help="folder of recorded episodes, LeRobot v3.0")
    parser.add_argument(
        "--record-fps", type=int, help="requests per second of a recording; default: control frequency"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-inference-steps", type=int, help="Euler steps; default: the checkpoint's own")
    parser.add_argument("--engine", action="store_true", help="the inference engine: CUDA graphs on a GPU")
    parser.add_argument("--fp8", action="store_true", help="with --engine and --dtype bfloat16: products in FP8")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, with the seeds of episodes")
    parser.add_argument("--max-batch", type=int, default=16, help="requests in one call of the model")
    parser.add_argument(
        "--warm-up-batches", type=int, nargs="+", help="calls before the first request; default: 1 and --max-batch"
    )
    parser.add_argument(
        "--warm-up-image", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), default=(224, 224), help="of their frames"
    )
    parser.add_argument("--batch-window-ms", type=float, default=5.0, help="how long a request may wait for others")
    parser.add_argument("--max-connections", type=int, default=64)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    options = parser.parse_args(_read_config(parser, arguments))
    from . import register_auto_classes
    from .data.lerobot_writer import LeRobotWriter

    try:
        from .serving.serve import name_and_path, serve_checkpoints
    except ModuleNotFoundError as error:
        parser.error(f"the server needs {error.name}: pip install 'wallvla[serve]'")
    for item in options.path:
        _checkpoint(name_and_path(item)[1])
    if not options.trust_remote_code:
        register_auto_classes()
    serve_checkpoints(options, LeRobotWriter)


def _evaluation_command(name: str) -> Callable[[list[str]], None]:
    """A command whose options and call are in `evaluation/commands.py`."""

    def command(arguments: list[str]) -> None:
        from .evaluation import commands

        add_options, run = {
            "eval": (commands.eval_options, commands.run_eval),
            "replay": (commands.replay_options, commands.run_replay),
            "report": (commands.report_options, commands.run_report),
            "score": (commands.score_options, commands.run_score),
            "blind": (commands.blind_options, commands.run_blind),
        }[name]
        parser = _finish(argparse.ArgumentParser(), name)
        add_options(parser)
        options = parser.parse_args(_read_config(parser, arguments))
        if name == "eval" and not options.path.startswith("policy://"):
            _checkpoint(options.path)  # workers would take half a minute to say it in a traceback
        run(options)

    return command


def _open_loop(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "open-loop")
    parser.add_argument("path", type=_checkpoint, help="checkpoint folder or Hub id")
    parser.add_argument("--dataset", required=True, help="LeRobot dataset folder; take episodes it was not trained on")
    parser.add_argument("--episodes", type=int, nargs="+", required=True, help="numbers of two or more episodes")
    parser.add_argument("--embodiment", help="robot of the checkpoint; default: its only one")
    parser.add_argument("--every", type=int, default=8, help="steps between two predictions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise, two or more")
    parser.add_argument("--num-inference-steps", type=int, help="Euler steps; default: the checkpoint's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="runs/open-loop", help="folder of the figures and report.json")
    options = parser.parse_args(_read_config(parser, arguments))
    from . import register_auto_classes
    from .data.lerobot import LeRobotDataset
    from .evaluation.demonstrations import demonstrations_of
    from .evaluation.open_loop import format_open_loop, format_probes, open_loop_report, predict_demonstration
    from .evaluation.plots import plot_open_loop, plot_open_loop_report
    from .evaluation.policy import HubPolicy
    from .modeling_wallvla import WallVLAForConditionalGeneration
    from .processing_wallvla import WallVLAProcessor

    register_auto_classes()
    processor = WallVLAProcessor.from_pretrained(options.path)
    name = _robot_name(parser, processor.embodiments, options.embodiment)
    robot = processor.embodiments[name]
    dataset = LeRobotDataset(
        options.dataset,
        embodiment=name,
        cameras=list(robot.cameras),
        action_horizon=robot.action_horizon,
        episodes=options.episodes,
    )
    model = WallVLAForConditionalGeneration.from_pretrained(options.path).to(options.device)
    policy = HubPolicy(model, processor, name, options.num_inference_steps)
    demonstrations = demonstrations_of(dataset)
    names = dataset.features["action"].get("names")
    names = names if isinstance(names, list) else [str(index) for index in range(dataset.actions.shape[1])]
    units = ["robot unit"] * len(names)
    report = open_loop_report(policy, demonstrations, names, options.every, options.seeds)
    output = Path(options.output)
    chunks = predict_demonstration(policy, demonstrations[0], options.every)
    title = f"{demonstrations[0].instruction} (episode {options.episodes[0]})"
    plot_open_loop(*chunks, names, units, dataset.fps, output / "chunks.png", title)
    plot_open_loop_report(report, units, output / "report.png", str(options.path))
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(format_open_loop(report["metrics"], units))
    print(format_probes(report["probes"]))
    print(f"wrote {output / 'report.json'}, report.png, chunks.png")


def _eval_grounding(arguments: list[str]) -> None:
    from .grounding_report import SIMULATOR, GroundingOptions, evaluate_checkpoints, format_results
    from .quickstart import DEFAULT_TASKS

    parser = _finish(argparse.ArgumentParser(), "eval-grounding")
    parser.add_argument("path", type=_checkpoint, help="checkpoint folder or Hub id")
    parser.add_argument(
        "--benchmark", nargs="+", default=list(SIMULATOR), help=f"{', '.join(SIMULATOR)}, or NAME=PATH of local files"
    )
    parser.add_argument("--baseline", help="another checkpoint, or any image-text-to-text model of transformers")
    parser.add_argument("--baseline-scale", type=float, help="full width in its coordinates; default: pixels it sees")
    parser.add_argument("--kind", choices=("box", "point"), default="box", help="of the simulator's questions")
    parser.add_argument("--task", nargs="+", default=list(DEFAULT_TASKS), help="Meta-World tasks of the simulator")
    parser.add_argument("--scenes", type=int, default=20, help="scenes of each task")
    parser.add_argument("--image-size", type=int, default=64, help="pixels of a rendered image")
    parser.add_argument("--constrained", action="store_true", help="decode well-formed coordinates only")
    parser.add_argument("--limit", type=int, help="questions of each public benchmark; default: all")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    parser.add_argument("--output", help="folder of the results; default: runs/grounding-NAME")
    options = parser.parse_args(_read_config(parser, arguments))
    values = vars(options)
    output = Path(values.pop("output") or f"runs/grounding-{Path(options.path).name}")
    renamed = {"benchmarks": values.pop("benchmark"), "tasks": values.pop("task")}
    del values["config"]
    print(format_results(evaluate_checkpoints(GroundingOptions(**values, **renamed), output)["results"]))
    print(f"wrote {output / 'results.json'}")


def _demo(arguments: list[str]) -> None:
    import importlib.util
    import os

    parser = _finish(argparse.ArgumentParser(), "demo")
    parser.add_argument("path", type=_checkpoint, help="checkpoint folder or Hub id")
    parser.add_argument(
        "--compare", type=_checkpoint, nargs="+", default=[], help="more checkpoints, for the tab that compares"
    )
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(_read_config(parser, arguments))
    try:
        import gradio
    except ModuleNotFoundError:
        parser.error("the demo needs gradio: pip install 'wallvla[space]'")
    os.environ |= {"WALLVLA_MODEL": options.path, "WALLVLA_COMPARE": ",".join(options.compare)}
    # A file, not a package: with an __init__.py the folder `spaces` would hide the PyPI package of that name
    spec = importlib.util.spec_from_file_location("space", Path(__file__).parent / "spaces" / "grounding" / "app.py")
    space = sys.modules["space"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(space)
    print(f"gradio {gradio.__version__}; stop with Ctrl-C")
    space.create_app().launch(**space.LAUNCH_OPTIONS, server_port=options.port)


def _push(arguments: list[str]) -> None:
    from .publish import push

    parser = _finish(argparse.ArgumentParser(), "push")
    parser.add_argument("path", help="folder of a model, Space, kernel or LeRobot dataset")
    parser.add_argument("repo_id", help="OWNER/NAME on the Hub")
    parser.add_argument("--model", help="of a Space: the repository that it shows")
    parser.add_argument("--license", help="of a dataset without a card, such as mit")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    options = parser.parse_args(_read_config(parser, arguments))
    print(f"pushed to {push(options.path, options.repo_id, options.model, options.license, options.private)}")


def _train_codec(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from . import register_auto_classes
    from .trainers.codec_trainer import CodecArguments, CodecTrainingConfig, train_codec

    parser = _finish(HfArgumentParser((CodecArguments, CodecTrainingConfig)), "train-codec")
    options, args = parser.parse_args_into_dataclasses(_read_config(parser, arguments))[:2]
    register_auto_classes()
    print(f"wrote {train_codec(options, args)}")


def _train_rl(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from . import register_auto_classes
    from .reinforcement_learning import RolloutArguments, train_rl
    from .trainers.flow_ppo_config import FlowPPOConfig

    parser = _finish(HfArgumentParser((RolloutArguments, FlowPPOConfig)), "train-rl")
    parser._option_string_actions["--model"].type = _checkpoint
    options, args = parser.parse_args_into_dataclasses(_read_config(parser, arguments))[:2]
    register_auto_classes()
    print(f"wrote {train_rl(options, args)}")


COMMANDS = {
    "quickstart": _quickstart,
    "train": _train,
    "eval": _evaluation_command("eval"),
    "sample": _sample,
    "stats": _stats,
    "compose": _compose,
    "convert": _convert,
    "inspect": _inspect,
    "plot-domains": _plot_domains,
    "export": _export,
    "data inspect": _data_inspect,
    "data clean": _data_clean,
    "data bridge": _data_bridge,
    "data text-actions": _data_text_actions,
    "serve": _serve,
    "replay": _evaluation_command("replay"),
    "report": _evaluation_command("report"),
    "score": _evaluation_command("score"),
    "blind": _evaluation_command("blind"),
    "open-loop": _open_loop,
    "eval-grounding": _eval_grounding,
    "demo": _demo,
    "push": _push,
    "train-codec": _train_codec,
    "train-rl": _train_rl,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `wallvla` command. Errors of the user's input end in one message and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<18}{SUMMARIES[name]}" for name in COMMANDS]
        print("usage: wallvla COMMAND [options]\n\n" + "\n".join(lines) + "\n\nexample:\n  wallvla quickstart")
        print("\n`wallvla COMMAND --help` shows the options of a command and an example.")
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    command = " ".join(arguments[:words])
    if command not in COMMANDS:
        sys.exit(f"wallvla: unknown command {command!r}; the commands are {', '.join(COMMANDS)}.")
    from .evaluation.workers import WorkerError

    try:
        COMMANDS[command](arguments[words:])
    except (ValueError, OSError, ImportError, argparse.ArgumentTypeError, WorkerError) as error:
        print(f"wallvla {command}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"wallvla {command}: interrupted; what is complete stays, and the same command goes on from there.")


if __name__ == "__main__":
    main()
