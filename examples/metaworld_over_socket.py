"""A simulated robot that asks a policy server for its actions; the process of the robot loads no model.

    wallvla serve runs/quickstart/hub --port 8000                       # in one terminal
    python examples/metaworld_over_socket.py --episodes 5               # in another one

`--scheduler` chooses how the robot lives with the server's latency: it waits (sync), or it goes on with the last chunk
and switches over (naive) or has the server continue that chunk (identity, vjp, prefix). The simulator is stepped at
`--frequency` in real time, so the latency counts.
"""

import argparse
import time

import numpy as np

from wallvla.evaluation.metaworld import EVALUATION_SEED_START, MetaWorldEnv
from wallvla.serving.chunking import OverlappingScheduler, SynchronousScheduler
from wallvla.serving.client import PolicyClient, RobotLoop
from wallvla.serving.safety import SafetyLimits, SafetyRails


def play(env: MetaWorldEnv, client: PolicyClient, options: argparse.Namespace, seed: int) -> bool:
    """One episode in real time; returns whether the task was solved."""
    env.reset_scene(seed)
    client.start_episode(seed=seed, task=env.instruction)
    if options.scheduler == "sync":
        scheduler = SynchronousScheduler(options.frequency, options.execute_steps)
    else:
        guidance = None if options.scheduler == "naive" else options.scheduler
        scheduler = OverlappingScheduler(options.frequency, options.execute_steps, guidance)
    rails = SafetyRails(SafetyLimits(low=[-1] * 4, high=[1] * 4, max_observation_age_s=5.0), options.frequency)
    gripper, due = 0.0, time.monotonic()

    def observe() -> dict:
        seen = env.observe(("front",))
        return {"observation.images.front": seen["images"]["front"], "observation.state": seen["state"]}

    with RobotLoop(client, scheduler, rails) as loop:
        while env.steps < options.max_steps and not env.success:
            action = loop.step(observe)
            # Without an action the hand stays where it is and the gripper as it is
            action = np.array([0, 0, 0, gripper]) if action is None else action
            gripper = action[3]
            env.step(action)
            due = max(due + 1 / options.frequency, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
    client.end_episode()
    return env.success


def main() -> None:
    """Plays episodes through a policy server and prints the successes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="ws://127.0.0.1:8000")
    parser.add_argument("--token")
    parser.add_argument("--task", default="button-press-topdown-v3")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--frequency", type=float, default=20.0, help="steps per second of real time")
    parser.add_argument("--execute-steps", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--scheduler", choices=["sync", "naive", "identity", "vjp", "prefix"], default="identity")
    options = parser.parse_args()
    with PolicyClient(options.server, options.token) as client, MetaWorldEnv(options.task, cameras=("front",)) as env:
        solved = []
        for seed in range(EVALUATION_SEED_START, EVALUATION_SEED_START + options.episodes):
            solved.append(play(env, client, options, seed))
            print(f"seed {seed}: {'solved' if solved[-1] else 'not solved'} in {env.steps} steps", flush=True)
        print(f"{sum(solved)} of {len(solved)}")


if __name__ == "__main__":
    main()
