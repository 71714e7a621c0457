"""The tables of the ablations, from results written by hand: intervals, pairing, partial runs."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from wallvla import cli


PATH = Path(cli.__file__).parent / "benchmarks" / "ablations.py"


spec = importlib.util.spec_from_file_location("ablations", PATH)
ablations = importlib.util.module_from_spec(spec)
sys.modules["ablations"] = ablations  # dataclasses look their module up
spec.loader.exec_module(ablations)


def write_result(folder: Path, arm: str, seed: int, outcomes: list[bool], flow: float) -> None:
    losses = {"flow_loss_action_space": flow, "flow_loss_velocity_space": 4 * flow, "action_token_loss": 5.0}
    log = [
        {"step": step, "gradient_share_flow": share, "gradient_share_action_token": 1 - share,
         "gradient_share_text": 0.0, "gradient_cosine_flow_action_token": 0.5}
        for step, share in ((10, 0.9), (60, 0.2), (90, 0.4))
    ]  # fmt: skip
    result = {
        "arm": arm, "seed": seed, "steps": 100, **losses, "grounding": {"rate": 0.5, "questions": 4},
        "episodes": {"flow": len(outcomes)}, "validation": {"50": losses, "100": losses}, "log_history": log,
        "closed_loop": {"flow": [{"task": "t", "seed": i, "success": s, "steps": 9} for i, s in enumerate(outcomes)]},
    }  # fmt: skip
    (folder / f"{arm}-{seed}").mkdir(parents=True)
    (folder / f"{arm}-{seed}" / "result.json").write_text(json.dumps(result))


def test_tables_of_what_is_there(tmp_path):
    """Two seeds of one arm, three of the reference: differences are taken over the seeds that both have."""
    for seed, flow in enumerate((0.10, 0.12, 0.14)):
        write_result(tmp_path, "co_training", seed, [True, True, True, False], flow)
    for seed, flow in enumerate((0.13, 0.16)):
        write_result(tmp_path, "flow_only", seed, [True, False, False, seed == 1], flow)
    text = ablations.report(tmp_path, tmp_path / "pictures")
    results, differences, gradients = (block.splitlines() for block in text.split("\n\n"))
    assert results[2].startswith(
        "| co_training | 3 | 0.1200 ± 0.0200 | 0.4800 ± 0.0800 | 5.0000 ± 0.0000 | 9/12 = 75%"
    )
    assert "| 25%, 50% |" in results[3] and len(results) == 4
    # Differences of success -50% and -25%, of the loss 0.03 and 0.04; Student's t of two seeds is 12.706
    half = 12.706 * math.sqrt(0.125**2 * 2) / math.sqrt(2)
    assert f"-0.3750 [{-0.375 - half:+.4f}, {-0.375 + half:+.4f}]" in differences[2]
    assert "1 / 4, p = 0.375" in differences[2] and "+0.0350 [" in differences[2]
    assert "| co_training | first 10% | 90.0% | 10.0% |" in gradients[2]
    assert "| co_training | second half | 30.0% | 70.0% | 0.0% | +0.500 | - | - |" in gradients[3]
    assert all((tmp_path / "pictures" / name).stat().st_size > 0 for name in ("ablations.png", "gradient_bridge.png"))


def test_one_number_of_steps_per_folder_and_no_empty_report(tmp_path):
    ablations.check_steps(tmp_path / "runs", 400)
    ablations.check_steps(tmp_path / "runs", 400)
    with pytest.raises(ValueError, match="policies of 400 steps, now 500: give --steps 400"):
        ablations.check_steps(tmp_path / "runs", 500)
    with pytest.raises(ValueError, match="no finished policy"):
        ablations.report(tmp_path / "runs", tmp_path)
