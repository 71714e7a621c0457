"""When a robot asks for actions, and which of them it executes at what time: no clock, no thread, no socket.

Time is an argument everywhere (seconds from any origin), so the same code runs in real time and in a simulation.
A chunk belongs to the instant of its observation: its action i is for `start + i / frequency`.

    scheduler = OverlappingScheduler(frequency=20, execute_steps=8, guidance="identity")
    each tick:  if scheduler.wants_chunk(now): send the observation with scheduler.ask(now)
                when the chunk is there:       scheduler.receive(chunk, now)
                action = scheduler.action(now)  # None: nothing to execute, hold still
"""

import math
from collections import deque

import numpy as np
from numpy.typing import ArrayLike


# Times that are meant to fall on the same step differ by rounding; a robot's clock is no better than this either
SLACK_S = 1e-6


class ActionQueue:
    """The chunk that is being executed, read by time.

    Args:
        frequency: actions per second of a chunk. The robot may read at any other rate.
        interpolate: between two actions go linearly from one to the other; right for absolute targets whose numbers
            can be averaged (joints, positions), wrong for displacements. False holds each action for its step.
    """

    def __init__(self, frequency: float, interpolate: bool = False) -> None:
        if not frequency > 0:
            raise ValueError(f"Found frequency {frequency}; it is actions per second, above 0.")
        self.frequency, self.interpolate = frequency, interpolate
        self.clear()

    def clear(self) -> None:
        """Forgets the chunk."""
        self._chunk = np.empty((0, 0))
        self._start = -math.inf

    def put(self, chunk: ArrayLike, start: float) -> None:
        """Replaces the chunk by `chunk` (H, D), whose first action is for the time `start`.

        Raises:
            ValueError: not (H, D), empty, or not finite.
        """
        chunk = np.array(chunk, dtype=np.float64)
        if chunk.ndim != 2 or 0 in chunk.shape or not np.isfinite(chunk).all():
            raise ValueError(f"Found a chunk of shape {chunk.shape}; it is (steps, channels), not empty and finite.")
        self._chunk, self._start = chunk, start

    @property
    def start(self) -> float:
        """The time of the observation behind the chunk; -inf without one."""
        return self._start

    @property
    def end(self) -> float:
        """The time at which nothing is left; -inf without a chunk."""
        return self._start + len(self._chunk) / self.frequency

    def at(self, now: float) -> np.ndarray | None:
        """The action (D,) for the time `now`; None before the chunk's start and after its end."""
        position = self._position(now)
        if not 0 <= position < len(self._chunk):
            return None
        index = int(position)
        if not self.interpolate or index + 1 == len(self._chunk):
            return self._chunk[index].copy()
        share = position - index
        return (1 - share) * self._chunk[index] + share * self._chunk[index + 1]

    def remaining(self, now: float) -> np.ndarray:
        """The actions (n, D) for `now`, `now + 1 / frequency`, ... as far as the chunk reaches."""
        count = len(self._chunk) - max(0, math.floor(self._position(now))) if len(self._chunk) else 0
        times = [now + step / self.frequency for step in range(max(0, count))]
        actions = [action for action in map(self.at, times) if action is not None]
        return np.stack(actions) if actions else np.empty((0, self._chunk.shape[1]))

    def _position(self, now: float) -> float:
        """The time `now` in steps of the chunk, moved onto a step that it only misses by rounding."""
        position = (now - self._start) * self.frequency
        nearest = round(position) if math.isfinite(position) else position
        return nearest if abs(position - nearest) < SLACK_S * self.frequency else position


class DelayEstimator:
    """How long the next reply may take: the longest of the last `window` replies, as the RTC paper does it.

    Args:
        window: replies that count.
        initial_s: the estimate before the first reply.
    """

    def __init__(self, window: int = 10, initial_s: float = 0.0) -> None:
        self._seconds = deque(maxlen=window)
        self.initial_s = initial_s

    def add(self, seconds: float) -> None:
        """Notes the time between an observation and the arrival of its chunk."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"Found a delay of {seconds} s; it is finite and not negative.")
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        """The estimate."""
        return max(self._seconds, default=self.initial_s)

    def steps(self, frequency: float) -> int:
        """The estimate in whole steps, rounded up."""
        return math.ceil(self.seconds * frequency - SLACK_S * frequency)


class SynchronousScheduler:
    """Ask, wait, execute `execute_steps` actions, ask again. The robot holds still while it waits."""

    def __init__(self, frequency: float, execute_steps: int, interpolate: bool = False) -> None:
        if execute_steps < 1:
            raise ValueError(f"Found execute_steps {execute_steps}; it is at least 1.")
        self.queue = ActionQueue(frequency, interpolate)
        self.delay = DelayEstimator()
        self.execute_steps = execute_steps
        self.reset()

    def reset(self) -> None:
        """Starts an episode: nothing to execute, no question open. What was learnt about delays stays."""
        self.queue.clear()
        self._asked_at: float | None = None
        self.observed_at = -math.inf  # when the observation behind the current actions was made

    @property
    def waiting(self) -> bool:
        """Whether a question is open."""
        return self._asked_at is not None

    def wants_chunk(self, now: float) -> bool:
        """Whether to send an observation now."""
        return not self.waiting and now >= self.queue.end - SLACK_S

    def ask(self, now: float) -> dict:
        """Notes that the observation of `now` is sent; returns the options to send along."""
        self._asked_at = now
        return {}

    def receive(self, chunk: ArrayLike, now: float) -> None:
        """Takes the answer to the open question; the robot begins it now."""
        self.delay.add(now - self._asked_at)
        self.queue.put(np.asarray(chunk)[: self.execute_steps], now)
        self.observed_at, self._asked_at = self._asked_at, None

    def give_up(self) -> None:
        """Closes the open question without an answer (the server was busy, the connection broke)."""
        self._asked_at = None

    def action(self, now: float) -> np.ndarray | None:
        """What to execute now, (D,), or None: hold still."""
        return self.queue.at(now)


class OverlappingScheduler:
    """Asks while the robot goes on with the chunk before. What passed while the answer was made is skipped.

    Args:
        frequency: actions per second of a chunk.
        execute_steps: ask again after so many steps; later if an answer takes longer than that.
        guidance: None switches over wherever the chunks differ (naive); "identity", "vjp" or "prefix" send the old
            chunk's remaining actions along, and the server makes the new chunk continue them.
        interpolate: see `ActionQueue`.
        initial_delay_s: the expected delay of the first answers.
    """

    def __init__(
        self,
        frequency: float,
        execute_steps: int,
        guidance: str | None = None,
        interpolate: bool = False,
        initial_delay_s: float = 0.0,
    ) -> None:
        if execute_steps < 1:
            raise ValueError(f"Found execute_steps {execute_steps}; it is at least 1.")
        self.queue = ActionQueue(frequency, interpolate)
        self.delay = DelayEstimator(initial_s=initial_delay_s)
        self.execute_steps, self.guidance = execute_steps, guidance
        self.reset()

    def reset(self) -> None:
        """Starts an episode: nothing to execute, no question open. What was learnt about delays stays."""
        self.queue.clear()
        self._asked_at: float | None = None
        self._last_asked = -math.inf
        self.observed_at = -math.inf  # when the observation behind the current actions was made

    @property
    def waiting(self) -> bool:
        """Whether a question is open."""
        return self._asked_at is not None

    def wants_chunk(self, now: float) -> bool:
        """Whether to send an observation now."""
        due = self._last_asked + self.execute_steps / self.queue.frequency
        return not self.waiting and (now >= due - SLACK_S or self.queue.at(now) is None)

    def ask(self, now: float) -> dict:
        """Notes that the observation of `now` is sent; returns the options to send along."""
        self._asked_at = self._last_asked = now
        remaining = self.queue.remaining(now)
        if self.guidance is None or not len(remaining):
            return {}
        delay = min(self.delay.steps(self.queue.frequency), len(remaining))
        return {"guidance": self.guidance, "previous": remaining.astype(np.float32), "delay": delay}

    def receive(self, chunk: ArrayLike, now: float) -> None:
        """Takes the answer to the open question; its first actions are for times that have passed.

        An answer that is later than its whole chunk is executed from its beginning, as a waiting robot would do:
        otherwise a robot whose server is that slow would never move.
        """
        self.delay.add(now - self._asked_at)
        too_late = now >= self._asked_at + len(chunk) / self.queue.frequency - SLACK_S
        self.queue.put(chunk, now if too_late else self._asked_at)
        self.observed_at, self._asked_at = self._asked_at, None

    def give_up(self) -> None:
        """Closes the open question without an answer (the server was busy, the connection broke)."""
        self._asked_at = None

    def action(self, now: float) -> np.ndarray | None:
        """What to execute now, (D,), or None: the chunk ran out, hold still."""
        return self.queue.at(now)
