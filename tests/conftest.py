"""Bind `wallvla` to this checkout, whatever is installed, and keep the tests off the network."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("wallvla", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["wallvla"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["wallvla"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
