"""Reinforcement learning in small: an under-trained policy, improved by its own successes, before and after.

    python benchmarks/flow_rl.py --run RUN --output runs/flow-rl --seeds 0 1 2
    python benchmarks/flow_rl.py --output runs/flow-rl --report benchmarks/results      # tables of what is there
    python benchmarks/flow_rl.py --run RUN --output runs/flow-rl --signal one:0.9 all:0.5 all:0.8 # exploring

RUN is a finished `wallvla quickstart`, whose demonstrations train the policy to start from: 200 steps instead of
1,500. Every seed then starts from that one policy and gets the reward 1 for solving the task within the time limit,
and nothing else. All policies meet the same held-out scenes with the same noise, so before and after are paired scene
by scene. Everything finished is kept: a call after ctrl-C goes on from the last checkpoint and the last episode.

`--signal` trains nothing: it says for ways to explore how much of the first policy gradient is signal.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from wallvla import register_auto_classes
from wallvla.evaluation.closed_loop import closed_loop_spec, evaluate
from wallvla.evaluation.statistics import compare_paired, wilson_interval
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, train
from wallvla.reinforcement_learning import RolloutArguments, make_trainer, train_rl
from wallvla.trainers.flow_ppo_config import FlowPPOConfig


TASK = "window-close-v3"
START_STEPS = 200
GROUP = 16  # episodes of one estimate of the gradient
TIME_LIMIT = 96  # steps in which the task has to be solved: 1.2 s. The scripted expert needs 80
LONG_LIMIT = 152  # evaluations go on to here, so that success without haste is known too
EXECUTE_STEPS = 8
PPO = {
    "execute_steps": EXECUTE_STEPS,
    "episodes": 128,
    "stochastic_steps": "all",
    "noise_level": 0.8,
    "learning_rate": 2e-5,
    "value_learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "target_kl": 0.08,
    "batch_size": 256,
    "epochs": 3,
    "freeze": ["vision", "vlm"],
    "cache_context": True,
    "save_steps": 2,
}


def make_start(run: Path, output: Path) -> Path:
    """The under-trained policy."""
    folder = output / "start"
    folder.mkdir(parents=True, exist_ok=True)
    for shared in ("dataset", "grounding.parquet"):
        if not (folder / shared).exists():
            (folder / shared).symlink_to((run / shared).resolve())
    if not (folder / "hub").exists():
        train(QuickstartConfig(steps=START_STEPS, num_processes=1), folder, folder / "hub", {"report_to": "none"})
    return folder / "hub"


def rollout_options(start: Path) -> RolloutArguments:
    """One task with a time limit, 32 episodes at a time in one process."""
    return RolloutArguments(str(start), [f"metaworld/{TASK}"], max_steps=TIME_LIMIT, num_workers=1, envs_per_worker=32)


def improve(start: Path, output: Path, seed: int, iterations: int) -> Path:
    """PPO from the start policy; more iterations only add to those that are there."""
    folder = output / f"seed-{seed}"
    if not (folder / "hub").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < iterations:
        args = FlowPPOConfig(output_dir=str(folder), seed=seed, iterations=iterations, **PPO)
        train_rl(rollout_options(start), args)
    return folder / "hub"


def signal_and_noise(gradients: Tensor) -> tuple[float, float]:
    """Squared norms of the expectation of independent estimates (n, d) of a gradient, and of the noise of one of them.

    Products of two different estimates have the first as their mean; so neither is biased, and the first can come out
    below 0.
    """
    count = len(gradients)
    each = gradients.square().sum(dim=1)
    signal = (gradients.sum(dim=0).square().sum() - each.sum()) / (count * (count - 1))
    return float(signal), float(each.mean() - signal)


def gradient_signal(start: Path, output: Path, stochastic_steps: str, noise_level: float, episodes: int) -> dict:
    """The signal in the policy gradient of `GROUP` episodes, in units of its noise, for one way to explore.

    Advantages are those of the first update: discounted success, less the mean of all chunks.
    """
    exploring = {"stochastic_steps": stochastic_steps, "noise_level": noise_level, "episodes": episodes}
    with make_trainer(
        rollout_options(start), FlowPPOConfig(output_dir=str(output / "signal"), **PPO | exploring)
    ) as trainer:
        played, trajectories = trainer.collect(0)
    trainer.estimate(trajectories)
    mean = np.mean([chunk.advantage for trajectory in trajectories for chunk in trajectory])
    parameters = [parameter for parameter in trainer.policy.model.parameters() if parameter.requires_grad]
    gradients = []
    for first in tqdm(range(0, len(trajectories) - GROUP + 1, GROUP), desc="gradients", unit="group", leave=False):
        chunks = [chunk for trajectory in trajectories[first : first + GROUP] for chunk in trajectory]
        batch = trainer.score(chunks)
        log_prob, _ = trainer.policy(batch.inputs, batch.transitions, batch.scored, batch.context)
        advantages = torch.tensor([chunk.advantage - mean for chunk in chunks])
        found = torch.autograd.grad((log_prob * advantages).sum(), parameters, materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    signal, noise = signal_and_noise(torch.stack(gradients))
    success = float(np.mean([episode["success"] for episode in played]))
    return exploring | {"success": success, "signal_to_noise": signal / noise}


def measure(hub: Path, output: Path, name: str, episodes: int) -> None:
    """Closed-loop episodes of a policy on held-out scenes; `output/evaluation/name/results.json`."""
    policy = {"kind": "hub", "path": str(hub.resolve()), "embodiment": EMBODIMENT}
    spec = closed_loop_spec(
        {name: policy}, [TASK], episodes, max_steps=LONG_LIMIT, execute_steps=EXECUTE_STEPS, trust_remote_code=False
    )
    evaluate(spec, output / "evaluation" / name, num_workers=1)


def outcomes(output: Path, name: str, limit: int) -> list[bool]:
    """Success of every scene within `limit` steps."""
    results = json.loads((output / "evaluation" / name / "results.json").read_text())
    return [episode["success"] and episode["steps"] <= limit for episode in results["episodes"]]


def evaluated(output: Path) -> dict[int, list[int]]:
    """Seeds that were evaluated, by the iterations of their training."""
    found: dict[int, list[int]] = {}
    for path in (output / "evaluation").glob("seed-*-after-*/results.json"):
        _, seed, _, iterations = path.parent.name.split("-")
        found.setdefault(int(iterations), []).append(int(seed))
    return {iterations: sorted(found[iterations]) for iterations in sorted(found)}


def compare(output: Path, seeds: list[int], iterations: int) -> dict:
    """Before and after so many iterations: each seed and all of them, by limit, and the course of training."""
    found = {seed: {} for seed in (*map(str, seeds), "all")}
    for limit in (TIME_LIMIT, LONG_LIMIT):
        before = outcomes(output, "start", limit)
        pooled = []
        for seed in seeds:
            after = outcomes(output, f"seed-{seed}-after-{iterations}", limit)
            pooled += after
            found[str(seed)][f"within_{limit}"] = compare_paired(after, before)
        found["all"][f"within_{limit}"] = compare_paired(pooled, before * len(seeds)) | {
            "interval_before": wilson_interval(sum(before), len(before)),
            "interval_after": wilson_interval(sum(pooled), len(pooled)),
        }
    for seed in seeds:
        lines = (output / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()[:iterations]
        found[str(seed)]["training"] = [json.loads(line) for line in lines]
    return found


def results(output: Path) -> dict:
    """All that was measured."""
    ppo = json.loads((output / "ppo.json").read_text())
    found = {"task": TASK, "start_steps": START_STEPS, "time_limit": TIME_LIMIT, "ppo": ppo}
    found["after"] = {n: compare(output, seeds, n) for n, seeds in evaluated(output).items()}
    if (output / "signal.json").exists():
        found["signal"] = json.loads((output / "signal.json").read_text())
    return found


def table(found: dict) -> str:
    """The results as Markdown."""
    rows = [
        f"| iterations | seed | success within {TIME_LIMIT} steps, before -> after | difference [95%, paired] "
        f"| only after / only before, McNemar p | within {LONG_LIMIT} steps, before -> after | difference [95%] |",
        "|---|---|---|---|---|---|---|",
    ]
    for iterations, by_seed in found["after"].items():
        for seed, measured in by_seed.items():
            cells = [str(iterations), seed]
            for limit in (TIME_LIMIT, LONG_LIMIT):
                test = measured[f"within_{limit}"]
                cells.append(f"{test['rate_b']:.0%} -> {test['rate_a']:.0%} of {test['trials']}")
                cells.append(f"{test['difference']:+.0%} [{test['low']:+.0%}, {test['high']:+.0%}]")
                if limit == TIME_LIMIT:
                    cells.append(f"{test['only_a']} / {test['only_b']}, p = {test['p']:.2g}")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + signal_table(found.get("signal", []))


def signal_table(rows: list[dict]) -> str:
    """What explores well: the cosine is that of an estimate from so many episodes with the true gradient."""
    if not rows:
        return ""
    lines = [
        f"\n\n| stochastic steps | noise level | success, exploring | signal / noise of {GROUP} episodes "
        "| cosine with 64 episodes | with 256 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["signal_to_noise"]
        cosines = [max(ratio, 0) * episodes / GROUP for episodes in (64, 256)]
        cells = [row["stochastic_steps"], row["noise_level"], f"{row['success']:.0%} of {row['episodes']}"]
        cells += [f"{ratio:.3f}", *(f"{(value / (1 + value)) ** 0.5:.2f}" for value in cosines)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def check_ppo(output: Path) -> None:
    """Runs of other rules are not mixed.

    Raises:
        ValueError: the folder was begun with others.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = output / "ppo.json"
    if not file.exists():
        write(file, json.dumps(PPO) + "\n")
    if json.loads(file.read_text()) != PPO:
        raise ValueError(f"{output} was begun with {file.read_text().strip()}, now {PPO}: choose another --output.")


def main() -> None:
    """Does what is not there yet, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--output", type=Path, default=Path("runs/flow-rl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--episodes", type=int, default=100, help="held-out scenes")
    parser.add_argument("--signal", nargs="+", metavar="STEPS:NOISE", help="ways to explore, such as one:0.9 all:0.5")
    parser.add_argument("--signal-episodes", type=int, default=192)
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write flow_rl.json and flow_rl.md there")
    options = parser.parse_args()
    if options.report is None:
        if options.run is None:
            parser.error("give --run, or --report for the tables of what is there")
        torch.set_num_threads(1)
        register_auto_classes()
        check_ppo(options.output)
        start = make_start(options.run, options.output)
        if options.signal:
            measured = []
            for way in options.signal:
                steps, noise = way.split(":")
                measured.append(gradient_signal(start, options.output, steps, float(noise), options.signal_episodes))
            write(options.output / "signal.json", json.dumps(measured, indent=1) + "\n")
            print(signal_table(measured))
            return
        measure(start, options.output, "start", options.episodes)
        for seed in options.seeds:
            hub = improve(start, options.output, seed, options.iterations)
            measure(hub, options.output, f"seed-{seed}-after-{options.iterations}", options.episodes)
    found = results(options.output)
    print(table(found))
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        write(options.report / "flow_rl.json", json.dumps(found, indent=1) + "\n")
        write(options.report / "flow_rl.md", table(found) + "\n")


if __name__ == "__main__":
    main()
