"""What the tests of all kernels share: loading, inputs, layouts and the tolerance."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor


PROJECT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# For what depends on Python alone
compiled_backends = pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True, scope="session"
)

# Sizes are few and small, and the first example loads a library
property_test = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def load_file(name: str, path: Path) -> ModuleType:
    """Imports a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, at an address that is no multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, device=tensor.device, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def assert_as_exact_as(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of torch in the same dtype.

    On a few numbers torch may have luck, so its error counts as at least what rounding makes inevitable: one rounding
    of the largest number in 16 bits; four in float32, where the arithmetic itself rounds at each step.

    Args:
        actual, reference: results of the kernel and of torch, of one dtype.
        exact: the result in float64.
    """
    assert actual.dtype == reference.dtype and exact.dtype == torch.float64
    assert actual.shape == reference.shape == exact.shape
    if actual.numel() == 0:
        return
    roundings = 4 if actual.dtype == torch.float32 else 1
    inevitable = roundings * torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    allowed = 2 * torch.maximum((reference.double() - exact).abs().max(), inevitable)
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g} against {allowed:.3g}"


def assert_opcheck(op, arguments: tuple) -> None:
    """Schema, fake and autograd of an operation pass torch's own checks."""
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}
