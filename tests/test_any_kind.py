"""Each kind of action expert through the whole line: a LeRobot dataset, training, saving, evaluation, the server."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_serving_server import Running
from test_train_mixture import CAMERA, write_dataset
from tiny import TINY_ROBOT, tiny_parts_of

from wallvla import register_auto_classes
from wallvla.data.collator import Collator
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.mixture import CoTrainingMixture
from wallvla.data.statistics import compute_statistics
from wallvla.evaluation.policy import HubPolicy
from wallvla.serving.client import PolicyClient
from wallvla.serving.policy import load_policy
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.co_training_trainer import CoTrainingTrainer


ROBOT = TINY_ROBOT | {"cameras": {CAMERA: "front view"}, "control_frequency": 80, "statistics": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", 2, "press the button")


@pytest.mark.parametrize(
    "kind, vlm", [("mot", "qwen2_5_vl"), ("soft_prompt", "florence2"), ("dit", "qwen2_5_vl"), ("mot", "internvl")]
)
def test_the_whole_line(kind, vlm, dataset, tmp_path):
    model, processor = tiny_parts_of(kind, vlm, {"robot": ROBOT})
    demonstrations = LeRobotDataset(dataset, embodiment="robot", action_horizon=8)
    robot = processor.embodiments["robot"]
    statistics = compute_statistics(demonstrations, robot, progress=False)
    processor.add_embodiment("robot", replace(robot, statistics=statistics))
    args = CoTrainingConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        max_steps=2,
        logging_steps=1,
        warmup_steps=0,
        optimizer="muon",
        learning_rate=1e-2,
        log_loss_breakdown=True,
        gradient_bridge_steps=2,
        gradient_checkpointing=True,
        peak_flops=1e12,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = CoTrainingTrainer(
        model=model,
        args=args,
        data_collator=Collator(processor),
        train_dataset=CoTrainingMixture(demonstrations, length=2 * args.draws_per_step),
        processing_class=processor,
    )
    trainer.train()
    # Without text and second views nothing reaches an LM head and the norm before it, the last VL layer (but for keys
    # and values), and what projects such views
    idle = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    unread = re.compile(r"language_model\.(norm|layers\.3)\.|lm_head|auxiliary_proj")
    assert [name for name in idle if not unread.search(name)] == []
    logs = trainer.state.log_history
    assert all(np.isfinite(log["flow_loss"]) for log in logs if "flow_loss" in log) and logs[0]["mfu"] > 0
    assert logs[0]["gradient_share_flow"] == 1
    trainer.save_model(str(tmp_path / "hub"))

    register_auto_classes()
    local = HubPolicy.from_pretrained(str(tmp_path / "hub"), "robot")
    rng = np.random.default_rng(0)
    frame, state = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), rng.normal(size=4).astype(np.float32)
    expected = local.act({"images": {"front": frame}, "state": state}, "press the button")
    assert expected.shape == (8, 4) and np.isfinite(expected).all()
    served = load_policy(str(tmp_path / "hub"), use_engine=True)
    with Running({"tiny": served}) as server, PolicyClient(server.address) as client:
        message = {CAMERA: frame, "observation.state": state, "prompt": "press the button"}
        found = client.infer(message)
    np.testing.assert_allclose(found["actions"], expected, atol=1e-4)
