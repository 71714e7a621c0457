"""A run that is killed at any moment goes on as if nothing had happened."""

import time

import pytest
import torch
from ranks import run, start
from transformers.trainer_utils import get_last_checkpoint

from wallvla.trainers.distributed import discard_unfinished, last_checkpoint, unfinished_marker


OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "optimizer": "muon",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
}


def kill_when_reached(folder, **options) -> None:
    (process,) = start(1, "train", folder, **options)
    deadline = time.monotonic() + 300
    while not (folder / "reached").exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    (folder / "reached").unlink()


def test_killed_in_a_step_and_in_a_checkpoint_equals_not_stopping(tmp_path):
    """kill -9 in step 3, go on, kill -9 while checkpoint 4 is written, go on: losses and weights of a whole run."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    run(1, "train", tmp_path / "whole", **OPTIONS)
    folder = tmp_path / "killed"
    kill_when_reached(folder, stop=["step", 2], **OPTIONS)
    assert last_checkpoint(folder) == get_last_checkpoint(folder) == str(folder / "checkpoint-2")
    kill_when_reached(folder, resume=True, stop=["checkpoint", 4], **OPTIONS)
    # the framework would take the half one, whose optimizer is cut off; the older one is still there
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-4")
    with pytest.raises((RuntimeError, OSError, EOFError)):
        torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    run(1, "train", folder, resume=True, **OPTIONS)
    whole, killed = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("whole", "killed"))
    assert killed["from"] == str(folder / "checkpoint-2")
    assert [log["step"] for log in killed["losses"]] == [1, 2, 3, 4, 5, 6]
    assert killed["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(killed["weights"][name], weight), name
    # only whole checkpoints are left, and only as many as asked for
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6"]


def test_half_checkpoints_are_never_the_last(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    unfinished_marker(tmp_path / "checkpoint-12").touch()
    unfinished_marker(tmp_path / "checkpoint-14").touch()  # killed before the folder was there
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    discard_unfinished(tmp_path)
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-2", "checkpoint-best"]
