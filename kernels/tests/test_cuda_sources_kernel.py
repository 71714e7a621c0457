"""The CUDA backend compiles and links for every architecture that the project names, without a GPU."""

import json

import pytest


def test_cuda_sources_compile_for_all_architectures(builder, builds):
    if builder.find_nvcc() is None:
        pytest.skip("There is no nvcc on this machine")
    archs = builder.config()["kernel"]["wallvla_cuda"]["cuda-capabilities"]
    assert archs == ["8.0", "8.9", "9.0", "10.0", "12.0"]
    variant = builder.build("cuda", builds / "all")
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": archs}
    library = (variant / f"{metadata['id']}.abi3.so").read_bytes()
    assert f"PyInit_{metadata['id']}".encode() in library
    # The options of the assembler stand in the binary, once for each source and architecture
    sources = [source for source in builder._sources(builder.config(), "cuda") if source.endswith(".cu")]
    for arch in archs:
        assert library.count(f"-arch sm_{arch.replace('.', '')} ".encode()) == len(sources) == 3, arch


def test_a_compiler_error_is_shown(builder, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return this_is_missing; }")
    with pytest.raises(RuntimeError, match="this_is_missing"):
        builder._run(["g++", "-c", broken, "-o", tmp_path / "broken.o"])
