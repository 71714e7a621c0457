"""Figures of a run's report, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from .grounding import Box
from .video import caption_strip, enlarge


DEMONSTRATED = "#444444"
PREDICTED = "#d1495b"
LINES = ("#2e6f95", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#5c5c5c")
TRUE_BOX = (64, 220, 90)
ANSWERED_BOX = (255, 70, 90)


def plot_losses(logs: Sequence[Mapping], path: Path | str, keys: Sequence[str] | None = None) -> Path:
    """Loss curves, one panel each: raw values light, a running mean on top.

    Args:
        logs: `trainer.state.log_history`: dictionaries with `step` and values; entries without a key are skipped.
        path: the picture to write.
        keys: what to draw, by default every key of the logs that ends in "loss".

    Raises:
        ValueError: the logs hold none of the keys.
    """
    if keys is None:
        keys = sorted(
            {key for entry in logs for key in entry if key.endswith("loss")}, key=lambda key: (len(key), key)
        )
    curves = {key: [(entry["step"], entry[key]) for entry in logs if key in entry and "step" in entry] for key in keys}
    curves = {key: np.array(points, dtype=np.float64) for key, points in curves.items() if points}
    if not curves:
        raise ValueError(f"The logs hold none of {list(keys)}: nothing to draw.")
    figure = Figure(figsize=(3.6 * len(curves), 3.0), layout="constrained")
    for axis, color, (key, points) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], _cycle(len(curves)), curves.items(), strict=True
    ):
        steps, values = points.T
        axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        axis.plot(steps, _running_mean(values), color=color, linewidth=1.8)
        if (values > 0).all() and values.max() > 20 * values.min():
            axis.set_yscale("log")
        axis.set_title(key.replace("_", " "), fontsize=10)
        axis.set_xlabel("training step")
        axis.set_ylabel("loss")
        _tidy(axis)
    return _save(figure, path)


def plot_open_loop(
    starts: np.ndarray,
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    is_pad: np.ndarray,
    names: Sequence[str],
    units: Sequence[str],
    frequency: float,
    path: Path | str,
    title: str = "",
) -> Path:
    """Predicted chunks over the demonstrated actions of one episode, one panel per dimension.

    Args:
        starts, predicted, demonstrated, is_pad: from `open_loop.predict_demonstration`.
        names, units: of the D dimensions.
        frequency: actions per second.
        path: the picture to write.
        title: of the figure.
    """
    steps = starts[:, None] + np.arange(predicted.shape[1])
    truth = dict(zip(steps[~is_pad].tolist(), demonstrated[~is_pad], strict=True))
    truth_steps = np.array(sorted(truth))
    truth_values = np.stack([truth[step] for step in truth_steps.tolist()])
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.1 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for dimension, (name, unit) in enumerate(zip(names, units, strict=True)):
        axis = axes.flat[dimension]
        axis.plot(truth_steps / frequency, truth_values[:, dimension], color=DEMONSTRATED, linewidth=2.2, alpha=0.8)
        for chunk, chunk_steps, pad in zip(predicted, steps, is_pad, strict=True):
            axis.plot(chunk_steps[~pad] / frequency, chunk[~pad, dimension], color=PREDICTED, linewidth=1.1)
            axis.plot(chunk_steps[0] / frequency, chunk[0, dimension], ".", color=PREDICTED, markersize=4)
        axis.set_ylabel(f"{name} [{unit}]")
        _tidy(axis)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("time [s]")
    figure.legend(
        handles=[
            axes[0, 0].plot([], [], color=DEMONSTRATED, linewidth=2.2, label="demonstrated")[0],
            axes[0, 0].plot([], [], ".-", color=PREDICTED, linewidth=1.1, label="predicted chunks")[0],
        ],
        loc="outside upper right",
        ncols=2,
        frameon=False,
    )
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return _save(figure, path)


def plot_open_loop_report(report: Mapping, units: Sequence[str], path: Path | str, title: str = "") -> Path:
    """Error by horizon step with the spread between noise seeds, one panel per dimension, and what the inputs change.

    Args:
        report: from `open_loop.open_loop_report`.
        units: of the dimensions.
        path: the picture to write.
        title: of the figure.
    """
    names = list(report["metrics"]["mae"])
    panels = len(names) + 1
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.9 * columns, 2.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name, unit in zip(axes.flat, names, units, strict=False):
        error = np.array(report["metrics"]["mae_by_step"][name], dtype=np.float64)  # None becomes nan, a gap
        axis.plot(error, color=PREDICTED, linewidth=1.8, label="error (MAE)")
        axis.plot(report["noise_spread_by_step"][name], color=DEMONSTRATED, linewidth=1.2, label="spread of noise")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name} [{unit}]", fontsize=10)
        axis.set_xlabel("step of the chunk")
        _tidy(axis)
    axes.flat[0].legend(fontsize=8, frameon=False)
    axis = axes.flat[len(names)]
    probes = list(report["probes"])[::-1]
    axis.barh(probes, [report["probes"][probe]["ratio"] for probe in probes], color=LINES[0])
    axis.axvline(1, color=DEMONSTRATED, linewidth=1)
    axis.set_title("change of the actions / spread of noise", fontsize=10)
    _tidy(axis)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    return _save(figure, path)


def grounding_picture(
    image: np.ndarray,
    caption: str,
    true_box: Box,
    answered_box: Box | None = None,
    answered_point: tuple[float, float] | None = None,
    side: int = 384,
) -> np.ndarray:
    """An image with the true box (green) and the model's answer (red), enlarged, uint8 (h, w, 3) with a caption."""
    factor = max(1, round(side / max(image.shape[:2])))
    picture = Image.fromarray(enlarge(image, factor))
    draw = ImageDraw.Draw(picture)
    for box, color in ((true_box, TRUE_BOX), (answered_box, ANSWERED_BOX)):
        if box is not None:
            # A model may answer corners in the wrong order: draw the box between them.
            left, right = sorted((box[0] * factor, box[2] * factor))
            top, bottom = sorted((box[1] * factor, box[3] * factor))
            draw.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=color, width=3)
    if answered_point is not None:
        x, y = answered_point[0] * factor, answered_point[1] * factor
        draw.line([x - 9, y, x + 9, y], fill=ANSWERED_BOX, width=3)
        draw.line([x, y - 9, x, y + 9], fill=ANSWERED_BOX, width=3)
    return np.concatenate([np.asarray(picture), caption_strip(caption, picture.width)])


def save_pictures(pictures: Sequence[np.ndarray], path: Path | str, columns: int = 3) -> Path:
    """Writes pictures of one size as a sheet, row by row, with white in the empty places."""
    if len(pictures) == 0:
        raise ValueError(f"There are no pictures to write to {path}.")
    gap = 6
    height, width = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
    return path


def principal_components(points: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, K) on their first principal axes, (N, count), and the share of the variance on each, (count,)."""
    centered = points - points.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    return left[:, :count] * sizes[:count], sizes[:count] ** 2 / (sizes**2).sum()


def plot_domains(tokens: Mapping[str, np.ndarray], path: Path | str) -> Path:
    """Learned tokens of domains on their two principal axes, with the name of a domain at the mean of its own.

    Args:
        tokens: (tokens, width) of each domain.
        path: the picture to write.

    Raises:
        ValueError: fewer than two domains.
    """
    if len(tokens) < 2:
        raise ValueError(
            f"Found the tokens of {list(tokens)}: a picture of their distances needs at least two domains."
        )
    places, shares = principal_components(np.concatenate(list(tokens.values())).astype(np.float64))
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis, start = figure.subplots(), 0
    for color, (name, values) in zip(_cycle(len(tokens)), tokens.items(), strict=True):
        own = places[start : start + len(values)]
        start += len(values)
        axis.plot(*own.T, ".", color=color, alpha=0.4, markersize=5)
        axis.plot(*own.mean(axis=0), "o", color=color, markersize=9)
        axis.annotate(name, own.mean(axis=0), xytext=(6, 6), textcoords="offset points", color=color, fontsize=9)
    axis.set_xlabel(f"first principal axis, {shares[0]:.0%} of the variance")
    axis.set_ylabel(f"second principal axis, {shares[1]:.0%} of the variance")
    _tidy(axis)
    return _save(figure, path)


def _cycle(count: int) -> list[str]:
    return [LINES[index % len(LINES)] for index in range(count)]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve, shorter at both ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _tidy(axis) -> None:
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _save(figure: Figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
