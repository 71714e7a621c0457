"""Builds a variant of this Kernel Hub project with plain g++ and nvcc, laid out as `kernels` loads it.

For development and tests. What is published is built by `kernel-builder`, which links against an older C library.

    python kernels/build_without_nix.py cpu
    python kernels/build_without_nix.py cuda --archs 9.0
"""

import argparse
import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch


PROJECT = Path(__file__).resolve().parent
PACKAGE = "wallvla_kernels"

# kernel-builder generates a file of this name and with these macros
REGISTRATION = """\
#pragma once
#include <Python.h>
#define WALLVLA_JOIN_(a, b) a##b
#define WALLVLA_JOIN(a, b) WALLVLA_JOIN_(a, b)
#define WALLVLA_TEXT_(a) #a
#define WALLVLA_TEXT(a) WALLVLA_TEXT_(a)
#define STABLE_TORCH_LIBRARY_EXPAND(name, module) STABLE_TORCH_LIBRARY(name, module)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(name, device, module) STABLE_TORCH_LIBRARY_IMPL(name, device, module)
#define REGISTER_EXTENSION(name)                                                                         \\
  PyMODINIT_FUNC WALLVLA_JOIN(PyInit_, name)() {                                                         \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, WALLVLA_TEXT(name), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module);                                                                     \\
  }
"""

OPS = '''\
import torch

from . import {id}


ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The name of an operation with its namespace."""
    return f"{id}::{{op_name}}"
'''


def config() -> dict:
    """What build.toml says."""
    return tomllib.loads((PROJECT / "build.toml").read_text())


def find_nvcc() -> str | None:
    """The CUDA compiler, or `None`."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_version() -> str:
    """Of the toolkit, as "13.0"."""
    text = subprocess.run([find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def _variant(project: dict, backend: str) -> str:
    tag = backend if backend == "cpu" else "cu" + cuda_version().replace(".", "")
    abi = project["torch"]["stable-abi"][backend].replace(".", "")
    return f"torch-stable-abi{abi}-{tag}-{os.uname().machine}-linux"


def _sources(project: dict, backend: str) -> list[str]:
    kernels = [kernel["src"] for kernel in project["kernel"].values() if kernel["backend"] == backend]
    return [*project["torch"]["src"], *(source for kernel in kernels for source in kernel)]


def _fingerprint(backend: str, archs: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {backend} {archs} {flags}".encode())
    for path in sorted(PROJECT.rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".py", ".toml"} and "build" not in path.parts:
            if "tests" not in path.parts and "benchmarks" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:7]


def _run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\nended with status {done.returncode}:\n{done.stderr}")


def _compile_commands(project: dict, backend: str, archs: list[str], name: str, folder: Path) -> dict[Path, list]:
    """Object file -> the command that makes it."""
    include = Path(torch.__file__).parent / "include"
    major, minor = map(int, project["torch"]["stable-abi"][backend].split("."))
    flags = [
        *(f"-I{path}" for path in (include, include / "torch/csrc/api/include", folder)),
        f"-I{sysconfig.get_paths()['include']}",
        "-std=c++20",
        "-O3",
        "-DPy_LIMITED_API=0x03090000",
        f"-DTORCH_EXTENSION_NAME={name}",
        f"-D{backend.upper()}_KERNEL",
        f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}",
    ]
    commands = {}
    for source in _sources(project, backend):
        target = folder / (source.replace("/", "_") + ".o")
        if source.endswith(".cu"):
            codes = [arch.replace(".", "") for arch in archs]
            targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
            nvcc = [find_nvcc(), "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            commands[target] = [*nvcc, *targets, *flags, "-c", PROJECT / source, "-o", target]
        elif source.endswith(".cpp"):
            gxx = ["g++", "-Wall", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
            commands[target] = [*gxx, *flags, "-c", PROJECT / source, "-o", target]
    return commands


def _link(objects: list[Path], backend: str, target: Path) -> None:
    # Symbols of torch come from the libraries that Python has loaded before
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    linker = ["g++"] if backend == "cpu" else [find_nvcc(), "-cudart=shared"]
    _run([*linker, "-shared", "-o", target, *objects, *libraries])


def _metadata(project: dict, backend: str, archs: list[str], name: str, folder: Path) -> dict:
    files = {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    general = project["general"]
    return {
        "id": name,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend, "archs": archs} if backend == "cuda" else {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; a folder can be locked like a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build(
    backend: str,
    output: Path = PROJECT / "build",
    archs: list[str] | None = None,
    jobs: int = 2,
    flags: tuple[str, ...] = (),
) -> Path:
    """Builds a variant, unless the one in `output` is of the same sources; safe to call from several processes.

    Args:
        backend: "cpu" or "cuda".
        output: folder of the variants.
        archs: compute capabilities such as "9.0"; those of build.toml when absent. CUDA only.
        jobs: compilers at a time.
        flags: more flags for the compilers.

    Returns:
        The folder of the variant.

    Raises:
        RuntimeError: a compiler failed, with what it said.
        FileNotFoundError: there is no nvcc.
    """
    project = config()
    if backend == "cuda":
        if find_nvcc() is None:
            raise FileNotFoundError("There is no nvcc: put the CUDA toolkit's bin folder into PATH.")
        archs = archs or project["kernel"]["wallvla_cuda"]["cuda-capabilities"]
    name = f"_{PACKAGE}_{backend}_{_fingerprint(backend, archs or [], flags)}"
    folder = output / _variant(project, backend)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        metadata = folder / "metadata.json"
        if metadata.exists() and json.loads(metadata.read_text())["id"] == name:
            return folder
        with tempfile.TemporaryDirectory(dir=output) as temporary:
            objects, fresh = Path(temporary) / "objects", Path(temporary) / "variant"
            objects.mkdir()
            (objects / "registration.h").write_text(REGISTRATION)
            shutil.copytree(PROJECT / "torch-ext" / PACKAGE, fresh, ignore=shutil.ignore_patterns("__pycache__"))
            commands = _compile_commands(project, backend, archs or [], name, objects)
            # The slowest first
            ordered = sorted(commands.values(), key=lambda command: not str(command[-3]).endswith(".cu"))
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda command: _run([*command, *flags]), ordered))
            _link(list(commands), backend, fresh / f"{name}.abi3.so")
            (fresh / "_ops.py").write_text(OPS.format(id=name))
            described = _metadata(project, backend, archs or [], name, fresh)
            (fresh / "metadata.json").write_text(json.dumps(described, indent=2))
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python kernels/build_without_nix.py cuda --archs 9.0 && "
        "LOCAL_KERNELS=x-square/wallvla-kernels=kernels python my_script.py",
    )
    parser.add_argument("backend", choices=["cpu", "cuda"])
    parser.add_argument("--archs", nargs="+", help="compute capabilities (default: those of build.toml)")
    parser.add_argument("--output", type=Path, default=PROJECT / "build", help="folder of the variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    arguments = parser.parse_args()
    sys.stdout.write(f"{build(arguments.backend, arguments.output, arguments.archs, arguments.jobs)}\n")


if __name__ == "__main__":
    main()
