"""The ablations of Wall-OSS-0.5 (sections 5.1 to 5.3) in small: policies from scratch, trained and measured alike.

    wallvla train-codec --dataset RUN/dataset --vision RUN/hub --model RUN/hub --cameras front \
        --latent_steps 2 --codebook_size 256 --hidden_size 128 --max_steps 1000 --per_device_train_batch_size 64 \
        --output_dir runs/rvq
    python benchmarks/ablations.py --run RUN --rvq runs/rvq --output runs/ablations
    python benchmarks/ablations.py --output runs/ablations --report docs/images   # tables and plots of what is there

RUN is a finished `wallvla quickstart`: its demonstrations and grounding questions are the training data. FAST is
fitted on the same chunks, with as many ids and as many tokens per chunk as the RVQ codec. The arms of a seed share
initial weights, batches, augmentation, noise, flow times and evaluation scenes; they differ in what
`ARMS` says. Seed by seed, so that what is there can be compared. Everything measured is kept: a finished policy
is never trained again, more --episodes only add to its own, and a call after ctrl-C goes on from the last checkpoint
and the last episode.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from wallvla import register_auto_classes
from wallvla.baseline_codecs_wallvla import FASTActionCodec, load_action_codec
from wallvla.data.action_chunks import ActionChunks
from wallvla.data.lerobot import LeRobotDataset
from wallvla.evaluation.closed_loop import closed_loop_spec, evaluate
from wallvla.evaluation.demonstrations import record_demonstrations, record_scenes
from wallvla.evaluation.grounding import evaluate_grounding
from wallvla.evaluation.grounding_subjects import CheckpointSubject
from wallvla.evaluation.metaworld import EVALUATION_SEED_START
from wallvla.evaluation.statistics import compare_paired, wilson_interval
from wallvla.flow_matching_wallvla import flow_matching_loss, interpolate, velocity_from_action
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import EMBODIMENT, OPEN_LOOP_SEED, QuickstartConfig, train
from wallvla.trainers.gradient_bridge import OBJECTIVES, plot_gradient_bridge


ARMS = {
    "co_training": {"codec": "rvq", "strategy": "co_training"},
    "flow_only": {"codec": "rvq", "strategy": "flow_only"},
    "stop_gradient": {"codec": "rvq", "strategy": "stop_gradient"},
    "stop_gradient_then_co_training": {"codec": "rvq", "strategy": "stop_gradient_then_co_training"},
    "velocity_loss": {"codec": "rvq", "strategy": "co_training", "loss_space": "velocity"},
    "co_training_fast": {"codec": "fast", "strategy": "co_training"},
}
REFERENCE = "co_training"
STUDENT_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by number of seeds


@dataclass(frozen=True)
class Preset:
    """Size of a run. steps of training, closed-loop episodes of each task, the same acting by tokens, simulators."""

    steps: int
    episodes: int
    token_episodes: int
    num_processes: int


PRESETS = {"cpu": Preset(400, 20, 5, 1), "gpu": Preset(1500, 50, 20, 8)}


@dataclass(frozen=True)
class Inputs:
    """What all runs share: the quickstart's folder, codecs by name, size, device and what is measured on."""

    run: Path
    output: Path
    codecs: dict[str, str]
    preset: Preset
    device: str
    samples: list[dict]
    scenes: list


def fit_fast(run: Path, rvq, folder: Path) -> None:
    """FAST with the token rate and the number of ids of `rvq`, from the chunks of the run."""
    processor = WallVLAProcessor.from_pretrained(run / "hub")
    robot = processor.embodiments[EMBODIMENT]
    dataset = LeRobotDataset(run / "dataset", embodiment=EMBODIMENT, cameras=[], action_horizon=robot.action_horizon)
    chunks = ActionChunks([dataset], robot, processor.action_dim, len(robot.state_channels))
    batch = chunks.__getitems__(list(range(0, len(dataset), 2)))
    rate = rvq.tokens_per_chunk(robot.action_horizon, len(robot.action_channels))
    codec = FASTActionCodec.fit_to_rate(batch["actions"], batch["action_mask"], rate, rvq.vocabulary_size)
    codec.save_pretrained(folder)


def validation_samples(config: QuickstartConfig, episodes: int) -> list[dict]:
    """Every fourth frame of unseen demonstrations, as action samples."""
    samples = []
    demonstrations = record_demonstrations(
        config.task, episodes, seed0=OPEN_LOOP_SEED, cameras=config.cameras, grounding_every=0, num_processes=1
    )
    for demonstration in demonstrations:
        length = len(demonstration.actions)
        for start in range(0, length, 4):
            steps = start + np.arange(8)
            samples.append(
                {
                    "images": {name: images[start] for name, images in demonstration.frames.items()},
                    "instruction": demonstration.instruction,
                    "state": demonstration.states[start],
                    "embodiment": EMBODIMENT,
                    "actions": demonstration.actions[np.minimum(steps, length - 1)],
                    "action_is_pad": steps >= length,
                }
            )
    return samples


@torch.no_grad()
def validation_losses(model, processor: WallVLAProcessor, samples: list[dict], draws: int = 4) -> dict:
    """Flow losses in both spaces and the cross-entropy of the action tokens, on unseen demonstrations.

    The same noise and the same uniform times for every model; `draws` of them for each sample.
    """
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    sums, counts = dict.fromkeys(("action", "velocity", "token"), 0.0), dict.fromkeys(("flow", "token"), 0.0)
    for start in range(0, len(samples), 32):
        batch = processor.encode(samples[start : start + 32]).to(model.device)
        for _ in range(draws):
            noise = torch.randn(batch["actions"].shape, generator=generator).to(model.device)
            times = (torch.rand(len(noise), generator=generator) * model.config.time_scale).to(model.device)
            output = model(**batch, noise=noise, time=times)
            clean, mask = batch["actions"], batch["action_mask"]
            noisy = interpolate(clean, noise, times)
            velocity = velocity_from_action(noisy, output.action_prediction, times)
            for space in ("action", "velocity"):
                loss = flow_matching_loss(velocity, clean, noise, times, mask, space)
                sums[space] += loss.item() * mask.sum().item()
            counts["flow"] += mask.sum().item()
        sums["token"] += (output.action_token_loss * output.loss_counts[1]).item()
        counts["token"] += output.loss_counts[1].item()
    model.train(training)
    return {
        "flow_loss_action_space": sums["action"] / counts["flow"],
        "flow_loss_velocity_space": sums["velocity"] / counts["flow"],
        "action_token_loss": sums["token"] / counts["token"],
    }


class ValidationCallback(TrainerCallback):
    """Measures `validation_losses` a few times on the way, into `file`; what it holds stays after a resume."""

    def __init__(self, inputs: Inputs, file: Path, points: int = 5):
        self._inputs, self._file, self._points = inputs, file, points

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % max(1, state.max_steps // self._points) == 0:
            curve = json.loads(self._file.read_text()) if self._file.exists() else {}
            losses = validation_losses(model, processing_class, self._inputs.samples, draws=1)
            write_json(self._file, curve | {str(state.global_step): losses})


def run_arm(inputs: Inputs, arm: str, seed: int) -> dict:
    """Trains and measures one policy; the result is kept in its folder. More episodes are added to those it has."""
    folder = inputs.output / f"{arm}-{seed}"
    wanted = {"flow": inputs.preset.episodes}
    if arm == REFERENCE and inputs.preset.token_episodes:
        wanted["tokens"] = inputs.preset.token_episodes
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        if all(result["episodes"].get(way, 0) >= episodes for way, episodes in wanted.items()):
            return result
    started = time.perf_counter()
    options = dict(ARMS[arm])
    config = QuickstartConfig(
        steps=inputs.preset.steps,
        seed=seed,
        codec=inputs.codecs[options.pop("codec")],
        multimodal_fraction=0.25,  # as in section 5.1
        device=inputs.device,
        num_processes=inputs.preset.num_processes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("dataset", "grounding.parquet"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to((inputs.run / shared).resolve())
    if not (folder / "hub").exists():
        options |= {"gradient_bridge_steps": max(1, config.steps // 20), "report_to": "none"}
        train(config, folder, folder / "hub", options, [ValidationCallback(inputs, folder / "validation.json")])
    policy = {
        "kind": "hub",
        "path": str((folder / "hub").resolve()),
        "embodiment": EMBODIMENT,
        "device": inputs.device,
    }
    policies = {"flow": policy, "tokens": {**policy, "discrete": True}}
    closed_loop = {}
    for way, episodes in wanted.items():
        spec = closed_loop_spec({way: policies[way]}, config.task, episodes, max_steps=200, trust_remote_code=True)
        found = evaluate(spec, folder / "closed_loop" / way, config.num_processes)
        closed_loop[way] = [
            {name: episode[name] for name in ("task", "seed", "success", "steps")} for episode in found["episodes"]
        ]
    model = WallVLAForConditionalGeneration.from_pretrained(folder / "hub").to(inputs.device).eval()
    processor = WallVLAProcessor.from_pretrained(folder / "hub")
    grounding = evaluate_grounding(CheckpointSubject(model, processor), inputs.scenes, progress=False)
    result = {
        "arm": arm,
        "seed": seed,
        **ARMS[arm],
        "steps": config.steps,
        **validation_losses(model, processor, inputs.samples),
        "grounding": {"rate": grounding["point_in_object"]["rate"], "questions": grounding["samples"]},
        "episodes": wanted,
        "closed_loop": closed_loop,
        "validation": json.loads((folder / "validation.json").read_text()),
        "log_history": json.loads((folder / "losses.json").read_text()),
        "seconds": round(time.perf_counter() - started),
    }
    write_json(folder / "result.json", result)
    return result


def check_steps(output: Path, steps: int) -> None:
    """Policies of different length are not compared: a folder holds those of one.

    Raises:
        ValueError: the folder was begun with another number of steps.
    """
    file = output / "steps.json"
    output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, steps)
    found = json.loads(file.read_text())
    if found != steps:
        raise ValueError(f"{output} holds policies of {found} steps, now {steps}: give --steps {found}, or --output.")


def write_json(path: Path, value) -> None:
    """Writes a JSON file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, path)


# --- report


def t_interval(values: list[float]) -> str:
    """Mean of a few seeds with its 95% interval by Student's t; the mean alone of one seed."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    half = STUDENT_T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def successes(row: dict, way: str = "flow") -> list[bool]:
    """Outcome of every episode, in the order of tasks and seeds."""
    return [episode["success"] for episode in row["closed_loop"][way]]


def results_table(by_arm: dict[str, list[dict]]) -> list[str]:
    """One line for each arm: losses over seeds, success over all episodes with Wilson's interval."""
    lines = [
        "| arm | seeds | flow loss, action space | flow loss, velocity space | action-token CE | success "
        "(95% Wilson) | by seed | boxes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, rows in by_arm.items():
        for way in ("flow", "tokens"):
            acted = [row for row in rows if way in row["closed_loop"]]
            if not acted:
                continue
            outcomes = [successes(row, way) for row in acted]
            total, count = sum(map(sum, outcomes)), sum(map(len, outcomes))
            low, high = wilson_interval(total, count)
            cells = [arm if way == "flow" else f"{arm}, acting by tokens", str(len(acted))]
            for name in ("flow_loss_action_space", "flow_loss_velocity_space", "action_token_loss"):
                cells.append(spread([row[name] for row in acted]) if way == "flow" else "")
            cells.append(f"{total}/{count} = {total / count:.0%} [{low:.0%}, {high:.0%}]")
            cells.append(", ".join(f"{sum(each) / len(each):.0%}" for each in outcomes))
            boxes = statistics.mean(row["grounding"]["rate"] for row in acted)
            cells.append(f"{boxes:.0%}" if way == "flow" else "")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def differences_table(by_arm: dict[str, list[dict]]) -> list[str]:
    """Every arm minus the reference, paired by seed (and by scene for success)."""
    lines = [
        f"| minus {REFERENCE} | seeds | success, mean of seeds [95% t] | scenes only the arm / only {REFERENCE} "
        "solved, McNemar p | flow loss, action space [95% t] | flow loss, velocity space [95% t] |",
        "|---|---|---|---|---|---|",
    ]
    base = {row["seed"]: row for row in by_arm.get(REFERENCE, [])}
    for arm, rows in by_arm.items():
        pairs = [(row, base[row["seed"]]) for row in rows if row["seed"] in base]
        if arm == REFERENCE or not pairs:
            continue
        rates = [sum(successes(a)) / len(successes(a)) - sum(successes(b)) / len(successes(b)) for a, b in pairs]
        test = compare_paired(
            [outcome for a, _ in pairs for outcome in successes(a)],
            [outcome for _, b in pairs for outcome in successes(b)],
        )
        cells = [arm, str(len(pairs)), t_interval(rates), f"{test['only_a']} / {test['only_b']}, p = {test['p']:.3f}"]
        for name in ("flow_loss_action_space", "flow_loss_velocity_space"):
            cells.append(t_interval([a[name] - b[name] for a, b in pairs]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gradient_table(by_arm: dict[str, list[dict]]) -> list[str]:
    """Shares and cosines, means over the seeds and over the measurements of a part of training."""
    pairs = [(a, b) for i, a in enumerate(OBJECTIVES) for b in OBJECTIVES[i + 1 :]]
    keys = [f"gradient_share_{name}" for name in OBJECTIVES] + [f"gradient_cosine_{a}_{b}" for a, b in pairs]
    lines = [
        "| arm | steps | " + " | ".join(key.removeprefix("gradient_").replace("_", " ") for key in keys) + " |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for arm, rows in by_arm.items():
        for name, first, last in (("first 10%", 0.0, 0.1), ("second half", 0.5, 1.0)):
            cells = [arm, name]
            for key in keys:
                values = [
                    entry[key]
                    for row in rows
                    for entry in row["log_history"]
                    if key in entry and first * row["steps"] < entry["step"] <= last * row["steps"]
                ]
                form = ".1%" if "share" in key else "+.3f"
                cells.append(format(statistics.mean(values), form) if values else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def mean_history(rows: list[dict]) -> list[dict]:
    """The gradient figures of the logs, averaged over seeds at each step."""
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        for entry in row["log_history"]:
            if "gradient_share_flow" in entry:
                by_step.setdefault(entry["step"], []).append(entry)
    return [
        {"step": step}
        | {
            key: statistics.mean(entry[key] for entry in entries if key in entry)
            for key in entries[0]
            if key.startswith("gradient_")
        }
        for step, entries in sorted(by_step.items())
    ]


def plot_arms(by_arm: dict[str, list[dict]], path: Path) -> None:
    """Validation flow loss over the steps (mean of seeds, seeds light), and success with intervals."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for position, (arm, rows) in enumerate(by_arm.items()):
        color = f"C{position}"
        lines = []
        for row in rows:
            steps = sorted(map(int, row["validation"]))
            lines.append([row["validation"][str(step)]["flow_loss_action_space"] for step in steps])
            curves.plot(steps, lines[-1], color=color, alpha=0.25, linewidth=0.8)
        curves.plot(steps, np.mean(lines, axis=0), color=color, label=arm)
        outcomes = [successes(row) for row in rows]
        total, count = sum(map(sum, outcomes)), sum(map(len, outcomes))
        low, high = wilson_interval(total, count)
        rate = total / count
        bars.errorbar(rate, position, xerr=[[rate - low], [high - rate]], fmt="o", color=color, capsize=3)
        bars.plot([sum(each) / len(each) for each in outcomes], [position + 0.2] * len(rows), "|", color=color)
    curves.set(xlabel="training step", ylabel="flow loss, action space", yscale="log", title="unseen demonstrations")
    curves.legend(fontsize=7, frameon=False)
    bars.set(yticks=range(len(by_arm)), yticklabels=list(by_arm), xlabel="success rate", title="unseen scenes")
    bars.invert_yaxis()
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def report(output: Path, pictures: Path) -> str:
    """Markdown tables of all finished policies in `output`; draws the plots into `pictures`."""
    results = [json.loads(path.read_text()) for path in sorted(output.glob("*/result.json"))]
    if not results:
        raise ValueError(f"{output} holds no finished policy: run the ablations first (--run, --rvq).")
    by_arm = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    by_arm = {arm: rows for arm, rows in by_arm.items() if rows}
    plot_arms(by_arm, pictures / "ablations.png")
    plot_gradient_bridge({arm: mean_history(rows) for arm, rows in by_arm.items()}, pictures / "gradient_bridge.png")
    tables = (results_table(by_arm), differences_table(by_arm), gradient_table(by_arm))
    return "\n\n".join("\n".join(table) for table in tables)


def main() -> None:
    """Trains what is not there yet, seed by seed, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--rvq", type=Path, help="folder of an RVQ codec trained on its dataset")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size: hours of a CPU, or minutes of a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, help="training steps, instead of the preset's")
    parser.add_argument("--episodes", type=int, help="closed-loop episodes of each task, instead of the preset's")
    parser.add_argument("--token-episodes", type=int, help="the same for co_training acting by its tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only print the tables; plots go to FOLDER")
    options = parser.parse_args()
    if options.report is not None:
        print(report(options.output, options.report))
        return
    if options.run is None or options.rvq is None:
        parser.error("give --run and --rvq, or --report for the tables of what is there")
    if options.device == "cpu":
        torch.set_num_threads(1)
    register_auto_classes()
    preset = PRESETS[options.preset]
    given = {name: vars(options)[name] for name in ("steps", "episodes", "token_episodes")}
    preset = replace(preset, **{name: value for name, value in given.items() if value is not None})
    check_steps(options.output, preset.steps)
    fast = options.output / "fast"
    if not fast.exists():
        fit_fast(options.run, load_action_codec(options.rvq), fast)
    config = QuickstartConfig()
    scene_seeds = range(EVALUATION_SEED_START + 10_000, EVALUATION_SEED_START + 10_010)
    inputs = Inputs(
        run=options.run,
        output=options.output,
        codecs={"rvq": str(options.rvq), "fast": str(fast)},
        preset=preset,
        device=options.device,
        samples=validation_samples(config, 4),
        scenes=[s for scene in record_scenes(config.task, scene_seeds, num_processes=1) for s in scene],
    )
    for seed in options.seeds:
        for arm in options.arms:
            result = run_arm(inputs, arm, seed)
            rate = statistics.mean(successes(result))
            print(f"{arm}-{seed}: {rate:.0%}, {result['seconds']} s", flush=True)
    print(report(options.output, options.output))


if __name__ == "__main__":
    main()
