"""Joint trajectories of one arm through waypoints of its gripper, for many trajectories at once.

A motion from one waypoint to the next is a straight line of the gripper that turns about z, with minimum-jerk timing
(Flash and Hogan 1985). Inverse kinematics is solved at Chebyshev-Lobatto points of the line, each from the solution of
the one before, and the polynomial through them is the joint path q(s): its derivatives are exact, and so are the
recorded velocities q'(s) s'(t). Motions are stretched until the limits of the joints hold.

`pytorch_kinematics` solves single goals from random starts; here each goal has a good start and needs the same branch.

B trajectories, J joints, T frames, W waypoints (`motion_templates.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..action_space_wallvla import axes_matrix, matrix_to_quaternion
from .motion_templates import Workspace
from .unification import UrdfArm


FPS = 50
KNOTS = 9  # Chebyshev-Lobatto points of a motion
TOOL_SPEED = 0.5  # largest speed of the gripper, m/s
TURN_SPEED = 1.5  # largest rate of its heading, rad/s
FULL_SPEED_S = 0.3  # seconds a joint needs to its largest speed: URDFs have no limits of acceleration
GRIP_S = 0.4  # seconds in which the gripper opens or closes
IK_TOLERANCE = 1e-6  # metres and radians, at the knots
PATH_TOLERANCE = (2e-3, 1e-2)  # metres and radians from the line, in every frame
_IK_ITERATIONS = 40
_IK_STEP = 0.3  # largest change of a joint in an iteration, rad or m
_MARGIN = 1.01  # of a motion's duration over what the limits ask for between the points at which they are looked at
_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # the gripper's x axis to -z


@dataclass(frozen=True)
class ArmSpec:
    """What a URDF does not say.

    Args:
        urdf: file below the robots of `example-robot-data`.
        link: link that holds the gripper.
        tool_axes: its axes along which the gripper points, opens, and the third; see `Embodiment`.
        tool_m: from the link's origin to the grip point along the first, in metres.
        seed: joint positions near those at home, which choose the branch of the inverse kinematics.
        workspace: where objects may lie.
    """

    urdf: str
    link: str
    tool_axes: tuple[str, str, str]
    tool_m: float
    seed: tuple[float, ...]
    workspace: Workspace


@dataclass(frozen=True)
class Trajectory:
    """Frames at FPS: `joints` and `velocities` (T, J) in radians and radians per second, `gripper` (T, 1) 0 closed and
    1 open, `poses` (T, 7): position in metres and quaternion xyzw of the link's axes at the grip point; float64."""

    joints: np.ndarray
    velocities: np.ndarray
    gripper: np.ndarray
    poses: np.ndarray


def minimum_jerk(time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, velocity and acceleration of the minimum-jerk motion from 0 to 1 at `time` in [0, 1]."""
    return (
        time**3 * (10 + time * (6 * time - 15)),
        30 * time**2 * (1 - time) ** 2,
        60 * time * (1 - time) * (1 - 2 * time),
    )


def _lagrange(nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Barycentric weights (K,) and differentiation matrix (K, K) of the polynomial through K nodes (Berrut and
    Trefethen 2004)."""
    apart = nodes[:, None] - nodes + np.eye(len(nodes))
    weights = 1 / apart.prod(axis=1)
    matrix = weights / weights[:, None] / apart
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, -matrix.sum(axis=1))
    return weights, matrix


NODES = (1 - np.cos(np.pi * np.arange(KNOTS) / (KNOTS - 1))) / 2
_WEIGHTS, _DERIVATIVE = _lagrange(NODES)


def _basis(points: np.ndarray) -> np.ndarray:
    """Values (N, K) of the Lagrange polynomials of NODES at points (N,) in [0, 1]."""
    apart = points[:, None] - NODES
    hit = np.abs(apart) < 1e-14
    ratio = _WEIGHTS / np.where(hit, 1.0, apart)
    return np.where(hit.any(axis=1, keepdims=True), hit, ratio / ratio.sum(axis=1, keepdims=True))


_GRID = np.linspace(0, 1, 129)  # where speed and acceleration of a motion are looked at


def headings_to_rotations(headings: np.ndarray) -> np.ndarray:
    """Rotations (..., 3, 3) of a gripper (x points, y opens) that points down with the headings (...,)."""
    cosine, sine, zero = np.cos(headings), np.sin(headings), np.zeros_like(headings)
    rows = [[cosine, -sine, zero], [sine, cosine, zero], [zero, zero, zero + 1]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2) @ _DOWN


class PlannedArm:
    """Kinematics and planning of an arm.

    Args:
        spec: the arm.
        urdf: its URDF file.

    Raises:
        ValueError: the gripper cannot reach its home from `spec.seed`.

    Attributes:
        home (`(J,)` float64): joint positions before a task.
        position_limits (`(J, 2)`), velocity_limits, acceleration_limits (`(J,)`).
    """

    def __init__(self, spec: ArmSpec, urdf):
        self._arm = UrdfArm(urdf, spec.link)
        self._tool = axes_matrix(spec.tool_axes)
        self._offset = self._tool.T @ [spec.tool_m, 0.0, 0.0]
        self.joint_names = self._arm.joint_names
        self.position_limits, self.velocity_limits = self._arm.position_limits, self._arm.velocity_limits
        self.acceleration_limits = self.velocity_limits / FULL_SPEED_S
        x, z = spec.workspace.home
        goal = np.array([[x, 0.0, z]]), headings_to_rotations(np.zeros(1))
        home, solved = self.inverse(np.array([spec.seed]), *goal)
        if not solved[0]:
            raise ValueError(f"{spec.urdf} cannot reach its home x={x}, z={z} from seed {spec.seed}. Correct them.")
        self.home = home[0]

    def poses(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Grip points (N, 3) and rotations (N, 3, 3) of the gripper (x points, y opens) for joints (N, J)."""
        position, rotation = self._arm.poses(joints)
        return position + rotation @ self._offset, rotation @ self._tool.T

    def inverse(self, start: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Joint positions within the limits whose gripper has the given pose, by damped least squares.

        The damping is half the squared error (Sugihara 2011), so convergence is quadratic near a solution and steps
        stay finite near singularities.

        Args:
            start: joints (B, J) from which the solution is sought.
            position, rotation: as `poses` returns them, (B, 3) and (B, 3, 3).

        Returns:
            joints (B, J), and (B,) bool, whether the residual is below IK_TOLERANCE.
        """
        joints, solved = np.clip(start, *self.position_limits.T), np.zeros(len(start), dtype=bool)
        left = np.arange(len(start))
        for iteration in range(_IK_ITERATIONS + 1):
            (at, turned), jacobian = self._arm.poses_and_jacobians(joints[left])
            lever = turned @ self._offset
            twist = rotation[left] @ self._tool @ turned.swapaxes(1, 2)
            # sin(angle) axis of the rotation that is still missing; goals are less than a right angle apart.
            turn = np.stack([twist[:, 2, 1] - twist[:, 1, 2], twist[:, 0, 2] - twist[:, 2, 0],
                             twist[:, 1, 0] - twist[:, 0, 1]], axis=1) / 2  # fmt: skip
            error = np.concatenate([position[left] - at - lever, turn], axis=1)
            # A half turn has no sine either.
            done = (np.abs(error) < IK_TOLERANCE).all(axis=1) & (np.trace(twist, axis1=1, axis2=2) > 0)
            solved[left[done]] = True
            if done.all() or iteration == _IK_ITERATIONS:
                break
            left, jacobian, error, lever = left[~done], jacobian[~done], error[~done], lever[~done]
            jacobian[:, :3] += np.cross(jacobian[:, 3:], lever[:, :, None], axis=1)
            damping = (error**2).sum(axis=1)[:, None, None] / 2 + 1e-10
            square = jacobian @ jacobian.swapaxes(1, 2) + damping * np.eye(6)
            step = (jacobian.swapaxes(1, 2) @ np.linalg.solve(square, error[:, :, None]))[:, :, 0]
            step *= np.minimum(1.0, _IK_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-12))
            joints[left] = np.clip(joints[left] + step, *self.position_limits.T)
        return joints, solved

    def plan(self, waypoints: Sequence[np.ndarray]) -> list[Trajectory | str]:
        """One trajectory per array of waypoints (W, 5), or the reason why there is none: "unreachable" (no joint
        positions within the limits at a knot), "limits" or "path" (between the knots outside limits or tolerance).

        A trajectory does not depend on what else is planned with it. It starts at home, at rest.
        """
        lines = [_lines(each) for each in waypoints]
        knots = self._solve(lines)
        solved = [number for number, each in enumerate(knots) if each is not None]
        plans: list[Trajectory | str] = ["unreachable"] * len(lines)
        if not solved:
            return plans
        frames = [self._frames(waypoints[number], lines[number], knots[number]) for number in solved]
        joints = np.concatenate([each[0] for each in frames])
        position, rotation = self.poses(joints)
        wanted = np.concatenate([each[3] for each in frames])
        away = np.linalg.norm(position - wanted[:, :3], axis=1)
        twist = rotation @ headings_to_rotations(wanted[:, 3]).swapaxes(1, 2)
        turned = np.arccos(np.clip((np.trace(twist, axis1=1, axis2=2) - 1) / 2, -1, 1))
        on_path = (away < PATH_TOLERANCE[0]) & (turned < PATH_TOLERANCE[1])
        inside = ((joints >= self.position_limits[:, 0]) & (joints <= self.position_limits[:, 1])).all(axis=1)
        quaternion = matrix_to_quaternion(rotation @ self._tool)
        stop = 0
        for number, (at, velocity, gripper, _) in zip(solved, frames, strict=True):
            start, stop = stop, stop + len(at)
            if not inside[start:stop].all():
                plans[number] = "limits"
            elif not on_path[start:stop].all():
                plans[number] = "path"
            else:
                poses = np.concatenate([position[start:stop], _continuous(quaternion[start:stop])], axis=1)
                plans[number] = Trajectory(at, velocity, gripper, poses)
        return plans

    def _solve(self, lines: list[np.ndarray]) -> list[np.ndarray | None]:
        """Joints (M, K, J) at the knots of the M motions of each trajectory; None where one cannot be reached."""
        goals = [_along(each, NODES[1:]).reshape(-1, 4) for each in lines]
        lengths = np.array([len(each) for each in goals])
        now = np.tile(self.home, (len(lines), 1))
        found = [[self.home] for _ in lines]
        reached = np.ones(len(lines), dtype=bool)
        for step in range(lengths.max()):
            active = np.flatnonzero(reached & (step < lengths))
            if not len(active):
                break
            goal = np.stack([goals[number][step] for number in active])
            rotation = headings_to_rotations(goal[:, 3])
            now[active], reached[active] = self.inverse(now[active], goal[:, :3], rotation)
            for number in active:
                found[number].append(now[number].copy())
        index = [np.arange(len(each))[:, None] * (KNOTS - 1) + np.arange(KNOTS) for each in lines]
        return [np.stack(found[number])[index[number]] if reached[number] else None for number in range(len(lines))]

    def _durations(self, lines: np.ndarray, knots: np.ndarray) -> np.ndarray:
        """Frames (M,) that each motion takes at least under the limits of joints and gripper."""
        position, speed, acceleration = minimum_jerk(_GRID)
        basis = _basis(position)
        first = basis @ _DERIVATIVE @ knots  # (M, N, J)
        second = basis @ _DERIVATIVE @ _DERIVATIVE @ knots
        speeds = np.abs(first * speed[:, None]) / self.velocity_limits
        accelerations = np.abs(second * speed[:, None] ** 2 + first * acceleration[:, None]) / self.acceleration_limits
        seconds = np.maximum(speeds.max(axis=(1, 2)), np.sqrt(accelerations.max(axis=(1, 2)))) * _MARGIN
        distance = np.linalg.norm(lines[:, 1, :3] - lines[:, 0, :3], axis=1)
        turn = np.abs(lines[:, 1, 3] - lines[:, 0, 3])
        for length, limit in ((distance, TOOL_SPEED), (turn, TURN_SPEED)):
            seconds = np.maximum(seconds, length * speed.max() / limit)
        return np.ceil(seconds * FPS).astype(int)

    def _frames(self, waypoints: np.ndarray, lines: np.ndarray, knots: np.ndarray) -> tuple[np.ndarray, ...]:
        """Joints (T, J), velocities (T, J), gripper (T, 1) and the pose that is wanted (T, 4)."""
        counts, motion = self._durations(lines, knots), 0
        joints, velocities = [self.home[None]], [np.zeros((1, len(self.home)))]
        gripper, wanted = [waypoints[:1, 4:]], [waypoints[:1, :4]]
        for now, then in zip(waypoints[:-1], waypoints[1:], strict=True):
            if now[4] != then[4]:
                frames = round(GRIP_S * FPS)
                opening = now[4] + (then[4] - now[4]) * minimum_jerk(np.arange(1, frames + 1) / frames)[0]
                joints.append(np.repeat(joints[-1][-1:], frames, axis=0))
                velocities.append(np.zeros_like(joints[-1]))
                gripper.append(opening[:, None])
                wanted.append(np.repeat(then[None, :4], frames, axis=0))
                continue
            frames = counts[motion]
            place, speed, _ = minimum_jerk(np.arange(1, frames + 1) / frames)
            basis = _basis(place)
            joints.append(basis @ knots[motion])
            velocities.append(basis @ _DERIVATIVE @ knots[motion] * (speed * FPS / frames)[:, None])
            gripper.append(np.full((frames, 1), now[4]))
            wanted.append(_along(lines[motion : motion + 1], place)[0])
            motion += 1
        return tuple(np.concatenate(each) for each in (joints, velocities, gripper, wanted))


def _lines(waypoints: np.ndarray) -> np.ndarray:
    """Start and end (M, 2, 4) of the motions between waypoints: position and heading."""
    changes = waypoints[1:] != waypoints[:-1]
    moves, grips = changes[:, :4].any(axis=1), changes[:, 4]
    if not (moves ^ grips).all():
        raise ValueError("From one waypoint to the next either the pose changes or the gripper; here both or neither.")
    return np.stack([waypoints[:-1, :4], waypoints[1:, :4]], axis=1)[moves]


def _along(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Poses (M, N, 4) at places (N,) in [0, 1] of lines (M, 2, 4)."""
    return lines[:, :1] + (lines[:, 1:] - lines[:, :1]) * places[None, :, None]


def _continuous(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions (T, 4) with signs that do not jump; the largest entry of the first is positive."""
    steps = (quaternion[1:] * quaternion[:-1]).sum(axis=1)
    signs = np.concatenate([[np.sign(quaternion[0, np.abs(quaternion[0]).argmax()])], np.where(steps < 0, -1.0, 1.0)])
    return quaternion * np.cumprod(signs)[:, None]
