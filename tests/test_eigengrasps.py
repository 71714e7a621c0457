"""Eigengrasps against numpy's SVD, and wrists there and back."""

import json

import numpy as np
import pytest

from wallvla.action_space_wallvla import Embodiment, axis_angle_to_matrix
from wallvla.data.eigengrasps import Eigengrasps, actions_to_hand, hand_to_actions


def hand_poses(count=400, seed=0):
    """Far from zero, with a spread that differs by direction."""
    rng = np.random.default_rng(seed)
    return 3 + rng.normal(size=(count, 45)) * np.linspace(0.05, 1, 45) @ np.linalg.qr(rng.normal(size=(45, 45)))[0]


def test_components_are_those_of_the_svd():
    poses = hand_poses()
    grasps = Eigengrasps.fit([poses[:1], poses[1:150], poses[150:]])
    rows = np.linalg.svd(poses - poses.mean(axis=0), full_matrices=False)[2][:10]
    np.testing.assert_allclose(grasps.mean, poses.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(grasps.basis * rows, axis=1)), 1, atol=1e-9)
    assert (grasps.basis[np.arange(10), np.abs(grasps.basis).argmax(axis=1)] > 0).all()


@pytest.mark.filterwarnings("error")
def test_an_episode_without_a_hand_changes_nothing():
    poses = hand_poses()
    grasps = Eigengrasps.fit([poses[:0], poses[:200], poses[:0], poses[200:]])
    expected = Eigengrasps.fit([poses[:200], poses[200:]])
    assert np.array_equal(grasps.mean, expected.mean) and np.array_equal(grasps.basis, expected.basis)


@pytest.mark.parametrize("count", [0, 46])
def test_there_are_as_many_components_as_asked_for(count):
    with pytest.raises(ValueError, match=f"{count} components: a hand has 1 to 45"):
        Eigengrasps.fit([hand_poses()], count)
    assert len(Eigengrasps.fit([hand_poses()], 45).basis) == 45


def test_decoded_pose_is_the_nearest_in_the_subspace():
    poses, grasps = hand_poses(), Eigengrasps.fit([hand_poses()])
    decoded = grasps.decode(grasps.encode(poses))
    centred = poses - poses.mean(axis=0)
    spread = np.linalg.svd(centred, compute_uv=False) ** 2
    np.testing.assert_allclose(np.sum((poses - decoded) ** 2), spread[10:].sum(), rtol=1e-9)  # Eckart-Young
    np.testing.assert_allclose(grasps.decode(grasps.encode(decoded)), decoded, atol=1e-12)
    assert grasps.encode(poses.reshape(20, 20, 45)).shape == (20, 20, 10)


def test_grasps_survive_json():
    grasps = Eigengrasps.fit([hand_poses()], count=4)
    again = Eigengrasps.from_dict(json.loads(json.dumps(grasps.to_dict())))
    assert np.array_equal(again.mean, grasps.mean) and np.array_equal(again.basis, grasps.basis)


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (hand_poses()[:, :44], r"shape \(400, 44\)"),
        (np.full((20, 45), np.nan), "finite"),
        (hand_poses(10), "10 hand poses for 10 components"),
    ],
)
def test_poses_that_do_not_fit(poses, message):
    with pytest.raises(ValueError, match=message):
        Eigengrasps.fit([poses])


def test_human_actions_have_32_numbers_and_come_back():
    rng, grasps = np.random.default_rng(1), Eigengrasps.fit([hand_poses()])
    chunks, hands = [], []
    for _ in ("left", "right"):
        start = rng.normal(size=3), axis_angle_to_matrix(rng.normal(size=3))
        wrist = rng.normal(size=(6, 3)), axis_angle_to_matrix(rng.normal(size=(6, 3)))
        poses = grasps.decode(rng.normal(size=(6, 10)))
        hands.append((wrist, start, poses))
        chunks.append(hand_to_actions(wrist, start, poses, grasps))
    actions = np.concatenate(chunks, axis=-1)
    human = Embodiment(
        {"ego": "ego"}, 30, 6, (), (("native", 32),), normalization="none", robot_tag="human", arms=2
    )  # fmt: skip
    assert human.action_channels.size == 32
    decoded = human.decode_actions(human.encode_actions(actions, None), None)
    for hand, (wrist, start, poses) in enumerate(hands):
        # The wrist as a 4 x 4 matrix: inverse of the start times the target
        transform = np.tile(np.eye(4), (7, 1, 1))
        transform[0, :3, :3], transform[0, :3, 3] = start[1], start[0]
        transform[1:, :3, :3], transform[1:, :3, 3] = wrist[1], wrist[0]
        relative = np.linalg.inv(transform[0]) @ transform[1:]
        np.testing.assert_allclose(chunks[hand][:, :3], relative[:, :3, 3], atol=1e-12)
        np.testing.assert_allclose(axis_angle_to_matrix(chunks[hand][:, 3:6]), relative[:, :3, :3], atol=1e-12)
        found, found_poses = actions_to_hand(decoded[:, 16 * hand : 16 * hand + 16], start, grasps)
        np.testing.assert_allclose(found[0], wrist[0], atol=1e-12)
        np.testing.assert_allclose(found[1], wrist[1], atol=1e-12)
        np.testing.assert_allclose(found_poses, poses, atol=1e-12)
