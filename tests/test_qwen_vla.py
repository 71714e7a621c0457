"""Qwen-VLA from a sample to a motion: prompt and view tags, `dit` on a small Qwen3.5, loss, sampling, decoding.

One batch holds an arm, a robot that navigates, a human and a question; none of it needs generated data.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import PATCHES, TINY_EXPERTS, TINY_VLMS
from transformers import HfArgumentParser, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from wallvla.action_space_wallvla import Embodiment, axis_angle_to_matrix
from wallvla.configuration_wallvla import WallVLAConfig
from wallvla.data.eigengrasps import Eigengrasps, actions_to_hand, hand_to_actions
from wallvla.data.recipe import read_recipe
from wallvla.flow_matching_wallvla import interpolate
from wallvla.modeling_wallvla import WallVLAForConditionalGeneration
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.prompts_wallvla import QWEN_VLA
from wallvla.trainers.co_training_config import STAGES, CoTrainingConfig
from wallvla.trainers.fine_tuning import FineTuningArguments
from wallvla.trainers.parameter_groups import freeze


ROOT = Path(__file__).parents[1]
HORIZON, CHANNELS = 16, 32


def load_benchmark():
    """`benchmarks/qwen_vla.py` as a module."""
    spec = importlib.util.spec_from_file_location("qwen_vla_benchmark", ROOT / "benchmarks" / "qwen_vla.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ranges(width: int) -> dict:
    """Statistics whose channels all differ."""
    return {"q01": [-1.0 - channel for channel in range(width)], "q99": [2.0 + channel for channel in range(width)]}


def robot(width: int, horizon: int, tag: str, cameras=("ego",), **fields) -> Embodiment:
    values = {"action": ranges(width)}
    if fields.get("state_layout"):
        values["state"] = ranges(fields["state_layout"][0][1])
    fields = {"state_layout": (), **fields}
    keys = {f"observation.images.{label}": label for label in cameras}
    layout = (("native", width),)
    return Embodiment(keys, 10.0, horizon, action_layout=layout, statistics=values, robot_tag=tag, **fields)


ROBOTS = {
    "arm": robot(7, 5, "Franka", ("ego", "cam_left_wrist"), state_layout=(("native", 3),)),
    "rover": robot(3, 8, "Stretch", arms=0, domain=1),
    "human": robot(32, 16, "human", arms=2, domain=2),
    "blind_arm": robot(7, 16, "Franka", ()),
}
TEXTS = [
    "The robot is Franka with single arm. The control frequency is 10 Hz. Please predict the next 16 control actions "
    "to execute the following task: pick up the red cup."
]
CHAT = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


@pytest.fixture(scope="module")
def processor():
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(TEXTS * 4, vocab_size=600, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT})
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCHES["patch_size"], temporal_patch_size=1, merge_size=2, min_pixels=256, max_pixels=1024
    )
    return WallVLAProcessor(
        images,
        tokenizer,
        ROBOTS,
        action_dim=CHANNELS,
        action_horizon=HORIZON,
        longest_side=32,
        proprioception="none",
        prompt_format=QWEN_VLA,
    )


@pytest.fixture
def model(processor):
    vlm = TINY_VLMS["qwen3_5"] | {"image_token_id": processor.image_token_id}
    vlm["text_config"] = vlm["text_config"] | {"vocab_size": -(-len(processor.tokenizer) // 64) * 64}
    torch.manual_seed(0)
    config = WallVLAConfig.qwen_vla(
        vlm_config=vlm, action_expert=TINY_EXPERTS["dit"], action_dim=CHANNELS, action_horizon=HORIZON
    )
    model = WallVLAForConditionalGeneration(config).eval()
    with torch.no_grad():  # adaLN-Zero predicts zeros at first
        for parameter in model.action_expert.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)


def sample(name: str, seed: int = 0, **changes) -> dict:
    """A demonstrated chunk in the robot's units, inside its ranges."""
    embodiment, rng = ROBOTS[name], np.random.default_rng(seed)
    width = embodiment.action_width
    low, high = (np.array(ranges(width)[key]) for key in ("q01", "q99"))
    return {
        "images": {key: picture(seed + number) for number, key in enumerate(embodiment.cameras)},
        "instruction": "pick up the red cup",
        "embodiment": name,
        "actions": rng.uniform(low, high, size=(embodiment.action_horizon, width)),
        **changes,
    }


def flow_inputs(batch, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shape = batch["actions"].shape
    return {
        "noise": torch.randn(shape, generator=generator),
        "time": 0.1 + 0.8 * torch.rand(shape[0], generator=generator),
    }


# ---- the whole path


def test_one_sample_from_pictures_to_a_motion(processor, model):
    given = sample("arm", state=np.zeros(3))
    batch = processor.encode([given])
    text = processor.decode(batch["input_ids"][0]).replace("<|image_pad|>" * 4, "<|image_pad|>")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>user\nThe robot is Franka with single arm. The control frequency is 10 Hz. Please predict the "
        "next 5 control actions to execute the following task: pick up the red cup."
        f"<|ego_start|>{image}<|ego_end|><|cam_left_wrist_start|>{image}<|cam_left_wrist_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tags = ["<|ego_start|>", "<|ego_end|>", "<|cam_left_wrist_start|>", "<|cam_left_wrist_end|>"]
    for tag in tags:  # one token each
        assert batch["input_ids"][0].tolist().count(processor.tokenizer.convert_tokens_to_ids(tag)) == 1
    assert "states" not in batch  # proprioception "none", though the sample has one
    assert batch["action_mask"][0].nonzero().amax(dim=0).tolist() == [4, 6] and batch["action_mask"].sum() == 5 * 7
    back = processor.decode_actions(batch["actions"], embodiment="arm")
    np.testing.assert_allclose(back[0], given["actions"], atol=1e-5)

    model.train()
    output = model(**batch, **flow_inputs(batch))
    output.loss.backward()
    assert output.loss == output.flow_loss and output.loss_counts.tolist() == [1, 0, 0]
    for part in ("vlm.model.visual", "vlm.model.language_model", "action_expert"):
        gradients = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), part

    model.eval()
    observation = processor.encode([{key: given[key] for key in ("images", "instruction", "embodiment")}])
    assert torch.equal(observation["input_ids"], batch["input_ids"])
    noise = torch.randn(1, HORIZON, CHANNELS, generator=torch.Generator().manual_seed(2))
    chunk = model.sample_actions(**observation, noise=noise)
    assert not chunk[~observation["action_mask"]].any() and chunk[observation["action_mask"]].all()
    motion = processor.decode_actions(chunk, embodiment="arm")
    low, high = (np.array(ranges(7)[key]) for key in ("q01", "q99"))
    expected = low + (chunk[0, :5, :7].double().numpy() + 1) / 2 * (high - low)
    assert motion.shape == (1, 5, 7)
    np.testing.assert_allclose(motion[0], expected, atol=1e-6)


def test_two_level_loss_by_a_loop(processor, model):
    """Three bodies of 7, 3 and 32 channels and 5, 8 and 16 steps, one cut short by the end of its episode, and a
    question: equations 1 and 2, element by element in float64."""
    short = np.arange(8) >= 6
    question = {"images": [picture(9)], "text": "what is red?", "answer": "the cup"}
    samples = [sample("arm"), sample("rover", 1, action_is_pad=short), question, sample("human", 2)]
    batch = processor.encode(samples)
    flow = flow_inputs(batch)
    with torch.no_grad():
        output = model(**batch, **flow)
        noisy = interpolate(batch["actions"], flow["noise"], flow["time"])
    sizes = {0: (5, 7), 1: (6, 3), 3: (16, 32)}  # real steps and channels
    total = 0.0
    for row, (steps, channels) in sizes.items():
        tau = flow["time"][row].item()
        of_channels = []
        for k in range(channels):
            errors = []
            for h in range(steps):
                clean, start = batch["actions"][row, h, k].item(), flow["noise"][row, h, k].item()
                velocity = (output.action_prediction[row, h, k].item() - noisy[row, h, k].item()) / (1 - tau)
                errors.append((velocity - (clean - start)) ** 2)
            of_channels.append(sum(errors) / steps)
        total += sum(of_channels) / channels
    assert output.flow_loss.item() == pytest.approx(total / 3, rel=1e-4)
    assert output.loss_counts[0] == 3
    text = output.text_loss.item()
    assert text > 0 and output.loss.item() == pytest.approx(total / 3 + 0.1 * text, rel=1e-4)  # weights 1.0 and 0.1


# ---- bodies


def test_waypoints_of_navigation(processor, model):
    waypoints = np.tile([0.5, -0.2, 0.1], (8, 1))
    waypoints[0] = [9.0, -0.2, -9.0]  # beyond what the data hold
    batch = processor.encode([sample("rover", actions=waypoints)])
    assert (
        "The robot is Stretch, which moves in the ground plane. The control frequency is 10 Hz. Please predict the "
        "next 8 waypoints (dx, dy, dtheta), each the relative displacement and heading change, to execute"
    ) in processor.decode(batch["input_ids"][0])
    assert batch["domain_ids"].tolist() == [1] and batch["action_mask"].sum() == 8 * 3
    assert batch["actions"][0, 0, :3].tolist() == pytest.approx([1, 2 * (-0.2 + 2) / 5 - 1, -1])  # clipped
    back = processor.decode_actions(batch["actions"], embodiment="rover")[0]
    np.testing.assert_allclose(back[0], [2.0, -0.2, -3.0], atol=1e-6)
    np.testing.assert_allclose(back[1:], waypoints[1:], atol=1e-6)
    observation = {"images": sample("rover")["images"], "instruction": "go to the kitchen", "embodiment": "rover"}
    chunk = model.sample_actions(**processor.encode([observation]), noise=torch.ones(1, HORIZON, CHANNELS))
    assert processor.decode_actions(chunk, embodiment="rover").shape == (1, 8, 3)


def test_human_hands_are_a_body_of_32_channels(processor):
    """Wrists and eigengrasps of both hands go through the processor and come back as poses of hands."""
    rng = np.random.default_rng(3)
    grasps = Eigengrasps.fit([rng.normal(size=(200, 45)) * np.linspace(0.1, 1, 45)])
    hands, chunks = [], []
    for _ in ("left", "right"):
        start = 0.1 * rng.normal(size=3), axis_angle_to_matrix(0.3 * rng.normal(size=3))
        wrist = 0.1 * rng.normal(size=(HORIZON, 3)), axis_angle_to_matrix(0.3 * rng.normal(size=(HORIZON, 3)))
        poses = grasps.decode(0.3 * rng.normal(size=(HORIZON, 10)))
        hands.append((wrist, start, poses))
        chunks.append(hand_to_actions(wrist, start, poses, grasps))
    actions = np.concatenate(chunks, axis=-1)
    assert actions.shape == (HORIZON, 32)
    batch = processor.encode([sample("human", actions=actions)])
    assert batch["action_mask"].all()
    back = processor.decode_actions(batch["actions"], embodiment="human")[0]
    for hand, (wrist, start, poses) in enumerate(hands):
        found, found_poses = actions_to_hand(back[:, 16 * hand : 16 * hand + 16], start, grasps)
        np.testing.assert_allclose(found[0], wrist[0], atol=1e-5)
        np.testing.assert_allclose(found[1], wrist[1], atol=1e-5)
        np.testing.assert_allclose(found_poses, poses, atol=1e-4)


# ---- text to action


def test_text_to_action_learns_motions_from_words(processor, model):
    """Without any image, the VLM frozen: two instructions become two motions, told apart by the text alone."""
    words = ["pick up the red cup", "the cup"]
    samples = [sample("blind_arm", seed, instruction=text) for seed, text in enumerate(words)]
    batch = processor.encode(samples)
    assert "pixel_values" not in batch and "image_grid_thw" not in batch
    assert "<|vision_start|>" not in processor.decode(batch["input_ids"][0])
    options = CoTrainingConfig(output_dir="none", use_cpu=True, stage="t2a")
    assert (options.time_sampler, options.max_steps) == ("logit_normal", 2000)
    freeze(model, STAGES["t2a"]["freeze"])
    model.train()
    model(**batch, **flow_inputs(batch)).loss.backward()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"action_expert"}

    with torch.no_grad():  # the frozen VLM says the same in every step
        context = model.encode_prefix(**{name: batch[name] for name in ("input_ids", "attention_mask", "domain_ids")})
    optimizer = torch.optim.Adam(model.action_expert.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    channel_mask, step_mask = batch["action_mask"].any(1, keepdim=True), batch["action_mask"].any(2)
    for _ in range(150):
        noise = torch.randn(batch["actions"].shape, generator=generator)
        time = torch.sigmoid(torch.randn(2, generator=generator))
        noisy = interpolate(batch["actions"], noise, time)
        velocity = model.action_expert(noisy, time, context, channel_mask, step_mask)
        errors = (velocity - (batch["actions"] - noise))[batch["action_mask"]]
        optimizer.zero_grad()
        errors.square().mean().backward()
        optimizer.step()
    told = [{key: each[key] for key in ("instruction", "embodiment")} for each in samples]
    noise = torch.randn(1, HORIZON, CHANNELS, generator=generator).expand(2, -1, -1).contiguous()
    chunks = model.eval().sample_actions(**processor.encode(told), noise=noise)
    motions = processor.decode_actions(chunks, embodiment="blind_arm")
    distances = [[np.square(motion - each["actions"]).mean() for each in samples] for motion in motions]
    assert distances[0][0] < 0.3 * distances[0][1] and distances[1][1] < 0.3 * distances[1][0]


# ---- examples and the benchmark


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_examples_of_the_stages(stage):
    """The real dataclasses and the real reader take them."""
    path = ROOT / "examples" / f"train_qwen_vla_{stage}.yaml"
    parser = HfArgumentParser((FineTuningArguments, CoTrainingConfig))
    options, args = parser.parse_dict(yaml.safe_load(path.read_text()) | {"use_cpu": True, "bf16": False})
    assert args.stage == stage and args.time_sampler == "beta" and args.freeze == []
    assert args.learning_rates["vlm"] < args.learning_rates["action_expert"]
    assert args.text_loss_weight == 0.1  # beside 1.0 for actions
    recipe = read_recipe(ROOT / options.mixture)
    assert recipe.power < 1 and 0 < recipe.multimodal_fraction < 0.2 and recipe.multimodal
    robots = {entry.embodiment for entry in recipe.actions}
    assert robots == set(recipe.robots)


def test_the_benchmarks_other_body_moves_as_ours():
    benchmark = load_benchmark()
    commands = np.random.default_rng(0).normal(size=(5, 4))
    states, recorded = benchmark.to_other(np.zeros((5, 4)), commands)
    np.testing.assert_allclose(recorded[:, 0], -0.5 * commands[:, 1])  # by hand
    np.testing.assert_allclose(recorded[:, 3], 3 * commands[:, 2])

    class Policy:
        cameras = ("front",)

        def act(self, observation, instruction):
            return recorded

    np.testing.assert_allclose(benchmark.OtherBody(Policy()).act({}, ""), commands)
    assert not states.any()


def finished(folder: Path, arm: str, outcomes: dict[str, list[bool]], seed: int = 0) -> None:
    result = {
        "arm": arm, "seed": seed, "steps": 5, "t2a_steps": 4, "backbone_steps": 3, "machine": "m", "torch": "t",
        "date": "d", "commit": "c", "projection_parameters": 1234, "held_out_loss": dict.fromkeys(outcomes, 0.25),
        "closed_loop": {
            body: [{"task": f"task{i % 2}", "seed": i, "success": s, "steps": 9} for i, s in enumerate(found)]
            for body, found in outcomes.items()
        },
        "log": [{"loss": 2.0}, {"flow_loss": 1.5, "loss": 1.0}],
    }  # fmt: skip
    (folder / f"{arm}-{seed}").mkdir(parents=True)
    (folder / f"{arm}-{seed}" / "result.json").write_text(json.dumps(result))


def test_the_benchmarks_tables(tmp_path):
    """Paired with the reference of each table, p values corrected for the number of arms, verdicts."""
    benchmark = load_benchmark()
    finished(tmp_path, "scratch", {"sawyer": 10 * [False] + [True] * 2})
    finished(tmp_path, "t2a", {"sawyer": 10 * [True] + [True, False]})
    finished(tmp_path, "t2a_beta", {"sawyer": 10 * [False] + [False, True]})
    finished(tmp_path, "shared", {"sawyer": [True] * 4, "other": [False] * 4})
    finished(tmp_path, "per_domain", {"sawyer": [True] * 4, "other": [True] * 4})
    text = benchmark.report(tmp_path, tmp_path / "tables")
    data = json.loads((tmp_path / "tables.json").read_text())
    assert (tmp_path / "tables.md").read_text().strip() == text.strip()
    by_arm = {entry["arm"]: entry for entry in data["tables"]["t2a"]}
    better = by_arm["t2a"]["against"]
    assert (better["only_a"], better["only_b"]) == (10, 1)
    p = 2 * (1 + 11) / 2**11
    assert better["p"] == pytest.approx(p) and better["holm_p"] == pytest.approx(2 * p)  # two arms
    assert by_arm["t2a"]["verdict"] == "better" and by_arm["t2a_beta"]["verdict"] == "undecided"
    assert by_arm["scratch"]["by_task"] == {"task0": [1, 6], "task1": [1, 6]}
    assert "| `t2a` | 0 | 11/12 = 92% [65%, 99%] | 6/6, 5/6 | 0.2500 | +75%" in text
    other = [entry for entry in data["tables"]["projection"] if entry["body"] == "other"]
    assert [entry["arm"] for entry in other] == ["shared", "per_domain"]
    assert other[1]["against"]["p"] == pytest.approx(2 * math.comb(4, 0) / 2**4)
    assert "state" not in text.lower() and data["policies"][0]["last_losses"] == {"loss": 1.0, "flow_loss": 1.5}
    with pytest.raises(ValueError, match="no finished policy"):
        benchmark.report(tmp_path / "empty", tmp_path / "tables")
