"""Robots as data: action layouts and normalisation, every transform beside its inverse.

Shapes: `...` are leading dimensions, H action steps, K channels of the model that an embodiment uses. All functions
take anything `np.asarray` reads, CPU tensors included, and return float64 arrays.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

# All public names of the rotations, also those that are not used here: this is the place to import them from.
from .rotations_wallvla import (  # noqa: F401
    EULER_ORDERS,
    JOINT_FRAMES,
    REFERENCE_FRAMES,
    ROTATION_FORMATS,
    Pose,
    axes_matrix,
    axis_angle_to_matrix,
    compose,
    euler_to_matrix,
    from_joint_frame,
    from_reference_frame,
    interpolate_rotation,
    inverse,
    matrix_to_axis_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rot6d,
    matrix_to_rotation,
    quaternion_to_matrix,
    rot6d_to_matrix,
    rotation_functions,
    rotation_to_matrix,
    to_joint_frame,
    to_reference_frame,
)


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

# The unified space of "Rethinking VLA scaling" (equation 3): end effectors, joints, grippers, hands and the rest, so
# that robots of all kinds share one space. The paper gives no sizes; these are ours. A rotation is axis-angle here.
UNIFIED_LAYOUT = (
    ("left_ee_position", 3),
    ("left_ee_rotation", 3),
    ("right_ee_position", 3),
    ("right_ee_rotation", 3),
    ("left_joints", 7),
    ("right_joints", 7),
    ("left_gripper", 1),
    ("right_gripper", 1),
    ("left_hand", 12),
    ("right_hand", 12),
    ("base_velocity", 3),
    ("lift", 1),
    ("head", 2),
    ("waist", 3),
)
UNIFIED_DIM = 61
SLOTS = {"canonical": CANONICAL_LAYOUT, "unified": UNIFIED_LAYOUT}
# Of these parts a robot may have fewer numbers than there are channels; it fills the first ones.
ROOMY_PARTS = ("left_joints", "right_joints", "left_hand", "right_hand", "head", "waist")

ROT6D_LAYOUTS = ("rows", "columns", "interleaved")
NORMALIZATIONS = ("quantiles", "none")

# Channels whose q99 - q01 is below this get range 1: dividing by it would blow sensor noise up to the full [-1, 1].
MIN_RANGE = 1e-5
QUANTILES = ("q01", "q99")
STATISTICS = QUANTILES + ("mean", "std", "min", "max")


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
    `lift` (1), `head` (2); with `slots` "unified" also `left_joints` (1 to 7), `left_hand` (1 to 12), the same for
    `right`, `waist` (1 to 3), and `head` (1 or 2). Named parts go to fixed channels of the model (CANONICAL_LAYOUT:
    rotations as rot6d; UNIFIED_LAYOUT: as axis-angle). A layout of the single part `native` (any width) is used as it
    is, in the model's first channels. State layouts may also hold parts `unused`, which the model never sees.

    Args:
        cameras: dataset key -> spoken label, in the order of the prompt: {"observation.images.front": "front view"}.
            Empty: the model sees no image of this robot (text-to-action).
            Its JSON form is a list of pairs, because transformers sorts the keys of the dictionaries that it saves.
        control_frequency: action steps per second.
        action_horizon: action steps of a chunk, at most the model's.
        state_layout, action_layout: layouts of the robot's own vectors. An empty state layout: no proprioception.
        prompt: text of the system turn.
        rotation_format: how the robot writes rotations, in state and actions; a key of ROTATION_FORMATS.
        reference_frame: in which frame the *model* sees end-effector targets; see `to_reference_frame`. The robot's
            own targets are absolute. "absolute" changes nothing, so it also fits robots with relative commands.
            "joint_relative" and "joint_delta" are for native vectors; see `to_joint_frame`.
        joint_channels: numbers of the native action and state vectors that are joints, for these two frames.
        world_axes: the robot's axes that point forward, left and up: ("y", "-x", "z") if its y points forward.
        tool_axes: the axes of its end effector along which the gripper points, opens, and the third of a right-handed
            frame. The model sees x forward, y left, z up, and no rotation for a gripper that points forward and opens
            horizontally (Wall-OSS-0.5, section 3.1.3).
        state_gripper_range, action_gripper_range: the robot's value for [closed, open]; the model sees 0 and 1.
            [1, -1] is a gripper command where 1 closes.
        statistics: {"state": {...}, "action": {...}} of lists over channels: q01, q99, mean, std, min, max. Computed
            on `transform_state` and `transform_actions`, so *after* the change of layout and frame.
        domain: index of the soft prompt, for models that have them.
        state_padding, action_padding: what the model sees in its channels that the robot lacks: one normalised number
            for each channel of the model (those of the robot's own channels are not used). Empty: 0.
        slots: "canonical" or "unified": which channels of the model the named parts fill.
        model_rot6d: which six entries of a rotation the model sees in canonical slots; see `rot6d_to_matrix`. X-VLA
            has "columns" for LIBERO and "interleaved" for its other robots.
        normalization: "quantiles", or "none" for models that see metres and rot6d as they are (X-VLA); then
            `statistics` are not needed.
        robot_tag, arms, waist, mobile_base: what prompts say of the robot: its name; 1 or 2 arms, 0 for one that
            navigates; whether it has a waist or a mobile base that the policy moves.
        client_keys: what robots call their observations when they ask a policy server: ordered pairs of the client's
            key and what it holds, which is a key of `cameras`, "state" or "instruction". Several keys of "state" are
            joined in this order. Empty: see `observation_keys`.
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
    joint_channels: tuple = ()
    world_axes: tuple = ("x", "y", "z")
    tool_axes: tuple = ("x", "y", "z")
    client_keys: tuple = ()
    slots: str = "canonical"
    model_rot6d: str = "rows"
    normalization: str = "quantiles"
    robot_tag: str = ""
    arms: int = 1
    waist: bool = False
    mobile_base: bool = False

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
            **{
                name: list(vars(self)[name])
                for name in (
                    "state_gripper_range",
                    "action_gripper_range",
                    "state_padding",
                    "action_padding",
                    "joint_channels",
                    "world_axes",
                    "tool_axes",
                )
            },
            "client_keys": [list(pair) for pair in self.client_keys],
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
        for name in ("joint_channels", "world_axes", "tool_axes"):
            object.__setattr__(self, name, tuple(vars(self)[name]))
        object.__setattr__(self, "client_keys", _pairs(self.client_keys, "client_keys", str))
        self._check_scalars()
        self._check_client_keys()
        self._check_layout(self.state_layout, "state_layout")
        self._check_layout(self.action_layout, "action_layout")
        self._check_reference_frame()
        if self.statistics is not None:
            object.__setattr__(self, "statistics", self._checked_statistics(self.statistics))

    def _check_scalars(self):
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
        rotation_functions(self.rotation_format)
        for name, known in (("slots", SLOTS), ("model_rot6d", ROT6D_LAYOUTS), ("normalization", NORMALIZATIONS)):
            if vars(self)[name] not in known:
                raise ValueError(f"Found {name} {vars(self)[name]!r}. Known: {', '.join(known)}.")
        if self.arms not in (0, 1, 2):
            raise ValueError(f"Found {self.arms!r} arms. A robot has 1 or 2, or 0 if it navigates.")
        if self.reference_frame not in REFERENCE_FRAMES + JOINT_FRAMES:
            known = ", ".join(REFERENCE_FRAMES + JOINT_FRAMES)
            raise ValueError(f"Found reference_frame {self.reference_frame!r}. Known: {known}.")
        axes_matrix(self.world_axes)
        axes_matrix(self.tool_axes)
        for name, values in (("state", self.state_gripper_range), ("action", self.action_gripper_range)):
            if len(values) != 2 or values[0] == values[1]:
                raise ValueError(
                    f"Found {name}_gripper_range {list(values)}. It is the robot's value for [closed, open], two "
                    f"different numbers."
                )

    def _check_client_keys(self):
        keys, targets = [key for key, _ in self.client_keys], [target for _, target in self.client_keys]
        unknown = set(targets) - {*self.cameras, "state", "instruction"}
        repeated = {target for target in targets if target != "state" and targets.count(target) > 1}
        if unknown or repeated or len(set(keys)) < len(keys):
            raise ValueError(
                f"Found client_keys {[list(pair) for pair in self.client_keys]}. Each pairs a key of its own with one "
                f"of {', '.join(self.cameras)}, state, instruction; only state may come more than once."
            )
        needed = [*self.cameras, "instruction"] + ["state"] * bool(self.state_layout)
        missing = [target for target in needed if target not in targets]
        if self.client_keys and missing:
            raise ValueError(
                f"Found client_keys without {', '.join(missing)}. A robot has to send all that the prompt shows; add "
                f"a pair for each, or leave client_keys empty for the usual names."
            )

    @property
    def observation_keys(self) -> tuple:
        """`client_keys`, or the names that LeRobot and openpi use: the cameras' own, "observation.state", "prompt"."""
        if self.client_keys:
            return self.client_keys
        state = (("observation.state", "state"),) if self.state_layout else ()
        return (*((camera, camera) for camera in self.cameras), *state, ("prompt", "instruction"))

    def _check_layout(self, layout: tuple, name: str):
        widths = dict(SLOTS[self.slots])
        roomy = ROOMY_PARTS if self.slots == "unified" else ()
        rotation_width = ROTATION_FORMATS[self.rotation_format][0]
        widths.update(left_ee_rotation=rotation_width, right_ee_rotation=rotation_width)
        parts = [part for part, _ in layout if part != "unused"]
        for part, width in layout:
            if part not in widths and part != "native" and (part != "unused" or name == "action_layout"):
                raise ValueError(
                    f"Found part {part!r} in {name}. Known: {', '.join(widths)}, native (a robot that fits none of "
                    f"these)" + (", unused." if name == "state_layout" else ".")
                )
            fits = width <= widths[part] if part in roomy else width == widths.get(part, width)
            if not fits or width < 1:
                allowed = f"1 to {widths[part]}" if part in roomy else widths.get(part, "at least 1")
                raise ValueError(
                    f"Found width {width} for part {part!r} in {name}, which has {allowed}"
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

    def _check_joint_frame(self):
        in_state, in_action = dict(self.state_layout), dict(self.action_layout)
        room = min(in_state.get("native", 0), in_action.get("native", 0))
        numbers = self.joint_channels
        if (
            not numbers
            or not all(isinstance(n, int) and 0 <= n < room for n in numbers)
            or len(set(numbers)) < len(numbers)
        ):
            raise ValueError(
                f"Found reference_frame {self.reference_frame!r} and joint_channels {list(numbers)}. It needs native "
                f"state and action vectors, and the numbers of the joints in both (0 to {room - 1})."
            )

    def _check_reference_frame(self):
        if self.reference_frame in JOINT_FRAMES:
            self._check_joint_frame()
        if self.reference_frame == "absolute" or self.reference_frame in JOINT_FRAMES:
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
        """Channels (K,) of the model's state that this robot fills, ascending; the columns of `transform_state`."""
        return _channels(self.state_layout, SLOTS[self.slots])

    @cached_property
    def action_channels(self) -> np.ndarray:
        """Channels (K,) of the model's action that this robot uses, ascending; the columns of `transform_actions`."""
        return _channels(self.action_layout, SLOTS[self.slots])

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

    def channels_of(self, part: str) -> np.ndarray:
        """All channels of the model in the slots of a named part, whether this robot has it or not: (room,)."""
        slots = SLOTS[self.slots]
        index = [name for name, _ in slots].index(part)
        return sum(room for _, room in slots[:index]) + np.arange(slots[index][1])

    # ---- change of layout, rotation format and frame ------------------------------------------------------------

    def transform_state(self, state: ArrayLike) -> np.ndarray:
        """Robot state (..., S) to the model's layout (..., K): absolute, gripper 0 closed and 1 open."""
        parts = _split(self._checked(state, "state"), self.state_layout)
        return self._join(parts, self._poses(parts), self.state_gripper_range)

    def transform_actions(self, actions: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Robot actions (..., H, D_robot) to the model's layout and frame (..., H, K), not yet normalised.

        `state` (..., S) is the robot's state when the chunk starts; `None` if the reference frame is absolute.
        Raises ValueError on a wrong width, a NaN, or a state that is needed and missing.
        """
        actions = self._checked(actions, "action")
        if self.reference_frame in JOINT_FRAMES:
            return to_joint_frame(actions, self._needed_state(state), self.joint_channels, self.reference_frame)
        parts = _split(actions, self.action_layout)
        poses = self._poses(parts)
        state_poses = self._state_poses(state)
        for arm, pose in poses.items():
            poses[arm] = to_reference_frame(pose, state_poses[arm], self.reference_frame)
        return self._join(parts, poses, self.action_gripper_range)

    def inverse_transform_actions(self, values: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Inverse of `transform_actions`: (..., H, K) to robot actions (..., H, D_robot); projects rot6d to SO(3)."""
        values = np.asarray(values, dtype=np.float64)
        if self.reference_frame in JOINT_FRAMES:
            return from_joint_frame(values, self._needed_state(state), self.joint_channels, self.reference_frame)
        if self.action_layout[0][0] == "native":
            return values
        widths = dict(self.action_layout)
        layout = [
            (part, room if part.endswith("_rotation") else widths[part])
            for part, room in SLOTS[self.slots]
            if part in widths
        ]
        parts = _split(values, layout)
        state_poses = self._state_poses(state)
        closed, opened = self.action_gripper_range
        for arm in ("left", "right"):
            position, rotation = f"{arm}_ee_position", f"{arm}_ee_rotation"
            matrix = rotation_to_matrix(parts[rotation], self.model_rotation) if rotation in parts else None
            pose = (parts.get(position), matrix)
            if position in parts or rotation in parts:
                pose = from_reference_frame(pose, state_poses[arm], self.reference_frame)
            if position in parts:
                parts[position] = pose[0] @ axes_matrix(self.world_axes)
            if rotation in parts:
                matrix = axes_matrix(self.world_axes).T @ pose[1] @ axes_matrix(self.tool_axes)
                parts[rotation] = matrix_to_rotation(matrix, self.rotation_format)
            if f"{arm}_gripper" in parts:
                parts[f"{arm}_gripper"] = closed + parts[f"{arm}_gripper"] * (opened - closed)
        return np.concatenate([parts[part] for part, _ in self.action_layout], axis=-1)

    def _poses(self, parts: dict) -> dict[str, Pose]:
        """{arm: (position or None, rotation matrix or None)} in the model's axes, for the arms that the parts have."""
        poses = {}
        world, tool = axes_matrix(self.world_axes), axes_matrix(self.tool_axes)
        for arm in ("left", "right"):
            position, rotation = parts.get(f"{arm}_ee_position"), parts.get(f"{arm}_ee_rotation")
            matrix = None if rotation is None else world @ rotation_to_matrix(rotation, self.rotation_format) @ tool.T
            position = None if position is None else position @ world.T
            if position is not None or matrix is not None:
                poses[arm] = (position, matrix)
        return poses

    def _state_poses(self, state: ArrayLike | None) -> dict[str, Pose]:
        if self.reference_frame == "absolute":
            return {"left": (None, None), "right": (None, None)}
        return self._poses(_split(self._needed_state(state), self.state_layout))

    def _needed_state(self, state: ArrayLike | None) -> np.ndarray:
        if state is None:
            raise ValueError(
                f"Found no state. Actions in reference_frame {self.reference_frame!r} are measured from the current "
                f"pose: pass the state that belongs to the chunk ({_spell(self.state_layout)})."
            )
        return self._checked(state, "state")

    def interpolate_actions(self, lower: ArrayLike, upper: ArrayLike, fraction: ArrayLike) -> np.ndarray:
        """Robot actions (..., D_robot) at `fraction` (...,) between two; rotations turn, the rest is linear."""
        lower, upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
        fraction = np.asarray(fraction, dtype=np.float64)
        between = lower + (upper - lower) * fraction[..., None]
        ends = (_split(lower, self.action_layout), _split(upper, self.action_layout))
        for part, values in _split(between, self.action_layout).items():
            if part.endswith("_rotation"):
                first, last = (rotation_to_matrix(end[part], self.rotation_format) for end in ends)
                values[...] = matrix_to_rotation(interpolate_rotation(first, last, fraction), self.rotation_format)
        return between

    @property
    def model_rotation(self) -> str:
        """How the model sees rotations: a key of ROTATION_FORMATS, as wide as the slots' rotations."""
        return f"rot6d_{self.model_rot6d}" if self.slots == "canonical" else "axis_angle"

    def _join(self, parts: dict, poses: dict[str, Pose], gripper_range: tuple) -> np.ndarray:
        """Parts in the robot's units to the model's channels, in the order of the slots: (..., K)."""
        if "native" in parts:
            return parts["native"]
        closed, opened = gripper_range
        columns = []
        for part, _ in SLOTS[self.slots]:
            if part not in parts:
                continue
            arm = part.split("_")[0]
            if part.endswith("_position"):
                columns.append(poses[arm][0])
            elif part.endswith("_rotation"):
                columns.append(matrix_to_rotation(poses[arm][1], self.model_rotation))
            elif part.endswith("_gripper"):
                columns.append((parts[part] - closed) / (opened - closed))
            else:
                columns.append(parts[part])
        return np.concatenate(columns, axis=-1)

    # ---- the same, normalised -----------------------------------------------------------------------------------

    def encode_state(self, state: ArrayLike) -> np.ndarray:
        """Robot state (..., S) to normalised values (..., K), in [-1, 1] unless `normalization` is "none"."""
        values = self.transform_state(state)
        return values if self.normalization == "none" else normalize(values, self._statistics_of("state"))

    def encode_actions(self, actions: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Robot actions (..., H, D_robot) and state (..., S) to values (..., H, K), normalised as `encode_state`."""
        values = self.transform_actions(actions, state)
        return values if self.normalization == "none" else normalize(values, self._statistics_of("action"))

    def decode_actions(self, values: ArrayLike, state: ArrayLike | None) -> np.ndarray:
        """Inverse of `encode_actions`: (..., H, K) and state (..., S) to robot actions (..., H, D_robot)."""
        if self.normalization == "quantiles":
            values = unnormalize(values, self._statistics_of("action"))
        return self.inverse_transform_actions(values, state)

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


def stack_vectors(values: list, rows: list[int], name: str, dimensions: int) -> np.ndarray:
    """Vectors or chunks of samples of one robot as one float64 array; `rows` are their numbers in the batch.

    Raises ValueError for another number of dimensions, or shapes that differ.
    """
    values = [np.asarray(value, dtype=np.float64) for value in values]
    for value, row in zip(values, rows, strict=True):
        if value.ndim != dimensions or value.shape != values[0].shape:
            raise ValueError(
                f"Found {name} of shape {value.shape} in sample {row} and {values[0].shape} in sample {rows[0]} "
                f"of the same embodiment. A {name} has {dimensions} dimension(s) and its layout fixes the last."
            )
    return np.stack(values)


_PAIRS_HOLD = {
    "cameras": "[dataset key, spoken label].",
    "client_keys": "[key of the client, what it holds].",
    "state_layout": "[part, width].",
    "action_layout": "[part, width].",
}


def _pairs(values: Iterable, name: str, kind: type) -> tuple:
    """((name, value), ...) of a JSON list of pairs."""
    pairs = tuple(values)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[1], kind):
            raise ValueError(f"Found {pair!r} in {name}, which is a list of pairs: " + _PAIRS_HOLD[name])
    return tuple((first, second) for first, second in pairs)


def _channels(layout: tuple, slots: tuple) -> np.ndarray:
    widths = dict(layout)
    if "native" in widths:
        return np.arange(widths["native"])
    used = []
    for part, room in slots:
        width = room if part.endswith("_rotation") and part in widths else widths.get(part, 0)
        used.append(np.arange(room) < width)
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
