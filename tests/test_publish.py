"""`wallvla push` against a Hub in memory: what arrives, and what is refused before anything is created."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from in_memory_hub import InMemoryHub

from wallvla.publish import dataset_card, folder_kind, push
from wallvla.quickstart import (
    QuickstartConfig,
    build_model,
    build_processor,
    embodiment,
    save_repository,
)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hub():
    hub = InMemoryHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    bounds = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
    config = QuickstartConfig()
    processor = build_processor(config, embodiment(config, {"state": bounds, "action": bounds}))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "hub"
    save_repository(build_model(processor), processor, folder, config)
    return folder


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "sawyer",
        "total_episodes": 2,
        "total_frames": 20,
        "total_tasks": 1,
        "fps": 80,
        "features": {"action": {"dtype": "float32", "shape": [4]}},
    }
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    for name in ("meta/tasks.parquet", "meta/stats.json", "data/chunk-000/file-000.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "build.toml").write_text('[general]\nname = "wallvla_ops"\n')
    (folder / "build" / "torch-cpu").mkdir(parents=True)
    (folder / "build" / "torch-cpu" / "__init__.py").write_text("")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [kernel]\n---\n\n# Kernels\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("")
    return folder


def run_online(hub: InMemoryHub, code: str, folder: Path) -> str:
    """Runs code in a process whose Hub is the one in memory, and in which `wallvla` is this checkout."""
    (folder / "wallvla").unlink(missing_ok=True)
    (folder / "wallvla").symlink_to(ROOT, target_is_directory=True)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_test",
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def front_matter(data: bytes) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", data.decode(), flags=re.DOTALL)[1])


def test_push_everything(hub, model_folder, dataset_folder, kernel_folder, tmp_path):
    """Four repositories by four commands; then the model loads from the Hub with its own code."""
    commands = [
        [str(model_folder), "tester/policy"],
        [str(ROOT / "spaces" / "grounding"), "tester/demo", "--model", "tester/policy"],
        [str(kernel_folder), "tester/kernels"],
        [str(dataset_folder), "tester/demos", "--license", "mit"],
    ]
    code = f"from wallvla.cli import main\nfor command in {commands!r}: main(['push', *command])"
    out = run_online(hub, code, tmp_path)
    assert out.count("pushed to") == 4
    repositories = hub.repositories
    model = repositories["model", "tester/policy"]
    assert {"config.json", "model.safetensors", "processor_config.json", "grounding_wallvla.py"} <= set(model.files)
    card = front_matter(model.files["README.md"])
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "robotics"
    assert card["license"] == "apache-2.0" and "vision-language-action" in card["tags"]

    space = repositories["space", "tester/demo"]
    card = front_matter(space.files["README.md"])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["tester/policy"]
    assert space.created_with["sdk"] == "gradio" and space.variables == {"WALLVLA_MODEL": "tester/policy"}
    assert {"app.py", "requirements.txt", "examples/button.png", "examples/observation.json"} <= set(space.files)
    assert space.files["app.py"] == (ROOT / "spaces" / "grounding" / "app.py").read_bytes()

    kernel = repositories["kernel", "tester/kernels"]
    assert set(kernel.files) == {"build.toml", "build/torch-cpu/__init__.py", "README.md"}
    assert "kernel" in front_matter(kernel.files["README.md"])["tags"]

    card = front_matter(repositories["dataset", "tester/demos"].files["README.md"])
    assert card["license"] == "mit" and card["task_categories"] == ["robotics"]
    assert {"LeRobot", "sawyer"} <= set(card["tags"])
    assert card["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]

    code = """
import sys
sys.path = [path for path in sys.path if not path.endswith("wallvla")]
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("tester/policy", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("tester/policy", trust_remote_code=True)
print(processor.grounding_prompt("box", "cup"), type(model).__module__.split(".")[0])
"""
    assert run_online(hub, code, tmp_path).strip() == "Where is the cup? Answer with a box. transformers_modules"


def test_folders_are_recognised(model_folder, dataset_folder, kernel_folder, tmp_path):
    folders = {"model": model_folder, "dataset": dataset_folder, "kernel": kernel_folder}
    for kind, folder in folders.items():
        assert folder_kind(folder) == kind
    with pytest.raises(ValueError, match="nothing that can be pushed.*config.json"):
        folder_kind(tmp_path)
    (tmp_path / "app.py").write_text("")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model and space at once"):
        folder_kind(tmp_path)


def test_incomplete_folders_are_refused(hub, model_folder, dataset_folder, tmp_path):
    """Before a repository is created: nothing of these may exist afterwards."""
    (tmp_path / "config.json").write_text("{}")
    told = r"has no README.md, \*.safetensors, processor_config.json.* card; that of a model begins with license"
    with pytest.raises(ValueError, match=told):
        push(tmp_path, "tester/broken")
    with pytest.raises(ValueError, match="A Space needs --model"):
        push(ROOT / "spaces" / "grounding", "tester/broken")
    with pytest.raises(ValueError, match="only a Space takes it"):
        push(model_folder, "tester/broken", model="tester/policy")
    with pytest.raises(ValueError, match="under which --license"):
        dataset_card(dataset_folder, None)
    for name in ("model.safetensors", "processor_config.json", "modeling_x.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "README.md").write_text("# No front matter\n")
    with pytest.raises(ValueError, match="no front matter"):
        push(tmp_path, "tester/broken")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="library_name None, pipeline_tag None and license mit"):
        push(tmp_path, "tester/broken")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: robotics\n---\n")
    with pytest.raises(ValueError, match="no auto_map"):
        push(tmp_path, "tester/broken")
    assert ("model", "tester/broken") not in hub.repositories
