"""The benchmark script: its checks hold, and a kernel that is wrong is not timed."""

from types import SimpleNamespace

import pytest
import torch
from kernel_testing import PROJECT, load_file


@pytest.fixture(scope="module")
def script():
    return load_file("kernel_benchmark", PROJECT / "benchmarks" / "benchmark.py")


@pytest.fixture(scope="module")
def cpu_kernels(load_variant):
    return load_variant("cpu")


def test_every_workload_agrees_with_torch(script, cpu_kernels, monkeypatch):
    monkeypatch.setattr(script, "milliseconds", lambda function, device, calls: 0.5)
    rows = [script.measure(*workload, cpu_kernels, "cpu", 1) for workload in script.WORKLOADS]
    assert all(0 <= row["relative error"] < 4e-3 for row in rows)
    # By hand: what must move for a step of the expert is its projection, in and out, and its angles
    assert rows[0]["bytes"] == 2 * (32 * 20 * 128 * 2) + 2 * (32 * 128 * 4)
    assert rows[-1]["bytes"] == 918 * 3 * 11008 * 2
    record = script.table(rows, "cpu", "the command")
    assert record.count("\n| ") == 1 + len(script.WORKLOADS) and "command    the command" in record


def test_a_wrong_kernel_is_not_timed(script):
    wrong = SimpleNamespace(swiglu=lambda gate_up: torch.zeros_like(gate_up[..., ::2]))
    with pytest.raises(SystemExit, match="nothing was timed"):
        script.measure(script.Swiglu, "step", wrong, "cpu", 1)
