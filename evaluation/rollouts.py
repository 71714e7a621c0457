"""Episodes for reinforcement learning: simulators in worker processes, one batch of policy calls for each worker.

    pool = RolloutPool(rollout_spec(["button-press-topdown-v3"], cameras=["front"]), num_workers=2)
    with pool:
        for episode in pool.play([{"number": 0, "task": "button-press-topdown-v3", "seed": 7}, ...], act):
            episode["success"], episode["rewards"]

The policy stays with the caller: `act` gets what all simulators of a worker see and returns what each shall do. A
worker that dies or hangs is replaced, and the episodes that it was playing are played again from their start with
the same seed: every episode is yielded once, whole or as dropped. The simulators may also be behind a socket
(`remote://host:port`).
"""

import contextlib
import select
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from .environments import Environment, check_name, make_environment, step_limit
from .workers import WorkerError, WorkerPool


ATTEMPTS = 3  # of an episode whose worker dies
REPLY_SECONDS = 600.0  # a worker that is silent for so long hangs


def rollout_spec(
    tasks: Sequence[str],
    cameras: Sequence[str] | None = None,
    image_size: int = 64,
    max_steps: int | None = 300,
    reward: Literal["success", "environment"] = "success",
) -> dict:
    """The plain description of the simulators that `RolloutPool` takes.

    Args:
        tasks: names from `environments.expand_names`.
        cameras: those that the policy looks at; None renders all.
        image_size: side of the policy's images in pixels.
        max_steps: an episode without success ends after this many steps. None: when the environment says so.
        reward: `"success"`: 1 at the step that solves the task, else 0. `"environment"`: the simulator's own.

    Raises:
        ValueError: an unknown task or reward, or more steps than the simulator has.
    """
    for task in tasks:
        check_name(task)
        limit = step_limit(task)
        if max_steps is not None and not 0 < max_steps <= (limit or max_steps):
            raise ValueError(f"max_steps is {max_steps}: episodes of {task} have 1 to {limit} steps.")
    if reward not in ("success", "environment"):
        raise ValueError(f"Unknown reward {reward!r}: use success or environment.")
    return {
        "job": "rollout",
        "tasks": list(tasks),
        "cameras": None if cameras is None else list(cameras),
        "image_size": image_size,
        "max_steps": max_steps,
        "reward": reward,
    }


@dataclass
class _Playing:
    """An episode in a simulator: what was executed and what it brought, chunk by chunk; what it shows now."""

    episode: dict
    rewards: list[float] = field(default_factory=list)
    executed: list[int] = field(default_factory=list)
    request: dict | None = None
    actions: np.ndarray | None = None


@dataclass
class _Station:
    """A worker: episodes that wait for it, those in its simulators by slot, and whether it owes a reply."""

    number: int
    queue: deque[dict]
    slots: dict[int, _Playing] = field(default_factory=dict)
    busy: bool = False

    def next_job(self, envs: int) -> dict:
        """Actions for the episodes that go on, and new episodes in the slots that are free."""
        jobs = {slot: {"actions": playing.actions.tolist()} for slot, playing in self.slots.items()}
        for slot in range(envs):
            if slot not in self.slots and self.queue:
                self.slots[slot] = _Playing(self.queue.popleft())
                jobs[slot] = {name: self.slots[slot].episode[name] for name in ("task", "seed")}
        return {"slots": jobs}

    def take(self, reply: dict[int, dict]) -> list[dict]:
        """Books what the simulators answered. Returns the episodes that are over."""
        over = []
        for slot, answer in reply.items():
            playing = self.slots[slot]
            if answer["executed"]:
                playing.rewards.append(answer["reward"])
                playing.executed.append(answer["executed"])
            if answer["over"]:
                del self.slots[slot]
                result = {name: answer[name] for name in ("success", "steps")}
                over.append({**playing.episode, **result, "rewards": playing.rewards, "executed": playing.executed})
            else:
                seen = {name: answer[name] for name in ("instruction", "observation")}
                playing.request = {"number": playing.episode["number"], "chunk": len(playing.rewards), **seen}
        return over


class RolloutPool:
    """Simulators in processes.

    Args:
        spec: from `rollout_spec`.
        num_workers: processes.
        envs_per_worker: simulators of each; so many observations come to the policy at once.
        log_dir: folder for the logs of the workers; by default a temporary one, which survives only an error.
        reply_seconds: a worker that answers nothing for so long is replaced.

    Attributes:
        lost: how often an episode was broken off so far, because its worker died.
    """

    def __init__(
        self,
        spec: dict,
        num_workers: int = 2,
        envs_per_worker: int = 8,
        log_dir: Path | str | None = None,
        reply_seconds: float = REPLY_SECONDS,
    ) -> None:
        if envs_per_worker < 1:
            raise ValueError(f"envs_per_worker must be at least 1, got {envs_per_worker}.")
        self._pool = WorkerPool(spec, num_workers, log_dir)
        self._envs_per_worker = envs_per_worker
        self._reply_seconds = reply_seconds
        self._stations: list[_Station] = []
        self.tasks: list[str] = spec["tasks"]
        self.lost = 0

    def __enter__(self) -> "RolloutPool":
        return self

    def __exit__(self, *exception) -> None:
        self._pool.close()

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._pool.workers]

    def play(self, episodes: Sequence[dict], act: Callable[[list[dict]], Sequence[np.ndarray]]) -> Iterator[dict]:
        """Plays episodes and yields each one when it is over.

        Which episodes come to one call of `act` together follows from their order alone, as long as no worker dies.

        Args:
            episodes: `number` (unique), `task`, `seed`.
            act: gets requests `{"number", "chunk", "instruction", "observation"}` of one worker and returns for each
                the actions to execute before the next one, (steps, action_dim) in robot units. Chunk 0 begins an
                episode, also again: then what came before is void.

        Yields:
            the episode with `success`, `steps`, and `rewards` and `executed` (steps) of each chunk; or, when its
            worker died in three attempts, with `dropped` True.

        Raises:
            WorkerError: more than half of the episodes had to be dropped; the message has the end of the log.
        """
        for station in self._stations:
            if station.busy:  # an earlier call was broken off, and the worker owes it a reply
                self._pool.restart(self._pool.workers[station.number])
        count = len(self._pool.workers)
        self._stations = stations = [_Station(number, deque(episodes[number::count])) for number in range(count)]
        failures = dict.fromkeys((episode["number"] for episode in episodes), 0)
        for station in stations:
            self._dispatch(station)
        while any(station.busy for station in stations):
            for station in self._ready(stations):
                try:
                    reply = self._pool.workers[station.number].receive()
                except WorkerError as error:
                    yield from self._recover(station, failures, error)
                else:
                    yield from station.take(reply)
                    going_on = list(station.slots.values())
                    if going_on:
                        chunks = act([playing.request for playing in going_on])
                        for playing, actions in zip(going_on, chunks, strict=True):
                            playing.actions = actions
                self._dispatch(station)

    def _dispatch(self, station: _Station) -> None:
        job = station.next_job(self._envs_per_worker)
        station.busy = bool(job["slots"])
        if station.busy:
            with contextlib.suppress(WorkerError):  # that it died is found when its reply is read
                self._pool.workers[station.number].send(job)

    def _ready(self, stations: list[_Station]) -> list[_Station]:
        """Those whose reply can be read, or whose worker is gone."""
        busy = {self._pool.workers[station.number].process.stdout: station for station in stations if station.busy}
        readable = select.select(list(busy), [], [], self._reply_seconds)[0]
        if not readable:
            for station in busy.values():
                self._pool.workers[station.number].process.kill()
        return [busy[stream] for stream in readable]

    def _recover(self, station: _Station, failures: dict[int, int], error: WorkerError) -> Iterator[dict]:
        """Replaces the worker of a station; its episodes are played again, or yielded as dropped."""
        broken = [playing.episode for playing in station.slots.values()]
        station.slots.clear()
        self.lost += len(broken)
        for episode in reversed(broken):
            failures[episode["number"]] += 1
            if failures[episode["number"]] < ATTEMPTS:
                station.queue.appendleft(episode)
            else:
                yield {**episode, "dropped": True}
        if 2 * sum(count == ATTEMPTS for count in failures.values()) > len(failures):
            self._pool.keep_logs()
            raise error
        self._pool.restart(self._pool.workers[station.number])


class RolloutWorker:
    """The worker's side: simulators that are made when needed and used again for the next episode of their task."""

    def __init__(self, spec: dict) -> None:
        self._spec = spec
        self._playing: dict[int, tuple[str, Environment]] = {}  # slot -> task, simulator
        self._free: dict[str, list[Environment]] = {task: [] for task in spec["tasks"]}

    def run(self, job: dict) -> dict[int, dict]:
        """Begins episodes and executes actions, slot by slot."""
        answers = {}
        for name, order in job["slots"].items():
            slot, result = int(name), {"executed": 0, "over": False}
            if "seed" in order:
                free = self._free[order["task"]]
                env = free.pop() if free else make_environment(order["task"], self._spec["image_size"])
                self._playing[slot] = (order["task"], env)
                env.reset_scene(order["seed"])
            else:
                result = self._execute(self._playing[slot][1], order["actions"])
            task, env = self._playing[slot]
            if result["over"]:
                self._free[task].append(env)
                del self._playing[slot]
            else:
                result |= {"instruction": env.instruction, "observation": env.observe(self._spec["cameras"])}
            answers[slot] = result
        return answers

    def _execute(self, env: Environment, actions: list[list[float]]) -> dict:
        """Executes a chunk until it ends, the task is solved or the time is over."""
        limit = env.max_steps if self._spec["max_steps"] is None else self._spec["max_steps"]
        total, executed, over = 0.0, 0, False
        for action in actions:
            result = env.step(np.asarray(action))
            executed += 1
            total += result.reward if self._spec["reward"] == "environment" else float(result.success)
            over = result.success or result.done or env.steps >= limit
            if over:
                break
        return {"reward": total, "executed": executed, "over": over, "success": result.success, "steps": env.steps}

    def close(self) -> None:
        """Closes the simulators."""
        for env in [
            *(env for _, env in self._playing.values()),
            *(env for free in self._free.values() for env in free),
        ]:
            env.close()
