"""A LeRobot robot driven by a policy server through the stock `openpi-client`, in LeRobot's own environment.

    pip install lerobot openpi-client typing_extensions        # on the robot's computer; nothing of WallVLA
    wallvla serve ./my-checkpoint --host 0.0.0.0 --token-file token.txt     # where the model runs
    python examples/lerobot_robot.py --server ws://gpu-box:8000 --token-file token.txt --port /dev/ttyACM0 \
        --camera front=0 --task "pick up the red cup"

openpi-client asks for numpy 1; if LeRobot's environment has numpy 2, install it with `--no-deps` beside msgpack,
websockets and dm-tree: the client itself runs with both.

This loop waits for each chunk. For one that hides the latency see `RobotLoop` in `wallvla/serving/client.py`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from lerobot.cameras.opencv import OpenCVCameraConfig
from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    """Connects arm and server and runs until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="ws://127.0.0.1:8000")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--port", required=True, help="serial port of the arm")
    parser.add_argument("--id", default="follower", help="name of the arm's calibration")
    parser.add_argument("--camera", nargs="+", required=True, help="NAME=INDEX, names as in the training data")
    parser.add_argument("--task", required=True)
    parser.add_argument("--execute-steps", type=int, default=16, help="actions of each chunk before the next question")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()

    cameras = {}
    for item in options.camera:
        name, _, index = item.partition("=")
        cameras[name] = OpenCVCameraConfig(index_or_path=int(index), width=640, height=480, fps=30)
    token = None if options.token_file is None else options.token_file.read_text().strip()
    policy = WebsocketClientPolicy(host=options.server, api_key=token)
    metadata = policy.get_server_metadata()
    period = 1 / metadata["control_frequency"]
    # At most 5 degrees a step towards a target: the driver's own rail, beside those of the server
    robot = SO101Follower(
        SO101FollowerConfig(port=options.port, id=options.id, cameras=cameras, max_relative_target=5.0)
    )
    robot.connect()
    motors = list(robot.action_features)  # "shoulder_pan.pos", ...: the order of the training data
    try:
        policy.infer({"__ctrl__": "episode_start", "__task__": options.task})
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            seen = robot.get_observation()
            observation = {f"observation.images.{name}": seen[name] for name in cameras}
            observation["observation.state"] = np.array([seen[motor] for motor in motors], dtype=np.float32)
            for action in policy.infer(observation)["actions"][: options.execute_steps]:
                started = time.monotonic()
                robot.send_action(dict(zip(motors, action.tolist(), strict=True)))
                time.sleep(max(0.0, period - (time.monotonic() - started)))
        policy.infer({"__ctrl__": "episode_end"})
    finally:
        robot.disconnect()


if __name__ == "__main__":
    main()
