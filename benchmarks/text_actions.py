"""Language-action trajectories: how fast one core makes them, how often an arm cannot, and what they take on disk.

    OMP_NUM_THREADS=1 python benchmarks/text_actions.py --trajectories 1200 --json benchmarks/results/text_actions.json

Seconds are those of this process's CPU; it plans and writes alone, as a worker of `wallvla data text-actions` does.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wallvla.data import text_actions
from wallvla.data.arm_motion import FPS
from wallvla.data.motion_templates import draw_task


def measure(arm: str, trajectories: int, seed: int) -> dict:
    """Figures of one arm."""
    planner = text_actions.planned_arm(arm)
    indices = range(trajectories)
    start = time.process_time()
    for first in range(0, trajectories, text_actions.BLOCK):
        text_actions.make_trajectories(arm, indices[first : first + text_actions.BLOCK], seed)
    planning = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "data"
        start = time.process_time()
        report = text_actions.generate(output, trajectories=trajectories, arms=[arm], seed=seed, progress=False)[arm]
        everything = time.process_time() - start
        gigabytes = sum(path.stat().st_size for path in (output / arm).rglob("*") if path.is_file()) / 1e9
    hours = sum(row["hours"] for row in report.values())
    failed = {template: sum(row["failures"].values()) for template, row in report.items()}
    return {
        "trajectories": trajectories,
        "planned_per_second": trajectories / planning,
        "written_per_second": trajectories / everything,
        "mean_seconds": hours * 3600 / trajectories,
        "hours_per_gigabyte": hours / gigabytes,
        "failed_draws": {template: n / (n + report[template]["trajectories"]) for template, n in failed.items()},
        "path_error_mm": path_error(arm, planner, seed),
    }


def path_error(arm: str, planner, seed: int, lines: int = 60) -> float:
    """Largest distance of the gripper from the straight lines between its waypoints, in millimetres."""
    tasks = [
        draw_task(
            text_actions.template_of(number), text_actions.ARMS[arm].workspace, np.random.default_rng([seed, number])
        )
        for number in range(lines)
    ]
    largest = 0.0
    for task, plan in zip(tasks, planner.plan([task.waypoints for task in tasks]), strict=True):
        if isinstance(plan, str):
            continue
        starts, ends = task.waypoints[:-1, :3], task.waypoints[1:, :3]
        along = ends - starts
        length = np.maximum((along**2).sum(axis=1), 1e-12)
        share = ((plan.poses[:, None, :3] - starts) * along).sum(axis=2) / length
        nearest = starts + np.clip(share, 0, 1)[..., None] * along
        largest = max(largest, np.linalg.norm(plan.poses[:, None, :3] - nearest, axis=2).min(axis=1).max())
    return 1000 * largest


def main() -> None:
    """Print a table of all arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=480, help="of each arm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"frames at {FPS} Hz; per second of one core")
    print(f"{'arm':<17}{'planned/s':>10}{'written/s':>10}{'mean s':>8}{'h/GB':>7}{'path mm':>9}  failed draws")
    for arm in text_actions.ARMS:
        row = results[arm] = measure(arm, options.trajectories, options.seed)
        failed = ", ".join(f"{template} {share:.1%}" for template, share in row["failed_draws"].items() if share)
        print(
            f"{arm:<17}{row['planned_per_second']:>10.0f}{row['written_per_second']:>10.0f}{row['mean_seconds']:>8.1f}"
            f"{row['hours_per_gigabyte']:>7.0f}{row['path_error_mm']:>9.3f}  {failed or 'none'}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
