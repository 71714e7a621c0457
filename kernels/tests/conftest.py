"""The kernels under test, built here where needed, and the functions of torch that they have to equal."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


PROJECT = Path(__file__).resolve().parents[1]


def load_file(name: str, path: Path) -> ModuleType:
    """Imports a file under a name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """`build_without_nix.py`."""
    return load_file("build_without_nix", PROJECT / "build_without_nix.py")


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`ops_wallvla.py`: it has no imports of ours, so that it needs no package around it."""
    return load_file("ops_wallvla", PROJECT.parent / "ops_wallvla.py")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def load_variant(builder) -> Callable[[str], ModuleType]:
    """Builds a backend and imports it, once: a process can register its operations only once."""
    loaded = {}

    def load(backend: str) -> ModuleType:
        if backend not in loaded:
            archs = None
            if backend == "cuda":
                archs = ["{}.{}".format(*torch.cuda.get_device_capability())]
            variant = builder.build(backend, archs=archs)
            name = json.loads((variant / "metadata.json").read_text())["id"]
            loaded[backend] = load_file(name, variant / "__init__.py")
        return loaded[backend]

    return load


@pytest.fixture(scope="session")
def kernels(device, load_variant) -> ModuleType:
    """The package of the kernels for `device`."""
    return load_variant(device)


@pytest.fixture(scope="session")
def ops(kernels):
    """`torch.ops` of the kernels."""
    return sys.modules[kernels.__name__ + "._ops"].ops
