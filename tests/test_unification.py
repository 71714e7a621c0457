"""Many robots, one action space: kinematics against MuJoCo, conventions against their definitions and inverses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallvla.action_space_wallvla import (
    EULER_ORDERS,
    JOINT_FRAMES,
    REFERENCE_FRAMES,
    ROTATION_FORMATS,
    Embodiment,
    axes_matrix,
    axis_angle_to_matrix,
    compose,
    from_joint_frame,
    from_reference_frame,
    interpolate_rotation,
    inverse,
    matrix_to_rotation,
    quaternion_to_matrix,
    rotation_to_matrix,
    to_joint_frame,
    to_reference_frame,
)
from wallvla.data.chunks import anchor_times, strided_times
from wallvla.data.lerobot import LeRobotDataset
from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.data.unification import (
    Arm,
    JointsToPoses,
    RelativeToAbsolute,
    UrdfArm,
    chain_conversions,
    read_conversion,
)


settings.register_profile("wallvla", max_examples=40, deadline=None)
settings.load_profile("wallvla")

seeds = st.integers(0, 2**32 - 1)
FORMATS = sorted(ROTATION_FORMATS)


def poses(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, 3)), quaternion_to_matrix(rng.normal(size=(*shape, 4)))


def assert_poses_equal(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(found[0], expected[0], atol=tolerance)
    np.testing.assert_allclose(found[1], expected[1], atol=tolerance)


# ---- rotations and SE(3): the properties that the design lists ---------------------------------------------------


@given(st.sampled_from(FORMATS), seeds)
def test_every_rotation_format_round_trips_to_1e_6(name, seed):
    matrix = quaternion_to_matrix(np.random.default_rng(seed).normal(size=(5, 4)))
    np.testing.assert_allclose(rotation_to_matrix(matrix_to_rotation(matrix, name), name), matrix, atol=1e-6)


def test_all_euler_orders_are_there():
    assert len(EULER_ORDERS) == 12
    assert {f"euler_{order}" for order in EULER_ORDERS} | {f"euler_{order.upper()}" for order in EULER_ORDERS} <= set(
        FORMATS
    )


@given(seeds)
def test_composition_laws(seed):
    a, b, c = poses(seed), poses(seed + 1), poses(seed + 2)
    identity = (np.zeros(3), np.eye(3))
    assert_poses_equal(compose(compose(a, b), c), compose(a, compose(b, c)), 1e-9)
    assert_poses_equal(compose(a, inverse(a)), identity, 1e-9)
    assert_poses_equal(compose(identity, a), a, 1e-12)
    assert_poses_equal(inverse(compose(a, b)), compose(inverse(b), inverse(a)), 1e-9)


@given(st.sampled_from(REFERENCE_FRAMES), seeds)
def test_modes_round_trip_and_deltas_add_up_to_the_relative_pose(frame, seed):
    chunk, state = poses(seed, 4, 6), poses(seed + 1, 4)
    seen = to_reference_frame(chunk, state, frame)
    assert_poses_equal(from_reference_frame(seen, state, frame), chunk)
    if frame == "eef_delta":
        total = tuple(half[:, 0] for half in seen)
        for step in range(1, 6):
            total = compose(total, tuple(half[:, step] for half in seen))
        relative = to_reference_frame(chunk, state, "eef_relative")
        assert_poses_equal(total, tuple(half[:, -1] for half in relative))


ARM = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
BOTH = ARM + [[part.replace("left", "right"), width] for part, width in ARM]


def robot(layout=BOTH, **changes) -> Embodiment:
    values = {"cameras": [["front", "front view"]], "control_frequency": 10, "action_horizon": 5}
    return Embodiment.from_dict(values | {"state_layout": layout, "action_layout": layout} | changes)


def mirrored(vectors: np.ndarray) -> np.ndarray:
    """Two-arm vectors (..., 14) of the robot's mirror image: left and right exchanged, reflected at the xz plane."""
    left, right = vectors[..., :7], vectors[..., 7:]
    swapped = np.concatenate([right, left], axis=-1)
    # Under the reflection y changes sign; a rotation vector is a pseudovector, of which x and z change sign.
    return swapped * np.tile([1, -1, 1, -1, 1, -1, 1], 2)


@given(st.sampled_from(REFERENCE_FRAMES), seeds)
def test_left_and_right_are_symmetric(frame, seed):
    """The transform of the mirrored robot is the mirror image of the transform."""
    rng = np.random.default_rng(seed)
    chunk, state = rng.normal(size=(5, 14)), rng.normal(size=14)
    embodiment = robot(reference_frame=frame)
    found = embodiment.transform_actions(mirrored(chunk), mirrored(state))
    expected = embodiment.transform_actions(chunk, state)
    expected = np.concatenate([expected[:, 10:], expected[:, :10]], axis=1)
    # In rows of a rotation matrix: entries with exactly one index y change sign.
    signs = np.tile([1, -1, 1, 1, -1, 1, -1, 1, -1, 1], 2)
    np.testing.assert_allclose(found, expected * signs, atol=1e-9)


# ---- axes --------------------------------------------------------------------------------------------------------

AXES = [
    axes
    for axes in (
        (a + x, b + y, c + z) for x in "xyz" for y in "xyz" for z in "xyz"
        for a in ("", "-") for b in ("", "-") for c in ("", "-") if len({x, y, z}) == 3
    )
    if np.linalg.det([[(-1.0) ** n.startswith("-") * (n[-1] == k) for k in "xyz"] for n in axes]) > 0
]  # fmt: skip


def test_there_are_24_right_handed_axes_and_mirrors_are_refused():
    assert len(AXES) == 24
    np.testing.assert_array_equal(axes_matrix(("y", "-x", "z")) @ [0, 1, 0], [1, 0, 0])  # its y becomes forward
    for wrong in (("y", "x", "z"), ("x", "x", "z"), ("x", "y"), ("x", "y", "w"), "xyzz"):
        with pytest.raises(ValueError, match="right-handed"):
            axes_matrix(wrong)


@given(st.sampled_from(AXES), st.sampled_from(AXES), st.sampled_from(REFERENCE_FRAMES), seeds)
def test_axis_conventions_are_undone(world, tool, frame, seed):
    rng = np.random.default_rng(seed)
    embodiment = robot(world_axes=world, tool_axes=tool, reference_frame=frame, rotation_format="axis_angle")
    chunk, state = rng.uniform(-1, 1, size=(5, 14)), rng.uniform(-1, 1, size=14)
    seen = embodiment.transform_actions(chunk, state)
    np.testing.assert_allclose(embodiment.inverse_transform_actions(seen, state), chunk, atol=1e-6)
    assert Embodiment.from_dict(json.loads(json.dumps(embodiment.to_dict()))) == embodiment


def test_two_robots_that_differ_in_axes_look_the_same_to_the_model():
    """The same motion, written by a robot with y forward and a tool that points along z."""
    world, tool = axes_matrix(("y", "-x", "z")), axes_matrix(("z", "y", "-x"))
    position, rotation = np.array([0.4, 0.1, 0.2]), axis_angle_to_matrix([0.3, -0.2, 0.5])
    other = np.concatenate([world.T @ position, matrix_to_rotation(world.T @ rotation @ tool, "axis_angle"), [1.0]])
    own = np.concatenate([position, [0.3, -0.2, 0.5], [1.0]])
    first = robot(ARM).transform_state(own)
    second = robot(ARM, world_axes=("y", "-x", "z"), tool_axes=("z", "y", "-x")).transform_state(other)
    np.testing.assert_allclose(first, second, atol=1e-12)
    forward_facing = robot(ARM, tool_axes=("z", "y", "-x")).transform_state(
        np.concatenate([[0, 0, 0], matrix_to_rotation(tool, "axis_angle"), [0]])
    )
    np.testing.assert_allclose(forward_facing[3:9], [1, 0, 0, 0, 1, 0], atol=1e-12)


# ---- joints ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(JOINT_FRAMES), seeds)
def test_joint_frames(frame, seed):
    rng = np.random.default_rng(seed)
    chunk, state = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 6))
    seen = to_joint_frame(chunk, state, [0, 2, 3], frame)
    np.testing.assert_array_equal(seen[..., 1], chunk[..., 1])
    np.testing.assert_allclose(seen[:, 0, 2], chunk[:, 0, 2] - state[:, 2])
    before = state[:, None, [3]] if frame == "joint_relative" else chunk[:, 1:2, [3]]
    np.testing.assert_allclose(seen[:, 2, [3]], (chunk[:, 2:3, [3]] - before)[:, 0])
    np.testing.assert_allclose(from_joint_frame(seen, state, [0, 2, 3], frame), chunk, atol=1e-9)
    layouts = {"state_layout": [["native", 6]], "action_layout": [["native", 4]]}
    embodiment = robot([], **layouts, reference_frame=frame, joint_channels=[0, 2, 3])
    np.testing.assert_array_equal(embodiment.transform_actions(chunk, state), seen)
    np.testing.assert_allclose(embodiment.inverse_transform_actions(seen, state), chunk, atol=1e-9)
    with pytest.raises(ValueError, match="Found no state"):
        embodiment.transform_actions(chunk, None)


@pytest.mark.parametrize("channels", [[], [0, 6], [0, 0], [-1]])
def test_joint_channels_are_checked(channels):
    layouts = {"state_layout": [["native", 8]], "action_layout": [["native", 6]]}
    with pytest.raises(ValueError, match="needs native state and action vectors, .*0 to 5"):
        robot([], **layouts, reference_frame="joint_relative", joint_channels=channels)


# ---- forward kinematics --------------------------------------------------------------------------------------------

LINKS = 7


def urdf_text(seed: int = 0) -> str:
    """A serial arm with arbitrary offsets, revolute and prismatic joints, and a fixed flange."""
    rng = np.random.default_rng(seed)
    parts = ['<robot name="test">', '<link name="link0"/>']
    for number in range(1, LINKS):
        kind = "prismatic" if number == 4 else "revolute"
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        parts.append(
            f'<link name="link{number}"><inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" '
            f'iyz="0"/></inertial></link><joint name="joint{number}" type="{kind}"><parent link="link{number - 1}"/>'
            f'<child link="link{number}"/><origin xyz="{" ".join(map(str, rng.normal(size=3) * 0.3))}" '
            f'rpy="{" ".join(map(str, rng.uniform(-1, 1, 3)))}"/><axis xyz="{" ".join(map(str, axis))}"/>'
            '<limit lower="-3" upper="3" effort="1" velocity="1"/></joint>'
        )
    parts.append(
        '<link name="flange"/><joint name="mount" type="fixed"><parent link="link6"/><child link="flange"/>'
        '<origin xyz="0.1 0 0.2" rpy="0.3 0 1"/></joint></robot>'
    )
    return "".join(parts)


@pytest.fixture
def urdf(tmp_path):
    pytest.importorskip("pytorch_kinematics")
    path = tmp_path / "arm.urdf"
    path.write_text(urdf_text())
    return path


def test_forward_kinematics_agrees_with_mujoco(urdf):
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        urdf_text().replace('name="test">', 'name="test"><mujoco><compiler fusestatic="false"/></mujoco>')
    )
    data = mujoco.MjData(model)
    joints = np.random.default_rng(1).uniform(-2, 2, size=(20, LINKS - 1))
    positions, rotations = UrdfArm(urdf, "flange").poses(joints)
    for row in range(20):
        data.qpos[:] = joints[row]
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(positions[row], data.body("flange").xpos, atol=1e-6)
        np.testing.assert_allclose(rotations[row], data.body("flange").xmat.reshape(3, 3), atol=1e-6)


def test_joint_sources_become_poses(urdf, tmp_path):
    rng = np.random.default_rng(2)
    states, targets = rng.uniform(-1, 1, size=(2, 9, 8))
    columns = [1, 2, 3, 4, 5, 6]
    convert = JointsToPoses(urdf, [Arm("flange", columns, gripper=0)])
    found_states, found_actions = convert(states, targets)
    position, rotation = UrdfArm(urdf, "flange").poses(targets[:, columns])
    np.testing.assert_allclose(found_actions[:, :3], position)
    np.testing.assert_allclose(axis_angle_to_matrix(found_actions[:, 3:6]), rotation, atol=1e-6)
    np.testing.assert_array_equal(found_actions[:, 6], targets[:, 0])
    deltas = targets.copy()
    deltas[:, columns] -= states[:, columns]
    by_deltas = JointsToPoses(urdf, [Arm("flange", columns, gripper=0)], joint_deltas=True)
    np.testing.assert_allclose(by_deltas(states, deltas)[1], found_actions, atol=1e-6)
    in_degrees = states.copy()
    in_degrees[:, columns] = np.rad2deg(states[:, columns])
    degrees = JointsToPoses(urdf, [Arm("flange", columns, 0, degrees=True)])
    np.testing.assert_allclose(degrees(in_degrees, targets)[0], found_states, atol=1e-6)
    file = tmp_path / "convert.yaml"
    file.write_text(
        "joints_to_poses: {urdf: arm.urdf, arms: [{link: flange, joints: [1, 2, 3, 4, 5, 6], gripper: 0}]}"
    )
    np.testing.assert_array_equal(read_conversion(file)(states, targets)[1], found_actions)


def test_kinematics_errors(urdf, tmp_path):
    with pytest.raises(ValueError, match="has no link 'hand'; it has link0, link1"):
        UrdfArm(urdf, "hand")
    with pytest.raises(ValueError, match="the chain has 6: joint1"):
        UrdfArm(urdf, "flange").poses(np.zeros((3, 5)))
    (tmp_path / "broken.urdf").write_text("<robot")
    with pytest.raises(ValueError, match="broken.urdf is no URDF"):
        UrdfArm(tmp_path / "broken.urdf", "flange")
    with pytest.raises(FileNotFoundError):
        UrdfArm(tmp_path / "none.urdf", "flange")
    with pytest.raises(ValueError, match="uses column 9; the state has 8 numbers"):
        JointsToPoses(urdf, [Arm("flange", [4, 5, 6, 7, 8, 9])])(np.zeros((2, 8)), np.zeros((2, 8)))
    for text, message in (
        ("joints_to_poses: {urdf: arm.urdf}", "lacks arms"),
        ("joints: {}", "it is a mapping of joints_to_poses"),
        ("relative_to_absolute: {position: [0, 1, 2], mode: 3}", "it is a mapping of action_position"),
        ("[", "is not valid YAML"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conversion(tmp_path / "c.yaml")


@given(st.sampled_from(["world", "eef"]), st.sampled_from(["axis_angle", "quaternion_wxyz", "euler_xyz"]), seeds)
def test_relative_commands_become_targets(frame, rotation_format, seed):
    width = ROTATION_FORMATS[rotation_format][0]
    now, target = poses(seed, 6), poses(seed + 1, 6)
    if frame == "eef":
        move = compose(inverse(now), target)
    else:
        move = target[0] - now[0], target[1] @ np.swapaxes(now[1], -1, -2)

    def vector(pose, scale=1.0):
        return np.concatenate([pose[0] / scale, matrix_to_rotation(pose[1], rotation_format), np.ones((6, 1))], axis=1)

    columns = {"position": [0, 1, 2], "rotation": list(range(3, 3 + width))}
    convert = RelativeToAbsolute(**columns, rotation_format=rotation_format, frame=frame, scale=0.05)
    states, actions = convert(vector(now), vector(move, 0.05))
    np.testing.assert_array_equal(states, vector(now))
    found = actions[:, :3], rotation_to_matrix(actions[:, 3 : 3 + width], rotation_format)
    assert_poses_equal(found, target)
    np.testing.assert_array_equal(actions[:, -1], 1)
    twice = chain_conversions(convert, lambda s, a: (s, a + 1))
    np.testing.assert_allclose(twice(vector(now), vector(move, 0.05))[1], actions + 1)


# ---- through the reader --------------------------------------------------------------------------------------------


def written(root, states, actions, fps=10):
    features = {"observation.state": {"dtype": "float32", "shape": (states.shape[1],)}}
    if actions is not None:
        features["action"] = {"dtype": "float32", "shape": (actions.shape[1],)}
    with LeRobotWriter(root, fps=fps, features=features) as writer:
        for first, last in ((0, 12), (12, 20)):
            for step in range(first, last):
                frame = {"observation.state": states[step]}
                writer.add_frame(frame | ({} if actions is None else {"action": actions[step]}))
            writer.save_episode("wave")
    return root


def test_pseudo_actions_are_the_next_states(tmp_path):
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    root = written(tmp_path / "d", states, None)
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=3, action_key=None)
    assert dataset.episode_bounds.tolist() == [[0, 11], [11, 18]]  # the last frames have no next one
    np.testing.assert_array_equal(dataset.states, np.delete(states, [11, 19], axis=0))
    np.testing.assert_array_equal(dataset.actions, np.delete(states, [0, 12], axis=0))
    with pytest.raises(ValueError, match="action_key 'action' is not a feature"):
        LeRobotDataset(root, embodiment="r", action_horizon=3)


def test_conversion_is_applied_per_episode(tmp_path):
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    root = written(tmp_path / "d", states, states)
    lengths = []

    def convert(episode_states, episode_actions):
        lengths.append(len(episode_states))
        return episode_states[:, :1], np.cumsum(episode_actions, axis=0)

    dataset = LeRobotDataset(root, embodiment="r", action_horizon=3, convert=convert)
    assert lengths == [12, 8] and dataset.states.shape == (20, 1)
    np.testing.assert_allclose(dataset.actions[12:], np.cumsum(states[12:], axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="convert returned states of shape .11, 3. for the 12 frames of episode 0"):
        LeRobotDataset(root, embodiment="r", action_horizon=3, convert=lambda s, a: (s[1:], a))


# ---- chunk modes ---------------------------------------------------------------------------------------------------


def test_anchors_summarise_the_horizon(tmp_path):
    """X-VLA: N points over a horizon, interpolated, clamped at the end."""
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    root = written(tmp_path / "d", states, states)
    times = anchor_times(6, 0.9)
    np.testing.assert_allclose(times, [0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=6, action_times_s=times)
    for index in (0, 3, 9, 11, 12, 19):
        start, stop = (0, 12) if index < 12 else (12, 20)
        at = np.minimum(index + times * 10, stop - 1)
        expected = np.stack([np.interp(at, np.arange(start, stop), states[start:stop, k]) for k in range(3)], axis=1)
        sample = dataset[index]
        np.testing.assert_allclose(sample["actions"], expected, atol=1e-6)
        np.testing.assert_array_equal(sample["action_is_pad"], index + times * 10 > stop - 1 + 1e-9)


def test_strided_chunks_take_every_nth_frame(tmp_path):
    states = np.arange(60, dtype=np.float32).reshape(20, 3)
    root = written(tmp_path / "d", states, states)
    dataset = LeRobotDataset(root, embodiment="r", action_horizon=4, action_times_s=strided_times(4, 3, 10))
    sample = dataset[1]
    np.testing.assert_array_equal(sample["actions"], states[[1, 4, 7, 10]])
    assert dataset[5]["action_is_pad"].tolist() == [False, False, False, True]


def test_rotations_are_interpolated_on_the_sphere():
    layout = [["left_ee_position", 3], ["left_ee_rotation", 4], ["left_gripper", 1]]
    embodiment = robot(layout, rotation_format="quaternion_xyzw")
    first, last = axis_angle_to_matrix([0, 0, 3.0]), axis_angle_to_matrix([0, 0, -3.0])
    half = interpolate_rotation(first, last, np.float64(0.5))
    np.testing.assert_allclose(half, axis_angle_to_matrix([0, 0, np.pi]), atol=1e-9)  # the short way, through pi
    lower, upper = (
        np.concatenate([[x, 0, 0], matrix_to_rotation(matrix, "quaternion_xyzw"), [x]])
        for x, matrix in ((0.0, first), (1.0, last))
    )
    between = embodiment.interpolate_actions(lower, upper, 0.25)
    np.testing.assert_allclose(between[[0, 7]], 0.25)
    expected = axis_angle_to_matrix([0, 0, 3.0 + (2 * np.pi - 6) / 4])
    np.testing.assert_allclose(rotation_to_matrix(between[3:7], "quaternion_xyzw"), expected, atol=1e-9)


@pytest.mark.parametrize("times", [[0.0, 0.1], [0.2, 0.1, 0.3], [-0.1, 0.0, 0.1], [0.0, np.nan, 1.0]])
def test_chunk_time_errors(tmp_path, times):
    states = np.zeros((20, 3), dtype=np.float32)
    root = written(tmp_path / "d", states, states)
    with pytest.raises(ValueError, match=r"it must be 3 \(action_horizon\) ascending times"):
        LeRobotDataset(root, embodiment="r", action_horizon=3, action_times_s=times)
    with pytest.raises(ValueError, match="at least one"):
        anchor_times(0, 1.0)
    with pytest.raises(ValueError, match="at least 1"):
        strided_times(3, 0, 10)
