"""`wallvla push`: a finished folder to the Hub, with the metadata that makes it findable, or not at all.

What a folder is follows from what is in it: a model (config.json), a Space (app.py), a kernel (build.toml) or a
LeRobot dataset (meta/info.json). Each is checked before anything is created.
"""

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, HfApi, ModelCard, RepoCard, SpaceCard


# What a run leaves beside its results
IGNORED = ["__pycache__/**", "**/__pycache__/**", ".cache/**", ".*", "*.pth", "optimizer.pt", "checkpoint-*/**"]
MARKS = {"config.json": "model", "app.py": "space", "build.toml": "kernel", "meta/info.json": "dataset"}


def push(
    folder: str | Path,
    repo_id: str,
    model: str | None = None,
    license: str | None = None,
    private: bool = False,
) -> str:
    """Uploads a folder and returns the URL of the repository.

    Args:
        folder: what `quickstart`, `train`, the LeRobot writer or the kernel build left, or `spaces/grounding`.
        repo_id: OWNER/NAME on the Hub.
        model: of a Space: the repository that it shows.
        license: of a dataset without a card.
        private: create a private repository.

    Raises:
        ValueError: the folder is none of the four, is incomplete, or its card lacks metadata.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if (model is not None) != (kind == "space") or (license is not None and kind != "dataset"):
        raise ValueError(
            f"{folder} is a {kind}. A Space needs --model (the repository that it shows) and only a Space takes it; "
            "--license is for a dataset without a card."
        )
    CHECKS[kind](folder)
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "space":
            folder = _space_for(folder, model, Path(scratch))
        elif kind == "dataset" and not (folder / "README.md").exists():
            dataset_card(folder, license).save(Path(scratch) / "README.md")
        options = {"space_sdk": "gradio"} if kind == "space" else {}
        url = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, **options)
        message = f"Upload {kind} with wallvla push"
        upload = {"repo_id": repo_id, "repo_type": kind, "commit_message": message}
        api.upload_folder(folder_path=folder, ignore_patterns=IGNORED, **upload)
        if kind == "dataset" and (Path(scratch) / "README.md").exists():
            api.upload_file(path_or_fileobj=Path(scratch) / "README.md", path_in_repo="README.md", **upload)
        if kind == "space":
            api.add_space_variable(repo_id, "WALLVLA_MODEL", model)
    return str(url)


def folder_kind(folder: Path) -> str:
    """ "model", "space", "kernel" or "dataset", by the file that marks it."""
    found = [kind for mark, kind in MARKS.items() if (folder / mark).is_file()]
    if len(found) != 1:
        marks = ", ".join(f"{mark} ({kind})" for mark, kind in MARKS.items())
        what = f"is {' and '.join(found)} at once" if found else "is nothing that can be pushed"
        raise ValueError(f"{folder} {what}. Exactly one of these has to be in it: {marks}.")
    return found[0]


def _check_model(folder: Path) -> None:
    _require(folder, "README.md", "*.safetensors", "processor_config.json", "modeling_*.py")
    data = _card(folder, ModelCard).data
    if data.library_name != "transformers" or not data.pipeline_tag or not data.license:
        raise ValueError(
            f"The front matter of {folder / 'README.md'} has library_name {data.library_name}, pipeline_tag "
            f"{data.pipeline_tag} and license {data.license}. It needs library_name: transformers and the other two."
        )
    config = json.loads((folder / "config.json").read_text())
    if "AutoModel" not in config.get("auto_map", {}):
        raise ValueError(f"{folder / 'config.json'} has no auto_map, so nobody could load it. Save the model again.")


def _check_space(folder: Path) -> None:
    _require(folder, "README.md", "requirements.txt")
    data = _card(folder, SpaceCard).data
    if data.sdk != "gradio" or data.app_file != "app.py":
        raise ValueError(f"{folder / 'README.md'} has sdk {data.sdk}, app_file {data.app_file}: gradio and app.py.")


def _check_kernel(folder: Path) -> None:
    _require(folder, "README.md", "build/*/*")
    data = _card(folder, RepoCard).data.to_dict()
    if "kernel" not in data.get("tags", []) or not data.get("license"):
        raise ValueError(f"The front matter of {folder / 'README.md'} needs a license and the tag kernel: {data}.")


def _check_dataset(folder: Path) -> None:
    _require(folder, "data/*/*.parquet", "meta/tasks.*", "meta/stats.json")


CHECKS = {"model": _check_model, "space": _check_space, "kernel": _check_kernel, "dataset": _check_dataset}


def _require(folder: Path, *patterns: str) -> None:
    missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if missing:
        card = " README.md is its card; that of a model begins with license, library_name: transformers and "
        card = card + "pipeline_tag: robotics, between two lines of ---." if "README.md" in missing else ""
        raise ValueError(f"{folder} has no {', '.join(missing)}: it is not complete, so it is not pushed.{card}")


def _card(folder: Path, kind: type[RepoCard]) -> RepoCard:
    card = kind.load(folder / "README.md")
    if not card.data.to_dict():
        raise ValueError(f"{folder / 'README.md'} has no front matter. It tells the Hub what this is; write it.")
    return card


def _space_for(folder: Path, model: str, scratch: Path) -> Path:
    """A copy of the Space whose card names the model that it shows."""
    copy = scratch / "space"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
    card = SpaceCard.load(copy / "README.md")
    card.data.models = [model]
    card.save(copy / "README.md")
    return copy


def dataset_card(folder: Path, license: str | None) -> DatasetCard:
    """A card for a LeRobot dataset, from its meta/info.json."""
    if license is None:
        raise ValueError(f"{folder} has no README.md. Say under which --license it is published, such as mit.")
    info = json.loads((folder / "meta" / "info.json").read_text())
    robot = info.get("robot_type") or "unknown robot"
    data = DatasetCardData(
        license=license,
        task_categories=["robotics"],
        tags=["LeRobot", "wallvla", robot],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    rows = [f"| `{name}` | {f['dtype']} | {f['shape']} |" for name, f in info["features"].items()]
    text = [
        f"# {robot}: {info['total_episodes']} episodes",
        f"{info['total_frames']} frames at {info['fps']} a second, {info['total_tasks']} tasks, in the LeRobot format "
        f"{info['codebase_version']}.",
        "\n".join(["| feature | type | shape |", "|---|---|---|", *rows]),
        "```python\nfrom wallvla.data.lerobot import LeRobotDataset\n\n"
        'dataset = LeRobotDataset("path/to/this/folder", embodiment="robot", action_horizon=8)\n```',
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")
