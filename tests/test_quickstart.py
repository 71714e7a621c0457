"""The whole line once, as small as it goes, and the command line around it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wallvla import cli
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.multimodal import MultimodalDataset
from wallvla.evaluation.metaworld import EVALUATION_SEED_START
from wallvla.quickstart import EMBODIMENT, QuickstartConfig, quickstart


SMALL = {
    "task": ["button-press-topdown-v3"],
    "episodes": 1,
    "steps": 3,
    "batch_size": 4,
    "eval_episodes": 1,
    "control_episodes": 1,
    "image_size": 32,
}
ROOT = Path(cli.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run and its summary."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart(QuickstartConfig(output=str(folder), **SMALL))


def test_the_whole_line(run):
    folder, summary = run
    dataset = LeRobotDataset(folder / "dataset", embodiment=EMBODIMENT, action_horizon=8)
    assert dataset.num_episodes == 1 and list(dataset.tasks.values()) == ["press the button"]
    assert sorted(dataset.camera_keys) == ["observation.images.front", "observation.images.wrist"]
    assert all(s["answer"].startswith(("<box>", "<point>")) for s in MultimodalDataset(folder / "grounding.parquet"))
    hub = {path.name for path in (folder / "hub").iterdir()}
    assert hub >= {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"}
    assert {name for name in hub if name.endswith(".py")} == {path.name for path in ROOT.glob("*_wallvla.py")}
    assert set(summary["closed_loop"]) == {"trained policy", "scripted expert", "random policy", "images blanked"}
    assert summary["closed_loop"]["scripted expert"]["all"]["rate"] == 1
    for name in ("losses.png", "open_loop.png", "grounding.png", "rollout.mp4", "summary.json"):
        assert (folder / "report" / name).stat().st_size > 0
    assert json.loads((folder / "report" / "summary.json").read_text()) == summary
    assert "Not evaluated" not in (folder / "hub" / "README.md").read_text()
    episodes = json.loads((folder / "evaluation" / "closed_loop" / "results.json").read_text())["episodes"]
    assert all(episode["seed"] >= EVALUATION_SEED_START for episode in episodes)


def test_a_finished_run_is_kept(run):
    folder, _ = run
    with pytest.raises(FileExistsError, match="finished run"):
        quickstart(QuickstartConfig(output=str(folder), **SMALL))
    with pytest.raises(FileExistsError, match=r"other options .*'steps': \(3, 5\)"):
        quickstart(QuickstartConfig(output=str(folder), **SMALL | {"steps": 5}))
    with pytest.raises(FileExistsError, match="no quickstart run"):
        quickstart(QuickstartConfig(output=str(folder / "hub"), **SMALL))


def test_an_interrupted_run_goes_on(run, tmp_path, capsys):
    """Everything up to the report is there: only the report is made again, with the same figures."""
    folder, summary = run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "report" / "summary.json").unlink()
    again = quickstart(QuickstartConfig(output=str(tmp_path / "run"), **SMALL))
    assert again["closed_loop"] == summary["closed_loop"] and again["grounding"] == summary["grounding"]
    assert capsys.readouterr().out.count("is there, skipping") == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": ["buton-press-v3"]}, "button-press-v3"),
        ({"steps": 0}, "steps is 0"),
        ({"cameras": ["side"]}, "side.*front and wrist"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        QuickstartConfig(**options)


def fails(capsys, *arguments: str) -> str:
    """The message of a command that ends with an error."""
    with pytest.raises(SystemExit) as error:
        cli.main(list(arguments))
    assert error.value.code not in (0, None)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err if isinstance(error.value.code, int) else str(error.value.code)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"example:\n  wallvla {command} " in capsys.readouterr().out


def test_help_of_the_whole_is_quick():
    """No torch, no transformers: a user who mistypes should not wait."""
    script = "import sys; from wallvla.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(name in done.stdout for name in cli.COMMANDS)


def test_unknown_commands_and_options(capsys, tmp_path):
    assert "quickstart, train, eval" in fails(capsys, "trian")
    config = tmp_path / "options.yaml"
    config.write_text("episode: 3\n")
    assert "option episode; did you mean episodes?" in fails(capsys, "eval", "--config", str(config))
    assert "Unknown environment" in fails(capsys, "eval", "A/B", "--env", "libero/1")
    assert "nowhere" in fails(capsys, "stats", str(tmp_path / "nowhere"))


def test_quickstart_reads_its_options(run, capsys):
    folder, _ = run
    options = " ".join(f"--{name} {value}" for name, value in (SMALL | {"task": SMALL["task"][0]}).items())
    assert "finished run" in fails(capsys, *f"quickstart --output {folder} {options}".split())


def test_stats_from_a_config_file(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "stats.yaml").write_text(f"dataset: {folder / 'dataset'}\naction_horizon: 8\n")
    cli.main(["stats", "--config", str(tmp_path / "stats.yaml"), "--output", str(tmp_path / "robot.json")])
    assert "wrote" in capsys.readouterr().out
    robot = json.loads((tmp_path / "robot.json").read_text())
    actions = LeRobotDataset(folder / "dataset", embodiment="robot", action_horizon=8).actions
    np.testing.assert_allclose(robot["statistics"]["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-6)


def test_sample_prints_a_chunk_or_an_answer(run, tmp_path, capsys):
    folder, _ = run
    cli.main(["sample", str(folder / "hub"), "--dataset", str(folder / "dataset"), "--index", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert "press the button" in lines[0] and len(lines) == 2 + 8
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.fromarray(MultimodalDataset(folder / "grounding.parquet")[0]["images"][0]).save(picture)
    cli.main(["sample", str(folder / "hub"), "--image", str(picture), "--text", "Where is the button?"])
    assert set(json.loads(capsys.readouterr().out)) == {"text", "point", "box"}


def test_train_from_the_example_file(run, tmp_path, capsys):
    """A new robot name: native layout, its own statistics, saved in a complete repository."""
    folder, _ = run
    arguments = ["--model", str(folder / "hub"), "--dataset", str(folder / "dataset"), "--embodiment", "second_robot"]
    options = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 False --disable_tqdm True".split()
    output = tmp_path / "finetuned"
    example = str(ROOT / "examples" / "finetune_lerobot.yaml")
    cli.main(["train", "--config", example, *arguments, *options, "--cameras", "front", "--output_dir", str(output)])
    processor = json.loads((output / "processor_config.json").read_text())
    assert set(processor["embodiments"]) == {EMBODIMENT, "second_robot"}
    assert processor["embodiments"]["second_robot"]["statistics"]["action"]["q99"]
    assert (output / "model.safetensors").exists() and (output / "modeling_wallvla.py").exists()


def test_open_loop_of_a_dataset(run, tmp_path, capsys):
    folder, _ = run
    arguments = f"open-loop {folder / 'hub'} --dataset {folder / 'dataset'} --every 40 --output {tmp_path} --episodes"
    assert "got 1 demonstrations" in fails(capsys, *arguments.split(), "0")


def test_eval_writes_results(run, tmp_path, capsys):
    folder, _ = run
    output = tmp_path / "eval"
    cli.main(
        f"eval {folder / 'hub'} --env metaworld/button-press-topdown-v3 --episodes 1 --image-size 32 "
        f"--max-steps 8 --output {output}".split()
    )
    assert "button-press-topdown-v3" in capsys.readouterr().out
    assert len(json.loads((output / "results.json").read_text())["episodes"]) == 1
