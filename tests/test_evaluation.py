"""The simulator, the recorder, the evaluators: same seed, same numbers, in any process and in any order."""

import ast
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from wallvla.evaluation.closed_loop import (
    closed_loop_spec,
    evaluate,
    format_summary,
    run_episode,
    summarize,
)
from wallvla.evaluation.demonstrations import RETRY_STRIDE, GroundingSample, record_demonstrations, record_scenes
from wallvla.evaluation.grounding import box_iou, evaluate_grounding
from wallvla.evaluation.grounding_subjects import CheckpointSubject
from wallvla.evaluation.metaworld import (
    ACTION_NAMES,
    ACTION_UNITS,
    EVALUATION_SEED_START,
    INSTRUCTIONS,
    TASKS,
    MetaWorldEnv,
    mask_box,
)
from wallvla.evaluation.open_loop import (
    format_open_loop,
    format_probes,
    open_loop_metrics,
    open_loop_report,
    predict_demonstration,
)
from wallvla.evaluation.plots import (
    grounding_picture,
    plot_losses,
    plot_open_loop,
    plot_open_loop_report,
    save_pictures,
)
from wallvla.evaluation.policy import (
    BlankedImages,
    HubPolicy,
    PolicyError,
    RandomPolicy,
    ScriptedExpert,
    SwappedInstruction,
    build_policy,
    check_chunk,
)
from wallvla.evaluation.statistics import wilson_interval
from wallvla.evaluation.video import write_video
from wallvla.evaluation.workers import WorkerError
from wallvla.grounding_wallvla import grounding_prompt, read_answer


EVALUATION = Path(__file__).resolve().parents[1] / "evaluation"
QUICKSTART_TASKS = ("button-press-topdown-v3", "window-close-v3", "drawer-open-v3")


@pytest.fixture(scope="module")
def envs():
    """One simulator per quickstart task, shared: making one costs more than an episode."""
    made = {task: MetaWorldEnv(task) for task in QUICKSTART_TASKS}
    yield made
    for env in made.values():
        env.close()


@pytest.fixture(scope="module")
def demonstrations():
    """Two tasks, one episode each, recorded by two processes."""
    return list(record_demonstrations(QUICKSTART_TASKS[:2], 1, num_processes=2, progress=False))


class Constant:
    """A policy that always returns the same chunk and remembers what it was shown."""

    cameras = ("front",)

    def __init__(self, chunk):
        self.chunk, self.seen = chunk, []

    def reset(self, seed=0):
        self.seed = seed

    def act(self, observation, instruction):
        self.seen.append((observation, instruction))
        return self.chunk


# ---- the package ----


def test_imports_nothing_of_ours_outside_itself():
    for path in EVALUATION.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path.name}:{node.lineno}"
                assert not (node.module or "").startswith("wallvla"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "wallvla" for alias in node.names), path.name


# ---- simulator ----


def test_every_task_has_an_instruction():
    assert len(TASKS) == 50 and len(set(INSTRUCTIONS.values())) == 50
    assert INSTRUCTIONS["button-press-topdown-v3"] == "press the button"


def test_unknown_task_and_camera_name_what_exists(envs):
    with pytest.raises(ValueError, match="window-close-v3"):
        MetaWorldEnv("window-closed")
    with pytest.raises(ValueError, match="'front', 'wrist', 'topview'"):
        envs["drawer-open-v3"].render("left")


def test_same_seed_is_the_same_scene_whatever_ran_before(envs):
    env = envs["window-close-v3"]
    first = env.reset(7)
    objects = env.objects("front")
    for _ in range(20):
        env.step(env.expert_action())
    other = env.reset(8)
    again = env.reset(7)
    assert first["images"].keys() == {"front", "wrist"}
    for camera, image in first["images"].items():
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, again["images"][camera])
    np.testing.assert_array_equal(first["state"], again["state"])
    assert first["state"].shape == (4,) and first["state"].dtype == np.float32
    assert objects == env.objects("front")
    assert (first["images"]["front"] != other["images"]["front"]).any()


def test_same_seed_is_the_same_scene_in_another_process(envs):
    [scene] = record_scenes(["drawer-open-v3"], [EVALUATION_SEED_START], progress=False)
    [again] = record_scenes(["drawer-open-v3"], [EVALUATION_SEED_START], progress=False)
    np.testing.assert_array_equal(scene[0].image, again[0].image)
    assert {sample.name: sample.box for sample in scene} == {sample.name: sample.box for sample in again}


def test_rendering_is_lazy_and_cached(envs):
    env = envs["drawer-open-v3"]
    env.reset_scene(0)
    assert env.observe(())["images"] == {}
    front = env.observe(("front",))["images"]["front"]
    assert env.observe()["images"]["front"] is front
    env.step(np.zeros(4))
    assert env.observe()["images"]["front"] is not front
    assert env.render("front", 96).shape == (96, 96, 3)


@pytest.mark.parametrize(
    ("task", "body", "name", "offset"),
    [
        ("button-press-topdown-v3", "buttonbox", "button box", (0.0, 0.0, 0.0)),
        ("drawer-open-v3", "drawer_link", "drawer handle", (0.0, -0.16, 0.0)),
        ("window-close-v3", "hand", "robot hand", (0.0, 0.0, -0.05)),
    ],
)
def test_boxes_lie_on_the_objects(envs, task, body, name, offset):
    env = envs[task]
    centers = []
    for seed in range(3):
        env.reset_scene(seed)
        masks = env.object_masks("front", size=256)
        assert len(masks) >= 3 and "robot hand" in masks
        x1, y1, x2, y2 = mask_box(masks[name])
        assert masks[name][y1:y2, x1:x2].sum() == masks[name].sum()
        [(x, y)] = env.project("front", env.body_position(body)[None] + offset, size=256)
        assert x1 - 2 <= x <= x2 + 2 and y1 - 2 <= y <= y2 + 2
        centers.append((x1 + x2, y1 + y2))
        assert sum(mask.astype(int) for mask in masks.values()).max() == 1  # no pixel belongs to two
    if name != "robot hand":
        assert len(set(centers)) == 3, "the object must be placed by the seed"


def test_front_boxes_agree_with_the_pixels(envs):
    env = envs["button-press-topdown-v3"]
    env.reset_scene(0)
    x1, y1, x2, y2 = env.objects("front", size=256)["button"]
    red, green, blue = env.render("front", 256)[(y1 + y2) // 2 - 4 : (y1 + y2) // 2, x1 + 5 : x2 - 5].mean((0, 1))
    assert red > 3 * max(green, blue)


def test_bad_actions_are_refused(envs):
    env = envs["drawer-open-v3"]
    env.reset_scene(0)
    for action in (np.zeros(3), np.array([0, 0, np.nan, 0])):
        with pytest.raises(ValueError, match="4 finite numbers"):
            env.step(action)


def test_missing_opengl_gives_the_command(envs, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no device")

    env = envs["drawer-open-v3"]
    env.reset_scene(0)
    monkeypatch.setattr(env._mujoco, "Renderer", fail)
    with pytest.raises(RuntimeError, match="apt-get install -y libegl1 libgl1-mesa-dri"):
        env.render("front", 77)


@pytest.mark.parametrize("task", QUICKSTART_TASKS)
def test_the_expert_succeeds(envs, task):
    outcome = run_episode(envs[task], ScriptedExpert(envs[task]), EVALUATION_SEED_START, execute_steps=1)
    assert outcome["success"] and outcome["steps"] < 200


# ---- demonstrations ----


def test_recording_does_not_depend_on_the_number_of_processes(demonstrations):
    again = list(record_demonstrations(QUICKSTART_TASKS[:2], 1, num_processes=1, progress=False))
    assert [item.task for item in again] == list(QUICKSTART_TASKS[:2])
    for first, second in zip(demonstrations, again, strict=True):
        np.testing.assert_array_equal(first.states, second.states)
        np.testing.assert_array_equal(first.actions, second.actions)
        for camera in ("front", "wrist"):
            np.testing.assert_array_equal(first.frames[camera], second.frames[camera])


def test_a_demonstration_is_complete(demonstrations):
    for item in demonstrations:
        length = len(item.actions)
        assert item.states.shape == item.actions.shape == (length, 4)
        assert item.states.dtype == item.actions.dtype == np.float32
        assert item.frames["front"].shape == item.frames["wrist"].shape == (length, 64, 64, 3)
        assert np.abs(item.actions).max() <= 1
        assert item.instruction == INSTRUCTIONS[item.task] and item.seed < EVALUATION_SEED_START
        assert len(item.grounding) >= 4
        for sample in item.grounding:
            assert mask_box(sample.mask) == sample.box and sample.name not in sample.others
            assert any((sample.image == frame).all() for frame in item.frames["front"])


def test_labels_are_the_experts_actions_not_the_noise(demonstrations):
    """The executed action is not the label: the hand does not move as the labels alone would move it."""
    for item in demonstrations:
        moved = np.diff(item.states[:, :3], axis=0)
        clean = np.corrcoef(moved[10:-10].ravel(), item.actions[10:-11, :3].ravel())[0, 1]
        assert clean < 0.99
        assert (item.actions[:, 3] == item.actions[0, 3]).mean() > 0.5  # the gripper gets no noise


def test_training_seeds_cannot_reach_evaluation_seeds():
    with pytest.raises(ValueError, match="smaller seed0"):
        next(record_demonstrations(["reach-v3"], 2, seed0=RETRY_STRIDE - 1))
    with pytest.raises(ValueError, match="belong to demonstrations"):
        closed_loop_spec({"random": {"kind": "random"}}, ["reach-v3"], 1, seed0=0)


# ---- policies ----


def test_wrong_chunks_are_errors_with_details(envs):
    env = envs["drawer-open-v3"]
    with pytest.raises(PolicyError, match=r"shape \(8, 7\).*\(steps, 4\)"):
        run_episode(env, Constant(np.zeros((8, 7))), 0)
    chunk = np.zeros((8, 4))
    chunk[3, 2] = np.nan
    with pytest.raises(PolicyError, match="nan at step 3, dimension 2"):
        run_episode(env, Constant(chunk), 0)
    with pytest.raises(PolicyError, match="shape"):
        check_chunk(np.zeros((0, 4)), 4)


def test_episode_observes_every_execute_steps(envs):
    policy = Constant(np.zeros((8, 4)))
    outcome = run_episode(envs["drawer-open-v3"], policy, 3, execute_steps=5, max_steps=12)
    assert (outcome["steps"], outcome["policy_calls"], outcome["success"]) == (12, 3, False)
    assert policy.seed == 3
    assert [list(observation["images"]) for observation, _ in policy.seen] == [["front"]] * 3


def test_controls_take_information_away(envs):
    observation = envs["drawer-open-v3"].reset(0)
    blind = Constant(None)
    BlankedImages(blind).act(observation, "open the drawer")
    image = blind.seen[0][0]["images"]["front"]
    assert image.shape == (64, 64, 3) and np.unique(image).size == 1
    np.testing.assert_array_equal(blind.seen[0][0]["state"], observation["state"])
    told = Constant(None)
    SwappedInstruction(told, {"open the drawer": "close the window"}).act(observation, "open the drawer")
    SwappedInstruction(told, "press the button").act(observation, "open the drawer")
    assert [instruction for _, instruction in told.seen] == ["close the window", "press the button"]
    with pytest.raises(ValueError, match="No other instruction"):
        SwappedInstruction(told, {}).act(observation, "open the drawer")


class FakeProcessor:
    """The calls of `WallVLAProcessor` that policies and grounding make."""

    embodiments = {"sawyer": SimpleNamespace(cameras={"observation.images.front": "front view"})}

    def __call__(self, images, return_tensors, instruction=None, state=None, embodiment=None, text=None):
        inputs = {"input_ids": torch.zeros(1 if text is None else len(text), 5, dtype=torch.long)}
        if text is None:
            assert list(images) == ["front"] and state.shape == (4,)
            inputs["action_mask"] = torch.ones(1, 6, 8, dtype=torch.bool)
        else:
            self.asked = text

        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(inputs)

    def decode_actions(self, chunk, state, embodiment):
        return chunk.numpy()[..., :4]

    def batch_decode(self, tokens):
        return [self.answers[text] for text in self.asked]

    def grounding_prompt(self, kind, subject):
        return grounding_prompt(kind, subject)

    def parse_answer(self, text, kind, image_size):
        values = [float(value) for value in text.split()]
        points, boxes = [tuple(values)] if len(values) == 2 else [], [tuple(values)] if len(values) == 4 else []
        return read_answer(kind, text, points, boxes)


class FakeModel:
    device = torch.device("cpu")

    def eval(self):
        return self

    def sample_actions(self, input_ids, action_mask, noise, num_inference_steps):
        return noise

    def generate(self, input_ids, max_new_tokens, do_sample):
        return torch.zeros(len(input_ids), 9, dtype=torch.long)


def test_hub_policy_noise_follows_from_seed_episode_and_call(envs):
    observation = envs["drawer-open-v3"].reset(0)
    policy = HubPolicy(FakeModel(), FakeProcessor(), "sawyer", seed=1)
    assert policy.cameras == ("front",)

    def chunks(episode):
        policy.reset(episode)
        return [policy.act(observation, "open the drawer") for _ in range(2)]

    first, again, other = chunks(5), chunks(5), chunks(6)
    assert first[0].shape == (6, 4)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).all() and (first[0] != other[0]).all()
    with pytest.raises(ValueError, match="trained with sawyer"):
        HubPolicy(FakeModel(), FakeProcessor(), "aloha")


def test_unknown_policy_kind():
    with pytest.raises(ValueError, match="'hub', 'remote', 'expert' or 'random'"):
        build_policy({"kind": "oracle"}, None)


# ---- closed loop ----


def outcomes(results):
    timing = ("policy_seconds", "video")
    return [{key: value for key, value in item.items() if key not in timing} for item in results["episodes"]]


def test_evaluation_does_not_depend_on_workers_and_resumes(tmp_path):
    policies = {"expert": {"kind": "expert"}, "random": {"kind": "random"}}
    tasks = ["drawer-open-v3", "button-press-topdown-v3"]
    spec = closed_loop_spec(policies, tasks, 2, max_steps=120, videos_per_task=1)
    two = evaluate(spec, tmp_path / "two", num_workers=2, progress=False)
    one = evaluate({**spec, "videos_per_task": 0}, tmp_path / "one", num_workers=1, progress=False)
    assert outcomes(two) == outcomes(one)
    assert two["summary"]["expert"]["all"]["successes"] == 4
    assert two["summary"]["random"]["all"]["successes"] < 4
    assert [Path(video).name.rsplit("_", 1)[1] for video in two["videos"]] == ["failure.mp4"] * 2 + ["success.mp4"] * 2
    assert all(Path(video).exists() for video in two["videos"])
    table = format_summary(two["summary"]).splitlines()
    assert len(table) == 8 and len({line.index("/") for line in table[2:5]}) == 1

    log = tmp_path / "two" / "episodes.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    resumed = evaluate(spec, tmp_path / "two", num_workers=1, progress=False)
    assert outcomes(resumed) == outcomes(two)
    assert log.read_bytes().startswith(b"".join(lines[:-1])) and len(log.read_bytes().splitlines()) == 8
    stamp = log.stat().st_mtime_ns
    assert outcomes(evaluate(spec, tmp_path / "two", progress=False)) == outcomes(two)
    assert log.stat().st_mtime_ns == stamp  # nothing was left to do

    log.write_bytes(lines[0][:-20] + b"\n" + lines[1])
    with pytest.raises(ValueError, match="Line 1 of .* is not JSON"):
        evaluate(spec, tmp_path / "two", progress=False)


def test_a_failing_worker_names_its_log(tmp_path):
    policies = {"trained": {"kind": "hub", "path": str(tmp_path / "nowhere"), "embodiment": "sawyer"}}
    spec = closed_loop_spec(policies, ["reach-v3"], 1, trust_remote_code=True)
    with pytest.raises(WorkerError, match="Worker 0 stopped") as error:
        evaluate(spec, tmp_path / "run", num_workers=1, progress=False)
    assert "nowhere" in str(error.value) and "worker-0.log" in str(error.value)
    assert "nowhere" in (tmp_path / "run" / "logs" / "worker-0.log").read_text()


HUB_MODEL = """
    import sys

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    assert sys.modules["wallvla"] is None, "wallvla must not be importable here"


    class PokeConfig(PreTrainedConfig):
        model_type = "poke"


    class PokeModel(PreTrainedModel):
        config_class = PokeConfig

        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.post_init()

        def sample_actions(self, input_ids, action_mask, noise=None, num_inference_steps=None):
            return self.scale * noise
"""
HUB_PROCESSOR = """
    from types import SimpleNamespace

    import torch
    from transformers import BatchFeature, ProcessorMixin


    class PokeProcessor(ProcessorMixin):
        def __init__(self):
            super().__init__()
            self.embodiments = {"sawyer": SimpleNamespace(cameras={"observation.images.wrist": "wrist view"})}

        def __call__(self, images, instruction, state, embodiment, return_tensors):
            assert images["wrist"].shape == (64, 64, 3)
            mask = torch.ones(1, 4, 4, dtype=torch.bool)
            return BatchFeature({"input_ids": torch.zeros(1, 1, dtype=torch.long), "action_mask": mask})

        def decode_actions(self, chunk, state, embodiment):
            return chunk.numpy()
"""


def test_a_hub_folder_acts_where_wallvla_cannot_be_imported(tmp_path):
    """The remote code asserts that the import fails, so success of the run is the proof."""
    from safetensors.torch import save_file

    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "modeling_poke.py").write_text(textwrap.dedent(HUB_MODEL))
    (hub / "processing_poke.py").write_text(textwrap.dedent(HUB_PROCESSOR))
    auto_map = {"AutoConfig": "modeling_poke.PokeConfig", "AutoModel": "modeling_poke.PokeModel"}
    (hub / "config.json").write_text(json.dumps({"model_type": "poke", "auto_map": auto_map}))
    processor = {"processor_class": "PokeProcessor", "auto_map": {"AutoProcessor": "processing_poke.PokeProcessor"}}
    (hub / "processor_config.json").write_text(json.dumps(processor))
    save_file({"scale": torch.ones(1)}, hub / "model.safetensors", metadata={"format": "pt"})
    policies = {"poke": {"kind": "hub", "path": str(hub), "embodiment": "sawyer"}}
    spec = closed_loop_spec(policies, ["reach-v3"], 1, max_steps=8, trust_remote_code=True)
    results = evaluate(spec, tmp_path / "run", num_workers=1, progress=False)
    assert results["episodes"][0]["policy_calls"] == 2


def test_wilson_interval_against_known_values():
    for successes, episodes, low, high in [  # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
        (8, 10, 0.49016, 0.94332),
        (0, 10, 0.0, 0.27753),
        (50, 50, 0.92865, 1.0),
        (15, 50, 0.19104, 0.43750),
    ]:
        assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=2e-5)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_summary_pools_tasks():
    base = {"policy": "p", "progress": 0.5, "steps": 10, "policy_calls": 2, "policy_seconds": 0.01}
    episodes = [{**base, "task": task, "success": task == "a"} for task in ("a", "a", "b", "b")]
    summary = summarize(episodes)["p"]
    assert summary["a"]["rate"] == 1 and summary["b"]["rate"] == 0 and summary["all"]["rate"] == 0.5
    assert summary["b"]["mean_steps"] is None and summary["all"]["policy_ms"] == pytest.approx(5)


# ---- open loop ----


def test_open_loop_ignores_padding_and_keeps_units():
    demonstrated = np.zeros((2, 3, 2))
    predicted = np.zeros((2, 3, 2))
    predicted[..., 1] = [[3, 4, 100], [3, 100, 100]]
    is_pad = np.array([[False, False, True], [False, True, True]])
    metrics = open_loop_metrics(predicted, demonstrated, is_pad, ("dx", "dy"))
    assert metrics["steps"] == 3
    assert metrics["mae"] == {"dx": 0.0, "dy": pytest.approx(10 / 3)}
    assert metrics["rmse"]["dy"] == pytest.approx(math.sqrt(34 / 3))
    assert metrics["mae_by_step"]["dy"] == [3.0, 4.0, None]
    assert "cm" in format_open_loop(metrics, ("cm", "cm"))
    with pytest.raises(ValueError, match="Expected two arrays"):
        open_loop_metrics(predicted, demonstrated[:1])
    with pytest.raises(ValueError, match="all are padding"):
        open_loop_metrics(predicted, demonstrated, np.ones((2, 3), bool))


def test_predicting_along_a_demonstration(demonstrations):
    item = demonstrations[0]
    starts, predicted, demonstrated, is_pad = predict_demonstration(Constant(np.zeros((8, 4))), item, every=10)
    assert predicted.shape == demonstrated.shape == (len(starts), 8, 4)
    np.testing.assert_array_equal(demonstrated[1], item.actions[10:18])
    assert is_pad.sum() == np.maximum(starts + 8 - len(item.actions), 0).sum()
    np.testing.assert_array_equal(demonstrated[-1][is_pad[-1]], np.repeat(item.actions[-1:], is_pad[-1].sum(), 0))


# ---- grounding ----


def test_grounding_scores_right_wrong_and_malformed():
    image = np.zeros((20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[4:8, 2:6] = True
    boxes = {"cup": (2, 4, 6, 8), "bowl": (20, 10, 26, 16), "lid": (2, 4, 6, 8)}
    samples = [
        GroundingSample(image, "t", "front", name, boxes[name], mask, {k: v for k, v in boxes.items() if k != name})
        for name in ("cup", "bowl", "lid")
    ]
    processor = FakeProcessor()
    processor.answers = {
        grounding_prompt("box", "cup"): "2 4 6 8",
        grounding_prompt("box", "bowl"): "22 10 28 16",
        grounding_prompt("box", "lid"): "",
    }
    report = evaluate_grounding(CheckpointSubject(FakeModel(), processor), samples, "box", 6, progress=False)
    assert report["point_in_object"]["rate"] == pytest.approx(2 / 3)
    assert report["point_on_mask"]["rate"] == pytest.approx(1 / 3)
    assert report["malformed_rate"] == pytest.approx(1 / 3)
    assert report["mean_iou"] == pytest.approx((1 + 0.5) / 3)
    assert report["iou_50"] == pytest.approx(2 / 3)
    assert report["point_in_object_when_swapped"]["rate"] == 0
    assert report["by_name"] == {"bowl": 1.0, "cup": 1.0, "lid": 0.0}
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0
    with pytest.raises(ValueError, match="Unknown kind"):
        evaluate_grounding(CheckpointSubject(FakeModel(), processor), samples, "polygon")


# ---- pictures ----


def test_video_round_trip(tmp_path):
    frames = [np.full((64, 48, 3), (30 * index, 128, 255 - 30 * index), np.uint8) for index in range(6)]
    path = write_video(tmp_path / "clips" / "rollout.mp4", frames, 20, caption="press the button", min_side=96)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 20
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 6 and decoded[0].shape == (128 + 22, 96, 3)
    for frame, source in zip(decoded, frames, strict=True):
        assert np.abs(frame[:128].astype(int).mean((0, 1)) - source[0, 0]).max() < 6
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "empty.mp4", [], 20)
    with pytest.raises(ValueError, match="all alike"):
        write_video(tmp_path / "mixed.mp4", [frames[0], frames[0][:10]], 20)


def test_pictures_are_written(tmp_path, demonstrations):
    logs = [{"step": step, "loss": 1 / (step + 1), "text_loss": 2.0} for step in range(30)] + [{"train_runtime": 1.0}]
    item = demonstrations[0]
    arrays = predict_demonstration(Constant(np.zeros((8, 4))), item)
    picture = grounding_picture(item.grounding[0].image, "button", item.grounding[0].box, (30, 30, 20, 20), (9, 9))
    assert picture.shape == (384 + 22, 384, 3)
    for path in (
        plot_losses(logs, tmp_path / "report" / "losses.png"),
        plot_open_loop(*arrays, ACTION_NAMES, ACTION_UNITS, 80, tmp_path / "open_loop.png", "one episode"),
        save_pictures([picture] * 4, tmp_path / "grounding.png"),
    ):
        assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="none of"):
        plot_losses([{"step": 1, "accuracy": 1.0}], tmp_path / "nothing.png", ["loss"])


def test_random_policy_is_reproducible():
    first, second = RandomPolicy(), RandomPolicy()
    for policy in (first, second):
        policy.reset(4)
    chunk = first.act({}, "")
    assert chunk.shape == (8, 4) and np.abs(chunk).max() <= 1
    np.testing.assert_array_equal(chunk, second.act({}, ""))
    second.reset(5)
    assert (chunk != second.act({}, "")).all()


# ---- what the open loop depends on ----


class Looker:
    """Actions that follow from exactly the inputs named, plus noise by seed."""

    cameras = ("front", "wrist")

    def __init__(self, uses, noise=0.01):
        self.uses, self.noise = uses, noise

    def reset(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def act(self, observation, instruction):
        value = 0.0
        if "images" in self.uses:
            front, wrist = (observation["images"][camera].astype(float) for camera in self.cameras)
            value += front[20:40].std() / 50 - wrist[20:40].std() / 50 + front[32, 32].mean() / 255
        if "instruction" in self.uses:
            value += ord(instruction[0]) / 50
        if "state" in self.uses:
            value += observation["state"][2]
        return value + self.noise * self.rng.normal(size=(8, 4)) * np.array([1, 1, 1, 3])


@pytest.mark.parametrize("uses", [set(), {"images"}, {"instruction"}, {"state"}, {"images", "state"}])
def test_probes_find_what_a_policy_looks_at(demonstrations, uses):
    report = open_loop_report(Looker(uses), demonstrations, ACTION_NAMES, every=20)
    used = {name for name, probe in report["probes"].items() if probe["used"]}
    probes = {
        "images": {"blank images", "shuffled images", "swapped cameras"},
        "instruction": {"swapped instruction"},
        "state": {"zero state", "shuffled state"},
    }
    assert set(report["probes"]) == set().union(*probes.values())
    assert used == set().union(*(probes[name] for name in uses)) if uses else not used
    assert "yes" in format_probes(report["probes"]) or not uses


def test_open_loop_report_splits_by_phase_and_seed(demonstrations, tmp_path):
    report = open_loop_report(Looker(set()), demonstrations, ACTION_NAMES, every=4)
    phases = report["by_phase"]
    assert list(phases) == ["first third", "second third", "last third"]
    assert sum(metrics["steps"] for metrics in phases.values()) == report["metrics"]["steps"]
    weighted = sum(metrics["mae"]["dx"] * metrics["steps"] for metrics in phases.values())
    assert weighted / report["metrics"]["steps"] == pytest.approx(report["metrics"]["mae"]["dx"])
    assert list(report["by_seed"]) == ["0", "1", "2"] and report["by_seed"]["0"] == report["metrics"]["mae"]
    assert report["noise_spread"]["dx"] == pytest.approx(0.01 * 0.886, rel=0.1)  # c4(3) of three draws
    assert report["noise_spread"]["gripper"] == pytest.approx(3 * 0.01 * 0.886, rel=0.1)
    assert plot_open_loop_report(report, ACTION_UNITS, tmp_path / "report.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="got 1 demonstrations"):
        open_loop_report(Looker(set()), demonstrations[:1])
