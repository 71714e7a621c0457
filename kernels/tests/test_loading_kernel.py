"""The ways in which users get the kernels, each in a process of its own: one process can load them only once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_testing import PROJECT


pytest.importorskip("kernels._rust", reason="the package that loads Hub kernels is not installed")

# Without a package around it, the file of the project's root behaves as in the Hub's remote code
COMMON = f"""
import importlib.util, logging, sys, torch
spec = importlib.util.spec_from_file_location("ops_wallvla", {str(PROJECT.parent / "ops_wallvla.py")!r})
ops_wallvla = sys.modules["ops_wallvla"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops_wallvla)
gate_up = torch.randn(3, 16)
"""

# The package itself, as tests/conftest.py binds it
WALLVLA = f"""
spec = importlib.util.spec_from_file_location(
    "wallvla", {str(PROJECT.parent / "__init__.py")!r}, submodule_search_locations=[{str(PROJECT.parent)!r}]
)
sys.modules["wallvla"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["wallvla"])
"""


@pytest.fixture(scope="module")
def repository(builder, builds, tmp_path_factory) -> Path:
    """A folder laid out as the Hub repository, with the CPU variant."""
    folder, variant = tmp_path_factory.mktemp("repository"), builder.build("cpu", builds)
    shutil.copytree(variant, folder / "build" / variant.name)
    return folder


@pytest.fixture(scope="module")
def hub_cache(repository, tmp_path_factory) -> Path:
    """A Hub cache in which version 1 of the repository has been downloaded."""
    cache, commit = tmp_path_factory.mktemp("cache"), "0123456789abcdef" * 2 + "01234567"
    entry = cache / "kernels--x-square--wallvla-kernels"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "v1").write_text(commit)
    shutil.copytree(repository, entry / "snapshots" / commit)
    return cache


def run(code: str, folder: Path, **environment: str) -> str:
    """Runs code offline in a new process and returns what it writes."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_KERNELS", "HF_HUB_CACHE")}
    variables = {**inherited, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), **environment}
    command = [sys.executable, "-c", COMMON + code]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_get_kernel_from_the_cache_of_the_hub(hub_cache, tmp_path):
    code = """
from kernels import LayerRepository, Mode, get_kernel, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
module = get_kernel("x-square/wallvla-kernels", version=1)
assert sorted(module.__all__) == sorted([*ops_wallvla.Ops._fields, "layers"])
torch.testing.assert_close(module.swiglu(gate_up), ops_wallvla.swiglu(gate_up))

@use_kernel_forward_from_hub("OurNorm")
class OurNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.randn(16)), 1e-6
    def forward(self, hidden):
        raise AssertionError("the layer's own forward ran")

norm = OurNorm()
layer = LayerRepository("x-square/wallvla-kernels", layer_name="WallVLARMSNorm", version=1)
with use_kernel_mapping({"OurNorm": {"cpu": layer}}):
    kernelize(norm, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
expected = ops_wallvla.rms_norm(gate_up, norm.weight, 1e-6, True)
torch.testing.assert_close(norm(gate_up), expected)
gradients = [torch.autograd.grad(states.square().sum(), norm.weight)[0] for states in (norm(gate_up), expected)]
torch.testing.assert_close(*gradients)
print("as expected")
"""
    assert "as expected" in run(code, tmp_path, HF_HUB_CACHE=str(hub_cache))


def test_fast_ops_and_layers_from_a_local_build(repository, tmp_path):
    code = """
from kernels import register_kernel_mapping
from transformers import Qwen2Config, Qwen2ForCausalLM
ops = ops_wallvla.fast_ops("cpu")
assert ops is not ops_wallvla.TORCH_OPS and ops_wallvla.fast_ops(torch.device("cpu")).swiglu is ops.swiglu
for name, function in ops._asdict().items():
    assert function.__name__ == name and function is not vars(ops_wallvla)[name], name
torch.testing.assert_close(ops.swiglu(gate_up), ops_wallvla.swiglu(gate_up))

torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50,
)).eval()
ids = torch.arange(12).view(2, 6)
with torch.no_grad():
    expected = model(ids).logits
register_kernel_mapping({
    "RMSNorm": {"cpu": ops_wallvla.HubLayer("RMSNorm", "cpu")},
    "rotary_pos_emb": {"cpu": ops_wallvla.HubLayer("RotaryPosEmb", "cpu")},
})
model.set_use_kernels(True)
calls = []
for layer in ("rms_norm", "rope"):
    original = vars(sys.modules[ops.swiglu.__module__])[layer]
    def counted(*arguments, original=original, layer=layer):
        calls.append(layer)
        return original(*arguments)
    vars(sys.modules[ops.swiglu.__module__.rpartition(".")[0] + ".layers"])[layer] = counted
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected)
assert calls.count("rms_norm") == 5 and calls.count("rope") == 4, calls
print("as expected")
"""
    assert "as expected" in run(code, tmp_path, LOCAL_KERNELS=f"x-square/wallvla-kernels={repository}")


def test_the_norm_of_the_model_uses_the_kernel(repository, tmp_path):
    """`set_use_kernels` reaches `WallVLARMSNorm`; where kernels are absent, the model runs on with one log line."""
    code = """
from kernels import Mode, kernelize, register_kernel_mapping
from kernels import KernelizeFallback
from wallvla import ops_wallvla
from wallvla.action_experts_wallvla import WallVLARMSNorm

norm = WallVLARMSNorm(16, 1e-6)
own = norm(gate_up)
register_kernel_mapping({"WallVLARMSNorm": {"cpu": ops_wallvla.HubLayer("WallVLARMSNorm", "cpu")}})
for _ in range(2):
    kernelize(norm, mode=Mode.INFERENCE, device="cpu", use_fallback=KernelizeFallback.ALL)
print(type(norm).forward is norm.forward.__func__)
torch.testing.assert_close(norm(gate_up), own)
"""
    output = run(WALLVLA + code, tmp_path, LOCAL_KERNELS=f"x-square/wallvla-kernels={repository}")
    assert "False" in output and "torch takes its place" not in output
    output = run(WALLVLA + code, tmp_path)
    assert "True" in output and output.count("torch takes its place") == 1


def test_the_engine_runs_on_the_kernels(repository, tmp_path):
    code = f"""
sys.path.insert(0, {str(PROJECT.parent / "tests")!r})
import test_engine as tiny
from wallvla.ops_wallvla import TORCH_OPS, fast_ops

model, processor = tiny.make_parts()
samples, start = [tiny.observation()], tiny.noise()
expected = tiny.expected(model, processor, samples, start)
ops = fast_ops("cpu")
assert ops is not TORCH_OPS
actions = tiny.WallVLAEngine(model, processor, ops=ops).sample_actions(samples, start)
torch.testing.assert_close(actions, expected, atol=1e-6 * start.abs().max().item(), rtol=0)
print("as expected")
"""
    local = f"x-square/wallvla-kernels={repository}"
    assert "as expected" in run(WALLVLA + code, tmp_path, LOCAL_KERNELS=local)


def test_the_build_has_what_the_hub_asks_for(builder, repository):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    [variant] = (repository / "build").iterdir()
    metadata = Metadata.read_from_file(variant / "metadata.json")
    general = builder.config()["general"]
    assert (str(metadata.name), metadata.version) == (general["name"], general["version"])
    assert (variant / f"{metadata.id}.abi3.so").exists()
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    assert digest.files == metadata.digest.files


def test_all_sources_are_named_in_the_project(builder):
    named = {*builder._sources(builder.config(), "cpu"), *builder._sources(builder.config(), "cuda")}
    folders = ["common", "rms_norm", "rope", "swiglu", "torch-ext"]
    found = {str(path.relative_to(PROJECT)) for folder in folders for path in (PROJECT / folder).rglob("*.*")}
    assert named == {path for path in found if path.endswith((".cpp", ".h", ".cu", ".cuh"))}
