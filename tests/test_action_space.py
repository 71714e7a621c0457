"""Every transform of the action space against its inverse, a definition written out by hand, or both."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wallvla.action_space_wallvla import (
    CANONICAL_DIM,
    CANONICAL_LAYOUT,
    MIN_RANGE,
    REFERENCE_FRAMES,
    ROTATION_FORMATS,
    Embodiment,
    axis_angle_to_matrix,
    compose,
    euler_to_matrix,
    from_reference_frame,
    inverse,
    matrix_to_axis_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rot6d,
    matrix_to_rotation,
    normalize,
    quaternion_to_matrix,
    rot6d_to_matrix,
    rotation_to_matrix,
    to_reference_frame,
    unnormalize,
)


settings.register_profile("wallvla", max_examples=25, deadline=None)
settings.load_profile("wallvla")

FORMATS = sorted(ROTATION_FORMATS)
NOT_EULER = [name for name in FORMATS if not name.startswith("euler")]
# Every order once, and of the redundant spellings a few: what the whole chain needs to be tried with.
CHAIN_FORMATS = NOT_EULER + ["euler_xyz", "euler_XYZ", "euler_ZYX", "euler_zxz"]

angles = st.floats(-np.pi, np.pi)
rotation_vectors = arrays(np.float64, (3,), elements=angles)
seeds = st.integers(0, 2**32 - 1)


def random_rotations(seed, *shape):
    """Rotations (*shape, 3, 3), uniform on SO(3)."""
    return quaternion_to_matrix(np.random.default_rng(seed).normal(size=(*shape, 4)))


def embodiment(**changes):
    values = {
        "cameras": {"observation.images.front": "front view"},
        "control_frequency": 10,
        "action_horizon": 8,
        "state_layout": [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]],
        "action_layout": [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]],
    }
    return Embodiment.from_dict(values | changes)


def two_arms(rotation_format="quaternion_xyzw", reference_frame="absolute"):
    """A robot whose vectors are ordered unlike the canonical layout."""
    width = ROTATION_FORMATS[rotation_format][0]
    layout = [
        ["head", 2],
        ["right_gripper", 1],
        ["right_ee_rotation", width],
        ["right_ee_position", 3],
        ["left_ee_position", 3],
        ["left_ee_rotation", width],
        ["lift", 1],
        ["left_gripper", 1],
        ["base_velocity", 3],
    ]
    return embodiment(
        state_layout=layout[:4] + [["unused", 2]] + layout[4:],
        action_layout=layout,
        rotation_format=rotation_format,
        reference_frame=reference_frame,
        state_gripper_range=[0.0, 0.08],
        action_gripper_range=[1.0, -1.0],
    )


def random_vectors(robot, layout, seed, *shape):
    """Vectors (*shape, width) of a layout with rotations as the robot itself would write them."""
    rng = np.random.default_rng(seed)
    columns = []
    for part, width in layout:
        if part.endswith("rotation"):
            rotation = axis_angle_to_matrix(rng.uniform(-1.7, 1.7, size=(*shape, 3)))
            columns.append(matrix_to_rotation(rotation, robot.rotation_format))
        else:
            columns.append(rng.normal(size=(*shape, width)))
    return np.concatenate(columns, axis=-1)


def with_statistics(robot, seed, steps=8):
    """The robot with quantiles that hold everything `random_vectors` makes of this seed."""
    state = random_vectors(robot, robot.state_layout, seed)
    actions = random_vectors(robot, robot.action_layout, seed + 1, steps)
    values = {"state": robot.transform_state(state)[None], "action": robot.transform_actions(actions, state)}
    statistics = {
        kind: {"q01": rows.min(axis=0) - 0.1, "q99": rows.max(axis=0) + 0.1} for kind, rows in values.items()
    }
    return Embodiment.from_dict(robot.to_dict() | {"statistics": statistics}), state, actions


# Rotations


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds)
def test_rotation_formats_are_invertible(name, seed):
    rotation = random_rotations(seed, 2, 3)
    values = matrix_to_rotation(rotation, name)
    assert values.shape == (2, 3, ROTATION_FORMATS[name][0])
    np.testing.assert_allclose(rotation_to_matrix(values, name), rotation, atol=1e-9)


@given(rotation_vectors)
def test_axis_angle_is_rodrigues_formula(vector):
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle if angle > 0 else vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    expected = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    np.testing.assert_allclose(axis_angle_to_matrix(vector), expected, atol=1e-12)


@given(rotation_vectors)
def test_axis_angle_keeps_its_values_below_pi(vector):
    angle = np.linalg.norm(vector)
    if angle < np.pi - 1e-3:
        np.testing.assert_allclose(matrix_to_axis_angle(axis_angle_to_matrix(vector)), vector, atol=1e-8)


@given(st.floats(1e-12, 1e-5))
def test_axis_angle_of_tiny_rotations(angle):
    vector = np.array([0.0, angle, 0.0])
    np.testing.assert_allclose(matrix_to_axis_angle(axis_angle_to_matrix(vector)), vector, rtol=1e-6)


def test_axis_angle_of_half_turns():
    vectors = np.pi * np.concatenate([np.eye(3), [[0.6, 0.8, 0.0], [0.6, 0.0, -0.8]]])
    found = matrix_to_axis_angle(axis_angle_to_matrix(vectors))
    # The axis of a half turn has no sign.
    np.testing.assert_allclose(np.abs(np.sum(found * vectors, axis=-1)), np.pi**2, rtol=1e-9)


def test_euler_extrinsic_and_intrinsic_definitions():
    roll, pitch, yaw = 0.3, -0.7, 1.9

    def about(axis, angle):
        return axis_angle_to_matrix(angle * np.eye(3)["xyz".index(axis)])

    x, y, z = about("x", roll), about("y", pitch), about("z", yaw)
    np.testing.assert_allclose(euler_to_matrix([roll, pitch, yaw], "xyz"), z @ y @ x, atol=1e-12)
    np.testing.assert_allclose(euler_to_matrix([roll, pitch, yaw], "XYZ"), x @ y @ z, atol=1e-12)
    np.testing.assert_allclose(euler_to_matrix([yaw, pitch, roll], "ZYX"), z @ y @ x, atol=1e-12)
    again = about("z", 0.4)
    np.testing.assert_allclose(euler_to_matrix([yaw, roll, 0.4], "ZXZ"), z @ x @ again, atol=1e-12)
    np.testing.assert_allclose(euler_to_matrix([yaw, roll, 0.4], "zxz"), again @ x @ z, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("euler")])
def test_euler_in_gimbal_lock(name):
    order = name.removeprefix("euler_")
    locks = [0.0, np.pi] if order[0].lower() == order[2].lower() else [-np.pi / 2, np.pi / 2]
    for middle in locks:
        rotation = euler_to_matrix(np.array([[0.4, middle, -1.1], [3.0, middle, 0.2]]), order)
        np.testing.assert_allclose(euler_to_matrix(matrix_to_euler(rotation, order), order), rotation, atol=1e-7)


@given(angles, st.floats(-1.5, 1.5), angles)
def test_euler_keeps_its_values_in_range(roll, pitch, yaw):
    found = matrix_to_euler(euler_to_matrix([roll, pitch, yaw], "xyz"), "xyz")
    difference = (found - [roll, pitch, yaw] + np.pi) % (2 * np.pi) - np.pi  # pi and -pi are the same angle
    np.testing.assert_allclose(difference, 0, atol=1e-7)


def test_quaternion_orders_and_definition():
    half = np.sqrt(0.5)
    quarter_turn_about_z = [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(
        rotation_to_matrix([0, 0, half, half], "quaternion_xyzw"), quarter_turn_about_z, atol=1e-12
    )
    np.testing.assert_allclose(
        rotation_to_matrix([half, 0, 0, half], "quaternion_wxyz"), quarter_turn_about_z, atol=1e-12
    )


@given(seeds)
def test_quaternion_is_unit_with_positive_scalar(seed):
    quaternion = matrix_to_quaternion(random_rotations(seed, 5))
    np.testing.assert_allclose(np.linalg.norm(quaternion, axis=-1), 1, atol=1e-12)
    assert (quaternion[:, 3] >= 0).all()
    # Neither the sign nor the length of a quaternion matters.
    np.testing.assert_allclose(quaternion_to_matrix(-3 * quaternion), quaternion_to_matrix(quaternion), atol=1e-12)


def test_zero_quaternion_is_an_error():
    with pytest.raises(ValueError, match="quaternion of length 0"):
        quaternion_to_matrix([[0, 0, 0, 1], [0, 0, 0, 0]])


def test_rot6d_layouts():
    rotation = np.arange(9.0).reshape(3, 3)
    assert matrix_to_rot6d(rotation, "rows").tolist() == [0, 1, 2, 3, 4, 5]
    assert matrix_to_rot6d(rotation, "columns").tolist() == [0, 3, 6, 1, 4, 7]
    assert matrix_to_rot6d(rotation, "interleaved").tolist() == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize("layout", ["rows", "columns", "interleaved"])
@given(values=arrays(np.float64, (6,), elements=st.floats(-10, 10)))
def test_rot6d_is_always_projected_to_a_rotation(layout, values):
    rotation = rot6d_to_matrix(values, layout)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-6)


def test_rot6d_of_degenerate_vectors():
    degenerate = [[0] * 6, [1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, -1, 0, 0, 1], [1, 1, 1, 0, 0, 0]]
    rotation = rot6d_to_matrix(degenerate)
    np.testing.assert_allclose(
        rotation @ np.swapaxes(rotation, -1, -2), np.broadcast_to(np.eye(3), (5, 3, 3)), atol=1e-9
    )
    np.testing.assert_allclose(rotation[1, 0], [1, 0, 0])


@given(seeds, st.floats(0.1, 10))
def test_rot6d_keeps_the_first_direction(seed, scale):
    """Gram-Schmidt, not some other projection: the first vector is normalised, the second bent."""
    rotation = random_rotations(seed)
    bent = np.concatenate([scale * rotation[0], rotation[1] + 0.3 * rotation[0]])
    np.testing.assert_allclose(rot6d_to_matrix(bent), rotation, atol=1e-9)


@pytest.mark.parametrize("name", ["euler_xxz", "euler_xyZ", "euler_xy", "rpy", ""])
def test_unknown_rotation_format(name):
    with pytest.raises(ValueError, match="rotation_format"):
        rotation_to_matrix([0, 0, 0], name)


@pytest.mark.parametrize("order", ["xxz", "xyZ", "xy", "abc"])
def test_unknown_euler_order(order):
    with pytest.raises(ValueError, match=f"euler order '{order}'"):
        euler_to_matrix([0, 0, 0], order)


# Poses and reference frames


@given(seeds)
def test_inverse_pose(seed):
    rng = np.random.default_rng(seed)
    pose = rng.normal(size=(4, 3)), random_rotations(seed, 4)
    for product in (compose(inverse(pose), pose), compose(pose, inverse(pose))):
        np.testing.assert_allclose(product[0], 0, atol=1e-9)
        np.testing.assert_allclose(product[1], np.broadcast_to(np.eye(3), (4, 3, 3)), atol=1e-9)


@given(seeds)
def test_compose_is_the_product_of_homogeneous_matrices(seed):
    def homogeneous(pose):
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = pose[1], pose[0]
        return matrix

    rng = np.random.default_rng(seed)
    first, second = ((rng.normal(size=3), random_rotations(seed + k)) for k in range(2))
    np.testing.assert_allclose(
        homogeneous(compose(first, second)), homogeneous(first) @ homogeneous(second), atol=1e-12
    )


@pytest.mark.parametrize("frame", REFERENCE_FRAMES)
@given(seed=seeds)
def test_reference_frames_are_invertible(frame, seed):
    rng = np.random.default_rng(seed)
    pose = rng.normal(size=(2, 5, 3)), random_rotations(seed, 2, 5)
    state_pose = rng.normal(size=(2, 3)), random_rotations(seed + 1, 2)
    seen = to_reference_frame(pose, state_pose, frame)
    back = from_reference_frame(seen, state_pose, frame)
    np.testing.assert_allclose(back[0], pose[0], atol=1e-9)
    np.testing.assert_allclose(back[1], pose[1], atol=1e-9)


@pytest.mark.parametrize("frame", REFERENCE_FRAMES)
def test_reference_frames_follow_their_formulas(frame):
    """The table of `to_reference_frame`, one step at a time."""
    rng = np.random.default_rng(0)
    p, R = rng.normal(size=(4, 3)), random_rotations(1, 4)  # index 0 is the current pose
    positions, rotations = to_reference_frame((p[1:], R[1:]), (p[0], R[0]), frame)
    for t in range(1, 4):
        r = 0 if frame.endswith("relative") else t - 1
        expected = {
            "absolute": (p[t], R[t]),
            "world": (p[t] - p[r], R[t] @ R[r].T),
            "eef": (R[r].T @ (p[t] - p[r]), R[r].T @ R[t]),
        }[frame.split("_")[0]]
        np.testing.assert_allclose(positions[t - 1], expected[0], atol=1e-12)
        np.testing.assert_allclose(rotations[t - 1], expected[1], atol=1e-12)


def test_eef_frames_do_not_depend_on_the_world_frame():
    """What makes them useful: moving robot base and targets together changes nothing."""
    rng = np.random.default_rng(3)
    pose, state_pose = (rng.normal(size=(5, 3)), random_rotations(4, 5)), (rng.normal(size=3), random_rotations(5))
    move = rng.normal(size=3), random_rotations(6)
    for frame in ("eef_relative", "eef_delta"):
        before = to_reference_frame(pose, state_pose, frame)
        after = to_reference_frame(compose(move, pose), compose(move, state_pose), frame)
        np.testing.assert_allclose(after[0], before[0], atol=1e-12)
        np.testing.assert_allclose(after[1], before[1], atol=1e-12)


# Normalisation


@given(seeds)
def test_normalize_is_invertible_between_the_quantiles(seed):
    rng = np.random.default_rng(seed)
    q01 = rng.normal(size=5)
    statistics = {"q01": q01, "q99": q01 + rng.uniform(0.01, 3, size=5)}
    values = rng.uniform(statistics["q01"], statistics["q99"], size=(7, 5))
    normalised = normalize(values, statistics)
    assert np.abs(normalised).max() <= 1
    np.testing.assert_allclose(unnormalize(normalised, statistics), values, atol=1e-12)


def test_normalize_maps_the_quantiles_to_the_ends_and_clips():
    statistics = {"q01": [0.0, -2.0], "q99": [10.0, 2.0]}
    assert normalize([[0, -2], [10, 2], [5, 0], [-1, 99]], statistics).tolist() == [[-1, -1], [1, 1], [0, 0], [-1, 1]]


def test_near_constant_channels_are_not_blown_up():
    statistics = {"q01": [0.5, 0.5], "q99": [0.5, 0.5 + MIN_RANGE / 2]}
    values = np.array([[0.5, 0.5], [0.5 + 1e-7, 0.5 + 1e-7]])
    normalised = normalize(values, statistics)
    assert np.isfinite(normalised).all() and np.ptp(normalised) < 1e-6
    np.testing.assert_allclose(unnormalize(normalised, statistics), values, atol=1e-12)


# Embodiments


@pytest.mark.parametrize("frame", REFERENCE_FRAMES)
@pytest.mark.parametrize("rotation_format", CHAIN_FORMATS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_decode_is_the_inverse_of_encode(rotation_format, frame, seed):
    robot, state, actions = with_statistics(two_arms(rotation_format, frame), seed)
    encoded = robot.encode_actions(actions, state)
    assert encoded.shape == (8, CANONICAL_DIM) and np.abs(encoded).max() <= 1
    np.testing.assert_allclose(robot.decode_actions(encoded, state), actions, atol=1e-6)


@pytest.mark.parametrize("frame", REFERENCE_FRAMES)
def test_leading_dimensions(frame):
    robot, state, actions = with_statistics(two_arms("rot6d_columns", frame), 0)
    encoded = robot.encode_actions(actions, state)
    stacked = robot.encode_actions(np.stack([actions, actions]), np.stack([state, state]))
    np.testing.assert_array_equal(stacked, np.stack([encoded, encoded]))
    decoded = robot.decode_actions(stacked, np.stack([state, state]))
    np.testing.assert_allclose(decoded, np.stack([actions, actions]), atol=1e-6)


def test_canonical_channels():
    """Every part lands where Wall-OSS-0.5 has it, whatever the robot's own order."""
    robot = two_arms("rot6d_rows")
    vector, start = {}, 0
    for part, width in robot.action_layout:
        vector[part] = np.arange(start, start + width) / 100.0
        start += width
    vector["left_ee_rotation"] = np.array([0, 1, 0, -1, 0, 0.0])
    vector["right_ee_rotation"] = np.array([1, 0, 0, 0, 1, 0.0])
    actions = robot.transform_actions(np.concatenate([vector[part] for part, _ in robot.action_layout])[None], None)[0]
    starts = np.cumsum([0] + [width for _, width in CANONICAL_LAYOUT])
    assert starts[-1] == CANONICAL_DIM == 26
    for (part, width), first in zip(CANONICAL_LAYOUT, starts[:-1], strict=True):
        expected = vector[part]
        if part.endswith("gripper"):
            expected = (expected - 1.0) / -2.0  # this robot closes at 1 and opens at -1
        np.testing.assert_allclose(actions[first : first + width], expected, err_msg=part)


def test_world_relative_is_the_convention_of_wall_oss():
    robot = embodiment(reference_frame="world_relative", action_horizon=1)
    state = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.0]
    action = [1.0, 2.0, 3.0, -0.3, 0.2, 0.1, 1.0]
    channels = robot.transform_actions([action], state)[0]
    relative = axis_angle_to_matrix(action[3:6]) @ axis_angle_to_matrix(state[3:6]).T
    np.testing.assert_allclose(channels, [0.9, 1.8, 2.7, *relative[0], *relative[1], 1.0], atol=1e-12)


def test_state_is_absolute_and_skips_unused_channels():
    robot = two_arms("quaternion_xyzw", "eef_relative")
    state = random_vectors(robot, robot.state_layout, 0)
    values = robot.transform_state(state)
    assert values.shape == (26,) and robot.state_width == len(state) == 24
    np.testing.assert_allclose(values[:3], state[12:15])  # head 2, gripper 1, rotation 4, position 3, unused 2
    assert values[9] == pytest.approx(state[20] / 0.08)


def test_single_arm_channels_and_mask():
    right = embodiment(action_layout=[["right_gripper", 1], ["right_ee_position", 3], ["lift", 1]])
    assert right.action_channels.tolist() == [10, 11, 12, 19, 23]
    mask = right.channel_mask(26)
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == [10, 11, 12, 19, 23]
    with pytest.raises(ValueError, match="reaches channel 23 of a model with 20"):
        right.channel_mask(20)
    left = embodiment()
    assert left.channel_mask(10).all()


def test_native_vectors_are_left_packed_and_untouched():
    robot = embodiment(
        state_layout=[["native", 3], ["unused", 1]],
        action_layout=[["native", 7]],
        statistics={"action": {"q01": [-1] * 7, "q99": [1] * 7}, "state": {"q01": [0] * 3, "q99": [1] * 3}},
    )
    assert robot.action_channels.tolist() == list(range(7))
    actions = np.random.default_rng(0).uniform(-1, 1, size=(8, 7))
    np.testing.assert_allclose(robot.encode_actions(actions, None), actions, atol=1e-12)
    np.testing.assert_allclose(robot.decode_actions(actions, None), actions, atol=1e-12)
    np.testing.assert_allclose(robot.encode_state([0.0, 0.5, 1.0, 9.0]), [-1, 0, 1])


def test_position_only_arm_in_a_world_frame():
    """Parts may come alone where the frame does not need the other half of the pose."""
    for frame in ("world_relative", "world_delta"):
        layout = [["left_ee_position", 3], ["left_gripper", 1]]
        robot = embodiment(state_layout=layout, action_layout=layout, reference_frame=frame)
        state, actions = np.arange(4.0), np.random.default_rng(0).normal(size=(8, 4))
        values = robot.transform_actions(actions, state)
        np.testing.assert_allclose(values[0, :3], actions[0, :3] - state[:3])
        np.testing.assert_allclose(robot.inverse_transform_actions(values, state), actions, atol=1e-12)


def test_a_robot_may_have_no_camera():
    robot = embodiment(cameras={})
    assert robot.cameras == {} and Embodiment.from_dict(json.loads(json.dumps(robot.to_dict()))) == robot
    assert [target for _, target in robot.observation_keys] == ["state", "instruction"]


def test_json_round_trip_keeps_the_camera_order():
    """transformers saves with sorted keys."""
    robot, _, _ = with_statistics(two_arms(), 0)
    cameras = {"observation.images.wrist": "wrist view", "observation.images.front": "front view"}
    robot = Embodiment.from_dict(robot.to_dict() | {"cameras": cameras})
    loaded = Embodiment.from_dict(json.loads(json.dumps(robot.to_dict(), sort_keys=True)))
    assert loaded == robot
    assert list(loaded.cameras.items()) == list(cameras.items())


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 3, "fps": 10}, r"unknown embodiment field\(s\) fps, horizon. Known: cameras"),
        ({"cameras": {"observation.images.a": "x", "b.a": "y"}}, "these parts must differ"),
        ({"cameras": ["front"]}, r"Found 'front' in cameras, which is a list of pairs: \[dataset key"),
        (
            {"state_layout": ["native", 4]},
            r"Found 'native' in state_layout, which is a list of pairs: \[part, width\]",
        ),
        ({"state_layout": [["native", "4"]]}, "in state_layout, which is a list of pairs"),
        ({"action_horizon": 0}, "action_horizon 0"),
        ({"action_horizon": 8.0}, "action_horizon 8.0"),
        ({"domain": -1}, "domain -1"),
        ({"control_frequency": 0}, "control_frequency 0"),
        ({"rotation_format": "euler"}, "rotation_format 'euler'. Known: quaternion_xyzw"),
        ({"reference_frame": "delta"}, "reference_frame 'delta'. Known: absolute, world_relative"),
        ({"action_gripper_range": [1, 1]}, r"action_gripper_range \[1.0, 1.0\]"),
        ({"action_layout": []}, "empty action_layout"),
        ({"action_layout": [["arm", 3]]}, "part 'arm' in action_layout. Known: left_ee_position"),
        ({"action_layout": [["unused", 3]]}, "part 'unused' in action_layout"),
        (
            {"action_layout": [["left_ee_rotation", 4]]},
            "width 4 for part 'left_ee_rotation' .* has 3 in rotation_format",
        ),
        ({"action_layout": [["lift", 2]]}, "width 2 for part 'lift'"),
        ({"action_layout": [["native", 0]]}, "width 0 for part 'native'"),
        ({"action_layout": [["native", 2], ["lift", 1]]}, "'native' stands alone"),
        ({"action_layout": [["lift", 1], ["lift", 1]]}, "Each part comes once"),
        ({"action_layout": [["native", 7]], "reference_frame": "eef_delta"}, "without an end-effector pose"),
        (
            {"state_layout": [["native", 7]], "reference_frame": "world_relative"},
            "state_layout without left_ee_position",
        ),
        ({"action_layout": [["left_ee_position", 3]], "reference_frame": "eef_delta"}, "without left_ee_rotation"),
        ({"statistics": {"actions": {}}}, "statistics of 'actions'. Known: state, action"),
        ({"statistics": {"action": {"q01": [0] * 10}}}, "q01 and q99 are needed.*wallvla stats"),
        ({"statistics": {"action": {"q01": [0] * 7, "q99": [1] * 7}}}, "q01 of 7 numbers for 10 channels"),
        ({"statistics": {"state": {"q01": [0] * 10, "q99": [np.nan] * 10}}}, "must be there and finite"),
        ({"statistics": {"state": {"q01": [1] * 10, "q99": [0] * 10}}}, "state statistics with q99 below q01"),
    ],
)
def test_contradicting_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        embodiment(**changes)


def test_missing_fields():
    with pytest.raises(ValueError, match="control_frequency, action_layout missing"):
        Embodiment.from_dict({"cameras": {"a": "b"}, "action_horizon": 1, "state_layout": []})


def test_wrong_width():
    robot = embodiment()
    with pytest.raises(ValueError, match=r"Found 8 state channels, the state_layout has 7 \(left_ee_position 3, left"):
        robot.transform_state(np.zeros(8))
    with pytest.raises(ValueError, match="Found 6 action channels, the action_layout has 7"):
        robot.transform_actions(np.zeros((8, 6)), None)
    with pytest.raises(ValueError, match="Found no state channels"):
        robot.transform_state(0.0)


def test_nan_is_named():
    robot = embodiment()
    actions = np.zeros((2, 8, 7))
    actions[1, 5, 4] = np.nan
    with pytest.raises(ValueError, match=r"nan in action channel 4 \(left_ee_rotation\[1\]\) at step 5"):
        robot.transform_actions(actions, None)
    with pytest.raises(ValueError, match=r"inf in state channel 6 \(left_gripper\[0\]\). Every"):
        robot.transform_state([0, 0, 0, 0, 0, 0, np.inf])


def test_missing_state_and_statistics():
    robot = embodiment(reference_frame="world_relative")
    with pytest.raises(ValueError, match="no state. Actions in reference_frame 'world_relative'"):
        robot.transform_actions(np.zeros((8, 7)), None)
    with pytest.raises(ValueError, match="no action statistics.*wallvla stats"):
        robot.encode_actions(np.zeros((8, 7)), np.zeros(7))
    with pytest.raises(ValueError, match="no state statistics.*wallvla stats"):
        robot.encode_state(np.zeros(7))
    with pytest.raises(ValueError, match="no action statistics"):
        robot.decode_actions(np.zeros((8, 10)), np.zeros(7))
