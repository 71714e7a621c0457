"""Closed loop with an injected delay between observation and actions: waiting, naive overlap, real-time chunking.

    python benchmarks/serving_rtc.py runs/quickstart/hub --output benchmarks/results/serving_rtc.json

Time is simulated: a step of the robot's loop stands for `--step-ms`, an answer arrives `delay / step-ms` steps after
its observation, and the simulator goes on meanwhile. So the result does not depend on this machine's speed. While a
strategy has nothing to execute, the robot holds still (no displacement, same gripper).

Reported per strategy and delay: success within `--max-steps`, mean time to success, and the jump of the commanded
action (L2 of the change of the three displacement channels, 1 = 1 cm of set point) where a new chunk begins, and over
all steps.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from wallvla import register_auto_classes
from wallvla.evaluation.closed_loop import wilson_interval
from wallvla.evaluation.metaworld import EVALUATION_SEED_START, MetaWorldEnv
from wallvla.serving.chunking import OverlappingScheduler, SynchronousScheduler
from wallvla.serving.observations import RequestError
from wallvla.serving.policy import PolicyRequest, ServedPolicy, load_policy


STRATEGIES = {
    "synchronous": lambda frequency, steps, delay_s: SynchronousScheduler(frequency, steps),
    "naive async": lambda frequency, steps, delay_s: OverlappingScheduler(frequency, steps, None),
    **{
        f"RTC {guidance}": lambda frequency, steps, delay_s, guidance=guidance: OverlappingScheduler(
            frequency, steps, guidance, initial_delay_s=delay_s
        )
        for guidance in ("identity", "vjp", "prefix")
    },
}


def play(
    env: MetaWorldEnv, policy: ServedPolicy, camera: str, scheduler, seed: int, delay_steps: int, max_steps: int
) -> dict:
    """One episode in simulated time: success, steps, and the jumps of the executed actions."""
    frequency = scheduler.queue.frequency
    env.reset_scene(seed)
    scheduler.reset()
    arrival, chunk, calls = -1, None, 0
    last, fresh, jumps, changes, held = np.zeros(4), False, [], [], 0
    while env.steps < max_steps and not env.success:
        now = env.steps / frequency
        if chunk is not None and env.steps >= arrival:
            scheduler.receive(chunk, now)
            chunk, fresh = None, True
        if scheduler.wants_chunk(now):
            observation = env.observe(("front",))
            options = scheduler.ask(now)
            message = {"images": {camera: observation["images"]["front"]}, "state": observation["state"]}
            request = PolicyRequest(message | {"instruction": env.instruction}, seed, calls, **options)
            (chunk,) = policy.infer([request])
            if isinstance(chunk, RequestError):
                raise chunk
            calls, arrival = calls + 1, env.steps + delay_steps
            if delay_steps == 0:
                scheduler.receive(chunk, now)
                chunk, fresh = None, True
        action = scheduler.action(now)
        held += action is None
        action = np.array([0, 0, 0, last[3]]) if action is None else np.clip(action, -1, 1)
        change = float(np.linalg.norm(action[:3] - last[:3]))
        if env.steps:
            changes.append(change)
            if fresh:
                jumps.append(change)
        fresh, last = False, action
        env.step(action)
    return {
        "success": env.success,
        "steps": env.steps,
        "calls": calls,
        "held": held,
        "jump_sum": sum(jumps),
        "jumps": len(jumps),
        "change_sum": sum(changes),
        "changes": len(changes),
    }


def summarize(episodes: list[dict], step_ms: float) -> dict:
    """What the table shows of the episodes of one strategy at one delay."""
    successes = [episode for episode in episodes if episode["success"]]
    low, high = wilson_interval(len(successes), len(episodes))
    total = {key: sum(episode[key] for episode in episodes) for key in episodes[0]}
    return {
        "episodes": len(episodes),
        "successes": len(successes),
        "low": round(low, 3),
        "high": round(high, 3),
        "seconds_to_success": round(float(np.mean([item["steps"] for item in successes])) * step_ms / 1000, 2)
        if successes
        else None,
        "jump_at_switch": round(total["jump_sum"] / max(1, total["jumps"]), 4),
        "change_per_step": round(total["change_sum"] / max(1, total["changes"]), 4),
        "held_share": round(total["held"] / total["steps"], 4),
    }


def main() -> None:
    """Runs every cell of the table and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--tasks", nargs="+", default=["button-press-topdown-v3", "window-close-v3", "drawer-open-v3"])
    parser.add_argument("--seeds", type=int, default=6, help="episodes of each task")
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0, 100, 200, 400])
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--execute-steps", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    policy = load_policy(options.path)
    camera = next(iter(policy.robot.cameras))
    frequency, started, table = 1000 / options.step_ms, time.time(), []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cells = [(delay, name) for delay in options.delays_ms for name in options.strategies]
    episodes = {cell: [] for cell in cells}
    for task in options.tasks:
        with MetaWorldEnv(task, cameras=("front",), image_size=64) as env:
            for delay, name in cells:
                for number in range(options.seeds):
                    scheduler = STRATEGIES[name](frequency, options.execute_steps, delay / 1000)
                    seed = EVALUATION_SEED_START + number
                    delay_steps = round(delay / options.step_ms)
                    episodes[delay, name].append(
                        play(env, policy, camera, scheduler, seed, delay_steps, options.max_steps)
                    )
                print(f"{time.time() - started:6.0f} s  {task}  {delay:.0f} ms  {name}", flush=True)
    for (delay, name), played in episodes.items():
        table.append({"delay_ms": delay, "strategy": name, **summarize(played, options.step_ms)})
        print(table[-1])
    if options.output is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("output", "path")}
        settings["horizon"] = policy.robot.action_horizon
        command = " ".join(["python", "benchmarks/serving_rtc.py", "CHECKPOINT", *sys.argv[2:]])
        result = {"command": command, "date": "2026-11-21", "commit": commit, "machine": "2 shared CPU cores"}
        options.output.write_text(json.dumps(result | {"settings": settings, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
