"""A LeRobot dataset of two arms that move and turn: what measures an action codec where Meta-World cannot, in degrees.

    python benchmarks/se3_motions.py --output runs/se3
    python benchmarks/action_codecs.py --datasets runs/se3/dataset --robot runs/se3/robot.json --output runs/codecs-se3

Each arm goes from pose to pose along minimum-jerk paths (positions within half a metre, turns of up to 120 degrees,
0.8 to 2.5 seconds each), closes or opens its gripper at some of them, and trembles as a teleoperated arm does: 0.5 mm
and 0.2 degrees below 8 Hz. The motions are made up; nothing here says what any real robot does.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from wallvla.data.lerobot_writer import LeRobotWriter
from wallvla.rotations_wallvla import axis_angle_to_matrix, matrix_to_axis_angle


FREQUENCY = 32
LAYOUT = [
    [f"{side}_{part}", width]
    for side in ("left", "right")
    for part, width in (("ee_position", 3), ("ee_rotation", 3), ("gripper", 1))
]
ROBOT = {
    "cameras": [["observation.images.front", "front view"]],
    "control_frequency": FREQUENCY,
    "action_horizon": FREQUENCY,
    "rotation_format": "axis_angle",
    "reference_frame": "world_relative",
    "state_layout": LAYOUT,
    "action_layout": LAYOUT,
}


def tremor(frames: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Noise (frames, width) of unit size without frequencies from 8 Hz on."""
    spectrum = np.fft.rfft(generator.normal(size=(frames, width)), axis=0)
    spectrum[np.fft.rfftfreq(frames, 1 / FREQUENCY) >= 8] = 0
    noise = np.fft.irfft(spectrum, n=frames, axis=0)
    return noise / noise.std(axis=0)


def arm_motion(frames: int, generator: np.random.Generator) -> np.ndarray:
    """Poses and gripper of one arm, (frames, 7): position in metres, axis-angle in radians, gripper 0 or 1."""
    position, rotation, gripper = generator.uniform(-0.25, 0.25, 3), np.eye(3), 1.0
    rows = []
    while len(rows) < frames:
        steps = int(generator.uniform(0.8, 2.5) * FREQUENCY)
        s = np.arange(1, steps + 1) / steps
        progress = 10 * s**3 - 15 * s**4 + 6 * s**5  # minimum jerk
        goal, axis = generator.uniform(-0.25, 0.25, 3), generator.normal(size=3)
        turn = axis / np.linalg.norm(axis) * generator.uniform(0, np.deg2rad(120))
        turned = axis_angle_to_matrix(progress[:, None] * turn) @ rotation  # (steps, 3, 3)
        for at in range(steps):
            rows.append((position + progress[at] * (goal - position), turned[at], gripper))
        position, rotation = goal, turned[-1]
        gripper = 1 - gripper if generator.random() < 0.5 else gripper
    noise = tremor(frames, 6, generator)
    shaken = axis_angle_to_matrix(np.deg2rad(0.2) * noise[:, 3:]) @ np.stack([row[1] for row in rows[:frames]])
    positions = np.stack([row[0] for row in rows[:frames]]) + 0.0005 * noise[:, :3]
    return np.hstack([positions, matrix_to_axis_angle(shaken), [[row[2]] for row in rows[:frames]]])


def main() -> None:
    """Writes `dataset` and `robot.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/se3")
    parser.add_argument("--episodes", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    folder, frames = Path(options.output), int(options.seconds * FREQUENCY) + 1
    names = [f"{part}_{channel}" for part, width in LAYOUT for channel in range(width)]
    vector = {"dtype": "float32", "shape": [len(names)], "names": names}
    features = {"observation.state": vector, "action": vector}
    with LeRobotWriter(folder / "dataset", fps=FREQUENCY, features=features, robot_type="two_arms") as writer:
        for _ in range(options.episodes):
            motion = np.hstack([arm_motion(frames, generator) for _ in range(2)]).astype(np.float32)
            for now, then in zip(motion[:-1], motion[1:], strict=True):  # the command is the next pose
                writer.add_frame({"observation.state": now, "action": then})
            writer.save_episode("move")
    (folder / "robot.json").write_text(json.dumps(ROBOT, indent=2) + "\n")
    print(f"wrote {options.episodes} episodes of {options.seconds:g} s to {folder}")


if __name__ == "__main__":
    main()
