"""Robots as data: action layouts, rotations, reference frames and normalisation, every transform beside its inverse.

Shapes: `...` are leading dimensions, H action steps, K channels of the model that an embodiment uses. All functions
take anything `np.asarray` reads, CPU tensors included, and return float64 arrays.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial

import numpy as np
from numpy.typing import ArrayLike


# Position (..., 3) and rotation (..., 3, 3) of an end effector; None for a half that a robot does not have.
Pose = tuple[np.ndarray | None, np.ndarray | None]

DEFAULT_PROMPT = "You are a helpful assistant."

# The canonical action: (part, channels of the model), Wall-OSS-0.5 section 2.2.3. A rotation is rot6d here.
CANONICAL_LAYOUT = (
    ("left_ee_position", 3),
    ("left_ee_rotation", 6),
    ("left_gripper", 1),
    ("right_ee_position", 3),
    ("right_ee_rotation", 6),
    ("right_gripper", 1),
    ("base_velocity", 3),
    ("lift", 1),
    ("head", 2),
)
CANONICAL_DIM = 26
REFERENCE_FRAMES = ("absolute", "world_relative", "world_delta", "eef_relative", "eef_delta")

# Channels whose q99 - q01 is below this get range 1: dividing by it would blow sensor noise up to the full [-1, 1].
MIN_RANGE = 1e-5
QUANTILES = ("q01", "q99")
STATISTICS = QUANTILES + ("mean", "std", "min", "max")


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


def _rotation_format(name: str) -> tuple:
    if name not in ROTATION_FORMATS:
        raise ValueError(
            f"Found rotation_format {name!r}. Known: quaternion_xyzw, quaternion_wxyz, axis_angle, matrix, "
            f"rot6d_rows, rot6d_columns, rot6d_interleaved, and euler_ with an order, lower case for extrinsic "
            f"(euler_xyz is roll, pitch, yaw) or upper case for intrinsic (euler_ZYX)."
        )
    return ROTATION_FORMATS[name]


def rotation_to_matrix(values: ArrayLike, rotation_format: str) -> np.ndarray:
    """Rotations (..., width of the format) to matrices (..., 3, 3). `rotation_format`: a key of ROTATION_FORMATS."""
    return _rotation_format(rotation_format)[1](values)


def matrix_to_rotation(matrix: ArrayLike, rotation_format: str) -> np.ndarray:
    """Inverse of `rotation_to_matrix`: (..., 3, 3) to (..., width of the format)."""
    return _rotation_format(rotation_format)[2](matrix)


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


# --------------------------------------------------------------------------------------------------------------------
# Normalisation
# --------------------------------------------------------------------------------------------------------------------


def normalize(values: ArrayLike, statistics: dict) -> np.ndarray:
    """Values (..., K) to [-1, 1]: q01 becomes -1, q99 becomes 1, what lies outside is clipped."""
    low, scale = _low_and_range(statistics)
    return np.clip((np.asarray(values, dtype=np.float64) - low) / scale * 2 - 1, -1.0, 1.0)


def unnormalize(values: ArrayLike, statistics: dict) -> np.ndarray:
    """Inverse of `normalize` for values between q01 and q99; does not clip. Values (..., K)."""
    low, scale = _low_and_range(statistics)
    return (np.asarray(values, dtype=np.float64) + 1) / 2 * scale + low


def _low_and_range(statistics: dict) -> tuple[np.ndarray, np.ndarray]:
    low = np.asarray(statistics["q01"], dtype=np.float64)
    scale = np.asarray(statistics["q99"], dtype=np.float64) - low
    return low, np.where(scale < MIN_RANGE, 1.0, scale)


# --------------------------------------------------------------------------------------------------------------------
# Embodiments
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embodiment:
    """One robot as the model sees it. `from_dict` and `to_dict` are its JSON form, which travels in the checkpoint.

    Robot vectors are described by layouts, ordered lists of [part, width]. Parts: `left_ee_position` (3),
    `left_ee_rotation` (width of `rotation_format`), `left_gripper` (1), the same for `right`, `base_velocity` (3),
    `lift` (1), `head` (2). Named parts go to fixed channels of the canonical action (CANONICAL_LAYOUT), rotations as
    rot6d. A layout of the single part `native` (any width) is used as it is, in the model's first channels.
    State layouts may also hold parts `unused`, which the model never sees.

    Args:
        cameras: dataset key -> spoken label, in the order of the prompt: {"observation.images.front": "front view"}.
            Its JSON form is a list of pairs, because transformers sorts the keys of the dictionaries that it saves.
        control_frequency: action steps per second.
        action_horizon: action steps of a chunk, at most the model's.
        state_layout, action_layout: layouts of the robot's own vectors. An empty state layout: no proprioception.
        prompt: text of the system turn.
        rotation_format: how the robot writes rotations, in state and actions; a key of ROTATION_FORMATS.
        reference_frame: in which frame the *model* sees end-effector targets; see `to_reference_frame`. The robot's
            own targets are absolute. "absolute" changes nothing, so it also fits robots with relative commands.
        state_gripper_range, action_gripper_range: the robot's value for [closed, open]; the model sees 0 and 1.
            [1, -1] is a gripper command where 1 closes.
        statistics: {"state": {...}, "action": {...}} of lists over channels: q01, q99, mean, std, min, max. Computed
            on `transform_state` and `transform_actions`, so *after* the change of layout and frame.
        domain: index of the soft prompt, for models that have them.
        state_padding, action_padding: what the model sees in its channels that the robot lacks: one normalised number
            for each channel of the model (those of the robot's own channels are not used). Empty: 0.
    """

    cameras: dict
    control_frequency: float
    action_horizon: int
    state_layout: tuple
    action_layout: tuple
    prompt: str = DEFAULT_PROMPT
    rotation_format: str = "axis_angle"
    reference_frame: str = "absolute"
    state_gripper_range: tuple = (0.0, 1.0)
    action_gripper_range: tuple = (0.0, 1.0)
    statistics: dict | None = None
    domain: int = 0
    state_padding: tuple = ()
    action_padding: tuple = ()

    @classmethod
    def from_dict(cls, values: dict) -> "Embodiment":
        """Embodiment of a (JSON) dictionary. Raises ValueError on unknown, missing and contradicting fields."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"Found unknown embodiment field(s) {', '.join(unknown)}. Known: {', '.join(known)}. Correct the "
                f"name; a field that is silently ignored would change how the robot is driven."
            )
        missing = [name for name in ("cameras", "control_frequency", "action_horizon") if name not in values]
        missing += [name for name in ("state_layout", "action_layout") if name not in values]
        if missing:
            raise ValueError(f"Embodiment field(s) {', '.join(missing)} missing; they have no default. Add them.")
        return cls(**values)

    def to_dict(self) -> dict:
        """JSON form; `from_dict(to_dict())` is equal to this embodiment."""
        return {
            **asdict(self),
            "cameras": [list(pair) for pair in self.cameras.items()],
            "state_layout": [list(part) for part in self.state_layout],
            "action_layout": [list(part) for part in self.action_layout],
            "state_gripper_range": list(self.state_gripper_range),
            "action_gripper_range": list(self.action_gripper_range),
            "state_padding": list(self.state_padding),
            "action_padding": list(self.action_padding),
        }

    def __post_init__(self):
        # A frozen dataclass is written through `object.__setattr__`: here, and never again.
        cameras = self.cameras.items() if isinstance(self.cameras, dict) else self.cameras
        object.__setattr__(self, "cameras", dict(_pairs(cameras, "cameras", str)))
        object.__setattr__(self, "state_layout", _pairs(self.state_layout, "state_layout", int))
        object.__setattr__(self, "action_layout", _pairs(self.action_layout, "action_layout", int))
        object.__setattr__(self, "state_gripper_range", tuple(float(value) for value in self.state_gripper_range))
        object.__setattr__(self, "action_gripper_range", tuple(float(value) for value in self.action_gripper_range))
        object.__setattr__(self, "state_padding", tuple(float(value) for value in self.state_padding))
        object.__setattr__(self, "action_padding", tuple(float(value) for value in self.action_padding))
        self._check_scalars()
        self._check_layout(self.state_layout, "state_layout")
        self._check_layout(self.action_layout, "action_layout")
        self._check_reference_frame()
        if self.statistics is not None:
            object.__setattr__(self, "statistics", self._checked_statistics(self.statistics))

    def _check_scalars(self):
        if not self.cameras:
            raise ValueError("Found no cameras. An embodiment names at least one: {dataset key: spoken label}.")
        short = [short_camera_key(key) for key in self.cameras]
        if len(set(short)) < len(short):
            raise ValueError(
                f"Found cameras {', '.join(self.cameras)}. Samples may name a camera by the last part of its key, so "
                f"these parts must differ. Rename one."
            )
        if not isinstance(self.action_horizon, int) or self.action_horizon < 1 or self.control_frequency <= 0:
            raise ValueError(
                f"Found action_horizon {self.action_horizon} and control_frequency {self.control_frequency}. They are "
                f"steps of a chunk, an integer of at least 1, and steps per second, above 0."
            )
        if not isinstance(self.domain, int) or self.domain < 0:
            raise ValueError(f"Found domain {self.domain!r}. It is the index of a soft prompt: an integer from 0.")
        for name, values in (("state", self.state_padding), ("action", self.action_padding)):
            if not all(-1 <= value <= 1 for value in values):
                raise ValueError(f"Found {name}_padding {values}. It is normalised: every number in [-1, 1].")
        _rotation_format(self.rotation_format)
        if self.reference_frame not in REFERENCE_FRAMES:
            raise ValueError(f"Found reference_frame {self.reference_frame!r}. Known: {', '.join(REFERENCE_FRAMES)}.")
        for name, values in (("state", self.state_gripper_range), ("action", self.action_gripper_range)):
            if len(values) != 2 or values[0] == values[1]:
                raise ValueError(
                    f"Found {name}_gripper_range {list(values)}. It is the robot's value for [closed, open], two "
                    f"different numbers."
                )

    def _check_layout(self, layout: tuple, name: str):
        widths = dict(CANONICAL_LAYOUT)
        rotation_width = ROTATION_FORMATS[self.rotation_format][0]
        widths.update(left_ee_rotation=rotation_width, right_ee_rotation=rotation_width)
        parts = [part for part, _ in layout if part != "unused"]
        for part, width in layout:
            if part not in widths and part != "native" and (part != "unused" or name == "action_layout"):
                raise ValueError(
                    f"Found part {part!r} in {name}. Known: {', '.join(widths)}, native (a robot that fits none of "
                    f"these)" + (", unused." if name == "state_layout" else ".")
                )
            if width != widths.get(part, width) or width < 1:
                raise ValueError(
                    f"Found width {width} for part {part!r} in {name}, which has {widths.get(part, 'at least 1')}"
                    + (f" in rotation_format {self.rotation_format!r}." if part.endswith("rotation") else ".")
                    + " Correct the width, or use part 'native' for a vector that means something else."
                )
        if len(set(parts)) < len(parts) or ("native" in parts and len(parts) > 1):
            raise ValueError(
                f"Found parts {', '.join(parts)} in {name}. Each part comes once, and 'native' stands alone: its "
                f"channels would overlap with those of the named parts."
            )
        if name == "action_layout" and not parts:
            raise ValueError("Found an empty action_layout. List the parts of the robot's action vector.")

    def _check_reference_frame(self):
        if self.reference_frame == "absolute":
            return
        in_state, in_action = dict(self.state_layout), dict(self.action_layout)
        needed = [part for part in in_action if "_ee_" in part]
        if not needed:
            raise ValueError(
                f"Found reference_frame {self.reference_frame!r} for an action_layout without an end-effector pose. "
                f"Only poses have a frame; use 'absolute'."
            )
        if self.reference_frame.startswith("eef"):
            arms = sorted({part.split("_")[0] for part in needed})
            needed = [f"{arm}_ee_{half}" for arm in arms for half in ("position", "rotation")]
            absent = [part for part in needed if part not in in_action]
            if absent:
                raise ValueError(
                    f"Found reference_frame {self.reference_frame!r} and an action_layout without "
                    f"{', '.join(absent)}. The frame of the end effector needs its position and rotation; use a world "
                    f"frame or 'absolute'."
                )
        absent = [part for part in needed if part not in in_state]
        if absent:
            raise ValueError(
                f"Found reference_frame {self.reference_frame!r} and a state_layout without {', '.join(absent)}. "
                f"Actions are measured from the current pose; add these parts to the state, or use 'absolute'."
            )

    def _checked_statistics(self, statistics: dict) -> dict:
        widths = {"state": len(self.state_channels), "action": len(self.action_channels)}
        checked = {}
        for kind, values in statistics.items():
            if kind not in widths:
                raise ValueError(f"Found statistics of {kind!r}. Known: state, action.")
            absent = [name for name in QUANTILES if name not in values]
            unknown = [name for name in values if name not in STATISTICS]
            if absent or unknown:
                raise ValueError(
                    f"Found {kind} statistics {', '.join(values)}. q01 and q99 are needed, mean, std, min and max are "
                    f"known. Recompute them with `wallvla stats`."
                )
            checked[kind] = {name: np.asarray(numbers, dtype=np.float64).tolist() for name, numbers in values.items()}
            for name, numbers in checked[kind].items():
                if len(numbers) != widths[kind] or not np.isfinite(numbers).all():
                    raise ValueError(
                        f"Found {kind} statistics {name} of {len(numbers)} numbers for {widths[kind]} channels (after "
                        f"the transform to the model's layout); all must be there and finite. Recompute them with "
                        f"`wallvla stats`."
                    )
            if np.any(np.less(checked[kind]["q99"], checked[kind]["q01"])):
                raise ValueError(f"Found {kind} statistics with q99 below q01. Recompute them with `wallvla stats`.")
        return checked

    # ---- sizes and channels -------------------------------------------------------------------------------------

    @cached_property
    def state_width(self) -> int:
        """Numbers of the robot's state vector."""
        return sum(width for _, width in self.state_layout)

    @cached_property
    def action_width(self) -> int:
        """Numbers of the robot's action vector."""
        return sum(width for _, width in self.action_layout)

    @cached_property
    def state_channels(self) -> np.ndarray:
        """Canonical channels (K,) that the state fills, ascending; the columns of `transform_state`."""
        return _channels(self.state_layout)

    @cached_property
    def action_channels(self) -> np.ndarray:
        """Channels (K,) of the model's action that this robot uses, ascending; the columns of `transform_actions`."""
        return _channels(self.action_layout)

    def channel_mask(self, action_dim: int) -> np.ndarray:
        """Which of the model's `action_dim` channels this robot uses: bool (action_dim,)."""
        if self.action_channels[-1] >= action_dim:
            raise ValueError(
                f"Found an action layout that reaches channel {self.action_channels[-1]} of a model with {action_dim} "
                f"action channels ({_spell(self.action_layout)}). Use a model with more, or another layout."
            )
        mask = np.zeros(action_dim, dtype=bool)
        mask[self.action_channels] = True
        return mask

    def padding(self, kind: str, width: int) -> np.ndarray:
        """`state_padding` or `action_padding` (`kind` "state", "action") for `width` channels: float32 (width,)."""
        values = self.state_padding if kind == "state" else self.action_padding
        if len(values) not in (0, width):
            raise ValueError(
                f"Found {len(values)} numbers in {kind}_padding for a model with {width} {kind} channels. It has one "
                f"number per channel of the model, or none."
            )
        return np.array(values if values else [0.0] * width, dtype=np.float32)

    # ---- change of layout, rotation format and frame ------------------------------------------------------------

    def transform_state(self, state: ArrayLike) -> np.ndarray:
        """Robot state (..., S) to the model's layout (..., K): rot6d, absolute, gripper 0 closed and 1 open."""
        parts = _split(self._checked(state, "state"), self.state_layout)
        return self._join(parts, self._poses(parts), self.state_gripper_range)

    def transform_actions(self, actions: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Robot actions (..., H, D_robot) to the model's layout and frame (..., H, K), not yet normalised.

        `state` (..., S) is the robot's state when the chunk starts; `None` if the reference frame is absolute.
        Raises ValueError on a wrong width, a NaN, or a state that is needed and missing.
        """
        parts = _split(self._checked(actions, "action"), self.action_layout)
        poses = self._poses(parts)
        state_poses = self._state_poses(state)
        for arm, pose in poses.items():
            poses[arm] = to_reference_frame(pose, state_poses[arm], self.reference_frame)
        return self._join(parts, poses, self.action_gripper_range)

    def inverse_transform_actions(self, values: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Inverse of `transform_actions`: (..., H, K) to robot actions (..., H, D_robot); projects rot6d to SO(3)."""
        values = np.asarray(values, dtype=np.float64)
        if self.action_layout[0][0] == "native":
            return values
        layout = [(part, width) for part, width in CANONICAL_LAYOUT if part in dict(self.action_layout)]
        parts = _split(values, layout)
        state_poses = self._state_poses(state)
        closed, opened = self.action_gripper_range
        for arm in ("left", "right"):
            position, rotation = f"{arm}_ee_position", f"{arm}_ee_rotation"
            matrix = rot6d_to_matrix(parts[rotation]) if rotation in parts else None
            pose = (parts.get(position), matrix)
            if position in parts or rotation in parts:
                pose = from_reference_frame(pose, state_poses[arm], self.reference_frame)
            if position in parts:
                parts[position] = pose[0]
            if rotation in parts:
                parts[rotation] = matrix_to_rotation(pose[1], self.rotation_format)
            if f"{arm}_gripper" in parts:
                parts[f"{arm}_gripper"] = closed + parts[f"{arm}_gripper"] * (opened - closed)
        return np.concatenate([parts[part] for part, _ in self.action_layout], axis=-1)

    def _poses(self, parts: dict) -> dict[str, Pose]:
        """{arm: (position or None, rotation matrix or None)} of the robot's own parts, for the arms that they have."""
        poses = {}
        for arm in ("left", "right"):
            position, rotation = parts.get(f"{arm}_ee_position"), parts.get(f"{arm}_ee_rotation")
            matrix = None if rotation is None else rotation_to_matrix(rotation, self.rotation_format)
            if position is not None or matrix is not None:
                poses[arm] = (position, matrix)
        return poses

    def _state_poses(self, state: ArrayLike | None) -> dict[str, Pose]:
        if self.reference_frame == "absolute":
            return {"left": (None, None), "right": (None, None)}
        if state is None:
            raise ValueError(
                f"Found no state. Actions in reference_frame {self.reference_frame!r} are measured from the current "
                f"pose: pass the state that belongs to the chunk ({_spell(self.state_layout)})."
            )
        return self._poses(_split(self._checked(state, "state"), self.state_layout))

    @staticmethod
    def _join(parts: dict, poses: dict[str, Pose], gripper_range: tuple) -> np.ndarray:
        """Parts in the robot's units to the model's channels, in canonical order: (..., K)."""
        if "native" in parts:
            return parts["native"]
        closed, opened = gripper_range
        columns = []
        for part, _ in CANONICAL_LAYOUT:
            if part not in parts:
                continue
            arm = part.split("_")[0]
            if part.endswith("_position"):
                columns.append(poses[arm][0])
            elif part.endswith("_rotation"):
                columns.append(matrix_to_rot6d(poses[arm][1]))
            elif part.endswith("_gripper"):
                columns.append((parts[part] - closed) / (opened - closed))
            else:
                columns.append(parts[part])
        return np.concatenate(columns, axis=-1)

    # ---- the same, normalised -----------------------------------------------------------------------------------

    def encode_state(self, state: ArrayLike) -> np.ndarray:
        """Robot state (..., S) to normalised values (..., K) in [-1, 1]."""
        return normalize(self.transform_state(state), self._statistics_of("state"))

    def encode_actions(self, actions: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Robot actions (..., H, D_robot) and state (..., S) to normalised values (..., H, K) in [-1, 1]."""
        return normalize(self.transform_actions(actions, state), self._statistics_of("action"))

    def decode_actions(self, values: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Inverse of `encode_actions`: (..., H, K) and state (..., S) to robot actions (..., H, D_robot)."""
        return self.inverse_transform_actions(unnormalize(values, self._statistics_of("action")), state)

    def _statistics_of(self, kind: str) -> dict:
        if self.statistics is None or kind not in self.statistics:
            raise ValueError(
                f"Found no {kind} statistics in the embodiment. Without q01 and q99 nothing can be normalised. Run "
                f"`wallvla stats` on the dataset, which writes them into the processor."
            )
        return self.statistics[kind]

    def _checked(self, values: ArrayLike, kind: str) -> np.ndarray:
        """`values` as float64 of the right width and finite."""
        layout, width = (
            (self.state_layout, self.state_width) if kind == "state" else (self.action_layout, self.action_width)
        )
        values = np.asarray(values, dtype=np.float64)
        if values.ndim == 0 or values.shape[-1] != width:
            found = values.shape[-1] if values.ndim else "no"
            raise ValueError(
                f"Found {found} {kind} channels, the {kind}_layout has {width} ({_spell(layout)}). Pass the vector as "
                f"the layout says, or correct the layout."
            )
        if not np.isfinite(values).all():
            index = np.argwhere(~np.isfinite(values))[0]
            name = _channel_name(layout, index[-1])
            step = f" at step {index[-2]}" if kind == "action" and values.ndim > 1 else ""
            raise ValueError(
                f"Found {values[tuple(index)]} in {kind} channel {index[-1]} ({name}){step}. Every number "
                f"must be finite. Drop this frame from the dataset, or repair the sensor reading."
            )
        return values


def short_camera_key(key: str) -> str:
    """Short form of a dataset's camera key: "observation.images.front" is "front"."""
    return key.rsplit(".", 1)[-1]


def _pairs(values: Iterable, name: str, kind: type) -> tuple:
    """((name, value), ...) of a JSON list of pairs."""
    pairs = tuple(values)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], kind):
            raise ValueError(
                f"Found {pair!r} in {name}, which is a list of pairs: "
                + ("[dataset key, spoken label]." if kind is str else "[part, width].")
            )
    return tuple((first, second) for first, second in pairs)


def _channels(layout: tuple) -> np.ndarray:
    if any(part == "native" for part, _ in layout):
        return np.arange(dict(layout)["native"])
    present = {part for part, _ in layout}
    used = [np.full(width, part in present) for part, width in CANONICAL_LAYOUT]
    return np.flatnonzero(np.concatenate(used))


def _split(values: np.ndarray, layout: Iterable) -> dict[str, np.ndarray]:
    """Columns of `values` (..., width) by part, without the unused ones."""
    parts, start = {}, 0
    for part, width in layout:
        if part != "unused":
            parts[part] = values[..., start : start + width]
        start += width
    return parts


def _spell(layout: tuple) -> str:
    return ", ".join(f"{part} {width}" for part, width in layout)


def _channel_name(layout: tuple, channel: int) -> str:
    for part, width in layout:
        if channel < width:
            return f"{part}[{channel}]"
        channel -= width
    raise AssertionError("channel is inside the layout")
