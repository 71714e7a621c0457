"""When the steps of an action chunk happen, in seconds after the observation.

By default step j is the frame j after the observation. Other modes name their times; `LeRobotDataset` takes the frames
that lie there, or interpolates between the two neighbours.
"""

import numpy as np


def anchor_times(count: int, horizon_s: float) -> np.ndarray:
    """X-VLA's intention anchors: `count` points that summarise the next `horizon_s` seconds.

    Equal distances; the first lies one distance after the observation (the observation itself is the
    proprioception), the last at the horizon. float64 (count,).
    """
    if count < 1 or not horizon_s > 0:
        raise ValueError(f"Found {count} anchors over {horizon_s} s; at least one, over more than 0 s, is needed.")
    return np.arange(1, count + 1) * (horizon_s / count)


def strided_times(horizon: int, stride: int, fps: float) -> np.ndarray:
    """Temporal down-sampling: every `stride`-th frame, from the frame of the observation on. float64 (horizon,)."""
    if horizon < 1 or stride < 1:
        raise ValueError(f"Found {horizon} steps with stride {stride}; both are at least 1.")
    return np.arange(horizon) * (stride / fps)


def linear(lower: np.ndarray, upper: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Between `lower` and `upper` (..., D) at `fraction` (...,) of the way."""
    return lower + (upper - lower) * fraction[..., None]
