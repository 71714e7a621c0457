"""A small gymnasium environment for tests: a dot has to reach a goal. It misbehaves when the environment says so."""

import os
import signal
import time

import gymnasium
import numpy as np


class ToyEnv(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Dict(
        {
            "agent_pos": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            "goal": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
        }
    )
    action_space = gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed = seed
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self.observation(), {}

    def step(self, action):
        if os.environ.get("TOY_THROWS_AT") == str(self.seed):
            raise ZeroDivisionError("the simulation exploded")
        self.position = np.clip(self.position + action, -1, 1)
        distance = np.abs(self.position - self.goal).max()
        solved = bool(distance < 0.1)
        return self.observation(), 1 - distance / 2, solved, False, {"is_success": solved}

    def observation(self):
        nan = os.environ.get("TOY_NAN") == "1"
        state = np.full(2, np.nan) if nan else self.position
        return {"agent_pos": state.astype(np.float32), "goal": self.goal.astype(np.float32)}

    def render(self):
        frame = np.zeros((32, 32, 3), np.uint8)
        for point, channel in ((self.position, 0), (self.goal, 1)):
            x, y = (15.5 + 15 * point).astype(int)
            frame[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, channel] = 255
        return frame


class DiscreteEnv(ToyEnv):
    """The same with three actions and without a word about success."""

    action_space = gymnasium.spaces.Discrete(3)

    def step(self, action):
        assert action in (0, 1, 2) and isinstance(action, int)
        observation, reward, solved, truncated, _ = super().step(np.array([action - 1, 0]) / 10)
        return observation, reward, solved, truncated, {}


class LineEnv(gymnasium.Env):
    """A dot on a line has three steps to go to a goal on one of the two sides; the reward is how near it comes.

    It kills its process, or never answers, in episodes that the environment names.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if str(seed) in os.environ.get("TOY_DIES_AT", "").split():
            os.kill(os.getpid(), signal.SIGKILL)
        if str(seed) in os.environ.get("TOY_HANGS_AT", "").split():
            time.sleep(3600)
        self.position, self.goal = 0.0, self.np_random.choice([-0.6, 0.6])
        return self.observation(), {}

    def step(self, action):
        self.position = float(np.clip(self.position + 0.3 * action[0], -1, 1))
        distance = abs(self.position - self.goal)
        return self.observation(), 1 - distance, distance < 0.2, False, {"is_success": bool(distance < 0.2)}

    def observation(self):
        return np.array([self.position, self.goal], np.float32)

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


gymnasium.register("Toy-v0", ToyEnv, max_episode_steps=40)
gymnasium.register("ToyDiscrete-v0", DiscreteEnv, max_episode_steps=40)
gymnasium.register("Line-v0", LineEnv, max_episode_steps=3)
