"""The kernels under test, built here where needed, and the functions of torch that they have to equal."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_testing import PROJECT, load_file


# A vector at an address that is no multiple of its size ends the process; on a GPU it is an error, on x86 it is not
TRAP = "-fsanitize-undefined-trap-on-error"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """`build_without_nix.py`."""
    return load_file("build_without_nix", PROJECT / "build_without_nix.py")


@pytest.fixture(scope="session")
def builds(pytestconfig) -> Path:
    """Folder of test builds, kept between runs: not `build/`, which is what gets published."""
    return Path(pytestconfig.cache.mkdir("kernels"))


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`ops_wallvla.py`: it has no imports of ours, so that it needs no package around it."""
    return load_file("ops_wallvla", PROJECT.parent / "ops_wallvla.py")


@pytest.fixture(scope="session", params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request) -> str:
    """ "emulated": the CUDA sources, run by a CPU (`cuda_on_cpu.h`)."""
    return request.param


@pytest.fixture(scope="session")
def device(backend) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def emulated_project(folder: Path) -> Path:
    """A copy of the project whose CPU backend are the CUDA sources, with kernel launches as calls. Its builder."""
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("build", "tests", "benchmarks", "__pycache__"))
    shutil.copy(PROJECT / "tests" / "cuda_on_cpu.h", folder / "common")
    header = folder / "common" / "cuda.cuh"
    header.write_text(
        re.sub("#include <cuda_.*>\n", "", header.read_text()).replace(
            "#include <climits>", '#include <climits>\n#include "cuda_on_cpu.h"'
        )
    )
    launch = re.compile(r"(\w+<[\w, ]+>)<<<(.+?), 0, queue>>>\((.*?)\);")
    for source in sorted(folder.glob("*/*_cuda.cu")):
        text, launches = launch.subn(r"cuda_on_cpu::run_grid(\2, [&] { \1(\3); });", source.read_text())
        assert launches and "<<<" not in text
        Path(str(source).replace("_cuda.cu", "_cpu.cpp")).write_text(text)
    return folder / "build_without_nix.py"


@pytest.fixture(scope="session")
def load_variant(builder, builds, tmp_path_factory) -> Callable[[str], ModuleType]:
    """Builds a backend and imports it, once: a process can register its operations only once."""
    loaded = {}

    def build(backend: str) -> Path:
        if backend == "cuda":
            return builder.build("cuda", builds, archs=["{}.{}".format(*torch.cuda.get_device_capability())])
        if backend == "cpu":
            return builder.build("cpu", builds)
        path = emulated_project(tmp_path_factory.mktemp("emulated") / "kernels")
        flags = ("-O1", "-fsanitize=alignment", TRAP)
        return load_file("build_emulated", path).build("cpu", builds / "emulated", flags=flags)

    def load(backend: str) -> ModuleType:
        if backend not in loaded:
            variant = build(backend)
            name = json.loads((variant / "metadata.json").read_text())["id"]
            loaded[backend] = load_file(name, variant / "__init__.py")
        return loaded[backend]

    return load


@pytest.fixture(scope="session")
def kernels(backend, load_variant) -> ModuleType:
    """The package of the kernels, of one backend."""
    return load_variant(backend)


@pytest.fixture(scope="session")
def ops(kernels):
    """`torch.ops` of the kernels."""
    return sys.modules[kernels.__name__ + "._ops"].ops
