"""The `wallvla` command. Each subcommand parses its options and calls one function of the library."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


EXAMPLES = {
    "quickstart": "wallvla quickstart --output runs/quickstart",
    "train": "wallvla train --config examples/finetune_lerobot.yaml --dataset path/to/dataset",
    "eval": "wallvla eval runs/quickstart/hub --env metaworld/button-press-topdown-v3 --episodes 50",
    "replay": "wallvla replay runs/eval-hub --task drawer-open-v3 --seed 1000007",
    "report": "wallvla report runs/eval-a runs/eval-b --reference wall-oss-0.5",
    "score": "wallvla score trials.jsonl --task fruit_sorting --policy wall-oss --operator ada",
    "blind": "wallvla blind create study --models a b c --tasks stack_bowls wipe_board --group-size 3 --trials 10",
    "open-loop": "wallvla open-loop runs/quickstart/hub --dataset held_out --episodes 0 1 2",
    "sample": "wallvla sample runs/quickstart/hub --dataset runs/quickstart/dataset --index 100",
    "stats": "wallvla stats runs/quickstart/dataset --output robot.json",
}
SUMMARIES = {
    "quickstart": "demonstrations -> dataset -> training -> closed loop -> a Hub-ready folder, on a CPU in minutes",
    "train": "co-train a checkpoint on a LeRobot dataset",
    "eval": "success rate of a checkpoint in a simulator, with 95% intervals",
    "replay": "run an episode of an evaluation again from its seed, with a video, and check that it goes the same way",
    "report": "a report of one evaluation, or of two side by side with tests (HTML, Markdown, JSON)",
    "score": "score trials on a real robot by rubric, in the terminal or in a browser; 31 + 4 published rubrics",
    "blind": "grouped blind ensemble: compare models on a robot without knowing which one is running",
    "open-loop": "errors along recorded episodes, and whether the policy looks at images, instruction and state",
    "sample": "one action chunk for a recorded observation, or the answer to a question about an image",
    "stats": "normalisation statistics of a dataset, as an embodiment file",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and examples on lines of their own."""


def _finish(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """What all commands share: the example below the help, and `--config`."""
    parser.prog = f"wallvla {name}"
    parser.description = SUMMARIES[name]
    parser.epilog = f"example:\n  {EXAMPLES[name]}"
    parser.formatter_class = _HelpFormatter
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same options; the command line wins")
    return parser


def _read_config(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Makes the values of `--config FILE` the defaults of the parser. Returns the other arguments."""
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
    if not isinstance(values, dict) or not set(values) <= set(known):
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else values
        parser.error(f"{found.config} has unknown options {unknown}; this command has: {', '.join(sorted(known))}")
    for name, value in values.items():
        known[name].default, known[name].required = value, False
        if not known[name].option_strings:
            known[name].nargs = "?"
    return rest


def _quickstart(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from .quickstart import QuickstartConfig, quickstart

    parser = _finish(HfArgumentParser(QuickstartConfig), "quickstart")
    quickstart(parser.parse_args_into_dataclasses(_read_config(parser, arguments))[0])


def _train(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from . import register_auto_classes
    from .trainers.co_training_config import CoTrainingConfig
    from .trainers.fine_tuning import FineTuningArguments, fine_tune

    parser = _finish(HfArgumentParser((FineTuningArguments, CoTrainingConfig)), "train")
    options, args = parser.parse_args_into_dataclasses(_read_config(parser, arguments))[:2]
    register_auto_classes()
    print(f"wrote {fine_tune(options, args)}")


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
        run(parser.parse_args(_read_config(parser, arguments)))

    return command


def _open_loop(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "open-loop")
    parser.add_argument("path", help="checkpoint folder or Hub id")
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
    name = options.embodiment or next(iter(processor.embodiments))
    if name not in processor.embodiments:
        parser.error(f"--embodiment {name}: the checkpoint knows {', '.join(processor.embodiments)}")
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


def _sample(arguments: list[str]) -> None:
    parser = _finish(argparse.ArgumentParser(), "sample")
    parser.add_argument("path", help="checkpoint folder or Hub id")
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
    name = options.embodiment or next(iter(robots))
    if name not in robots:
        parser.error(f"--embodiment {name}: the checkpoint knows {', '.join(robots)}")
    dataset = LeRobotDataset(
        options.dataset,
        embodiment=name,
        cameras=list(robots[name].cameras),
        action_horizon=robots[name].action_horizon,
    )
    print(sample_chunk(options.path, dataset[options.index], options.num_inference_steps, options.seed))


def _stats(arguments: list[str]) -> None:
    from .action_space_wallvla import Embodiment
    from .data.lerobot import LeRobotDataset
    from .data.statistics import compute_statistics
    from .trainers.fine_tuning import native_embodiment

    parser = _finish(argparse.ArgumentParser(), "stats")
    parser.add_argument("dataset", help="LeRobot dataset folder")
    parser.add_argument("--embodiment-file", help="JSON of the robot; default: its vectors as they are (native)")
    parser.add_argument("--action-horizon", type=int, default=32, help="steps of a chunk, without --embodiment-file")
    parser.add_argument("--output", help="JSON file to write; default: print the statistics")
    options = parser.parse_args(_read_config(parser, arguments))
    embodiment, horizon = None, options.action_horizon
    if options.embodiment_file:
        embodiment = Embodiment.from_dict(json.loads(Path(options.embodiment_file).read_text()))
        horizon = embodiment.action_horizon
    dataset = LeRobotDataset(options.dataset, embodiment="robot", action_horizon=horizon)
    embodiment = embodiment or native_embodiment(dataset, horizon)
    values = embodiment.to_dict() | {"statistics": compute_statistics(dataset, embodiment)}
    if options.output is None:
        print(json.dumps(values["statistics"], indent=2))
        return
    Path(options.output).write_text(json.dumps(values, indent=2) + "\n")
    print(f"wrote {options.output}")


COMMANDS = {
    "quickstart": _quickstart,
    "train": _train,
    "eval": _evaluation_command("eval"),
    "replay": _evaluation_command("replay"),
    "report": _evaluation_command("report"),
    "score": _evaluation_command("score"),
    "blind": _evaluation_command("blind"),
    "open-loop": _open_loop,
    "sample": _sample,
    "stats": _stats,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `wallvla` command. Errors of the user's input end in one message and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12}{SUMMARIES[name]}" for name in COMMANDS]
        print("usage: wallvla COMMAND [options]\n\n" + "\n".join(lines) + "\n\nexample:\n  wallvla quickstart")
        print("\n`wallvla COMMAND --help` shows the options of a command and an example.")
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"wallvla: unknown command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}.")
    from .evaluation.workers import WorkerError

    try:
        COMMANDS[arguments[0]](arguments[1:])
    except (ValueError, OSError, WorkerError) as error:
        print(f"wallvla {arguments[0]}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(
            f"wallvla {arguments[0]}: interrupted; what is complete stays, and the same command goes on from there."
        )


if __name__ == "__main__":
    main()
