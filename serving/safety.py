"""Rails between a policy and a robot: limits of value, velocity and jerk, and guards that stop.

    rails = SafetyRails(SafetyLimits(low=[-1, -1], high=[1, 1], max_velocity=[2, 2]), frequency=20)
    action = rails.limit(action)           # one action at a time, in the order of execution
    rails.check_state(state)               # raises SafetyStop

Needs numpy alone. Every intervention is logged under the logger "wallvla.serving.safety" and counted.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike


logger = logging.getLogger(__name__)


class SafetyStop(ValueError):
    """The robot must not go on; the message says why."""


@dataclass(frozen=True)
class SafetyLimits:
    """Limits in robot units, one number per channel of the action (D) or of the state; `None` leaves a limit out.

    low, high: smallest and largest action.
    max_velocity: change of the action per second.
    max_jerk: change per second of the action's acceleration (units per second cubed). Meant to cut spikes: a limit
        below what the policy does makes the robot swing around its targets.
    state_low, state_high: the robot stops outside of these.
    state_margin: with a policy's statistics, the robot stops where its state is further outside of [q01, q99] than
        this fraction of q99 - q01.
    max_observation_age_s: the robot stops when its newest actions rest on an older observation.

    Raises:
        ValueError: a limit that cannot hold.
    """

    low: tuple | None = None
    high: tuple | None = None
    max_velocity: tuple | None = None
    max_jerk: tuple | None = None
    state_low: tuple | None = None
    state_high: tuple | None = None
    state_margin: float | None = None
    max_observation_age_s: float | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> "SafetyLimits":
        """Limits of a JSON file with the fields above."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else values
        if not isinstance(values, dict) or unknown:
            raise ValueError(f"{path} must hold an object with some of {', '.join(known)}; found {unknown!r}.")
        return cls(**values)

    def __post_init__(self):
        for name in ("low", "high", "max_velocity", "max_jerk", "state_low", "state_high"):
            values = vars(self)[name]
            if values is not None:
                values = np.atleast_1d(np.asarray(values, dtype=np.float64))
                if values.ndim != 1 or not np.isfinite(values).all():
                    raise ValueError(
                        f"Found {name} {values.tolist()}; it is a list of finite numbers, one per channel."
                    )
                if name.startswith("max") and (values <= 0).any():
                    raise ValueError(f"Found {name} {values.tolist()}; every limit must be above 0.")
                object.__setattr__(self, name, tuple(values.tolist()))
        for low, high in (("low", "high"), ("state_low", "state_high")):
            low_values, high_values = vars(self)[low], vars(self)[high]
            if low_values is not None and high_values is not None:
                if len(low_values) != len(high_values) or np.greater(low_values, high_values).any():
                    raise ValueError(
                        f"Found {low} {low_values} and {high} {high_values}; {low} must not exceed {high}."
                    )
        for name in ("state_margin", "max_observation_age_s"):
            if vars(self)[name] is not None and not vars(self)[name] >= 0:
                raise ValueError(f"Found {name} {vars(self)[name]}; it must be 0 or more.")

    def check_width(self, action_dim: int) -> None:
        """Raises ValueError if a limit of the action does not have `action_dim` channels."""
        for name in ("low", "high", "max_velocity", "max_jerk"):
            values = vars(self)[name]
            if values is not None and len(values) != action_dim:
                raise ValueError(
                    f"Found {len(values)} numbers in {name}; the robot's action has {action_dim} channels."
                )


class SafetyRails:
    """Applies limits to a stream of actions.

    Where limits contradict each other, position wins over velocity and velocity over jerk: a robot that is about to
    leave its range stops there, however hard.

    Args:
        limits: see `SafetyLimits`.
        frequency: actions per second.
        state_statistics: q01 and q99 (S,) of the state, for `state_margin`.
    """

    def __init__(self, limits: SafetyLimits, frequency: float, state_statistics: dict | None = None) -> None:
        self.limits, self.frequency = limits, frequency
        self.interventions: Counter[str] = Counter()
        self._state_range = None
        if limits.state_margin is not None and state_statistics is not None:
            low, high = (np.asarray(state_statistics[name], dtype=np.float64) for name in ("q01", "q99"))
            margin = limits.state_margin * (high - low)
            self._state_range = low - margin, high + margin
        self.reset()

    def reset(self) -> None:
        """Forgets the last actions. Velocity is limited from the second action on, jerk from the fourth."""
        self._past: list[np.ndarray] = []  # the last three actions

    def limit(self, action: ArrayLike) -> np.ndarray:
        """The action (D,) that keeps all limits, given those before it.

        Raises:
            SafetyStop: a number is not finite. The history stays as it was.
        """
        wanted = np.asarray(action, dtype=np.float64)
        if not np.isfinite(wanted).all():
            self._stop("not_finite", f"The policy asked for {wanted.tolist()}; actions must be finite.")
        limits, step, past = self.limits, 1 / self.frequency, self._past
        position = wanted
        if len(past) == 3 and limits.max_jerk is not None:
            smooth = 3 * past[-1] - 3 * past[-2] + past[-3]  # the acceleration stays as it is
            allowed = np.asarray(limits.max_jerk) * step**3
            position = self._noted("jerk", position, np.clip(position, smooth - allowed, smooth + allowed))
        if past and limits.max_velocity is not None:
            reach = np.asarray(limits.max_velocity) * step
            position = self._noted("velocity", position, np.clip(position, past[-1] - reach, past[-1] + reach))
        if limits.low is not None or limits.high is not None:
            low = -np.inf if limits.low is None else limits.low
            high = np.inf if limits.high is None else limits.high
            position = self._noted("position", position, np.clip(position, low, high))
        self._past = [*past[-2:], position]
        return position

    def limit_chunk(self, chunk: ArrayLike) -> np.ndarray:
        """A chunk (H, D) with all limits kept inside of it; what the robot did before is forgotten."""
        self.reset()
        return np.stack([self.limit(action) for action in np.asarray(chunk)])

    def check_state(self, state: ArrayLike, statistics_state: ArrayLike | None = None) -> None:
        """Guards against states that the robot or the policy must not be in.

        Args:
            state: (S,) in robot units, against `state_low` and `state_high`.
            statistics_state: the state as the statistics see it, if that is not `state` itself.

        Raises:
            SafetyStop: names the channel, its value and its range.
        """
        state = np.asarray(state, dtype=np.float64)
        ranges = []
        if self.limits.state_low is not None or self.limits.state_high is not None:
            low = np.full(len(state), -np.inf) if self.limits.state_low is None else np.asarray(self.limits.state_low)
            high = (
                np.full(len(state), np.inf) if self.limits.state_high is None else np.asarray(self.limits.state_high)
            )
            ranges.append(("state_limit", state, low, high))
        if self._state_range is not None:
            seen = state if statistics_state is None else np.asarray(statistics_state, dtype=np.float64)
            ranges.append(("out_of_distribution", seen, *self._state_range))
        for reason, values, low, high in ranges:
            if values.shape != low.shape:
                raise ValueError(
                    f"Found a state of {values.shape} channels and limits of {low.shape}; they must agree."
                )
            inside = (values >= low) & (values <= high)  # False for NaN
            if not inside.all():
                channel = int(np.flatnonzero(~inside)[0])
                self._stop(
                    reason,
                    f"State channel {channel} is {values[channel]:.6g}, outside of [{low[channel]:.6g}, "
                    f"{high[channel]:.6g}].",
                )

    def check_age(self, age_s: float) -> None:
        """Raises SafetyStop if actions rest on an observation that is `age_s` seconds old, more than allowed."""
        limit = self.limits.max_observation_age_s
        if limit is not None and age_s > limit:
            self._stop(
                "stale", f"The newest observation behind the actions is {age_s:.3f} s old; the limit is {limit} s."
            )

    def _noted(self, reason: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        changed = np.abs(after - before) > 1e-9 * (1 + np.abs(before))
        if changed.any():
            self.interventions[reason] += 1
            channel = int(np.flatnonzero(changed)[0])
            logger.warning("%s limit: channel %d from %.6g to %.6g", reason, channel, before[channel], after[channel])
        return after

    def _stop(self, reason: str, message: str) -> None:
        self.interventions[reason] += 1
        logger.warning("stop (%s): %s", reason, message)
        raise SafetyStop(message)
