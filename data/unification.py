"""From a source's own numbers to poses: what `LeRobotDataset(convert=...)` calls once per episode.

Wall-OSS-0.5, section 3.1.3: "for datasets that provide only joint states, we recover end-effector poses through
forward kinematics using the corresponding platform URDF". Conventions that an `Embodiment` can express (rotation
formats, axes, gripper ranges, reference frames) need no conversion: they are undone when actions are decoded.

Forward kinematics is `pytorch-kinematics` (the extra "urdf"): it reads URDF, computes whole batches to 1e-6, and is
pure Python on top of torch, which is here anyway. `pin` (Pinocchio) is faster for single configurations and knows
dynamics, which nothing here needs, for fourteen compiled packages.

T frames, S state and D action numbers.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from ..action_space_wallvla import (
    ROTATION_FORMATS,
    Pose,
    from_reference_frame,
    matrix_to_rotation,
    rotation_to_matrix,
)


class UrdfArm:
    """Forward kinematics of one serial chain of a URDF.

    Args:
        urdf: the file. Meshes are not needed.
        link: link whose pose is wanted, such as the flange or the tool centre.
        base: link in whose frame the pose is given. Default: the root.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no URDF, or no such link.
        ImportError: pytorch-kinematics is not installed.

    Attributes:
        joint_names (`list[str]`): the chain's joints in the order in which `poses` expects them.
        position_limits (`(J, 2)` float64): lower and upper, radians or metres; infinite where the URDF has none.
        velocity_limits (`(J,)` float64): largest speed to either side, per second; infinite where it has none.
    """

    def __init__(self, urdf: str | Path, link: str, base: str | None = None):
        try:
            import pytorch_kinematics
            import torch
            from lxml.etree import XMLSyntaxError
        except ImportError as error:
            raise ImportError('Forward kinematics needs pytorch-kinematics: pip install "wallvla[urdf]".') from error
        path = Path(urdf)
        try:
            # The parser prints a line for every attribute that URDF does not have, of which vendors' files are full.
            with redirect_stderr(io.StringIO()):
                chain = pytorch_kinematics.build_chain_from_urdf(path.read_bytes())
        except XMLSyntaxError as error:
            raise ValueError(f"{path} is no URDF: {error}.") from error
        links = [frame.link.name for frame in _frames(chain._root)]
        for name in (link, base):
            if name is not None and name not in links:
                raise ValueError(f"{path} has no link {name!r}; it has {', '.join(links)}.")
        serial = pytorch_kinematics.SerialChain(chain, link, root_frame_name=base or "")
        self._chain = serial.to(dtype=torch.float64)
        self.joint_names = list(serial.get_joint_parameter_names())
        self.position_limits = np.array(serial.get_joint_limits(), dtype=np.float64).T
        self.velocity_limits = np.array(serial.get_joint_velocity_limits()[1], dtype=np.float64)

    def poses(self, joints: np.ndarray) -> Pose:
        """Positions (T, 3) in metres and rotations (T, 3, 3) for joint positions (T, J), radians or metres."""
        matrices = self._chain.forward_kinematics(self._checked(joints)).get_matrix().numpy()
        return matrices[:, :3, 3], matrices[:, :3, :3]

    def poses_and_jacobians(self, joints: np.ndarray) -> tuple[Pose, np.ndarray]:
        """`poses`, and the geometric Jacobian (T, 6, J): velocity and angular velocity in the base's axes."""
        jacobians, matrices = self._chain.jacobian(self._checked(joints), ret_eef_pose=True)
        matrices = matrices.numpy()
        return (matrices[:, :3, 3], matrices[:, :3, :3]), jacobians.numpy()

    def _checked(self, joints: np.ndarray):
        """Joints (T, J) as a float64 tensor."""
        import torch

        joints = np.asarray(joints, dtype=np.float64)
        if joints.ndim != 2 or joints.shape[1] != len(self.joint_names):
            raise ValueError(
                f"Found joints of shape {joints.shape}; the chain has {len(self.joint_names)}: "
                f"{', '.join(self.joint_names)}. Correct the columns."
            )
        return torch.from_numpy(joints)


def _frames(frame) -> list:
    return [frame, *(each for child in frame.children for each in _frames(child))]


@dataclass(frozen=True)
class Arm:
    """One arm of a joint-space source.

    Args:
        link: end-effector link of the URDF.
        joints: columns of the joints in the state and action vectors, in the chain's order from the base.
        gripper: column of the gripper, if there is one.
        base: link in whose frame poses are given. Default: the URDF's root.
        degrees: whether the columns are in degrees.
    """

    link: str
    joints: Sequence[int]
    gripper: int | None = None
    base: str | None = None
    degrees: bool = False


class JointsToPoses:
    """Joint vectors to [position 3, axis-angle 3, gripper 1 if there is one] per arm, in the order of `arms`.

    Args:
        urdf: the robot's URDF.
        arms: its arms.
        joint_deltas: actions are displacements from the current joints instead of targets; grippers are targets.
    """

    def __init__(self, urdf: str | Path, arms: Sequence[Arm], joint_deltas: bool = False):
        if not arms:
            raise ValueError("Found no arms. Name at least one: its end-effector link and its joint columns.")
        self._arms = [(arm, UrdfArm(urdf, arm.link, arm.base)) for arm in arms]
        self._joint_deltas = joint_deltas

    def __call__(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States (T, S) and actions (T, D) in joints to float64 (T, K) and (T, K) in poses."""
        if self._joint_deltas:
            actions = actions.astype(np.float64)
            for arm, _ in self._arms:
                actions[:, list(arm.joints)] += states[:, list(arm.joints)]
        return self._vectors(states, "state"), self._vectors(actions, "action")

    def _vectors(self, values: np.ndarray, kind: str) -> np.ndarray:
        columns = []
        for arm, chain in self._arms:
            needed = [*arm.joints, *([] if arm.gripper is None else [arm.gripper])]
            if max(needed) >= values.shape[1]:
                raise ValueError(
                    f"The arm of link {arm.link} uses column {max(needed)}; the {kind} has {values.shape[1]} numbers."
                )
            joints = values[:, list(arm.joints)].astype(np.float64)
            position, rotation = chain.poses(np.deg2rad(joints) if arm.degrees else joints)
            columns += [position, matrix_to_rotation(rotation, "axis_angle")]
            if arm.gripper is not None:
                columns.append(values[:, arm.gripper : arm.gripper + 1])
        return np.concatenate(columns, axis=1)


class RelativeToAbsolute:
    """Per-frame relative end-effector commands to absolute targets: the pose of the state moved by the action.

    Args:
        position: columns (3) of the position in states and actions.
        rotation: columns of the rotation; may be empty.
        rotation_format: key of ROTATION_FORMATS, for states and actions.
        frame: "world" if displacements are along the axes of the world, "eef" along those of the end effector.
        action_position, action_rotation: columns in the actions, where they differ from those in the states.
        scale: what an action of 1 is, in metres; rotations are not scaled.
    """

    def __init__(
        self,
        position: Sequence[int],
        rotation: Sequence[int] = (),
        rotation_format: str = "axis_angle",
        frame: str = "world",
        action_position: Sequence[int] | None = None,
        action_rotation: Sequence[int] | None = None,
        scale: float = 1.0,
    ):
        if frame not in ("world", "eef") or (frame == "eef" and not rotation):
            raise ValueError(f"Found frame {frame!r}; it is world, or eef where the state has a rotation.")
        if rotation_format not in ROTATION_FORMATS:
            raise ValueError(f"Found rotation_format {rotation_format!r}; known are {', '.join(ROTATION_FORMATS)}.")
        self._state = (list(position), list(rotation))
        self._action = (list(action_position or position), list(action_rotation or rotation))
        width = ROTATION_FORMATS[rotation_format][0]
        for columns in (self._state, self._action):
            if len(columns[0]) != 3 or len(columns[1]) not in (0, width):
                raise ValueError(
                    f"Found {columns} columns; a position has 3 and a rotation {width} ({rotation_format})."
                )
        self._format, self._frame, self._scale = rotation_format, f"{frame}_relative", scale

    def __call__(self, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States (T, S) as they are, and actions (T, D) with absolute poses."""
        now, move = self._pose(states, self._state), self._pose(actions, self._action)
        move = (move[0] * self._scale, move[1])
        moved = from_reference_frame(
            tuple(None if half is None else half[:, None] for half in move), now, self._frame
        )  # a chunk of one step for every frame
        actions = actions.astype(np.float64)
        actions[:, self._action[0]] = moved[0][:, 0]
        if moved[1] is not None:
            actions[:, self._action[1]] = matrix_to_rotation(moved[1][:, 0], self._format)
        return states, actions

    def _pose(self, values: np.ndarray, columns: tuple[list[int], list[int]]) -> Pose:
        values = values.astype(np.float64)
        rotation = rotation_to_matrix(values[:, columns[1]], self._format) if columns[1] else None
        return values[:, columns[0]], rotation


def chain_conversions(*conversions):
    """One conversion that applies several, in the given order."""
    return partial(_convert_in_turn, conversions)


def _convert_in_turn(conversions, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for conversion in conversions:
        states, actions = conversion(states, actions)
    return states, actions


def read_conversion(path: str | Path):
    """The conversion of a YAML file:

        joints_to_poses:            # applied first
          urdf: panda.urdf          # relative to this file
          joint_deltas: false
          arms:
            - {link: panda_hand, joints: [0, 1, 2, 3, 4, 5, 6], gripper: 7}
        relative_to_absolute:
          {position: [0, 1, 2], rotation: [3, 4, 5], rotation_format: axis_angle, frame: eef}

    Raises:
        ValueError: no valid YAML, or unknown options.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    known = ("joints_to_poses", "relative_to_absolute")
    if not isinstance(values, dict) or not values or not set(values) <= set(known):
        raise ValueError(f"{path} holds {values!r}; it is a mapping of {' and '.join(known)}.")
    conversions = []
    if "joints_to_poses" in values:
        options = _only(values["joints_to_poses"], {"urdf", "arms", "joint_deltas"}, f"{path}: joints_to_poses")
        arm_options = {field.name for field in fields(Arm)}
        arms = [Arm(**_only(arm, arm_options, f"{path}: an arm")) for arm in options["arms"]]
        conversions.append(JointsToPoses(path.parent / options["urdf"], arms, options.get("joint_deltas", False)))
    if "relative_to_absolute" in values:
        names = {"position", "rotation", "rotation_format", "frame", "action_position", "action_rotation", "scale"}
        options = _only(values["relative_to_absolute"], names, f"{path}: relative_to_absolute")
        conversions.append(RelativeToAbsolute(**options))
    return conversions[0] if len(conversions) == 1 else chain_conversions(*conversions)


_NEEDED = ("urdf", "arms", "link", "joints", "position")


def _only(values, names: set[str], where: str) -> dict:
    """`values` if it is a mapping of `names` that has the needed ones."""
    if not isinstance(values, dict) or not set(values) <= names:
        raise ValueError(f"{where} is {values!r}; it is a mapping of {', '.join(sorted(names))}.")
    absent = [name for name in _NEEDED if name in names and name not in values]
    if absent:
        raise ValueError(f"{where} lacks {', '.join(absent)}.")
    return values
