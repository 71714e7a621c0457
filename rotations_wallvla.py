"""Rotations, poses and reference frames, every transform beside its inverse.

Shapes: `...` are leading dimensions, H action steps. All functions take anything `np.asarray` reads, CPU tensors
included, and return float64 arrays.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike


# Position (..., 3) and rotation (..., 3, 3) of an end effector; None for a half that a robot does not have.
Pose = tuple[np.ndarray | None, np.ndarray | None]

REFERENCE_FRAMES = ("absolute", "world_relative", "world_delta", "eef_relative", "eef_delta")
JOINT_FRAMES = ("joint_relative", "joint_delta")  # of native vectors; see `to_joint_frame`


# --------------------------------------------------------------------------------------------------------------------
# Rotations. A matrix R (..., 3, 3) maps vectors of the rotated frame to the reference frame.
# --------------------------------------------------------------------------------------------------------------------

_AXES = {"x": 0, "y": 1, "z": 2}
EULER_ORDERS = tuple(
    a + b + c for a in "xyz" for b in "xyz" for c in "xyz" if a != b and b != c
)  # 6 Tait-Bryan and 6 proper orders

# Gram-Schmidt calls shorter vectors zero.
_DEGENERATE = 1e-8


def _axis_rotation(angle: np.ndarray, axis: int) -> np.ndarray:
    """Rotation by `angle` (...,) in radians about coordinate axis 0, 1 or 2: (..., 3, 3)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.zeros(np.shape(angle) + (3, 3))
    following, last = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis] = 1.0
    matrix[..., following, following] = cosine
    matrix[..., last, last] = cosine
    matrix[..., last, following] = sine
    matrix[..., following, last] = -sine
    return matrix


def _euler_axes(order: str) -> tuple[list[int], bool]:
    """Axes of the equivalent intrinsic order, and whether the angles must be read backwards (extrinsic order)."""
    if order.lower() not in EULER_ORDERS or order not in (order.lower(), order.upper()):
        raise ValueError(
            f"Found euler order {order!r}. An order is three letters of x, y and z without equal neighbours, lower "
            f"case for extrinsic (fixed axes) or upper case for intrinsic (moving axes), such as 'xyz' or 'ZYX'."
        )
    extrinsic = order.islower()
    axes = [_AXES[letter] for letter in order.lower()]
    return (axes[::-1] if extrinsic else axes), extrinsic


def euler_to_matrix(angles: ArrayLike, order: str) -> np.ndarray:
    """Euler angles (..., 3) in radians to (..., 3, 3).

    `order` names the axes in the order of the angles: lower case is extrinsic (rotations about fixed axes; "xyz" is
    roll, pitch, yaw: R = Rz Ry Rx), upper case intrinsic (about moving axes; "XYZ" is R = Rx Ry Rz).
    """
    (first, second, third), extrinsic = _euler_axes(order)
    angles = np.asarray(angles, dtype=np.float64)
    if extrinsic:
        angles = angles[..., ::-1]
    return (
        _axis_rotation(angles[..., 0], first)
        @ _axis_rotation(angles[..., 1], second)
        @ _axis_rotation(angles[..., 2], third)
    )


def matrix_to_euler(matrix: ArrayLike, order: str) -> np.ndarray:
    """Inverse of `euler_to_matrix`: (..., 3, 3) to (..., 3) radians.

    The middle angle lies in [-pi/2, pi/2] for three distinct axes and in [0, pi] otherwise, the others in (-pi, pi].
    In gimbal lock only the sum or difference of the outer angles is defined; the last angle of the intrinsic order is
    then set to 0.
    """
    (i, j, third), extrinsic = _euler_axes(order)
    matrix = np.asarray(matrix, dtype=np.float64)
    k = 3 - i - j
    sign = 1.0 if (j - i) % 3 == 1 else -1.0  # (i, j, k) is an even or an odd permutation
    if third == k:
        level = np.hypot(matrix[..., i, i], matrix[..., i, j])
        middle = np.arctan2(sign * matrix[..., i, k], level)
        outer = np.arctan2(-sign * matrix[..., j, k], matrix[..., k, k])
        inner = np.arctan2(-sign * matrix[..., i, j], matrix[..., i, i])
    else:
        level = np.hypot(matrix[..., i, j], matrix[..., i, k])
        middle = np.arctan2(level, matrix[..., i, i])
        outer = np.arctan2(matrix[..., j, i], -sign * matrix[..., k, i])
        inner = np.arctan2(matrix[..., i, j], sign * matrix[..., i, k])
    locked = level < 1e-9
    outer = np.where(locked, np.arctan2(sign * matrix[..., k, j], matrix[..., j, j]), outer)
    inner = np.where(locked, 0.0, inner)
    angles = np.stack([outer, middle, inner], axis=-1)
    return angles[..., ::-1] if extrinsic else angles


def quaternion_to_matrix(quaternion: ArrayLike) -> np.ndarray:
    """Quaternion (..., 4) in xyzw order, of any length but zero, to (..., 3, 3)."""
    quaternion = np.asarray(quaternion, dtype=np.float64)
    norm = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if (norm < _DEGENERATE).any():
        raise ValueError(
            f"Found a quaternion of length {norm.min():.1e}; zero is no rotation. Check the rotation columns of the "
            f"state and action layout, or drop the frames in which the robot reported no pose."
        )
    x, y, z, w = np.moveaxis(quaternion / norm, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: ArrayLike) -> np.ndarray:
    """Inverse of `quaternion_to_matrix`: (..., 3, 3) to unit quaternions (..., 4) in xyzw order with w >= 0."""
    matrix = np.asarray(matrix, dtype=np.float64)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = ([matrix[..., row, column] for column in range(3)] for row in range(3))
    # 4 q q^T, of which every row is the quaternion times one of its entries: take the row of the largest entry.
    products = np.stack(
        [
            np.stack([1 + xx - yy - zz, xy + yx, xz + zx, zy - yz], axis=-1),
            np.stack([xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx], axis=-1),
            np.stack([xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy], axis=-1),
            np.stack([zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz], axis=-1),
        ],
        axis=-2,
    )
    largest = np.argmax(np.diagonal(products, axis1=-2, axis2=-1), axis=-1)
    quaternion = np.take_along_axis(products, largest[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def axis_angle_to_matrix(axis_angle: ArrayLike) -> np.ndarray:
    """Rotation vectors (..., 3), axis times angle in radians, to (..., 3, 3)."""
    axis_angle = np.asarray(axis_angle, dtype=np.float64)
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    # np.sinc(x) is sin(pi x) / (pi x), and exact at 0.
    vector = axis_angle * 0.5 * np.sinc(angle / (2 * np.pi))
    return quaternion_to_matrix(np.concatenate([vector, np.cos(angle / 2)], axis=-1))


def matrix_to_axis_angle(matrix: ArrayLike) -> np.ndarray:
    """Inverse of `axis_angle_to_matrix`: (..., 3, 3) to rotation vectors (..., 3) of length at most pi."""
    quaternion = matrix_to_quaternion(matrix)
    vector, scalar = quaternion[..., :3], quaternion[..., 3:]
    sine = np.linalg.norm(vector, axis=-1, keepdims=True)
    small = sine < _DEGENERATE
    # angle / sin(angle / 2) tends to 2 for small angles.
    factor = np.where(small, 2.0, 2 * np.arctan2(sine, scalar) / np.where(small, 1.0, sine))
    return vector * factor


def rot6d_to_matrix(rot6d: ArrayLike, layout: str = "rows") -> np.ndarray:
    """Six numbers (..., 6) to the rotation (..., 3, 3) that Gram-Schmidt makes of them; never fails.

    `layout` says which six entries of R they are: "rows" the first two rows, one after the other (Wall-OSS); "columns"
    the first two columns, one after the other; "interleaved" the first two columns, read row by row. Degenerate
    vectors (zero, or the second parallel to the first) are replaced by the nearest coordinate axis that works.
    """
    rot6d = np.asarray(rot6d, dtype=np.float64)
    if layout == "interleaved":
        first, second = rot6d[..., 0::2], rot6d[..., 1::2]
    else:
        first, second = rot6d[..., :3], rot6d[..., 3:]
    first = _unit(first, np.broadcast_to([1.0, 0.0, 0.0], first.shape))
    second = second - np.sum(first * second, axis=-1, keepdims=True) * first
    axis = np.eye(3)[np.argmin(np.abs(first), axis=-1)]
    second = _unit(second, axis - np.sum(first * axis, axis=-1, keepdims=True) * first)
    rows = np.stack([first, second, np.cross(first, second)], axis=-2)
    return rows if layout == "rows" else np.swapaxes(rows, -1, -2)


def _unit(vector: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """`vector` (..., 3) at length 1; where it is too short, `fallback` at length 1."""
    norm = np.linalg.norm(vector, axis=-1, keepdims=True)
    vector = np.where(norm < _DEGENERATE, fallback, vector)
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def matrix_to_rot6d(matrix: ArrayLike, layout: str = "rows") -> np.ndarray:
    """Inverse of `rot6d_to_matrix`: (..., 3, 3) to (..., 6)."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if layout == "rows":
        return np.concatenate([matrix[..., 0, :], matrix[..., 1, :]], axis=-1)
    if layout == "columns":
        return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)
    return matrix[..., :, :2].reshape(matrix.shape[:-2] + (6,))


# How a robot writes rotations: name -> (width, to matrix, from matrix).
ROTATION_FORMATS = {
    "quaternion_xyzw": (4, quaternion_to_matrix, matrix_to_quaternion),
    "quaternion_wxyz": (
        4,
        lambda values: quaternion_to_matrix(np.roll(values, -1, axis=-1)),
        lambda matrix: np.roll(matrix_to_quaternion(matrix), 1, axis=-1),
    ),
    "axis_angle": (3, axis_angle_to_matrix, matrix_to_axis_angle),
    "matrix": (
        9,
        lambda values: np.asarray(values, dtype=np.float64).reshape(np.shape(values)[:-1] + (3, 3)),
        lambda matrix: np.asarray(matrix).reshape(np.shape(matrix)[:-2] + (9,)),
    ),
}
for _layout in ("rows", "columns", "interleaved"):
    ROTATION_FORMATS[f"rot6d_{_layout}"] = (
        6,
        partial(rot6d_to_matrix, layout=_layout),
        partial(matrix_to_rot6d, layout=_layout),
    )
for _order in EULER_ORDERS + tuple(order.upper() for order in EULER_ORDERS):
    ROTATION_FORMATS[f"euler_{_order}"] = (
        3,
        partial(euler_to_matrix, order=_order),
        partial(matrix_to_euler, order=_order),
    )


def rotation_functions(name: str) -> tuple:
    """(width, to matrix, from matrix) of a rotation format. Raises ValueError for an unknown name."""
    if name not in ROTATION_FORMATS:
        raise ValueError(
            f"Found rotation_format {name!r}. Known: quaternion_xyzw, quaternion_wxyz, axis_angle, matrix, "
            f"rot6d_rows, rot6d_columns, rot6d_interleaved, and euler_ with an order, lower case for extrinsic "
            f"(euler_xyz is roll, pitch, yaw) or upper case for intrinsic (euler_ZYX)."
        )
    return ROTATION_FORMATS[name]


def rotation_to_matrix(values: ArrayLike, rotation_format: str) -> np.ndarray:
    """Rotations (..., width of the format) to matrices (..., 3, 3). `rotation_format`: a key of ROTATION_FORMATS."""
    return rotation_functions(rotation_format)[1](values)


def matrix_to_rotation(matrix: ArrayLike, rotation_format: str) -> np.ndarray:
    """Inverse of `rotation_to_matrix`: (..., 3, 3) to (..., width of the format)."""
    return rotation_functions(rotation_format)[2](matrix)


# --------------------------------------------------------------------------------------------------------------------
# Poses (position (..., 3), rotation (..., 3, 3)) and reference frames
# --------------------------------------------------------------------------------------------------------------------


def compose(outer: Pose, inner: Pose) -> Pose:
    """SE(3) product of two poses: `inner`, given in the frame of `outer`, in the frame that `outer` is given in."""
    position, rotation = outer
    return position + _apply(rotation, inner[0]), rotation @ inner[1]


def inverse(pose: Pose) -> Pose:
    """SE(3) inverse: compose(inverse(pose), pose) is the identity."""
    position, rotation = pose
    transposed = np.swapaxes(rotation, -1, -2)
    return -_apply(transposed, position), transposed


def _apply(rotation: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (rotation @ vector[..., None])[..., 0]


def to_reference_frame(pose: Pose, state_pose: Pose, reference_frame: str) -> Pose:
    """Target poses of a chunk, seen from another frame.

    With (p_t, R_t) the target at step t = 1..H, (p_0, R_0) the current pose, all in the robot's own world frame, and
    r = 0 for the relative and r = t-1 for the delta frames:

        absolute          p_t                        R_t
        world_relative    p_t - p_0                  R_t R_0^T            (Wall-OSS)
        world_delta       p_t - p_{t-1}              R_t R_{t-1}^T
        eef_relative      R_0^T (p_t - p_0)          R_0^T R_t
        eef_delta         R_{t-1}^T (p_t - p_{t-1})  R_{t-1}^T R_t

    Args:
        pose: positions (..., H, 3) and rotations (..., H, 3, 3); either may be `None` in absolute and world frames.
        state_pose: positions (..., 3) and rotations (..., 3, 3), `None` where `pose` is; unused for "absolute".
        reference_frame: one of REFERENCE_FRAMES.
    Returns:
        Positions and rotations, shaped as in `pose`.
    """
    if reference_frame == "absolute":
        return pose
    positions, rotations = pose
    reference = (
        None if positions is None else _references(positions, state_pose[0], reference_frame, axis=-2),
        None if rotations is None else _references(rotations, state_pose[1], reference_frame, axis=-3),
    )
    if reference_frame.startswith("eef"):
        return compose(inverse(reference), pose)
    return (
        None if positions is None else positions - reference[0],
        None if rotations is None else rotations @ np.swapaxes(reference[1], -1, -2),
    )


def _references(targets: np.ndarray, now: np.ndarray, reference_frame: str, axis: int) -> np.ndarray:
    """What every step of axis `axis` is measured from: the current value, or the target one step before."""
    now = np.expand_dims(now, axis)
    if reference_frame.endswith("relative"):
        return now
    steps = targets.shape[axis]
    return np.concatenate([now, np.take(targets, np.arange(steps - 1), axis=axis)], axis=axis)


def from_reference_frame(pose: Pose, state_pose: Pose, reference_frame: str) -> Pose:
    """Inverse of `to_reference_frame`: same arguments, poses in the robot's world frame back."""
    if reference_frame == "absolute":
        return pose
    if reference_frame.endswith("relative"):
        position, rotation = state_pose
        now = (
            None if position is None else position[..., None, :],
            None if rotation is None else rotation[..., None, :, :],
        )
        return _move(now, pose, reference_frame)
    positions, rotations = pose
    steps = positions.shape[-2] if positions is not None else rotations.shape[-3]
    current, position_steps, rotation_steps = state_pose, [], []
    for step in range(steps):  # every step starts where the one before ended
        increment = (
            None if positions is None else positions[..., step, :],
            None if rotations is None else rotations[..., step, :, :],
        )
        current = _move(current, increment, reference_frame)
        position_steps.append(current[0])
        rotation_steps.append(current[1])
    return (
        None if positions is None else np.stack(position_steps, axis=-2),
        None if rotations is None else np.stack(rotation_steps, axis=-3),
    )


def _move(reference: Pose, pose: Pose, reference_frame: str) -> Pose:
    """The pose that `pose`, seen from `reference`, is in the robot's world frame."""
    if reference_frame.startswith("eef"):
        return compose(reference, pose)
    return (
        None if pose[0] is None else reference[0] + pose[0],
        None if pose[1] is None else pose[1] @ reference[1],
    )


def to_joint_frame(actions: np.ndarray, state: np.ndarray, channels: ArrayLike, reference_frame: str) -> np.ndarray:
    """Joint targets (..., H, D), of which `channels` are measured from the current joints instead of from zero.

    With q_t the target at step t = 1..H and q_0 the same channels of `state` (..., S): "joint_relative" is q_t - q_0,
    "joint_delta" q_t - q_{t-1}. Other channels, such as grippers, stay as they are.
    """
    actions = np.array(actions, dtype=np.float64)
    targets = actions[..., channels]
    actions[..., channels] = targets - _references(targets, state[..., channels], reference_frame, axis=-2)
    return actions


def from_joint_frame(actions: np.ndarray, state: np.ndarray, channels: ArrayLike, reference_frame: str) -> np.ndarray:
    """Inverse of `to_joint_frame`: same arguments, joint targets back."""
    actions = np.array(actions, dtype=np.float64)
    steps = actions[..., channels]
    if reference_frame == "joint_delta":
        steps = np.cumsum(steps, axis=-2)
    actions[..., channels] = steps + state[..., None, :][..., channels]
    return actions


def interpolate_rotation(lower: np.ndarray, upper: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) at `fraction` (...,) of the shortest way from `lower` to `upper`, at constant speed."""
    between = matrix_to_axis_angle(np.swapaxes(lower, -1, -2) @ upper)
    return lower @ axis_angle_to_matrix(between * fraction[..., None])


def axes_matrix(axes: Iterable[str]) -> np.ndarray:
    """Change of axes (3, 3) of three signed names: row i is the direction that becomes axis i.

    `("y", "-x", "z")`: the new x is the old y, the new y the old -x. Raises ValueError unless it is a rotation.
    """
    axes = tuple(axes)
    rows = np.zeros((3, 3))
    for row, name in zip(rows, axes, strict=False):
        if isinstance(name, str) and name.removeprefix("-") in _AXES:
            row[_AXES[name.removeprefix("-")]] = -1.0 if name.startswith("-") else 1.0
    if len(axes) != 3 or np.linalg.det(rows) < 0.5:
        raise ValueError(
            f"Found axes {list(axes)}. They are three of x, y and z, each once, with a minus for the opposite "
            f"direction, and right-handed: a mirrored frame is no rotation."
        )
    return rows
