"""Load on a policy server: throughput, latency, and whether every client gets the answers to its own questions.

    python benchmarks/serving_load.py runs/quickstart/hub --output benchmarks/results/serving_load.json

Starts `wallvla serve` in a process of its own and connects many clients from this one. Every request is one of 64
observations with a seed of its own, in random order; their answers were computed before, one at a time, without a
server. A reply must carry the number of its request and be equal to the answer that belongs to it; different answers
lie further apart than that. Phases: 1, 8 and 32 clients; 8 clients among others that are silent, half open, slow to
read or send garbage; then kill -9 of the server under load and a restart, with recording.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from wallvla import register_auto_classes
from wallvla.data.lerobot import LeRobotDataset
from wallvla.serving.client import PolicyClient
from wallvla.serving.policy import PolicyRequest, load_policy
from wallvla.serving.wire import pack, unpack


POOL = 64
TOLERANCE = 1e-3  # batches of other sizes round differently; answers to other questions differ by far more


class Server:
    """`wallvla serve` as a subprocess that is ready when the block begins and stopped when it ends."""

    def __init__(self, path: str, port: int, log: Path, record: Path | None = None):
        command = [sys.executable, "-m", "wallvla.cli", "serve", path, "--port", str(port)]
        self._command = command + (["--record", str(record)] if record else [])
        self.port, self._log = port, log

    def __enter__(self) -> "Server":
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while self.fetch("/healthz") != "OK\n":
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start, see {self._log}:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *exception) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def fetch(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
                return reply.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return ""


def make_pool(path: str) -> tuple[list[dict], np.ndarray]:
    """Observations as a client sends them, and the answers (POOL, H, D) to them."""
    policy = load_policy(path)
    rng = np.random.default_rng(0)
    (camera,) = policy.robot.cameras
    low, high = (np.array(policy.robot.statistics["state"][name]) for name in ("q01", "q99"))
    messages, answers = [], []
    for number in range(POOL):
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        state = (low + (high - low) * rng.random(len(low))).astype(np.float32)
        message = {camera: image, "observation.state": state, "prompt": "press the button"}
        request = PolicyRequest(policy.adapter.read(message), seed=number, call=0)
        messages.append(message)
        answers.append(policy.infer([request])[0])
    answers = np.stack(answers)
    distance = np.abs(answers[:, None] - answers[None]).max(axis=(2, 3)) + 1e9 * np.eye(POOL)
    if distance.min() < 10 * TOLERANCE:
        raise RuntimeError(f"two answers differ by {distance.min()} only, so crossed replies could go unseen")
    return messages, answers


class Tally:
    """What the replies of a phase were."""

    def __init__(self):
        self.seconds, self.crossed, self.errors, self.largest = [], 0, {}, 0.0

    def take(self, reply, request_id: int, expected: np.ndarray, seconds: float) -> None:
        if isinstance(reply, str):
            kind = json.loads(reply)["error"]
            self.errors[kind] = self.errors.get(kind, 0) + 1
            return
        answer = unpack(reply)
        error = float(np.abs(answer["actions"] - expected).max())
        self.crossed += answer["request_id"] != request_id or error > TOLERANCE
        self.largest = max(self.largest, error)
        self.seconds.append(seconds)

    def summary(self, wall_s: float) -> dict:
        p50, p95, p99 = (round(1000 * float(np.quantile(self.seconds, q)), 1) for q in (0.5, 0.95, 0.99))
        return {
            "replies": len(self.seconds),
            "crossed": self.crossed,
            "errors": self.errors,
            "largest_difference": float(f"{self.largest:.2g}"),
            "requests_per_s": round(len(self.seconds) / wall_s, 1),
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
        }


async def run_phase(port: int, clients: int, requests: int, pool) -> dict:
    """`requests` questions from `clients` connections, each of which waits for its answer before it asks again."""
    messages, answers = pool
    tally, numbers = Tally(), iter(range(requests))

    async def client(name: int) -> None:
        choice = random.Random(name)
        async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
            await connection.recv()
            for request_id in numbers:
                index = choice.randrange(POOL)
                options = {"request_id": request_id, "seed": index, "call": 0}
                started = time.perf_counter()
                await connection.send(pack({**messages[index], "__wallvla__": options}))
                reply = await connection.recv()
                tally.take(reply, request_id, answers[index], time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client(name) for name in range(clients)))
    return {"clients": clients, "requests": requests, **tally.summary(time.perf_counter() - started)}


async def misbehave(port: int, pool, stop: asyncio.Event) -> None:
    """Clients that hold what they can: silent, half open, slow to read, and senders of garbage."""
    message = pack(pool[0][0])
    rng = random.Random(0)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):  # TCP connections that never say anything
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
        for _ in range(4):  # websockets that never ask
            await stack.enter_async_context(connect(f"ws://127.0.0.1:{port}", compression=None))
        raw = socket.create_connection(("127.0.0.1", port))  # half a handshake
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: webs")
        stack.callback(raw.close)
        # Without pings of its own: it does not read the answers to those either
        slow = await stack.enter_async_context(
            connect(f"ws://127.0.0.1:{port}", compression=None, max_queue=1, ping_interval=None)
        )
        while not stop.is_set():
            with contextlib.suppress(ConnectionClosed):  # the server drops it when it does not answer pings
                await slow.send(message)  # and never reads
            with contextlib.suppress(ConnectionClosed, InvalidHandshake):  # thrown out again and again
                async with connect(f"ws://127.0.0.1:{port}", compression=None) as fuzzer:
                    for _ in range(20):
                        await fuzzer.send(rng.randbytes(rng.randrange(1, 200_000)))
                        await fuzzer.recv()
            await asyncio.sleep(0.2)


async def run_among_bad_clients(port: int, clients: int, requests: int, pool) -> dict:
    """`run_phase` while other clients are slow, silent or half open."""
    stop = asyncio.Event()
    bad = asyncio.ensure_future(misbehave(port, pool, stop))
    result = await run_phase(port, clients, requests, pool)
    stop.set()
    await bad
    return result


def crash(path: str, port: int, folder: Path, pool) -> dict:
    """kill -9 under load, restart on the same port, recording all the time."""
    messages, answers = pool
    log, record = folder / "crash.log", folder / "recordings"
    stop, counts, problems = threading.Event(), [0] * 4, []

    def robot(name: int) -> None:
        with PolicyClient(f"ws://127.0.0.1:{port}", reconnect_s=120) as client:
            client.start_episode(seed=name, task="press the button")
            while not stop.is_set():
                index = random.Random(1000 * name + counts[name]).randrange(POOL)
                reply = client.infer(messages[index], {"seed": index, "call": 0})
                if np.abs(reply["actions"] - answers[index]).max() > TOLERANCE:
                    problems.append(f"robot {name}, request {counts[name]}: a wrong answer")
                counts[name] += 1

    with Server(path, port, log, record) as server:
        threads = [threading.Thread(target=robot, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(5)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        before = list(counts)
        started = time.monotonic()
        with Server(path, port, log, record):
            restart_s = time.monotonic() - started
            time.sleep(5)
            stop.set()
            for thread in threads:
                thread.join()
    datasets = [
        LeRobotDataset(root, embodiment="robot", action_horizon=1) for root in sorted(record.glob("*/round-???"))
    ]
    for dataset in datasets:
        for index in range(len(dataset)):  # decodes every frame
            dataset[index]
    return {
        "robots": 4,
        "answers_before_kill": sum(before),
        "answers_after": sum(counts) - sum(before),
        "restart_s": round(restart_s, 1),
        "wrong_answers": len(problems),
        "recorded_frames": [len(dataset) for dataset in datasets],
        "recorded_episodes": [dataset.num_episodes for dataset in datasets],
        "answered_but_not_recorded": max(0, sum(counts) - sum(map(len, datasets))),
    }


def main() -> None:
    """Runs all phases and writes their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--requests", type=int, nargs=3, default=[500, 2000, 10000], help="of 1, 8 and 32 clients")
    parser.add_argument("--port", type=int, default=8141)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_auto_classes()
    pool = make_pool(options.path)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = " ".join(["python", "benchmarks/serving_load.py", "CHECKPOINT", *sys.argv[2:]])
    result = {"command": command, "date": "2026-11-21", "commit": commit, "machine": "2 shared CPU cores"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Server(options.path, options.port, folder / "load.log") as server:
            load = os.getloadavg()[0]
            result["phases"] = []
            for clients, requests in zip((1, 8, 32), options.requests, strict=True):
                result["phases"].append(asyncio.run(run_phase(options.port, clients, requests, pool)))
                print(result["phases"][-1], flush=True)
            result["among_bad_clients"] = asyncio.run(
                run_among_bad_clients(options.port, 8, options.requests[1], pool)
            )
            print(result["among_bad_clients"], flush=True)
            result["load_average"] = {"before": load, "after": os.getloadavg()[0]}
            result["metrics"] = [line for line in server.fetch("/metrics").splitlines() if "_total{" in line]
        result["crash"] = crash(options.path, options.port + 1, folder, pool)
        print(result["crash"])
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
