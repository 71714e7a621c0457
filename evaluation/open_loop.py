"""Open loop: predicted against demonstrated chunks on episodes that were not trained on, in physical units."""

from collections.abc import Sequence

import numpy as np

from .demonstrations import Demonstration
from .policy import Policy


def open_loop_metrics(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    is_pad: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> dict:
    """Errors of N chunks of H steps and D dimensions.

    Args:
        predicted, demonstrated: (N, H, D) in robot units.
        is_pad: bool (N, H), True where the demonstration had already ended; those steps count nowhere.
        names: of the D dimensions, by default their numbers.

    Returns:
        `mae`, `rmse`: {name: error in the unit of that dimension};
        `mae_by_step`: {name: list of H errors}, None at steps that no chunk has;
        `chunks`, `steps`: how many were compared.

    Raises:
        ValueError: shapes that do not agree, nothing to compare, or predictions that are not finite.
    """
    predicted, demonstrated = np.asarray(predicted, np.float64), np.asarray(demonstrated, np.float64)
    if predicted.ndim != 3 or predicted.shape != demonstrated.shape:
        raise ValueError(f"Expected two arrays (N, H, D), got {predicted.shape} and {demonstrated.shape}.")
    valid = np.ones(predicted.shape[:2], bool) if is_pad is None else ~np.asarray(is_pad, bool)
    if valid.shape != predicted.shape[:2]:
        raise ValueError(f"is_pad has shape {valid.shape}, but the chunks have {predicted.shape[:2]} (chunks, steps).")
    if not valid.any():
        raise ValueError("There is no step to compare: all are padding.")
    if not np.isfinite(predicted[valid]).all():
        raise ValueError("The predicted actions hold values that are not finite.")
    names = [str(index) for index in range(predicted.shape[2])] if names is None else list(names)
    error = np.where(valid[..., None], predicted - demonstrated, 0.0)
    count, count_by_step = valid.sum(), valid.sum(axis=0)
    absolute_by_step = np.abs(error).sum(axis=0)  # (H, D)
    mae = absolute_by_step.sum(axis=0) / count
    rmse = np.sqrt((error**2).sum(axis=(0, 1)) / count)
    return {
        "chunks": len(predicted),
        "steps": int(count),
        "mae": dict(zip(names, mae.tolist(), strict=True)),
        "rmse": dict(zip(names, rmse.tolist(), strict=True)),
        "mae_by_step": {
            name: [float(total / n) if n else None for total, n in zip(column, count_by_step, strict=True)]
            for name, column in zip(names, absolute_by_step.T, strict=True)
        },
    }


def predict_demonstration(
    policy: Policy, demonstration: Demonstration, every: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lets a policy predict along a demonstration without ever acting.

    Args:
        policy: what predicts.
        demonstration: a recorded episode of T steps.
        every: steps between two predictions.

    Returns:
        `starts` (N,), `predicted` (N, H, D), `demonstrated` (N, H, D), `is_pad` (N, H). Steps after the end of the
        demonstration repeat its last action and are padding.
    """
    policy.reset(demonstration.seed)
    length = len(demonstration.actions)
    starts = np.arange(0, length, every)
    predicted = []
    for start in starts:
        images = {camera: demonstration.frames[camera][start] for camera in policy.cameras}
        observation = {"images": images, "state": demonstration.states[start]}
        predicted.append(policy.act(observation, demonstration.instruction))
    predicted = np.stack(predicted)
    steps = starts[:, None] + np.arange(predicted.shape[1])
    return starts, predicted, demonstration.actions[np.minimum(steps, length - 1)], steps >= length


def format_open_loop(metrics: dict, units: Sequence[str]) -> str:
    """The errors as an aligned table; `units` in the order of the dimensions."""
    lines = [f"{'dimension':<12}{'MAE':>10}{'RMSE':>10}  unit"]
    for (name, mae), unit in zip(metrics["mae"].items(), units, strict=True):
        lines.append(f"{name:<12}{mae:>10.4f}{metrics['rmse'][name]:>10.4f}  {unit}")
    return "\n".join(lines)
