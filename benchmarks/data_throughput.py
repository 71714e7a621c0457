"""Samples per second and memory of the data room, against LeRobot's own dataset class where that is installed.

    python benchmarks/data_throughput.py                                  # our reader, statistics, growth 1x 4x 16x
    python benchmarks/data_throughput.py --lerobot /path/to/env/bin/python # and LeRobot's class, in its environment
    python benchmarks/data_throughput.py --workers 0 1 2 --samples 400 --json result.json

Every measurement is a process of its own on the same files (two cameras, h264), so that memory is that of one reader.
One sample is a frame of both cameras, the state and an action chunk. Nothing is collated.

LeRobot decodes with its "pyav" backend unless --backend says otherwise: a comparison of decoders would be another one.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


STATE_KEY, ACTION_KEY = "observation.state", "action"
WIDTH, FPS, LENGTH = 14, 20, 100


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10, help="episodes of 100 frames, 1x (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="samples per measurement (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=32, help="steps of a chunk (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="worker counts")
    parser.add_argument("--growth", type=int, nargs="+", default=[1, 4, 16], help="sizes of the dataset")
    parser.add_argument("--lerobot", help="python of an environment with lerobot (and numpy, torch)")
    parser.add_argument("--backend", default="pyav", help="video backend of LeRobot (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, as JSON; in a process of its own
    return parser.parse_args()


def scene(step: int, size: int, camera: int) -> np.ndarray:
    """A textured background with a moving square, uint8 (size, size, 3)."""
    ramp = np.linspace(40, 160, size)
    pixels = np.stack([np.add.outer(ramp, ramp / 2), np.add.outer(ramp / 2, ramp), np.add.outer(ramp, ramp)], axis=-1)
    pixels += np.random.default_rng([step, camera]).normal(0, 2, size=(size, size, 1))
    left = (3 * step + 20 * camera) % (size - size // 4)
    pixels[size // 3 : size // 2, left : left + size // 4] = (200, 60, 40)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_dataset(root: Path, episodes: int, size: int):
    """The same 100 frames as every episode, with other numbers: writing is not what is measured."""
    from wallvla.data.lerobot_writer import LeRobotWriter

    rng = np.random.default_rng(0)
    cameras = [f"observation.images.{name}" for name in ("front", "wrist")]
    features = {camera: {"dtype": "video", "shape": (size, size, 3)} for camera in cameras}
    features |= {name: {"dtype": "float32", "shape": (WIDTH,)} for name in (STATE_KEY, ACTION_KEY)}
    frames = [{camera: scene(step, size, c) for c, camera in enumerate(cameras)} for step in range(LENGTH)]
    with LeRobotWriter(root, fps=FPS, features=features, robot_type="benchmark") as writer:
        for _ in range(episodes):
            for frame in frames:
                writer.add_frame(frame | {key: rng.normal(size=WIDTH) for key in (STATE_KEY, ACTION_KEY)})
            writer.save_episode("move the square")


def as_is(sample):
    """Collate function of single samples; a lambda could not be sent to a worker."""
    return sample


def peak_memory_mb() -> float:
    """Largest resident memory of this process and of the largest of its workers, megabytes."""
    own, workers = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + workers) / 1024


def measure(task: dict) -> dict:
    """One measurement; see `main` for the tasks."""
    import torch
    from torch.utils.data import DataLoader, Subset

    torch.set_num_threads(1)
    started = time.perf_counter()
    if task["reader"] == "lerobot":
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as TheirDataset

        delta = {ACTION_KEY: [step / FPS for step in range(task["horizon"])]}
        dataset = TheirDataset(
            "local/benchmark", root=task["root"], delta_timestamps=delta, video_backend=task["backend"]
        )
    else:
        from wallvla.data.lerobot import LeRobotDataset

        dataset = LeRobotDataset(task["root"], embodiment="robot", action_horizon=task["horizon"])
    opened, before = time.perf_counter() - started, peak_memory_mb()
    if task["what"] == "statistics":
        return _measure_statistics(dataset) | {"open_seconds": opened}
    count = min(task["samples"], len(dataset))
    order = np.arange(count) if task["order"] == "sequential" else np.random.default_rng(0).permutation(len(dataset))
    loader = DataLoader(
        Subset(dataset, order[:count].tolist()), batch_size=None, num_workers=task["workers"], collate_fn=as_is
    )
    samples = iter(loader)
    next(samples)  # starting the workers is not counted
    started = time.perf_counter()
    number = sum(1 for _ in samples)
    seconds = time.perf_counter() - started
    del samples
    return {
        "samples_per_second": number / seconds,
        "open_seconds": opened,
        "frames": len(dataset),
        "memory_after_open_mb": before,
        "memory_mb": peak_memory_mb(),
    }


def _measure_statistics(dataset) -> dict:
    from wallvla.action_space_wallvla import Embodiment
    from wallvla.data.statistics import compute_statistics

    layout = [
        (f"{arm}_{part}", width) for arm in ("left", "right")
        for part, width in (("ee_position", 3), ("ee_rotation", 3), ("gripper", 1))
    ]  # fmt: skip
    robot = Embodiment(
        cameras={"observation.images.front": "front view"}, control_frequency=FPS,
        action_horizon=dataset.action_horizon, state_layout=layout, action_layout=layout,
        reference_frame="eef_relative",
    )  # fmt: skip
    result = {}
    for name, exact in (("exact", True), ("sketch", False)):
        started = time.perf_counter()
        compute_statistics(dataset, robot, exact=exact, progress=False)
        result[f"{name}_frames_per_second"] = len(dataset) / (time.perf_counter() - started)
    return result | {"frames": len(dataset), "memory_mb": peak_memory_mb()}


def run(task: dict, python: str) -> dict:
    """A measurement in a process of its own."""
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--measure", json.dumps(task)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-2000:]}")
    return task | json.loads(done.stdout.splitlines()[-1])


def main():
    """Runs every measurement in a process of its own and prints a line for each."""
    options = parse_arguments()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    rows = []
    readers = {"wallvla": sys.executable} | ({"lerobot": options.lerobot} if options.lerobot else {})
    with tempfile.TemporaryDirectory() as folder:
        for factor in options.growth:
            root = Path(folder) / f"x{factor}"
            write_dataset(root, options.episodes * factor, options.size)
            common = {
                "root": str(root), "samples": options.samples, "horizon": options.horizon, "growth": factor,
                "backend": options.backend,
            }  # fmt: skip
            # All worker counts on the first size; how cost grows with the dataset, without workers, on all of them.
            for workers in options.workers if factor == options.growth[0] else [0]:
                for order in ("sequential", "random"):
                    for reader, python in readers.items():
                        task = common | {"what": "samples", "reader": reader, "order": order, "workers": workers}
                        rows.append(run(task, python))
                        print_row(rows[-1])
            rows.append(run(common | {"what": "statistics", "reader": "wallvla"}, sys.executable))
            print_row(rows[-1])
    if options.json is not None:
        result = {"cpu": platform.processor() or platform.machine(), "size": options.size, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_row(row: dict):
    """Prints one measurement."""
    size = f"{row['growth']}x ({row['frames']} frames)"
    if row["what"] == "statistics":
        print(
            f"{size:<18}statistics  exact {row['exact_frames_per_second']:.0f} frames/s, "
            f"sketch {row['sketch_frames_per_second']:.0f} frames/s, {row['memory_mb']:.0f} MB",
            flush=True,
        )
        return
    print(
        f"{size:<18}{row['reader']:<9}{row['order']:<12}{row['workers']} workers {row['samples_per_second']:8.0f} "
        f"samples/s  open {row['open_seconds']:.2f} s  {row['memory_mb']:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
