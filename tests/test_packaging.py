"""The rules that keep the repository loadable from the Hub, installable by pip and readable from top to bottom."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import check_imports, get_imports

import wallvla
from wallvla import cli


ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]

FORMULAS = {"configuration_wallvla", "flow_matching_wallvla", "ops_wallvla"}
EXPERTS = {"vl_experts_wallvla", "action_experts_wallvla"}
MODEL = FORMULAS | EXPERTS | {"modeling_wallvla"}
# Room -> the rooms that it may import: the layout table of the design. Arrows point one way, so there are no cycles.
MAY_IMPORT = {
    "configuration_wallvla": set(),
    "rotations_wallvla": set(),
    "action_space_wallvla": {"rotations_wallvla"},
    "flow_matching_wallvla": set(),
    "ops_wallvla": set(),
    "grounding_wallvla": set(),
    "vl_experts_wallvla": set(),
    "action_experts_wallvla": {"configuration_wallvla", "ops_wallvla", "vl_experts_wallvla"},
    "modeling_wallvla": FORMULAS | EXPERTS,
    "action_codec_wallvla": set(),
    "baseline_codecs_wallvla": {"action_codec_wallvla"},
    "images_wallvla": set(),
    "batches_wallvla": {"action_space_wallvla"},
    "prompts_wallvla": {"action_space_wallvla"},
    "action_tokens_wallvla": {"action_space_wallvla", "baseline_codecs_wallvla"},
    "processing_wallvla": {
        "action_space_wallvla",
        "action_tokens_wallvla",
        "baseline_codecs_wallvla",
        "batches_wallvla",
        "grounding_wallvla",
        "images_wallvla",
        "prompts_wallvla",
    },
    "data": {"action_space_wallvla"},
    "conversion": MODEL | {"action_space_wallvla", "images_wallvla", "processing_wallvla", "prompts_wallvla"},
    "trainers": MODEL | {"action_space_wallvla", "action_codec_wallvla", "data"},
    "inference": MODEL,
    "evaluation": set(),
    "serving": MODEL | {"processing_wallvla", "inference"},
    "kernels": set(),
    "spaces": set(),
}
MAY_IMPORT_ALL = {
    "__init__",
    "cli",
    "grounding_report",
    "publish",
    "quickstart",
    "reinforcement_learning",
    "benchmarks",
    "examples",
    "docs",
    "tests",
}
# What remote code may need without a guard: transformers itself brings all of it but torch and Pillow
FLAT_REQUIREMENTS = {"huggingface_hub", "numpy", "PIL", "safetensors", "tokenizers", "torch", "transformers"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    """Every Python file of ours but the tests."""
    paths = list(ROOT.glob("*.py"))
    for folder in MAY_IMPORT.keys() | MAY_IMPORT_ALL - {"tests"}:
        paths += (ROOT / folder).rglob("*.py")
    return sorted(paths)


SOURCES = sources()
FLAT = sorted(ROOT.glob("*_wallvla.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
each_flat_file = pytest.mark.parametrize("path", FLAT, ids=lambda path: path.name)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) for every import of our own code, relative or absolute."""
    folder = path.parent.relative_to(ROOT).parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
            targets = [module[1:] or [module[0]] for module in modules if module[0] == "wallvla"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            targets = [base or [alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "wallvla":
            targets = [node.module.split(".")[1:] or [alias.name] for alias in node.names]
        else:
            targets = []
        for target in targets:
            yield node.lineno, target[0]


def run_python(code: str, folder: Path) -> str:
    """Run code in a new process in which `wallvla` is this checkout, and return what it prints."""
    if not (folder / "wallvla").exists():
        (folder / "wallvla").symlink_to(ROOT, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Layout


def test_every_room_has_a_row():
    rooms = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    unknown = rooms - MAY_IMPORT.keys() - MAY_IMPORT_ALL
    assert not unknown, f"say in MAY_IMPORT (and in the design) what {sorted(unknown)} may import"


@pytest.mark.parametrize("folder", ["kernels", "spaces", "tests", "benchmarks", "examples", "docs"])
def test_folder_is_no_package(folder):
    """`kernels/__init__.py` or `spaces/__init__.py` would shadow the PyPI package of that name."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_is_the_pypi_package():
    import kernels

    assert kernels.get_kernel


def test_every_package_is_declared():
    found = {"wallvla"}
    for package in MAY_IMPORT.keys() - {"kernels", "spaces"}:  # projects of their own
        for path in (ROOT / package).rglob("__init__.py"):
            found.add(".".join(["wallvla", *path.parent.relative_to(ROOT).parts]))
    assert found == set(PACKAGES), "the folders with __init__.py and [tool.setuptools] packages disagree"


# Import directions


@each_source
def test_import_directions(path):
    here = room(path)
    if here in MAY_IMPORT_ALL:
        return
    wrong = [
        f"{path.name}:{line} imports {target}"
        for line, target in imported_rooms(path)
        if target != here and target not in MAY_IMPORT[here]
    ]
    assert not wrong, f"{here} may import {sorted(MAY_IMPORT[here]) or 'nothing of ours'}: {wrong}"


@each_flat_file
def test_flat_file_imports_flat_siblings_by_name(path):
    """The Hub's loader copies exactly the files that it sees in lines `from .sibling_wallvla import Name`."""
    siblings = {sibling.stem for sibling in FLAT}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings, f"{path.name}:{node.lineno}"
            assert [alias.name for alias in node.names] != ["*"], f"{path.name}:{node.lineno}"
    assert "wallvla" not in get_imports(path), "remote code runs where wallvla is not installed"


@each_flat_file
def test_flat_file_looks_the_same_to_the_hub_loader(path):
    """The loader searches with a regular expression: a docstring line that starts with `from .` is an import too."""
    seen_by_loader = re.findall(r"^\s*(?:from|import)\s+\.(\w*)", path.read_text(), flags=re.MULTILINE)
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert sorted(seen_by_loader) == sorted(node.module or "" for node in nodes)


@each_flat_file
def test_flat_file_needs_nothing_optional(path):
    unguarded = set(get_imports(path)) - set(sys.stdlib_module_names)
    assert unguarded <= FLAT_REQUIREMENTS, "guard optional imports by `try:` or `if is_..._available():`"
    check_imports(path)


# Style that a linter does not know


@each_flat_file
def test_flat_file_is_short(path):
    assert len(path.read_text().splitlines()) < 900


@each_source
def test_functions_are_short(path):
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert not {name: length for name, length in lengths.items() if length >= 100}


@each_source
def test_nothing_is_unfinished(path):
    assert not re.findall(r".*\b(?:TODO|FIXME|XXX|NotImplementedError)\b.*", path.read_text())


@each_source
def test_no_attribute_guessing(path):
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [f"{path.name}:{call.lineno}" for call in calls if call.func.id in {"hasattr", "getattr"}]


@each_source
def test_exceptions_are_named(path):
    """A broad `except` turns mistakes into silence. Catch what you expect."""
    handlers = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)]
    broad = {None, "Exception", "BaseException"}
    for handler in handlers:
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {node.id if isinstance(node, ast.Name) else ast.dump(node) if node else None for node in caught}
        assert not names & broad, f"{path.name}:{handler.lineno}"


# The command line


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_command_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    options, example = text.split("example:")
    assert example.strip().startswith(f"wallvla {command} ")
    assert "--config" in options
    for option in re.findall(r"--[\w-]+", example):
        assert option in options.replace("_", "-"), f"the example uses {option}, which the command does not have"


def test_command_without_arguments_lists_all_commands(capsys):
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in cli.COMMANDS)


def test_unknown_command_names_the_known_ones():
    with pytest.raises(SystemExit, match="unknown command 'trian'.*quickstart.*train"):
        cli.main(["trian"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --model ./nowhere --dataset data", "there is no folder ./nowhere, and a Hub id would be OWNER/NAME"),
        ("train --model {folder} --dataset data", "{folder} is no checkpoint: it has no config.json"),
        ("train --model A/B --lerning_rate 1", "unknown option --lerning_rate; did you mean --learning_rate?"),
        ("train-rl --model runs/nowhere/hub", "there is no folder runs/nowhere/hub"),
        ("eval nowhere --env metaworld/button-press-topdown-v3", "there is no folder nowhere"),
        ("eval A/B --env metaworld/mt10 --epsiodes=3", "unknown option --epsiodes; did you mean --episodes?"),
        ("serve right=nowhere", "there is no folder nowhere"),
        ("sample {folder} --dataset data", "{folder} is no checkpoint"),
    ],
)
def test_mistakes_are_answered_before_anything_starts(command, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(command.format(folder=tmp_path).split())
    error = capsys.readouterr().err
    assert message.format(folder=tmp_path) in error
    assert len(error.splitlines()) < 20, "usage of a hundred options hides the message"


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    for module in ("msgpack", "wallvla.serving.wire", "wallvla.serving.recording", "wallvla.serving.serve"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["serve", str(tmp_path)])
    assert "the server needs msgpack: pip install 'wallvla[serve]'" in capsys.readouterr().err


# The installed package


def test_import_does_not_import_torch(tmp_path):
    code = "import sys, wallvla; print(*sys.modules)"
    assert not {"torch", "transformers", "numpy"}.intersection(run_python(code, tmp_path).split())


def test_public_names_resolve():
    names = {}
    exec("from wallvla import *", names)
    assert set(wallvla.__all__) <= set(names)
    assert set(wallvla.__all__) <= set(dir(wallvla))
    assert names["WallVLAConfig"].__module__ == "wallvla.configuration_wallvla"
    with pytest.raises(AttributeError, match="no attribute 'WallVLAModel'; it has .*WallVLAConfig"):
        wallvla.WallVLAModel  # noqa: B018


def test_second_import_under_the_folder_name_is_harmless(tmp_path):
    """pytest imports the root package once more under the name of the checkout's folder."""
    (tmp_path / "checkout").symlink_to(ROOT, target_is_directory=True)
    code = "import sys, checkout, wallvla; print(*sorted(name for name in sys.modules if '_wallvla' in name))"
    assert not [name for name in run_python(code, tmp_path).split() if not name.startswith("__editable__")]


def test_register_auto_classes(tmp_path):
    """In a new process, because a registration lasts as long as the process and hides the code of checkpoints."""
    code = """
import wallvla
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

wallvla.WallVLAConfig.tiny().save_pretrained("checkpoint")
wallvla.register_auto_classes()
wallvla.register_auto_classes()
config = AutoConfig.from_pretrained("checkpoint")
assert type(config) is wallvla.WallVLAConfig
for auto_class in (AutoModel, AutoModelForImageTextToText):
    assert type(auto_class.from_config(config)) is wallvla.WallVLAForConditionalGeneration
assert PROCESSOR_MAPPING[type(config)] is wallvla.WallVLAProcessor
print("ok")
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "ok"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree: building in place would leave build/ behind, and old files in it."""
    folder = tmp_path_factory.mktemp("wheel")
    clutter = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=clutter, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    expected = {f"wallvla/{name}" for name in PYPROJECT["tool"]["setuptools"]["package-data"]["wallvla"]}
    for package in PACKAGES:
        folder = Path(*package.split(".")[1:])
        expected |= {f"wallvla/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).glob("*.py")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_wheel_metadata(wheel):
    metadata = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in metadata
    assert "wallvla = wallvla.cli:main" in wheel.read(metadata["entry_points.txt"]).decode()
    assert f"\nVersion: {wallvla.__version__}\n" in wheel.read(metadata["METADATA"]).decode()
