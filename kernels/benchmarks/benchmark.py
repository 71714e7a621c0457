"""Each kernel at the sizes of Wall-OSS-0.5: milliseconds and GB/s against torch and Inductor, with a check.

    python kernels/build_without_nix.py cuda --archs 9.0
    python kernels/benchmarks/benchmark.py --output benchmarks/results/kernels-h100.md

The same classes run under `kernels benchmark x-square/wallvla-kernels` once the repository is on the Hub.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


try:
    from kernels.benchmark import Benchmark
except ImportError:  # only `kernels benchmark` needs the package
    Benchmark = object

PROJECT = Path(__file__).resolve().parents[1]
# Tokens of a policy call (3 views and 150 tokens of text): a denoising step, and prefixes at 224 and 448 pixels
STEP, SMALL, LARGE = 32, 342, 918
# Patches of 3 views at 448 pixels
PATCHES = 3 * 32 * 32


def rotate_half(states: Tensor) -> Tensor:
    """(-second half, first half) of the last dimension."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def qkv_rope_store(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """As a model writes it in torch: rotation in float32, keys and values copied into the cache."""
    end, kv_heads, width = start + qkv.shape[1], keys.shape[1], keys.shape[3]
    heads = qkv.unflatten(-1, (-1, width)).transpose(1, 2)
    states = heads[:, :-kv_heads].float()
    rotated = (states * cos[:, None] + rotate_half(states) * sin[:, None]).to(qkv.dtype)
    keys[:, :, start:end] = rotated[:, -kv_heads:]
    values[:, :, start:end] = heads[:, -kv_heads:]
    return rotated[:, :-kv_heads].contiguous()


def vision_rope_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As the stock vision block: queries and keys rotated in float32."""
    states = qkv[:, :2].float()
    qkv[:, :2] = (states * cos[:, None, None] + rotate_half(states) * sin[:, None, None]).to(qkv.dtype)


def add_rms_norm(states: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the layers of Wall-OSS, with the norm in float32."""
    total = residual + states
    scaled = total.float()
    scaled = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + 1e-6)
    return (weight * scaled).to(states.dtype), total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half, as torch computes it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Qkv(Benchmark):
    """Rotation of queries and keys, and the store of keys and values, behind a prefix of 918 tokens."""

    seed = 0

    def make(self, tokens: int, heads: int) -> None:
        self.qkv = torch.randn(1, tokens, (heads + 4) * 128, device=self.device, dtype=torch.bfloat16)
        half = torch.randn(1, tokens, 64, device=self.device)
        angles = torch.cat([half, half], dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.keys, self.values = torch.zeros(2, 1, 2, LARGE + STEP, 128, device=self.device, dtype=torch.bfloat16)
        self.start = LARGE if tokens == STEP else 0
        self.arguments = (self.qkv, self.cos, self.sin, self.keys, self.values, self.start)
        self.bytes = 2 * self.qkv.nbytes + self.cos.nbytes + self.sin.nbytes

    def run(self) -> None:
        self.out = self.kernel.qkv_rope_store(*self.arguments)

    def reference(self) -> Tensor:
        return qkv_rope_store(*self.arguments)

    def setup_step(self) -> None:
        self.make(STEP, 16)

    def setup_prefix(self) -> None:
        self.make(LARGE, 16)

    benchmark_step = benchmark_prefix = run
    verify_step = verify_prefix = reference


class Vision(Benchmark):
    """Rotation in place of a packed projection of vision: 3 views at 448 pixels, 16 heads of 80."""

    seed = 0

    def setup_patches(self) -> None:
        self.qkv = torch.randn(PATCHES, 3, 16, 80, device=self.device, dtype=torch.bfloat16)
        half = torch.randn(PATCHES, 40, device=self.device)
        angles = torch.cat([half, half], dim=-1)
        self.arguments = (self.qkv, angles.cos(), angles.sin())
        # Queries and keys are read and written, values stay
        self.bytes = 2 * self.qkv.nbytes * 2 // 3 + 2 * angles.nbytes
        self.before = self.qkv.clone()

    def benchmark_patches(self) -> None:
        self.kernel.vision_rope_(*self.arguments)

    def verify_patches(self) -> Tensor:
        self.qkv.copy_(self.before)
        self.benchmark_patches()
        self.out = self.qkv.clone()
        self.qkv.copy_(self.before)
        vision_rope_(*self.arguments)
        return self.qkv

    def reference(self) -> None:
        vision_rope_(*self.arguments)


class AddRmsNorm(Benchmark):
    """Residual and norm: the action expert's step (1024) and the VL expert's prefix (2048); float32 weights."""

    seed = 0

    def make(self, tokens: int, width: int) -> None:
        self.states, self.residual = torch.randn(2, 1, tokens, width, device=self.device, dtype=torch.bfloat16)
        self.weight = torch.randn(width, device=self.device)
        self.bytes = 4 * self.states.nbytes

    def run(self) -> None:
        self.out, self.total = self.kernel.add_rms_norm(self.states, self.residual, self.weight, 1e-6, True)

    def reference(self) -> Tensor:
        return add_rms_norm(self.states, self.residual, self.weight)[0]

    def setup_step(self) -> None:
        self.make(STEP, 1024)

    def setup_prefix(self) -> None:
        self.make(LARGE, 2048)

    benchmark_step = benchmark_prefix = run
    verify_step = verify_prefix = reference


class Swiglu(Benchmark):
    """The action expert's step (2048) and the VL expert's prefix (11008)."""

    seed = 0

    def make(self, tokens: int, width: int) -> None:
        self.gate_up = torch.randn(1, tokens, 2 * width, device=self.device, dtype=torch.bfloat16)
        self.bytes = self.gate_up.nbytes * 3 // 2

    def run(self) -> None:
        self.out = self.kernel.swiglu(self.gate_up)

    def reference(self) -> Tensor:
        return swiglu(self.gate_up)

    def setup_step(self) -> None:
        self.make(STEP, 2048)

    def setup_prefix(self) -> None:
        self.make(LARGE, 11008)

    benchmark_step = benchmark_prefix = run
    verify_step = verify_prefix = reference


WORKLOADS = [
    (Qkv, "step"),
    (Qkv, "prefix"),
    (Vision, "patches"),
    (AddRmsNorm, "step"),
    (AddRmsNorm, "prefix"),
    (Swiglu, "step"),
    (Swiglu, "prefix"),
]


def load_kernels(device: str) -> ModuleType:
    """The newest local build for a device, whatever its version of CUDA."""
    tag = "cpu" if device == "cpu" else "cu"
    variants = sorted((PROJECT / "build").glob(f"torch-*-{tag}*"), key=lambda path: path.stat().st_mtime)
    if not variants:
        backend = "cpu" if device == "cpu" else "cuda"
        raise SystemExit(f"There is no build for {device}: run python kernels/build_without_nix.py {backend}")
    name = json.loads((variants[-1] / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variants[-1] / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(function: Callable[[], object], device: str, calls: int) -> float:
    """Median time of a call: replays of a CUDA graph, so that launches from Python do not count; on a CPU, calls."""
    for _ in range(3):
        function()
    if device == "cpu":
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
        return sorted(times)[len(times) // 2]
    repeats, graph = 20, torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a graph wants a warm-up on a stream of its own
        function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / repeats for begin, end in events)
    return times[len(times) // 2]


def measure(workload: type[Benchmark], name: str, kernels: ModuleType, device: str, calls: int) -> dict:
    """One row: error, bytes and the times of the three implementations, in one process and on the same tensors."""
    bench = workload()
    bench.device, bench.kernel = device, kernels
    torch.manual_seed(bench.seed)
    vars(workload)[f"setup_{name}"](bench)
    vars(workload)[f"benchmark_{name}"](bench)
    expected = vars(workload)[f"verify_{name}"](bench)
    error = ((bench.out.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < 1e-2:
        raise SystemExit(f"{workload.__name__} {name}: relative error {error:.3g} against torch; nothing was timed.")
    run = vars(workload)[f"benchmark_{name}"]
    compiled = torch.compile(bench.reference, dynamic=False)
    return {
        "kernel": f"{workload.__name__} {name}",
        "bytes": bench.bytes,
        "relative error": error,
        "kernel ms": milliseconds(lambda: run(bench), device, calls),
        "torch ms": milliseconds(bench.reference, device, calls),
        "inductor ms": milliseconds(compiled, device, calls),
    }


def table(rows: list[dict], device: str, command: str) -> str:
    """The record: machine, date, commit and command above the figures."""
    git = ["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"command    {command}",
        f"machine    {machine}, torch {torch.__version__}",
        f"date       {datetime.date.today()}",
        f"commit     {commit}",
    ]
    lines = [f"    {line}" for line in lines]
    lines += ["", "| kernel | MB | kernel ms | GB/s | torch ms | Inductor ms | torch / kernel | Inductor / kernel |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        times = [row["kernel ms"], row["torch ms"], row["inductor ms"]]
        lines.append(
            f"| {row['kernel']} | {row['bytes'] / 1e6:.2f} | {times[0]:.4f} | {row['bytes'] / times[0] / 1e6:.0f} "
            f"| {times[1]:.4f} | {times[2]:.4f} | {times[1] / times[0]:.2f} | {times[2] / times[0]:.2f} |"
        )
    lines += ["", "Small tensors stay in the GPU's cache between calls, so their GB/s may exceed that of its memory."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: python kernels/benchmarks/benchmark.py --calls 200"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each implementation")
    parser.add_argument("--output", type=Path, help="Markdown file of the record; a JSON file is written beside it")
    arguments = parser.parse_args()
    kernels = load_kernels(arguments.device)
    rows = []
    for number, (workload, name) in enumerate(WORKLOADS, 1):
        print(f"[{number}/{len(WORKLOADS)}] {workload.__name__} {name}", file=sys.stderr)
        rows.append(measure(workload, name, kernels, arguments.device, arguments.calls))
    record = table(rows, arguments.device, " ".join(["python", "kernels/benchmarks/benchmark.py", *sys.argv[1:]]))
    print(record)
    if arguments.output:
        for path, text in (
            (arguments.output, record),
            (arguments.output.with_suffix(".json"), json.dumps(rows, indent=2)),
        ):
            temporary = path.with_name(path.name + ".part")
            temporary.write_text(text)
            os.replace(temporary, path)


if __name__ == "__main__":
    main()
