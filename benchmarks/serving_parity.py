"""The same policy in-process and through the stock `openpi-client` over a socket: same actions, same success?

    python -m venv stock && stock/bin/pip install openpi-client typing_extensions
    python benchmarks/serving_parity.py runs/quickstart/hub --stock-python stock/bin/python

Three processes: this one has the simulator, `wallvla serve` the model, `stock_client.py` the stock client in a clean
environment. Every episode is played twice, with the same seed. In the played-through episodes each frame is also given
to the in-process policy, so actions are compared frame by frame, besides the outcomes of the two runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from serving_load import Server

from wallvla import register_auto_classes
from wallvla.evaluation.closed_loop import run_episode, wilson_interval
from wallvla.evaluation.metaworld import EVALUATION_SEED_START, MetaWorldEnv
from wallvla.evaluation.policy import HubPolicy
from wallvla.serving.wire import pack, unpack


class StockClientPolicy:
    """The `Policy` of evaluation, at the other end of `stock_client.py`; compares with `local` at every frame."""

    def __init__(self, python: str, port: int, local: HubPolicy):
        command = [python, str(Path(__file__).with_name("stock_client.py")), str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._local, self.cameras = local, local.cameras
        self.frames, self.largest_difference = 0, 0.0

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def reset(self, seed: int = 0) -> None:
        self._exchange({"__ctrl__": "episode_start", "__seed__": seed})
        self._local.reset(seed)

    def act(self, observation: dict, instruction: str) -> np.ndarray:
        message = {f"observation.images.{name}": image for name, image in observation["images"].items()}
        message |= {"observation.state": observation["state"], "prompt": instruction}
        actions = self._exchange(message)["actions"]
        expected = self._local.act(observation, instruction)
        self.frames += 1
        self.largest_difference = max(self.largest_difference, float(np.abs(actions - expected).max()))
        return actions

    def _exchange(self, message: dict) -> dict:
        data = pack(message)
        self._process.stdin.write(len(data).to_bytes(4, "little") + data)
        self._process.stdin.flush()
        size = int.from_bytes(self._process.stdout.read(4), "little")
        return unpack(self._process.stdout.read(size))


def rate(outcomes: list[bool]) -> dict:
    """Success rate with its 95% interval."""
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {"successes": sum(outcomes), "episodes": len(outcomes), "low": round(low, 3), "high": round(high, 3)}


def main() -> None:
    """Runs both arms and writes their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--stock-python", required=True, help="Python of the environment with openpi-client")
    parser.add_argument("--embodiment", default="metaworld_sawyer")
    parser.add_argument("--tasks", nargs="+", default=["button-press-topdown-v3", "window-close-v3", "drawer-open-v3"])
    parser.add_argument("--seeds", type=int, default=7, help="episodes of each task")
    parser.add_argument("--port", type=int, default=8151)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    local = HubPolicy.from_pretrained(options.path, options.embodiment)
    outcomes = {"in_process": [], "stock_client": []}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    listing = subprocess.run(
        [options.stock_python, "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True
    ).stdout.split()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Server(options.path, options.port, Path(scratch) / "server.log") as server,
    ):
        stock = StockClientPolicy(options.stock_python, server.port, local)
        for task in options.tasks:
            with MetaWorldEnv(task, cameras=("front",)) as env:
                for seed in range(EVALUATION_SEED_START, EVALUATION_SEED_START + options.seeds):
                    for name, policy in (("in_process", local), ("stock_client", stock)):
                        outcomes[name].append(run_episode(env, policy, seed, max_steps=200)["success"])
                    print(task, seed, outcomes["in_process"][-1], outcomes["stock_client"][-1], flush=True)
        stock.close()
    result = {
        "command": " ".join(
            ["python", "benchmarks/serving_parity.py", "CHECKPOINT", "--stock-python", "PYTHON", *sys.argv[4:]]
        ),
        "date": "2026-11-21",
        "commit": commit,
        "machine": "2 shared CPU cores",
        "stock_environment": [line for line in listing if line.split("==")[0] not in ("pip", "setuptools")],
        **{name: rate(values) for name, values in outcomes.items()},
        "episodes_with_the_same_outcome": sum(a == b for a, b in zip(*outcomes.values(), strict=True)),
        "frames_compared": stock.frames,
        "largest_action_difference": stock.largest_difference,
    }
    print(json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
