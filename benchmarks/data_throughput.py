"""Samples per second and memory of the LeRobot reader and the statistics, and LeRobot's own class on the same files.

    python benchmarks/data_throughput.py                             # on datasets that it writes: 1x, 4x, 16x
    python benchmarks/data_throughput.py --dataset path/to/dataset   # on one that is there
    python benchmarks/data_throughput.py --lerobot-python /path/to/env/bin/python --json result.json

One sample is a frame of every camera, the state and an action chunk; nothing is collated. Every measurement is a
process of its own. Memory is what reading added to the imports: of the process and its workers together at the end of
the reading (proportional set size, so that pages which they share count once), and at the peak for the statistics.

With --lerobot-python, LeRobot's class reads the same files in its own environment (lerobot cannot share ours), with
--backend as its decoder. It yields images as float32 (3, h, w) in [0, 1], ours as uint8 (h, w, 3): the reader "as
tensors" is ours plus that conversion. First both readers have to return the same: states, actions, padding and tasks
exactly, images within --image-tolerance.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


STATE_KEY, ACTION_KEY = "observation.state", "action"
WIDTH, FPS, LENGTH = 14, 20, 100
PACKAGE = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="LeRobot dataset folder; without it datasets are written")
    parser.add_argument("--samples", type=int, default=400, help="samples per measurement (default: %(default)s)")
    parser.add_argument("--horizon", type=int, default=32, help="steps of a chunk (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="worker counts (default: 0 1 2 4)"
    )
    parser.add_argument("--lerobot-python", help="python of an environment with lerobot, whose class then reads too")
    parser.add_argument("--backend", default="torchcodec", help="video decoder of LeRobot (default: %(default)s)")
    parser.add_argument("--image-tolerance", type=float, default=2.0, help="mean difference, grey levels (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)  # one measurement, as JSON; in a process of its own
    written = parser.add_argument_group("datasets that are written without --dataset")
    written.add_argument("--episodes", type=int, default=10, help="episodes of 100 frames, 1x (default: %(default)s)")
    written.add_argument("--growth", type=int, nargs="+", default=[1, 4, 16], help="sizes (default: 1 4 16)")
    written.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: %(default)s)")
    written.add_argument("--gop", type=int, default=5, help="frames between keyframes (default: %(default)s)")
    written.add_argument("--storage", choices=["h264", "png"], default="h264", help="(default: %(default)s)")
    return parser.parse_args()


# ---- the datasets --------------------------------------------------------------------------------------------------


def scene(step: int, size: int, camera: int) -> np.ndarray:
    """A textured background with a moving square, uint8 (size, size, 3)."""
    ramp = np.linspace(40, 160, size)
    pixels = np.stack([np.add.outer(ramp, ramp / 2), np.add.outer(ramp / 2, ramp), np.add.outer(ramp, ramp)], axis=-1)
    pixels += np.random.default_rng([step, camera]).normal(0, 2, size=(size, size, 1))
    left = (3 * step + 20 * camera) % (size - size // 4)
    pixels[size // 3 : size // 2, left : left + size // 4] = (200, 60, 40)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_dataset(root: Path, episodes: int, options: argparse.Namespace):
    """The same 100 frames of two cameras as every episode, with other numbers: writing is not what is measured."""
    from wallvla.data.lerobot_writer import LeRobotWriter

    rng = np.random.default_rng(0)
    cameras = [f"observation.images.{name}" for name in ("front", "wrist")]
    features = {camera: {"dtype": "video", "shape": (options.size, options.size, 3)} for camera in cameras}
    features |= {name: {"dtype": "float32", "shape": (WIDTH,)} for name in (STATE_KEY, ACTION_KEY)}
    frames = [{camera: scene(step, options.size, c) for c, camera in enumerate(cameras)} for step in range(LENGTH)]
    with LeRobotWriter(
        root, fps=FPS, features=features, robot_type="benchmark", use_videos=options.storage == "h264", gop=options.gop
    ) as writer:
        for _ in range(episodes):
            for frame in frames:
                writer.add_frame(frame | {key: rng.normal(size=WIDTH) for key in (STATE_KEY, ACTION_KEY)})
            writer.save_episode("move the square")


# ---- one task, in a process of its own ------------------------------------------------------------------------


class AsTensors:
    """Our samples with images as LeRobot yields them: float32 (3, h, w) tensors in [0, 1]."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        import torch

        sample = self._dataset[index]
        images = {
            key: torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32) / 255
            for key, pixels in sample["images"].items()
        }
        return sample | {"images": images}


def reader_of(task: dict):
    """Imports what the reader needs and returns the function that opens its dataset."""
    import pandas  # noqa: F401  pyarrow imports it when it converts its first column, lerobot at once
    import torch

    torch.set_num_threads(1)
    root, horizon = task["root"], task["horizon"]
    if task["reader"] == "lerobot":
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as TheirDataset

        fps = json.loads((Path(root) / "meta" / "info.json").read_text())["fps"]
        delta = {ACTION_KEY: [step / fps for step in range(horizon)]}
        return lambda: TheirDataset(
            "local/benchmark", root=root, delta_timestamps=delta, video_backend=task["backend"]
        )
    from wallvla.data.lerobot import LeRobotDataset

    def read():
        return LeRobotDataset(root, embodiment="robot", action_horizon=horizon)

    return (lambda: AsTensors(read())) if task["reader"] == "as tensors" else read


def as_is(sample):
    """Collate function of single samples; a lambda could not be sent to a worker."""
    return sample


def peak_mb() -> float:
    """Largest resident memory of this process so far, megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def shared_out_mb() -> float:
    """Proportional set size of this process and its workers, megabytes."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    rollups = [Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes]
    return sum(int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) for rollup in rollups) / 1024


def measure_samples(task: dict) -> dict:
    """Samples per second of one reader, order and number of workers."""
    from torch.utils.data import DataLoader, Subset

    reader = reader_of(task)
    imports = shared_out_mb()
    started = time.perf_counter()
    dataset = reader()
    opened = time.perf_counter() - started
    order = np.arange(len(dataset))
    if task["order"] == "random":
        order = np.random.default_rng(0).permutation(order)
    part = Subset(dataset, order[: task["samples"]].tolist())
    samples = iter(DataLoader(part, batch_size=None, num_workers=task["workers"], collate_fn=as_is))
    next(samples)  # starting the workers is not counted
    started = time.perf_counter()
    for _ in range(len(part) - 1):
        next(samples)
    seconds = time.perf_counter() - started
    memory = shared_out_mb() - imports  # before the workers end
    return {
        "samples_per_second": (len(part) - 1) / seconds,
        "open_seconds": opened,
        "frames": len(dataset),
        "memory_mb": memory,
    }


def measure_statistics(task: dict) -> dict:
    """Frames per second of the statistics pass: every step of every chunk, measured from the pose when it starts."""
    from wallvla.action_space_wallvla import Embodiment
    from wallvla.data.statistics import compute_statistics

    reader = reader_of(task)
    imports = peak_mb()
    dataset = reader()
    layout = [
        (f"{arm}_{part}", width) for arm in ("left", "right")
        for part, width in (("ee_position", 3), ("ee_rotation", 3), ("gripper", 1))
    ]  # fmt: skip
    robot = Embodiment(
        cameras={"observation.images.front": "front view"}, control_frequency=dataset.fps,
        action_horizon=dataset.action_horizon, state_layout=layout, action_layout=layout,
        reference_frame="eef_relative",
    )  # fmt: skip
    result = {"frames": len(dataset)}
    for name, exact in (("sketch", False), ("exact", True)):
        started = time.perf_counter()
        compute_statistics(dataset, robot, exact=exact, progress=False)
        result[f"{name}_frames_per_second"] = len(dataset) / (time.perf_counter() - started)
        result[f"{name}_memory_mb"] = peak_mb() - imports
    return result


def dump_samples(task: dict) -> dict:
    """Writes some samples in our form to `task["output"]`; LeRobot's class goes through our `LeRobotItems`."""
    dataset = reader_of(task)()
    if task["reader"] == "lerobot":
        from wallvla.data.items import LeRobotItems

        dataset = LeRobotItems(dataset, embodiment="robot", action_horizon=task["horizon"])
    order = np.random.default_rng(1).permutation(len(dataset))[: task["samples"]]
    samples = [dataset[int(index)] for index in order]
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in ("state", "actions", "action_is_pad")}
    arrays["task"] = np.array([sample["instruction"] for sample in samples])
    for camera in samples[0]["images"]:
        arrays[camera] = np.stack([sample["images"][camera] for sample in samples])
    np.savez(task["output"], **arrays)
    return {"samples": len(samples)}


# ---- all of them ---------------------------------------------------------------------------------------------------


def run(task: dict, python: str, folder: Path) -> dict:
    """A task in a process of its own; `folder` holds this package under the name wallvla."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--task", json.dumps(task)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr[-2000:]}")
    return task | json.loads(done.stdout.splitlines()[-1])


def compare(common: dict, lerobot_python: str, folder: Path, image_tolerance: float) -> dict:
    """Both readers on the same random samples: exits where they differ."""
    found = {}
    for reader, python in (("wallvla", sys.executable), ("lerobot", lerobot_python)):
        output = folder / f"{reader}.npz"
        run(common | {"what": "dump", "reader": reader, "samples": 100, "output": str(output)}, python, folder)
        found[reader] = dict(np.load(output))
    ours, theirs = found["wallvla"], found["lerobot"]
    differing = [
        name for name in ("state", "actions", "action_is_pad", "task") if not np.array_equal(ours[name], theirs[name])
    ]
    cameras = [name for name in ours if name.startswith("observation.image")]
    distances = [
        np.abs(ours[camera].astype(int) - theirs[camera]).mean(axis=(1, 2, 3)) for camera in cameras
    ]  # fmt: skip
    worst = float(np.max(distances))
    if differing or worst > image_tolerance or not cameras:
        sys.exit(f"The readers differ in {', '.join(differing) or 'images'}: images by up to {worst:.2f} grey levels.")
    print(
        f"both readers return the same in {len(ours['state'])} random samples: numbers and tasks exactly, images of "
        f"{len(cameras)} cameras within {worst:.2f} grey levels on average of an image",
        flush=True,
    )
    return {"what": "comparison", "samples": len(ours["state"]), "worst_image_grey_levels": worst}


def measure_dataset(root: Path, growth: int | None, workers: list[int], options, folder: Path) -> list[dict]:
    """All measurements of one dataset; prints each."""
    common = {"root": str(root), "horizon": options.horizon, "backend": options.backend, "growth": growth}
    readers = {"wallvla": sys.executable}
    rows = []
    if options.lerobot_python:
        rows.append(compare(common, options.lerobot_python, folder, options.image_tolerance))
        readers |= {"as tensors": sys.executable, "lerobot": options.lerobot_python}
    for number in workers:
        for order in ("sequential", "random"):
            for reader, python in readers.items():
                task = {"what": "samples", "reader": reader, "order": order, "workers": number}
                rows.append(run(common | task | {"samples": options.samples}, python, folder))
                print_row(rows[-1])
    if growth is not None:  # a layout that fits the numbers is known only of what was written here
        rows.append(run(common | {"what": "statistics", "reader": "wallvla"}, sys.executable, folder))
        print_row(rows[-1])
    return rows


def print_row(row: dict):
    """Prints one measurement."""
    size = f"{row['frames']} frames" + (f" ({row['growth']}x)" if row["growth"] else "")
    if row["what"] == "statistics":
        parts = [
            f"{name} {row[f'{name}_frames_per_second']:.0f} frames/s {row[f'{name}_memory_mb']:.0f} MB"
            for name in ("sketch", "exact")
        ]
        print(f"{size:<20}statistics  {', '.join(parts)}", flush=True)
        return
    print(
        f"{size:<20}{row['reader']:<12}{row['order']:<12}{row['workers']} workers {row['samples_per_second']:8.0f} "
        f"samples/s  open {row['open_seconds']:5.2f} s  {row['memory_mb']:6.0f} MB",
        flush=True,
    )


def main():
    """Runs every measurement in a process of its own and prints a line for each."""
    options = parse_arguments()
    if options.task:
        task = json.loads(options.task)
        tasks = {"samples": measure_samples, "statistics": measure_statistics, "dump": dump_samples}
        print(json.dumps(tasks[task["what"]](task)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wallvla").symlink_to(PACKAGE, target_is_directory=True)
        if options.dataset is not None:
            rows += measure_dataset(options.dataset, None, options.workers, options, folder)
        for place, factor in enumerate(options.growth if options.dataset is None else []):
            root = folder / f"x{factor}"
            write_dataset(root, options.episodes * factor, options)
            # All numbers of workers on the first size; how cost grows with the dataset, without workers.
            rows += measure_dataset(root, factor, [0] if place else options.workers, options, folder)
    if options.json is not None:
        result = {"cpu": platform.processor() or platform.machine(), "size": options.size, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
