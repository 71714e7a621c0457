"""The subcommands of `wallvla` that evaluate: their options, and the one call of the library that each makes.

`cli.py` adds what all commands share (help, `--config`, errors).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from .blind import BlindDispatcher, BlindGate, BlindStudy, create_study, reveal
from .closed_loop import closed_loop_spec, evaluate, format_summary, replay
from .environments import expand_names
from .metaworld import EVALUATION_SEED_START, INSTRUCTIONS
from .policy import HubPolicy, Policy
from .published_results import load_reference, reference_names
from .remote import RemotePolicy, policy_server
from .report import load_run, write_blind_report, write_comparison, write_report
from .rubric import find_rubric, load_rubrics, read_rubrics
from .trials import TrialBook, ask_counts, format_trials, read_trials, score_in_terminal, summarize_trials
from .trials_web import TrialForm


METAWORLD_STEPS = 200  # 2.5 seconds; experts need 60 to 150


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Options of `wallvla eval`."""
    parser.add_argument("path", help="checkpoint folder or Hub id; policy://HOST:PORT is a policy server")
    parser.add_argument(
        "--env",
        nargs="+",
        required=True,
        help="metaworld/TASK, metaworld/mt10, metaworld/all, pusht, aloha/transfer-cube, aloha/insertion, gym:ID, "
        "remote://HOST:PORT; one or more",
    )
    parser.add_argument("--embodiment", default="metaworld_sawyer", help="robot of the checkpoint")
    parser.add_argument("--episodes", type=int, default=50, help="episodes of each task")
    parser.add_argument("--seed0", type=int, default=EVALUATION_SEED_START, help="seed of the first episode")
    parser.add_argument("--execute-steps", type=int, default=4, help="actions of a chunk before the next observation")
    parser.add_argument(
        "--max-steps", type=int, help=f"steps of an episode; default: {METAWORLD_STEPS} in Meta-World, else its own"
    )
    parser.add_argument("--settle-steps", type=int, default=0, help="steps after the first success")
    parser.add_argument("--image-size", type=int, default=64, help="pixels of a camera image")
    parser.add_argument("--num-inference-steps", type=int, help="Euler steps; default: the checkpoint's own")
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the noise that the flow starts from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", "--num-processes", type=int, default=2, help="parallel processes")
    parser.add_argument("--baselines", action="store_true", help="also a random policy, and Meta-World's expert")
    parser.add_argument("--videos", type=int, default=0, help="videos of each task")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own code instead of the installed one"
    )
    parser.add_argument("--reference", nargs="*", default=[], help=f"published tables: {', '.join(reference_names())}")
    parser.add_argument("--output", help="folder of the results; default: runs/eval-NAME")


def run_eval(options: argparse.Namespace) -> None:
    """Evaluates, prints the summary and writes the report."""
    tasks = expand_names(options.env)
    for name in options.reference:
        load_reference(name)
    in_metaworld = all(task in INSTRUCTIONS for task in tasks)
    if options.path.startswith("policy://"):
        name = options.path.removeprefix("policy://").replace(":", "-")
        policy = {"kind": "remote", "address": options.path.removeprefix("policy://")}
    else:
        path = str(Path(options.path).resolve()) if Path(options.path).is_dir() else options.path
        name = Path(path).name
        policy = {"kind": "hub", "path": path, "embodiment": options.embodiment, "device": options.device}
        policy |= {"num_inference_steps": options.num_inference_steps, "temperature": options.temperature}
    policies = {"policy": policy}
    if options.baselines:
        policies |= {"scripted expert": {"kind": "expert"}} if in_metaworld else {}
        policies |= {"random policy": {"kind": "random"}}
    max_steps = METAWORLD_STEPS if options.max_steps is None and in_metaworld else options.max_steps
    spec = closed_loop_spec(
        policies,
        tasks,
        options.episodes,
        seed0=options.seed0,
        image_size=options.image_size,
        execute_steps=options.execute_steps,
        max_steps=max_steps,
        settle_steps=options.settle_steps,
        videos_per_task=options.videos,
        trust_remote_code=options.trust_remote_code,
    )
    output = Path(options.output or f"runs/eval-{name}")
    results = evaluate(spec, output, options.workers)
    print(format_summary(results["summary"]))
    for error in results["video_errors"]:
        print(f"video not written, its episode counts: {error}")
    paths = write_report(load_run(output), output / "report", options.reference)
    print(f"wrote {output / 'results.json'} and {paths['html']}")


def replay_options(parser: argparse.ArgumentParser) -> None:
    """Options of `wallvla replay`."""
    parser.add_argument("run", help="output folder of wallvla eval")
    parser.add_argument("--task", required=True, help="as the report names it")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--policy", help="as the report names it; default: the first")
    parser.add_argument("--output", help="folder of the video; default: RUN/replay")


def run_replay(options: argparse.Namespace) -> None:
    """Replays one episode and says where its video is."""
    task = options.task.removeprefix("metaworld/")
    episode = replay(options.run, task, options.seed, options.policy, options.output)
    word = "success" if episode["success"] else "failure"
    print(f"{word} after {episode['steps']} steps, every action as recorded (digest {episode['digest']})")
    print(f"wrote {episode['video']}")


def report_options(parser: argparse.ArgumentParser) -> None:
    """Options of `wallvla report`."""
    parser.add_argument("run", help="output folder of wallvla eval")
    parser.add_argument("other", nargs="?", help="a second one, to compare with")
    parser.add_argument("--policy", help="policy of the first run to compare; default: its first")
    parser.add_argument("--other-policy", help="policy of the second run; default: its first")
    parser.add_argument("--reference", nargs="*", default=[], help=f"published tables: {', '.join(reference_names())}")
    parser.add_argument("--output", help="folder of the report; default: RUN/report or RUN/against-OTHER")


def run_report(options: argparse.Namespace) -> None:
    """Writes the report of a run or of a comparison, and prints it as Markdown."""
    run = load_run(options.run)
    if options.other is None:
        paths = write_report(run, Path(options.output or Path(run["folder"]) / "report"), options.reference)
    else:
        other = load_run(options.other)
        folder = Path(options.output or Path(run["folder"]) / f"against-{other['name']}")
        paths = write_comparison(run, other, folder, (options.policy, options.other_policy), options.reference)
    print(paths["md"].read_text(encoding="utf-8"))
    print(f"wrote {paths['html']}")


def score_options(parser: argparse.ArgumentParser) -> None:
    """Options of `wallvla score`."""
    parser.add_argument("book", help="file of the trials; it is made or continued")
    parser.add_argument("--task", help="rubric, for scoring in the terminal")
    parser.add_argument("--policy", help="what runs on the robot, for scoring in the terminal")
    parser.add_argument("--operator", help="who scores, for scoring in the terminal")
    parser.add_argument("--web", action="store_true", help="a form in the browser instead of the terminal")
    parser.add_argument("--port", type=int, default=8080, help="of the form")
    parser.add_argument("--rubrics", help="JSON file with rubrics of your own, beside the published ones")
    parser.add_argument("--list", action="store_true", help="print the rubrics and stop")


def run_score(options: argparse.Namespace, ask: Callable[[str], str] = input) -> None:
    """Scores trials in the terminal or in the browser; without a task it sums up what the book has."""
    rubrics = load_rubrics() | (read_rubrics(options.rubrics) if options.rubrics else {})
    if options.list:
        for rubric in rubrics.values():
            print(f"{rubric.id:<28}{rubric.rule}")
        return
    if options.web:
        form = TrialForm(options.book, rubrics, options.port)
        print(f"the form is at {form.address} (ctrl-C ends)")
        try:
            form.serve_forever()
        finally:
            form.book.close()
        return
    if options.task is None:
        trials, head = read_trials(options.book)
        print(f"{format_trials(summarize_trials(trials))}\n{len(trials)} trials; the chain ends with {head}")
        return
    if options.policy is None or options.operator is None:
        raise ValueError("Scoring in the terminal needs --policy and --operator beside --task.")
    rubric = find_rubric(options.task, rubrics)
    with TrialBook(options.book) as book:
        for _ in score_in_terminal(book, rubric, options.policy, options.operator, ask, print):
            pass
        print(f"\n{format_trials(summarize_trials(book.trials))}\nthe chain ends with {book.head}")


def blind_options(parser: argparse.ArgumentParser) -> None:
    """Options of `wallvla blind`."""
    parser.add_argument("action", choices=["create", "run", "judge", "status", "reveal"])
    parser.add_argument("folder", help="of the study")
    create = parser.add_argument_group("create")
    create.add_argument("--models", nargs="+", help="checkpoints, Hub ids, or policy://HOST:PORT")
    create.add_argument("--tasks", nargs="+", help="rubrics, see wallvla score --list")
    create.add_argument("--group-size", type=int, default=4, help="models in a group, at most")
    create.add_argument("--trials", type=int, default=10, help="of every model at every task")
    create.add_argument("--rubrics", help="JSON file with rubrics of your own")
    create.add_argument("--operator-may-judge", action="store_true", help="allow one person for both")
    run = parser.add_argument_group("run")
    run.add_argument("--operator", help="who executes")
    run.add_argument("--port", type=int, default=8900, help="where the robot asks for actions")
    run.add_argument("--embodiment", help="robot of the checkpoints")
    run.add_argument("--device", default="cpu")
    run.add_argument("--cameras", nargs="+", default=["front"], help="what the robot sends")
    run.add_argument("--action-dim", type=int, help="length of an action")
    run.add_argument("--chunk-steps", type=int, default=8, help="actions of every answer")
    run.add_argument("--seconds-per-call", type=float, default=0.5, help="every answer takes at least so long")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge", help="who judges")


def run_blind(options: argparse.Namespace, ask: Callable[[str], str] = input) -> None:
    """One step of a blind study; see `blind.py`."""
    if options.action == "create":
        if not options.models or not options.tasks:
            raise ValueError("A study needs --models and --tasks.")
        create_study(
            options.folder,
            options.models,
            options.tasks,
            options.group_size,
            options.trials,
            options.rubrics,
            not options.operator_may_judge,
        )
        print(f"wrote {options.folder}. Operators and judges must not open sealed.json there.")
    elif options.action == "reveal":
        paths = write_blind_report(reveal(options.folder), Path(options.folder) / "report")
        print(paths["md"].read_text(encoding="utf-8"))
        print(f"wrote {paths['html']}")
    else:
        with BlindStudy(options.folder) as study:
            if options.action == "run":
                _run_trials(study, options, ask)
            elif options.action == "judge":
                _judge_trials(study, options.judge or "", ask)
            print(json.dumps({**study.progress(), "head": study.head}, indent=1))


def _run_trials(study: BlindStudy, options: argparse.Namespace, ask: Callable[[str], str]) -> None:
    if not options.operator or options.action_dim is None:
        raise ValueError("Running needs --operator and --action-dim (and --embodiment for checkpoints).")

    def load(model: str) -> Policy:
        if model.startswith("policy://"):
            return RemotePolicy(model.removeprefix("policy://"))
        return HubPolicy.from_pretrained(model, options.embodiment, options.device)

    dispatcher = BlindDispatcher(
        options.folder,
        load,
        options.cameras,
        options.action_dim,
        options.chunk_steps,
        options.seconds_per_call,
    )
    gate = BlindGate(study, dispatcher, options.cameras)
    with policy_server(lambda: gate, port=options.port) as server:
        print(f"the robot asks for actions at {server.address}; ctrl-D ends this session")
        try:
            while study.progress()["executed"] < study.progress()["trials"]:
                if study.break_due:
                    ask("The group is through. Take a break, then press Enter: ")
                    study.take_break()
                trial = study.start_next()
                print(f"\nTrial {trial['trial']}: {trial['task']}, alias {trial['alias']}")
                answer = ask(
                    "Run it. Then Enter or the name of the recording; `repeat REASON` to discard it: "
                ).strip()
                if answer.startswith("repeat "):
                    study.repeat(trial["trial"], answer.removeprefix("repeat "))
                else:
                    study.finish(trial["trial"], options.operator, answer)
        except EOFError:
            print("\nThe session is over; the same command goes on with the next trial.")


def _judge_trials(study: BlindStudy, judge: str, ask: Callable[[str], str]) -> None:
    try:
        while (trial := study.next_to_judge()) is not None:
            print(f"\nTrial {trial['trial']}, recording {trial['recording'] or 'without a name'}")
            counts = ask_counts(study.rubric(trial["trial"]), ask, print)
            study.judge(trial["trial"], judge, counts, ask("  comment: ").strip())
    except EOFError:
        print("\nThe session is over; the same command goes on.")
