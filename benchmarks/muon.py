"""DMuon beside its baselines: bytes and operations per rank, accuracy, and seconds in one process.

    python benchmarks/muon.py              # counted and simulated figures: benchmarks/results/muon.md and muon.json
    python benchmarks/muon.py --speed      # seconds of one step, matrices an eighth as wide, on the CPU
    python benchmarks/muon.py --speed --device cuda --divide 1      # at full size, on one GPU of 80 GB

"counted": on real gloo ranks, by a dispatch mode that sees every collective, and by torch's FlopCounterMode.
"simulated": from the plan that a step follows. Where both exist they are equal, or the script fails.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.trainers.muon import (
    OPTIMIZERS,
    count_parts,
    is_muon_parameter,
    logical_matrices,
    newton_schulz,
    newton_schulz_flops,
    plan_buckets,
)


RESULTS = Path(__file__).parent / "results"
EXPERTS = r"language_model\.layers\.|action_expert\.layers\."


def full_size_parameters(matrices: str) -> dict[str, tuple[int, int]]:
    """Name -> shape of what Muon gets in Wall-OSS-0.5 at full size, without allocating it."""
    with torch.device("meta"):
        model = WallVLAForConditionalGeneration(WallVLAConfig.wall_oss_05())
    return {n: tuple(p.shape) for n, p in model.named_parameters() if is_muon_parameter(n, p, matrices)}


class CountSent(TorchDispatchMode):
    """Bytes that this rank sends in collectives: what is not its own in an all-to-all, and its own part to each other
    rank in an all-gather (which a ring does)."""

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.rank, self.ranks, self.bytes, self.calls = rank, ranks, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "alltoall_base" in name:
            sent, splits = args[1], args[4]
            self.bytes += (sent.numel() - splits[self.rank]) * sent.element_size()
            self.calls["all_to_all"] += 1
        elif "c10d.allgather_" in name:
            (part,) = args[1]
            self.bytes += part.numel() * part.element_size() * (self.ranks - 1)
            self.calls["all_gather"] += 1
        elif "c10d" in name and "wait" not in name:
            raise RuntimeError(f"a collective that is not counted: {name}")
        return function(*args, **(kwargs or {}))


class Matrices(nn.Module):
    """Parameters of given names and shapes; dots become a character that a parameter may have in its name."""

    def __init__(self, shapes: dict[str, tuple[int, int]], device: str = "cpu"):
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, device=device) * 0.02
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value))

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.replace("/", "."), p) for name, p in self.named_parameters()]


def count_on_rank(rank: int, ranks: int, port: int, name: str, shapes: dict, bucket_size: int, queue) -> None:
    """One rank of a counted step; puts what it sent and computed into `queue`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model = Matrices(shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = OPTIMIZERS[name](model.named(), bucket_size=bucket_size, is_muon=lambda name, p: True)
    for p in model.parameters():
        p.grad = p.detach().clone()
    with CountSent(rank, ranks) as sent, FlopCounterMode(display=False) as flops:
        optimizer.step()
    queue.put((rank, sent.bytes, flops.get_total_flops(), dict(sent.calls)))
    dist.barrier()
    dist.destroy_process_group()


def counted(name: str, ranks: int, shapes: dict, bucket_size: int) -> list[dict]:
    """Per rank: bytes sent, operations, collectives; of one step on real gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(count_on_rank, (ranks, port, name, shapes, bucket_size, queue), nprocs=ranks)
    found = sorted(queue.get() for _ in range(ranks))
    return [{"bytes": sent, "flops": flops, "calls": calls} for _, sent, flops, calls in found]


def simulated(name: str, ranks: int, shapes: dict, bucket_size: int, dtype: torch.dtype = torch.float32) -> list[dict]:
    """The same from the plan alone."""
    parts = [count_parts(n) for n in shapes]
    matrices = logical_matrices(shapes.values(), parts)
    cost = [newton_schulz_flops(*m.shape, dtype=dtype) for m in matrices]
    size = dtype.itemsize
    if name == "muon_naive":
        # shards are padded to the largest
        sent = sum(max(m.size(r, ranks) for r in range(ranks)) for m in matrices) * (ranks - 1) * size
        return [
            {"bytes": sent, "flops": sum(cost), "calls": {"all_gather": len(matrices)} if ranks > 1 else {}}
        ] * ranks
    plan = plan_buckets(matrices, ranks, bucket_size=bucket_size, dtype=dtype)
    results = []
    for rank in range(ranks):
        mine = [i for bucket in plan for i in bucket[rank]]
        others = [i for bucket in plan for r in range(ranks) if r != rank for i in bucket[r]]
        there = sum(matrices[i].size(rank, ranks) for i in others)
        back = sum(m.shape[0] * m.columns - m.size(rank, ranks) for m in (matrices[i] for i in mine))
        calls = {"all_to_all": 2 * len(plan)} if ranks > 1 else {}
        results.append({"bytes": (there + back) * size, "flops": sum(cost[i] for i in mine), "calls": calls})
    return results


def summary(ranks: list[dict]) -> dict:
    """The rank that does most."""
    flops = [rank["flops"] for rank in ranks]
    return {
        "bytes": max(rank["bytes"] for rank in ranks),
        "flops": max(flops),
        "imbalance": max(flops) * len(flops) / sum(flops),
        "collectives": sum(ranks[0]["calls"].values()),
    }


def compare_on_ranks(full: dict, divide: int) -> list[dict]:
    """Rows of the table: counted at reduced width for 2 and 4 ranks, simulated at full size for all."""
    rows = []
    small = {n: tuple(side // divide for side in shape) for n, shape in full.items()}
    bucket_size = 2**26 // divide**2
    for ranks in tqdm((2, 4), desc="gloo ranks"):
        for name in ("muon", "muon_naive"):
            found, expected = (f(name, ranks, small, bucket_size) for f in (counted, simulated))
            if found != expected:
                raise RuntimeError(f"{name} on {ranks} ranks: counted {found}, simulated {expected}")
            rows.append({"how": "counted", "width": f"1/{divide}", "ranks": ranks, "optimizer": name} | summary(found))
    for ranks in (1, 2, 4, 8, 64):
        for name in ("muon", "muon_naive"):
            row = {"how": "simulated", "width": "1", "ranks": ranks, "optimizer": name}
            rows.append(row | summary(simulated(name, ranks, full, 2**26)))
    return rows


def orthogonality(shapes: dict, divide: int) -> list[dict]:
    """Errors against a float64 SVD, for each distinct shape up to transpose, at reduced width."""
    rows = []
    distinct = sorted({(min(s) // divide, max(s) // divide) for s in shapes.values()})
    for shape in tqdm(distinct, desc="float64 SVD"):
        matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        u, s, vh = torch.linalg.svd(matrix[0].double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = u @ s.diag() @ vh
        row = {"shape": list(shape), "singular_values": [s.min().item(), s.max().item()]}
        for label, options in (
            ("plain, float32", {"gram": False}),
            ("Gram, float32", {"gram": True}),
            ("plain, bfloat16", {"gram": False, "dtype": torch.bfloat16}),
        ):
            update = newton_schulz(matrix, **options)[0].double()
            row[label] = ((update - expected).norm() / expected.norm()).item()
        rows.append(row)
    return rows


def speed(shapes: dict, device: str, divide: int, repeats: int) -> list[dict]:
    """Seconds of one optimizer step in one process: ours and torch.optim.Muon in turn, median of `repeats`."""
    small = {n: tuple(side // divide for side in shape) for n, shape in shapes.items()}
    arms = {
        "ours, float32": ("muon", {"dtype": torch.float32}),
        "ours, bfloat16": ("muon", {"dtype": torch.bfloat16}),
        "one by one, float32": ("muon_naive", {"dtype": torch.float32}),
        "torch.optim.Muon (bfloat16)": ("torch_muon", {}),
    }
    model = Matrices(small, device)
    optimizers = {label: OPTIMIZERS[name](model.named(), **options) for label, (name, options) in arms.items()}
    for p in model.parameters():
        p.grad = p.detach().clone()
    seconds = {label: [] for label in arms}
    for repeat in tqdm(range(repeats + 1), desc=f"steps on {device}"):
        for label, optimizer in optimizers.items():
            optimizer.state.clear()  # one momentum at a time
            started = time.perf_counter()
            optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:  # the first is a warm-up
                seconds[label].append(time.perf_counter() - started)
            optimizer.state.clear()
    reference = statistics.median(seconds["torch.optim.Muon (bfloat16)"])
    return [
        {"arm": label, "seconds": statistics.median(values), "times_torch": reference / statistics.median(values)}
        for label, values in seconds.items()
    ]


def table(rows: list[dict]) -> str:
    """Markdown; numbers with four digits."""

    def shown(value) -> str:
        if isinstance(value, list):
            return " x ".join(map(shown, value)) if isinstance(value[0], int) else " to ".join(map(shown, value))
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(shown, row.values())) + " |" for row in rows])


def write(results: dict, output: Path) -> None:
    """JSON for programs, Markdown for people, each at once or not at all."""
    parts = ["# DMuon beside its baselines", __doc__.split("\n\n")[2]]
    titles = {
        "ranks": "Per rank and step, the matrices of both experts (the rank that does most; bytes in float32)",
        "ranks_with_vision": "The same with the vision tower, as in training",
        "orthogonality": "Relative error of an update against a float64 SVD, and where its singular values end",
    }
    if "matrices" in results:
        parts.append(f"Matrices at full size: {results['matrices']}.")
    parts += [f"## {title}\n\n{table(results[key])}" for key, title in titles.items() if key in results]
    parts += [f"## Seconds of one step: {key}\n\n{table(rows)}" for key, rows in results.get("speed", {}).items()]
    for suffix, text in ((".json", json.dumps(results, indent=1)), (".md", "\n\n".join(parts))):
        temporary = output.with_name(f"{output.name}{suffix}.tmp")
        temporary.write_text(text + "\n")
        temporary.replace(output.with_suffix(suffix))


def main() -> None:
    """Prints tables and writes `benchmarks/results/muon.{md,json}`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, default=8, help="how much narrower the matrices of counts and speed are")
    parser.add_argument("--speed", action="store_true", help="also measure seconds, on a quiet machine")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "muon", help="without suffix")
    options = parser.parse_args()
    experts, everything = full_size_parameters(EXPERTS), full_size_parameters(r"(^|\.)(layers|blocks)\.\d+\.")
    file = options.output.with_suffix(".json")
    results = json.loads(file.read_text()) if file.is_file() else {}
    if options.speed:
        name = options.device if options.device == "cpu" else torch.cuda.get_device_name()
        machine = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
        key = f"one process, {len(experts)} matrices, width 1/{options.divide}, {machine}, {platform.machine()}"
        results.setdefault("speed", {})[key] = speed(experts, options.device, options.divide, options.repeats)
    else:
        count = sum(map(count_parts, everything))
        results["matrices"] = {"both experts": len(experts), "with the vision tower": count}
        results["ranks"] = compare_on_ranks(experts, options.divide)
        results["ranks_with_vision"] = [
            {"how": "simulated", "width": "1", "ranks": ranks, "optimizer": "muon"}
            | summary(simulated("muon", ranks, everything, 2**26))
            for ranks in (1, 8, 64)
        ]
        results["orthogonality"] = orthogonality(experts, options.divide)
    write(results, options.output)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
