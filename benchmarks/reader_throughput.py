"""Samples per second of the LeRobot reader: in order and shuffled, with and without data loader workers.

    python benchmarks/reader_throughput.py                                  # on a dataset that it writes and deletes
    python benchmarks/reader_throughput.py --size 128 --videos png          # the same with images inside parquet
    python benchmarks/reader_throughput.py --dataset ./my_dataset --json result.json

One sample is one frame of every camera, its state and its action chunk. Nothing is collated: this is the reader alone.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter


STATE_KEY, ACTION_KEY = "observation.state", "action"


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="LeRobot dataset folder; without it one is written")
    parser.add_argument("--samples", type=int, default=1000, help="samples per measurement (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker counts (default: 0 1 2)")
    parser.add_argument("--horizon", type=int, default=32, help="steps of an action chunk (default: %(default)s)")
    parser.add_argument("--in-memory", action="store_true", help="decode all frames first (frames_in_memory=True)")
    parser.add_argument("--state-key", default=STATE_KEY, help="feature with the state (default: %(default)s)")
    parser.add_argument("--action-key", default=ACTION_KEY, help="feature with the action (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    written = parser.add_argument_group("dataset that is written without --dataset")
    written.add_argument("--episodes", type=int, default=20, help="episodes of 100 frames (default: %(default)s)")
    written.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: %(default)s)")
    written.add_argument("--cameras", type=int, default=2, help="number of cameras (default: %(default)s)")
    written.add_argument("--preset", default="ultrafast", help="x264 preset (default: %(default)s)")
    written.add_argument("--gop", type=int, default=5, help="frames between keyframes (default: %(default)s)")
    written.add_argument("--videos", choices=["h264", "png"], default="h264", help="storage (default: %(default)s)")
    return parser.parse_args()


def moving_scene(step: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A textured background with a moving square: as hard to encode as a small simulator's frame. uint8 (s, s, 3)."""
    ramp = np.linspace(40, 160, size)
    pixels = np.stack([np.add.outer(ramp, ramp / 2), np.add.outer(ramp / 2, ramp), np.add.outer(ramp, ramp)], axis=-1)
    pixels += rng.normal(0, 2, size=(size, size, 1))
    left = (3 * step) % (size - size // 4)
    pixels[size // 3 : size // 2, left : left + size // 4] = (200, 60, 40)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_dataset(root: Path, options: argparse.Namespace) -> float:
    """Write the synthetic dataset; returns camera frames written per second, without the time to draw them."""
    rng = np.random.default_rng(0)
    cameras = [f"observation.images.camera_{number}" for number in range(options.cameras)]
    features = {camera: {"dtype": "video", "shape": (options.size, options.size, 3)} for camera in cameras}
    features |= {name: {"dtype": "float32", "shape": (14,)} for name in (STATE_KEY, ACTION_KEY)}
    writer = LeRobotWriter(
        root, fps=20, features=features, use_videos=options.videos == "h264", preset=options.preset, gop=options.gop
    )
    scenes = [moving_scene(step, options.size, rng) for step in range(100)]
    started = time.perf_counter()
    with writer:
        for _ in tqdm(range(options.episodes), desc="writing", unit="episode", disable=None):
            for scene in scenes:
                numbers = {STATE_KEY: rng.normal(size=14), ACTION_KEY: rng.normal(size=14)}
                writer.add_frame(dict.fromkeys(cameras, scene) | numbers)
            writer.save_episode("move the square")
    return options.episodes * len(scenes) * len(cameras) / (time.perf_counter() - started)


def samples_per_second(dataset: LeRobotDataset, order: np.ndarray, workers: int) -> float:
    """Time from the first sample to the last: starting the workers is not counted."""
    loader = DataLoader(Subset(dataset, order), batch_size=None, num_workers=workers, collate_fn=as_is)
    samples = iter(loader)
    next(samples)
    started = time.perf_counter()
    for _ in samples:
        pass
    return (len(order) - 1) / (time.perf_counter() - started)


def as_is(sample: dict) -> dict:
    """Collate function of single samples; a lambda could not be sent to a worker."""
    return sample


def measure(root: Path, options: argparse.Namespace) -> dict:
    """Samples per second of one dataset, for every order and number of workers."""
    started = time.perf_counter()
    dataset = LeRobotDataset(
        root, embodiment="benchmark", action_horizon=options.horizon, frames_in_memory=options.in_memory,
        state_key=options.state_key, action_key=options.action_key,
    )  # fmt: skip
    result = {
        "frames": len(dataset),
        "episodes": dataset.num_episodes,
        "images": {key: list(pixels.shape) for key, pixels in dataset[0]["images"].items()},
        "in_memory": options.in_memory,
        "cpu": platform.processor() or platform.machine(),
        "open_seconds": time.perf_counter() - started,
        "samples_per_second": [],
    }
    count = min(options.samples, len(dataset))
    orders = {
        "sequential": np.arange(count),
        "shuffled": np.random.default_rng(0).permutation(len(dataset))[:count],
    }
    for name, order in orders.items():
        for workers in options.workers:
            speed = samples_per_second(dataset, order, workers)
            result["samples_per_second"].append({"order": name, "workers": workers, "value": speed})
    return result


def main():
    """Prints a table, or one JSON object with `--json`."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = options.dataset
        written = {}
        if root is None:
            root = Path(folder) / "dataset"
            written["written_camera_frames_per_second"] = write_dataset(root, options)
        result = {"dataset": str(options.dataset or "synthetic"), **written, **measure(root, options)}

    shapes = ", ".join("x".join(map(str, shape)) for shape in result["images"].values())
    print(f"{result['dataset']}: {result['frames']} frames, {result['episodes']} episodes, images {shapes}")
    for name, speed in written.items():
        print(f"{name}: {speed:.0f}")
    print(f"{'order':<12}{'workers':>8}{'samples/s':>12}")
    for row in result["samples_per_second"]:
        print(f"{row['order']:<12}{row['workers']:>8}{row['value']:>12.0f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
