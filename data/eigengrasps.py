"""Hands of egocentric data as actions: wrist motion and eigengrasps (Qwen-VLA, section 3.2.2).

A hand is 16 numbers: the wrist's translation (3) and axis-angle rotation (3) in its own frame at the start of the
chunk, and the weights (10) of the principal components of the hand's joints. Two hands, left first, make a `native`
layout of 32.

Shapes: `...` are leading dimensions, H steps; lengths in metres, angles in radians.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..action_space_wallvla import (
    Pose,
    axis_angle_to_matrix,
    from_reference_frame,
    matrix_to_axis_angle,
    to_reference_frame,
)


HAND_POSE_DIM = 45  # MANO: 15 joints, an axis-angle each


@dataclass(frozen=True)
class Eigengrasps:
    """Principal components of hand poses.

    Args:
        mean: (45,) float64.
        basis: (count, 45) float64, orthonormal rows, the widest spread first.
    """

    mean: np.ndarray
    basis: np.ndarray

    @classmethod
    def fit(cls, poses: Iterable[ArrayLike], count: int = 10) -> "Eigengrasps":
        """Components of batches of poses (N, 45), N from 0, which are read once and need not fit into memory together.

        The sign of a component is free; here its largest number is positive, so that equal data give equal actions.
        Raises ValueError for a `count` beyond 1 to 45, fewer poses than components, other widths, or numbers that are
        not finite.
        """
        if not 1 <= count <= HAND_POSE_DIM:
            raise ValueError(f"Found {count} components: a hand has 1 to {HAND_POSE_DIM}.")
        shift, total = None, 0
        for batch in poses:
            batch = np.asarray(batch, dtype=np.float64)
            if batch.ndim != 2 or batch.shape[1] != HAND_POSE_DIM or not np.isfinite(batch).all():
                raise ValueError(
                    f"Found hand poses of shape {batch.shape}. They are finite and (N, {HAND_POSE_DIM}): the "
                    f"axis-angles of MANO's 15 joints."
                )
            if not len(batch):
                continue
            if shift is None:  # near the mean, so that the difference below loses no digits
                shift = batch[0]
                sums, products = np.zeros(HAND_POSE_DIM), np.zeros((HAND_POSE_DIM, HAND_POSE_DIM))
            centred = batch - shift
            total, sums, products = total + len(batch), sums + centred.sum(axis=0), products + centred.T @ centred
        if total <= count:
            raise ValueError(f"Found {total} hand poses for {count} components. Fit on more.")
        covariance = products / total - np.outer(sums, sums) / total**2
        basis = np.linalg.eigh(covariance)[1].T[: -count - 1 : -1]  # eigenvalues ascend
        largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
        return cls(shift + sums / total, basis * np.sign(largest))

    @classmethod
    def from_dict(cls, values: dict) -> "Eigengrasps":
        """Of the JSON form."""
        return cls(np.array(values["mean"], dtype=np.float64), np.array(values["basis"], dtype=np.float64))

    def to_dict(self) -> dict:
        """JSON form; the floats come back exactly."""
        return {"mean": self.mean.tolist(), "basis": self.basis.tolist()}

    def encode(self, poses: ArrayLike) -> np.ndarray:
        """Hand poses (..., 45) to weights (..., count)."""
        return (np.asarray(poses, dtype=np.float64) - self.mean) @ self.basis.T

    def decode(self, weights: ArrayLike) -> np.ndarray:
        """Weights (..., count) to the hand poses (..., 45) that they make: of a pose, its nearest in the subspace."""
        return np.asarray(weights, dtype=np.float64) @ self.basis + self.mean


def hand_to_actions(wrist: Pose, start: Pose, poses: ArrayLike, grasps: Eigengrasps) -> np.ndarray:
    """Actions (..., H, 6 + count) of one hand.

    Args:
        wrist: positions (..., H, 3) and rotations (..., H, 3, 3) at the steps of the chunk.
        start: position (..., 3) and rotation (..., 3, 3) when it starts.
        poses: hand poses (..., H, 45).
        grasps: fitted on all human data.
    """
    position, rotation = to_reference_frame(wrist, start, "eef_relative")
    return np.concatenate([position, matrix_to_axis_angle(rotation), grasps.encode(poses)], axis=-1)


def actions_to_hand(actions: ArrayLike, start: Pose, grasps: Eigengrasps) -> tuple[Pose, np.ndarray]:
    """Inverse of `hand_to_actions`: the wrist's pose and the hand poses (..., H, 45)."""
    actions = np.asarray(actions, dtype=np.float64)
    relative = actions[..., :3], axis_angle_to_matrix(actions[..., 3:6])
    return from_reference_frame(relative, start, "eef_relative"), grasps.decode(actions[..., 6:])
