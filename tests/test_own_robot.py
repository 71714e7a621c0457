"""Bring your own robot, as docs/data.md says: inspect, clean, describe, compute statistics, to a training batch."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_unification import urdf_text

from wallvla import cli
from wallvla.action_space_wallvla import Embodiment, axis_angle_to_matrix, matrix_to_rotation
from wallvla.data.cleaning import read_plan
from wallvla.data.collator import Collator
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.statistics import compute_statistics
from wallvla.data.unification import UrdfArm
from wallvla.processing_wallvla import WallVLAProcessor
from wallvla.quickstart import QuickstartConfig, build_processor, embodiment
from wallvla.trainers.co_training_config import CoTrainingConfig
from wallvla.trainers.fine_tuning import FineTuningArguments, prepare_mixture


CAMERA = "observation.images.front"
SIZE, FPS, HORIZON = 32, 20, 8
FIXTURES = Path(__file__).parent / "fixtures"


def write(root: Path, vectors: np.ndarray, fps: int = FPS, **keys) -> Path:
    """Episodes of vectors (E, T, D): the state, and 0.5 s later the target of the action."""
    keys = {"state": "observation.state", "action": "action"} | keys
    features = {name: {"dtype": "float32", "shape": vectors.shape[2:]} for name in keys.values()}
    features[CAMERA] = {"dtype": "image", "shape": (SIZE, SIZE, 3)}
    rng, ahead = np.random.default_rng(0), fps // 2
    with LeRobotWriter(root, fps=fps, features=features) as writer:
        for episode in vectors:
            for step in range(len(episode)):
                target = episode[min(step + ahead, len(episode) - 1)]
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                writer.add_frame({keys["state"]: episode[step], keys["action"]: target, CAMERA: pixels})
            writer.save_episode("push the puck")
    return root


def empty_processor() -> WallVLAProcessor:
    """A processor of the full action space that knows no robot."""
    config = QuickstartConfig(image_size=SIZE)
    small = build_processor(config, embodiment(config))
    return WallVLAProcessor(
        small.image_processor, small.tokenizer, {}, action_dim=26, action_horizon=HORIZON, state_bins=64,
        longest_side=SIZE,
    )  # fmt: skip


def training_batch(tmp_path: Path, **options):
    """(processor, mixture, batch of its first samples) of `wallvla train` with these options."""
    processor = empty_processor()
    args = CoTrainingConfig(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=2, use_cpu=True, bf16=False
    )
    arguments = FineTuningArguments(model="", drop_state=0.0, **{k: str(v) for k, v in options.items()})
    mixture = prepare_mixture(arguments, args, processor)
    samples = [mixture[i] for i in range(4)]
    return processor, samples, Collator(processor)(samples)


def run(*words) -> None:
    cli.main([str(word) for word in words])


def robot_file(tmp_path: Path, **fields) -> Path:
    values = {"cameras": [[CAMERA, "front view"]], "control_frequency": FPS, "action_horizon": HORIZON} | fields
    (tmp_path / "robot.json").write_text(json.dumps(values))
    return tmp_path / "robot.json"


def check_batch(processor, samples, batch) -> None:
    """Decoding the batch gives the recorded actions back, in the robot's own units."""
    robot = processor.embodiments["robot"]
    for row, sample in enumerate(samples):
        steps = ~sample["action_is_pad"]
        values = robot.encode_actions(sample["actions"], sample["state"])
        found = batch["actions"][row, : len(values), robot.action_channels].numpy()
        np.testing.assert_allclose(found[steps], values[steps], atol=1e-6)
        assert np.abs(found).max() <= 1 and np.ptp(found) > 0.1
    assert batch["input_ids"].shape[0] == len(samples)


def test_end_effector_robot_with_quaternions(tmp_path, capsys):
    """xyzw, absolute targets, another forward axis, 1 closes: half of an episode idles, which the plan leaves out."""
    rng = np.random.default_rng(0)
    phase = np.linspace(0, 3, 40)[None, :, None] + rng.uniform(0, 3, (6, 1, 1))
    position = 0.3 * np.sin(phase + np.arange(3))
    rotation = matrix_to_rotation(axis_angle_to_matrix(np.sin(phase + 3 + np.arange(3))), "quaternion_xyzw")
    gripper = (np.sin(3 * phase) > 0).astype(float)
    vectors = np.concatenate([position, rotation, gripper], axis=-1)
    vectors[2, 20:] = vectors[2, 20]
    root = write(tmp_path / "arm", vectors)
    layout = [["left_ee_position", 3], ["left_ee_rotation", 4], ["left_gripper", 1]]
    file = robot_file(
        tmp_path, state_layout=layout, action_layout=layout, rotation_format="quaternion_xyzw",
        reference_frame="eef_relative", action_gripper_range=[1, 0], world_axes=["y", "-x", "z"],
    )  # fmt: skip
    run("data", "inspect", root)
    assert "camera observation.images.front" in capsys.readouterr().out
    run("data", "clean", root, "--output", tmp_path / "clean.json")
    plan = read_plan(tmp_path / "clean.json")
    assert len(plan[2]) <= 21 and len(plan[0]) == 40
    output = tmp_path / "with_statistics.json"
    options = ["--embodiment-file", file, "--clean", tmp_path / "clean.json", "--cache", "none", "--output", output]
    run("stats", root, *options)
    robot = Embodiment.from_dict(json.loads(output.read_text()))
    kept = LeRobotDataset(root, embodiment="robot", action_horizon=HORIZON, keep=plan)
    assert robot.statistics == compute_statistics(kept, robot, progress=False)
    whole = LeRobotDataset(root, embodiment="robot", action_horizon=HORIZON)
    assert robot.statistics != compute_statistics(whole, robot, progress=False)
    # Training computes the same where the file has none, and takes those of the file where it has some.
    given = {"dataset": root, "embodiment": "robot", "clean": tmp_path / "clean.json"}
    processor, samples, batch = training_batch(tmp_path, embodiment_file=file, **given)
    assert processor.embodiments["robot"].statistics == robot.statistics
    check_batch(processor, samples, batch)
    changed = json.loads(output.read_text())
    changed["statistics"]["action"]["q99"][0] += 1
    output.write_text(json.dumps(changed))
    processor, _, _ = training_batch(tmp_path, embodiment_file=output, **given)
    assert processor.embodiments["robot"].statistics == changed["statistics"]


def test_joint_robot_with_a_urdf(tmp_path):
    """Joints in degrees under other names; the model sees poses, in statistics and in training alike."""
    pytest.importorskip("pytorch_kinematics")
    (tmp_path / "arm.urdf").write_text(urdf_text())
    (tmp_path / "convert.yaml").write_text(
        "joints_to_poses:\n  urdf: arm.urdf\n  arms:\n"
        "    - {link: flange, joints: [0, 1, 2, 3, 4, 5], gripper: 6, degrees: true}\n"
    )
    rng = np.random.default_rng(0)
    joints = 60 * np.sin(np.linspace(0, 3, 30)[None, :, None] + rng.uniform(0, 3, (3, 1, 7)))
    root = write(tmp_path / "joints", joints, state="observation.qpos", action="action.qpos")
    layout = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
    file = robot_file(
        tmp_path, state_layout=layout, action_layout=layout, reference_frame="world_relative",
        state_gripper_range=[-60, 60], action_gripper_range=[-60, 60],
    )  # fmt: skip
    keys = ["--state-key", "observation.qpos", "--action-key", "action.qpos"]
    output = tmp_path / "with_statistics.json"
    run(
        "stats", root, "--embodiment-file", file, "--convert", tmp_path / "convert.yaml", *keys, "--cache", "none",
        "--output", output,
    )  # fmt: skip
    given = {"dataset": root, "embodiment": "robot", "convert": tmp_path / "convert.yaml"}
    given |= {"state_key": "observation.qpos", "action_key": "action.qpos"}
    processor, samples, batch = training_batch(tmp_path, embodiment_file=output, **given)
    check_batch(processor, samples, batch)
    raw = LeRobotDataset(
        root, embodiment="r", action_horizon=1, state_key="observation.qpos", action_key="action.qpos", cameras=[]
    )
    joint = raw[samples[0]["dataset_index"]]["state"]
    position, _ = UrdfArm(tmp_path / "arm.urdf", "flange").poses(np.deg2rad(joint[None, :6]))
    np.testing.assert_allclose(samples[0]["state"][:3], position[0], atol=1e-5)
    with pytest.raises(ValueError, match="state_key 'nothing' is not a feature"):
        training_batch(tmp_path, embodiment_file=output, **(given | {"state_key": "nothing"}))


def test_a_robot_at_another_frequency(tmp_path, capsys):
    """Files that LeRobot wrote at 80 frames per second, for a robot that takes 20 steps: an error, or every fourth."""
    root = FIXTURES / "lerobot_real_v3_images"
    layout = [["left_ee_position", 3], ["left_gripper", 1]]
    file = robot_file(tmp_path, state_layout=layout, action_layout=layout)
    # The fixture lacks the files of all episodes but the first.
    given = {"dataset": root, "embodiment": "robot", "embodiment_file": file, "on_error": "skip"}
    stats = ["stats", root, "--embodiment-file", file, "--cache", "none"]
    with pytest.raises(SystemExit, match="2"):
        run(*stats)
    assert "file-001.parquet is missing" in capsys.readouterr().err
    stats += ["--on-error", "skip"]
    with pytest.raises(ValueError, match="has 80 frames per second; robot robot takes 20 steps per second"):
        training_batch(tmp_path, **given)
    with pytest.raises(SystemExit, match="2"):
        run(*stats)
    assert "has 80 frames per second; robot robot takes 20" in capsys.readouterr().err
    run(*stats, "--resample", "--output", tmp_path / "s.json")
    processor, samples, batch = training_batch(tmp_path, **given, resample=True)
    every = LeRobotDataset(root, embodiment="robot", action_horizon=4 * HORIZON, cameras=[], episodes=[0])
    for sample in samples:
        np.testing.assert_array_equal(sample["actions"], every[sample["dataset_index"]]["actions"][::4])
    check_batch(processor, samples, batch)
    saved = json.loads((tmp_path / "s.json").read_text())["statistics"]
    assert saved == processor.embodiments["robot"].statistics


def test_a_robot_without_a_file_has_the_vectors_that_are_read(tmp_path):
    """Of the keys that are asked for, not of the usual ones; and an episode that is damaged is left out there too."""
    rng = np.random.default_rng(0)
    keys = {"observation.pose": 5, "observation.state": 3, "action": 3}
    features = {name: {"dtype": "float32", "shape": (width,)} for name, width in keys.items()}
    with LeRobotWriter(tmp_path / "data", fps=FPS, features=features) as writer:
        for _ in range(2):
            for _ in range(12):
                writer.add_frame({name: rng.normal(size=width) for name, width in keys.items()})
            writer.save_episode("push the puck")
    given = {"dataset": tmp_path / "data", "embodiment": "robot"}
    processor, samples, batch = training_batch(tmp_path, **given, state_key="observation.pose", action_key="none")
    robot = processor.embodiments["robot"]
    assert robot.state_layout == robot.action_layout == (("native", 5),)
    check_batch(processor, samples, batch)
    fixture = {"dataset": FIXTURES / "lerobot_real_v3_images", "embodiment": "robot"}  # lacks files of all but one
    with pytest.raises(FileNotFoundError, match="file-001.parquet is missing"):
        training_batch(tmp_path, **fixture)
    processor, samples, batch = training_batch(tmp_path, **fixture, on_error="skip")
    check_batch(processor, samples, batch)


def test_one_robot_in_several_datasets_of_a_mixture(tmp_path):
    """A robot without statistics gets those over all of its datasets."""
    rng = np.random.default_rng(0)
    for name, scale in (("near", 0.1), ("far", 1.0)):
        write(tmp_path / name, scale * np.cumsum(rng.normal(size=(2, 20, 4)), axis=1))
    layout = [["left_ee_position", 3], ["left_gripper", 1]]
    robot_file(tmp_path, state_layout=layout, action_layout=layout)
    (tmp_path / "mixture.yaml").write_text(
        "robots: {robot: robot.json}\nactions:\n"
        "  - {dataset: near, embodiment: robot}\n  - {dataset: far, embodiment: robot}\n"
    )
    processor, samples, batch = training_batch(tmp_path, mixture=tmp_path / "mixture.yaml")
    datasets = [LeRobotDataset(tmp_path / n, embodiment="robot", action_horizon=HORIZON) for n in ("near", "far")]
    robot = processor.embodiments["robot"]
    assert robot.statistics == compute_statistics(datasets, robot, progress=False)
    check_batch(processor, samples, batch)
