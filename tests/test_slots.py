"""Where and how the model sees a robot's numbers: slots, rot6d layouts, with and without normalisation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wallvla.action_space_wallvla import (
    REFERENCE_FRAMES,
    ROT6D_LAYOUTS,
    SLOTS,
    UNIFIED_DIM,
    UNIFIED_LAYOUT,
    Embodiment,
    axis_angle_to_matrix,
    matrix_to_rotation,
    rotation_to_matrix,
)


ROTATIONS = ["quaternion_xyzw", "euler_xyz", "rot6d_columns"]


def robot(layout, **changes):
    """A robot with the same vector as state and as action."""
    values = {"cameras": {"front": "front view"}, "control_frequency": 10, "action_horizon": 8}
    return Embodiment.from_dict(values | {"state_layout": layout, "action_layout": layout} | changes)


def two_arms(slots, width, **changes):
    layout = [["head", 2], ["right_gripper", 1], ["right_ee_rotation", width], ["right_ee_position", 3]]
    layout += [["left_ee_position", 3], ["left_ee_rotation", width], ["left_gripper", 1], ["base_velocity", 3]]
    if slots == "unified":
        layout = [["left_hand", 6], ["right_joints", 6], *layout, ["left_joints", 7], ["waist", 1]]
    return robot(layout, slots=slots, action_gripper_range=[1.0, -1.0], **changes)


def random_vectors(robot, seed, *shape):
    rng, columns = np.random.default_rng(seed), []
    for part, width in robot.action_layout:
        if part.endswith("rotation"):
            matrix = axis_angle_to_matrix(rng.uniform(-1.7, 1.7, size=(*shape, 3)))
            columns.append(matrix_to_rotation(matrix, robot.rotation_format))
        else:
            columns.append(rng.normal(size=(*shape, width)))
    return np.concatenate(columns, axis=-1)


# There and back


@pytest.mark.parametrize("frame", REFERENCE_FRAMES)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("normalization", ["quantiles", "none"])
@pytest.mark.parametrize(
    ("slots", "rot6d"), [*(("canonical", layout) for layout in ROT6D_LAYOUTS), ("unified", "rows")]
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_decode_is_the_inverse_of_encode(slots, rot6d, normalization, rotation, frame, seed):
    width = {"quaternion_xyzw": 4, "euler_xyz": 3, "rot6d_columns": 6}[rotation]
    fields = {"rotation_format": rotation, "reference_frame": frame, "model_rot6d": rot6d}
    plain = two_arms(slots, width, **fields)
    state, actions = random_vectors(plain, seed), random_vectors(plain, seed + 1, 8)
    values = plain.transform_actions(actions, state)
    statistics = {"action": {"q01": values.min(axis=0) - 0.1, "q99": values.max(axis=0) + 0.1}}
    fields |= {"normalization": normalization} | ({"statistics": statistics} if normalization == "quantiles" else {})
    own = two_arms(slots, width, **fields)
    encoded = own.encode_actions(actions, state)
    assert encoded.shape == (8, own.action_channels.size)
    assert normalization == "none" or np.abs(encoded).max() <= 1
    np.testing.assert_allclose(own.decode_actions(encoded, state), actions, atol=1e-8)


# What the model sees


@pytest.mark.parametrize("layout", ROT6D_LAYOUTS)
def test_rot6d_layouts_of_the_model(layout):
    """X-VLA: [R[:, 0], R[:, 1]] for LIBERO, R[:, :2].reshape(6) for its other robots."""
    parts = [["left_ee_position", 3], ["left_ee_rotation", 3], ["left_gripper", 1]]
    own = robot(parts, model_rot6d=layout, normalization="none")
    state = np.array([0.5, -0.2, 7.0, 0.3, -1.1, 0.8, 1.0])
    matrix = axis_angle_to_matrix(state[3:6])
    expected = {
        "rows": np.concatenate([matrix[0], matrix[1]]),
        "columns": np.concatenate([matrix[:, 0], matrix[:, 1]]),
        "interleaved": matrix[:, :2].reshape(6),
    }[layout]
    np.testing.assert_allclose(own.encode_state(state), [*state[:3], *expected, 1.0], atol=1e-12)
    np.testing.assert_allclose(own.encode_actions(state[None], None)[0], [*state[:3], *expected, 1.0], atol=1e-12)


def test_two_arms_of_x_vla_fill_its_twenty_channels():
    arm = [["ee_position", 3], ["ee_rotation", 4], ["gripper", 1]]
    layout = [[f"{side}_{part}", width] for side in ("left", "right") for part, width in arm]
    own = robot(layout, rotation_format="quaternion_xyzw", normalization="none", model_rot6d="interleaved")
    assert own.action_channels.tolist() == list(range(20))
    assert [own.channels_of(f"{side}_gripper").tolist() for side in ("left", "right")] == [[9], [19]]
    assert own.channels_of("right_ee_position").tolist() == [10, 11, 12]


def test_unified_slots():
    """Channels of equation 3, in the order of the table; an end effector and joints share one space."""
    starts = np.cumsum([0] + [room for _, room in UNIFIED_LAYOUT])
    assert starts[-1] == UNIFIED_DIM and len({part for part, _ in UNIFIED_LAYOUT}) == len(UNIFIED_LAYOUT)
    own = {part: start for (part, _), start in zip(UNIFIED_LAYOUT, starts[:-1], strict=True)}
    cartesian = robot(
        [["right_ee_position", 3], ["right_ee_rotation", 4], ["right_gripper", 1]],
        slots="unified", rotation_format="quaternion_wxyz", reference_frame="eef_relative", normalization="none",
    )  # fmt: skip
    joints = robot(
        [["right_gripper", 1], ["right_joints", 6], ["right_hand", 10]], slots="unified", normalization="none"
    )
    first = own["right_ee_position"]
    assert cartesian.action_channels.tolist() == [*range(first, first + 6), own["right_gripper"]]
    first, hand = own["right_joints"], own["right_hand"]
    wanted = [*range(first, first + 6), own["right_gripper"], *range(hand, hand + 10)]
    assert joints.action_channels.tolist() == wanted and joints.channels_of("right_hand").size == 12
    assert joints.channel_mask(UNIFIED_DIM).sum() == 17
    assert not (joints.channel_mask(UNIFIED_DIM) & cartesian.channel_mask(UNIFIED_DIM))[: own["left_gripper"]].any()
    values = np.arange(17.0)
    encoded = joints.encode_actions(values[None], None)[0]
    assert encoded.tolist() == [*values[1:7], values[0], *values[7:]]


def test_unified_rotation_is_an_axis_angle_in_the_end_effectors_frame():
    """EEF-Rel: T_0^-1 T_t (equation 4)."""
    layout = [["left_ee_position", 3], ["left_ee_rotation", 4]]
    own = robot(
        layout,
        slots="unified",
        rotation_format="quaternion_xyzw",
        reference_frame="eef_relative",
        normalization="none",
    )
    state, actions = random_vectors(own, 0), random_vectors(own, 1, 5)
    encoded = own.encode_actions(actions, state)
    now = rotation_to_matrix(state[3:], "quaternion_xyzw")
    np.testing.assert_allclose(encoded[:, :3], (actions[:, :3] - state[:3]) @ now, atol=1e-12)
    turned = now.T @ rotation_to_matrix(actions[:, 3:], "quaternion_xyzw")
    np.testing.assert_allclose(axis_angle_to_matrix(encoded[:, 3:]), turned, atol=1e-12)
    np.testing.assert_allclose(own.encode_state(state)[:3], state[:3])


def test_not_normalised_means_untouched():
    own = robot([["native", 3]], normalization="none")
    values = np.array([[700.0, -3.0, 0.25]])
    assert np.array_equal(own.encode_actions(values, None), values)
    assert np.array_equal(own.encode_state(values), values)
    assert np.array_equal(own.decode_actions(values, None), values)


# Fields


def test_fields_survive_json():
    own = two_arms("unified", 3, robot_tag="Franka", arms=2, waist=True, mobile_base=True, normalization="none")
    assert Embodiment.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    old = {key: value for key, value in robot([["native", 3]]).to_dict().items() if key not in (
        "slots", "model_rot6d", "normalization", "robot_tag", "arms", "waist", "mobile_base",
    )}  # fmt: skip
    assert Embodiment.from_dict(old) == robot([["native", 3]])  # checkpoints of before have none of them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": "wide"}, "slots 'wide'. Known: canonical, unified"),
        ({"model_rot6d": "diagonal"}, "model_rot6d 'diagonal'. Known: rows, columns, interleaved"),
        ({"normalization": "mean"}, "normalization 'mean'. Known: quantiles, none"),
        ({"arms": 3}, "3 arms. A robot has 1 or 2, or 0"),
        ({"action_layout": [["left_joints", 7]]}, "part 'left_joints' in action_layout. Known: left_ee_position"),
        ({"slots": "unified", "action_layout": [["left_joints", 8]]}, "width 8 .* 'left_joints' .* has 1 to 7"),
        ({"slots": "unified", "action_layout": [["left_hand", 0]]}, "width 0 .* 'left_hand' .* has 1 to 12"),
        ({"slots": "unified", "action_layout": [["lift", 2]]}, "width 2 .* 'lift' .* has 1"),
        ({"action_layout": [["head", 1]]}, "width 1 .* 'head' .* has 2"),
    ],
)
def test_fields_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        robot([["native", 3]], **changes)


def test_channels_beyond_the_model():
    own = robot([["waist", 3]], slots="unified", normalization="none")
    with pytest.raises(ValueError, match="reaches channel 60 of a model with 26"):
        own.channel_mask(26)
    assert set(SLOTS) == {"canonical", "unified"}
