"""Finding and leaving out what should not be learned from: idle frames, broken recordings, mixed-up cameras.

`inspect_dataset` looks and reports; `make_plan` turns its findings into frames to keep per episode, which
`LeRobotDataset(keep=...)` applies. Nothing is ever written into the dataset itself.

Wall-OSS-0.5, sections 2.2.4 (stationary frames) and 3.1.3 (erroneous data). The paper gives no thresholds; those here
are arguments, and every finding states the number that it was judged by.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..action_space_wallvla import MIN_RANGE
from .lerobot import LeRobotDataset


THUMBNAIL = 16  # side in pixels at which images are compared: blind to noise and codec, not to another viewpoint
MAD_TO_STD = 1.4826  # of a normal distribution
PLAN_VERSION = 1


@dataclass(frozen=True)
class CleaningOptions:
    """Thresholds.

    Args:
        stationary: a frame is idle when every state and action number differs from the last kept frame by less than
            this, in units of the number's global range (q99 - q01).
        min_motion: an episode is near-constant when no state number travels further than this, in the same unit.
        length_deviations: an episode's length is anomalous when the logarithm of its length is further than this from
            the median of its task, in robust standard deviations (and by more than a factor of 1.5).
        min_frames: shorter episodes are left out, also after idle frames are gone.
        frames_per_episode: frames of each camera that are decoded and looked at; 0 looks at no image.
        duplicate: two cameras are the same when their thumbnails differ by less than this on average, in grey levels.
        blank: an image is broken when its standard deviation over all pixels is below this, in grey levels.
    """

    stationary: float = 0.005
    min_motion: float = 0.02
    length_deviations: float = 6.0
    min_frames: int = 8
    frames_per_episode: int = 4
    duplicate: float = 1.0
    blank: float = 2.0


@dataclass(frozen=True)
class Finding:
    """What is wrong with one episode. `drop` says whether a plan leaves the episode out; otherwise it is a hint."""

    episode: int
    kind: str
    message: str
    drop: bool


@dataclass
class Inspection:
    """What `inspect_dataset` found: `findings`, idle frames, and facts of the dataset for a report."""

    facts: dict
    findings: list[Finding] = field(default_factory=list)
    kept: dict[int, np.ndarray] = field(default_factory=dict)  # frames to keep by episode, after the idle filter
    frames: int = 0

    def counts(self) -> dict[str, int]:
        """Episodes by kind of finding, and the idle frames of the others."""
        return dict(Counter(finding.kind for finding in self.findings))


# --------------------------------------------------------------------------------------------------------------------
# Filters on numbers
# --------------------------------------------------------------------------------------------------------------------


def global_scale(values: np.ndarray) -> np.ndarray:
    """Range q99 - q01 of each column of `values` (N, D); infinite for near-constant columns, which then never count
    as motion (divided by their range, sensor noise would)."""
    low, high = np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0)
    return np.where(high - low < MIN_RANGE, np.inf, high - low)


def moving_frames(values: np.ndarray, scale: np.ndarray, threshold: float) -> np.ndarray:
    """The stationary-frame filter: which frames to keep.

    A frame is dropped when every number differs from the last *kept* frame by less than `threshold` of its scale.
    Comparing with the last kept frame lets slow motion add up; comparing neighbours would drop it altogether.
    Filtering what was kept once more keeps all of it.

    Args:
        values: (T, D), one episode.
        scale: (D,), see `global_scale`.
        threshold: see `CleaningOptions.stationary`; 0 keeps every frame.

    Returns:
        bool (T,); the first frame is always kept.
    """
    normalised = np.asarray(values, dtype=np.float64) / scale
    keep = np.zeros(len(normalised), dtype=bool)
    last = 0
    while last < len(normalised):
        keep[last] = True
        step = 16  # looked at in growing blocks: long pauses cost little, motion costs one small block a frame
        start = last + 1
        while start < len(normalised):
            moved = (np.abs(normalised[start : start + step] - normalised[last]) >= threshold).any(axis=1)
            if moved.any():
                break
            start, step = start + step, step * 4
        if start >= len(normalised):
            break
        last = start + int(np.argmax(moved))
    return keep


def travel(values: np.ndarray, scale: np.ndarray) -> float:
    """Furthest that any number gets, in units of its scale. `values` (T, D)."""
    return float((np.ptp(values.astype(np.float64), axis=0) / scale).max(initial=0.0))


def anomalous_lengths(lengths: np.ndarray, deviations: float) -> np.ndarray:
    """Which lengths (E,) are far from the others, bool (E,); none where fewer than five can be compared."""
    if len(lengths) < 5:
        return np.zeros(len(lengths), dtype=bool)
    logs = np.log(lengths)
    distance = np.abs(logs - np.median(logs))
    spread = MAD_TO_STD * np.median(distance)
    return distance > np.maximum(deviations * spread, np.log(1.5))


# --------------------------------------------------------------------------------------------------------------------
# Filters on images
# --------------------------------------------------------------------------------------------------------------------


def thumbnail(image: np.ndarray) -> np.ndarray:
    """float32 (16, 16, 3) grey levels of an image uint8 (h, w, 3)."""
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def duplicated_cameras(thumbnails: dict[str, np.ndarray], threshold: float) -> list[tuple[str, str, float]]:
    """Pairs of cameras (first, second, mean difference in grey levels) that show the same.

    `thumbnails` {camera: (F, 16, 16, 3)} of the same F frames.
    """
    cameras, pairs = list(thumbnails), []
    for i, first in enumerate(cameras):
        for second in cameras[i + 1 :]:
            difference = float(np.abs(thumbnails[first] - thumbnails[second]).mean())
            if difference < threshold:
                pairs.append((first, second, difference))
    return pairs


def swapped_cameras(
    thumbnails: dict[str, np.ndarray], typical: dict[str, np.ndarray], factor: float = 2.0
) -> list[tuple[str, str, float]]:
    """Pairs of cameras (first, second, ratio) that each look like the other one usually does.

    Args:
        thumbnails: {camera: (16, 16, 3)}, mean of one episode.
        typical: the same over all episodes (median).
        factor: how many times closer the exchanged assignment has to be.
    """
    cameras, pairs = list(thumbnails), []
    for i, first in enumerate(cameras):
        for second in cameras[i + 1 :]:
            own, other = (
                np.abs(thumbnails[first] - typical[a]).mean() + np.abs(thumbnails[second] - typical[b]).mean()
                for a, b in ((first, second), (second, first))
            )
            if own > factor * other:
                pairs.append((first, second, float(own / max(other, 1e-9))))
    return pairs


# --------------------------------------------------------------------------------------------------------------------
# The whole dataset
# --------------------------------------------------------------------------------------------------------------------


def inspect_dataset(
    dataset: LeRobotDataset, options: CleaningOptions | None = None, *, progress: bool = True
) -> Inspection:
    """Look at every episode of a dataset.

    Args:
        dataset: read with `skip_errors=True`, so that episodes that cannot be read are findings and no error.
        options: thresholds.
        progress: whether to show a progress bar.
    """
    options = options or CleaningOptions()
    inspection = Inspection(_facts(dataset), frames=len(dataset))
    for episode, reason in dataset.skipped.items():
        inspection.findings.append(Finding(episode, "unreadable", reason, drop=True))
    state_scale = global_scale(dataset.states)
    values = np.concatenate([dataset.states, dataset.actions], axis=1)
    scale = np.concatenate([state_scale, global_scale(dataset.actions)])
    _check_lengths(dataset, options, inspection)
    signatures: dict[int, dict[str, np.ndarray]] = {}
    bar = tqdm(dataset.episode_bounds, desc="inspecting", unit="episode", disable=None if progress else True)
    for position, (start, stop) in enumerate(bar):
        episode = int(dataset.episode_ids[position])
        frames = dataset.frame_numbers[start:stop]
        keep = moving_frames(values[start:stop], scale, options.stationary)
        inspection.kept[episode] = frames[keep]
        moved = travel(dataset.states[start:stop], state_scale)
        if moved < options.min_motion:
            text = f"no state number travels further than {moved:.4f} of its range; the limit is {options.min_motion}"
            inspection.findings.append(Finding(episode, "near-constant", text, drop=True))
        elif keep.sum() < options.min_frames:
            text = f"{keep.sum()} of {stop - start} frames move; the limit is {options.min_frames}"
            inspection.findings.append(Finding(episode, "too short", text, drop=True))
        if options.frames_per_episode and dataset.camera_keys:
            signature = _check_images(dataset, position, options, inspection)
            if signature is not None:
                signatures[episode] = signature
    _check_swaps(signatures, inspection)
    inspection.findings.sort(key=lambda finding: (finding.episode, finding.kind))
    return inspection


def _facts(dataset: LeRobotDataset) -> dict:
    """Name, size and content of a dataset, as JSON."""
    tasks = Counter(dataset.tasks[int(i)] for i in dataset.task_indices[dataset.episode_bounds[:, 0]])
    lengths = np.diff(dataset.episode_bounds)[:, 0]
    cameras = {
        key: f"{dataset.features[key]['dtype']} {'x'.join(map(str, dataset.features[key]['shape']))}"
        for key in dataset.camera_keys
    }
    numbers = {}
    for name, values in (("state", dataset.states), ("action", dataset.actions)):
        quantiles = np.quantile(values.astype(np.float64), [0.01, 0.99], axis=0)
        numbers[name] = {"q01": quantiles[0].tolist(), "q99": quantiles[1].tolist()}
    return {
        "dataset": str(dataset.root),
        "fps": dataset.fps,
        "episodes": dataset.num_episodes,
        "frames": len(dataset),
        "seconds": round(len(dataset) / dataset.fps, 1),
        "episode_frames": {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "timestamp_error_s": float(np.abs(dataset.timestamps - dataset.frame_numbers / dataset.fps).max()),
        "tolerance_s": dataset.tolerance_s,
        "tasks": dict(tasks.most_common()),
        "steps": len(dataset.subtasks),
        "cameras": cameras,
        **numbers,
    }


def _check_lengths(dataset: LeRobotDataset, options: CleaningOptions, inspection: Inspection):
    lengths = np.diff(dataset.episode_bounds)[:, 0]
    tasks = dataset.task_indices[dataset.episode_bounds[:, 0]]
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task)
        for place in members[anomalous_lengths(lengths[members], options.length_deviations)]:
            text = (
                f"{lengths[place]} frames; the median of task {dataset.tasks[int(task)]!r} is "
                f"{np.median(lengths[members]):g}"
            )
            inspection.findings.append(Finding(int(dataset.episode_ids[place]), "anomalous length", text, drop=True))


def _check_images(
    dataset: LeRobotDataset, position: int, options: CleaningOptions, inspection: Inspection
) -> dict[str, np.ndarray] | None:
    """Findings of one episode's images; returns their mean thumbnails {camera: (16, 16, 3)}."""
    start, stop = dataset.episode_bounds[position]
    episode = int(dataset.episode_ids[position])
    indices = np.unique(np.linspace(start, stop - 1, options.frames_per_episode).astype(int))
    thumbnails: dict[str, list[np.ndarray]] = {key: [] for key in dataset.camera_keys}
    for index in indices:
        for key in dataset.camera_keys:
            try:
                image = dataset.image(int(index), key)
            except (ValueError, OSError) as error:
                inspection.findings.append(Finding(episode, "broken frame", str(error), drop=True))
                return None
            if image.std() < options.blank:
                text = f"{key}, frame {dataset.frame_numbers[index]}: one colour (deviation {image.std():.2f})"
                inspection.findings.append(Finding(episode, "blank image", text, drop=True))
                return None
            thumbnails[key].append(thumbnail(image))
    stacked = {key: np.stack(images) for key, images in thumbnails.items()}
    for first, second, difference in duplicated_cameras(stacked, options.duplicate):
        text = f"{first} and {second} show the same (mean difference {difference:.2f} grey levels)"
        inspection.findings.append(Finding(episode, "duplicated cameras", text, drop=False))
    if len(indices) > 1:
        for key, images in stacked.items():
            if np.ptp(images, axis=0).max() == 0:
                text = f"{key} shows exactly the same in {len(indices)} frames from beginning to end"
                inspection.findings.append(Finding(episode, "frozen camera", text, drop=True))
    return {key: images.mean(axis=0) for key, images in stacked.items()}


def _check_swaps(signatures: dict[int, dict[str, np.ndarray]], inspection: Inspection):
    if len(signatures) < 3:
        return  # nothing to call typical
    cameras = next(iter(signatures.values()))
    typical = {key: np.median([signature[key] for signature in signatures.values()], axis=0) for key in cameras}
    for episode, signature in signatures.items():
        for first, second, ratio in swapped_cameras(signature, typical):
            text = f"{first} and {second} look like each other's usual view ({ratio:.1f} times closer when exchanged)"
            inspection.findings.append(Finding(episode, "swapped cameras", text, drop=True))


# --------------------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------------------


def make_plan(inspection: Inspection) -> dict:
    """Which frames of which episodes to keep, with the reasons, as JSON: what `wallvla data clean` writes."""
    dropped = {finding.episode for finding in inspection.findings if finding.drop}
    keep = {str(e): _ranges(frames) for e, frames in inspection.kept.items() if e not in dropped}
    keep |= {str(episode): [] for episode in dropped}
    in_dropped = sum(len(inspection.kept.get(episode, ())) for episode in dropped)
    kept = sum(len(frames) for frames in inspection.kept.values()) - in_dropped
    return {
        "version": PLAN_VERSION,
        "dataset": Path(inspection.facts["dataset"]).name,
        "frames": inspection.frames,
        "frames_kept": kept,
        "episodes": len(inspection.kept.keys() | dropped),
        "episodes_kept": len(inspection.kept.keys() - dropped),
        "counts": inspection.counts(),
        "findings": [asdict(finding) for finding in inspection.findings],
        "keep": dict(sorted(keep.items(), key=lambda item: int(item[0]))),
    }


def _ranges(frames: Sequence[int]) -> list[list[int]]:
    """[[first, past the end], ...] of ascending numbers."""
    frames = np.asarray(frames)
    if not len(frames):
        return []
    breaks = np.flatnonzero(np.diff(frames) != 1)
    firsts = frames[np.concatenate([[0], breaks + 1])]
    lasts = frames[np.concatenate([breaks, [len(frames) - 1]])]
    return [[int(first), int(last) + 1] for first, last in zip(firsts, lasts, strict=True)]


def write_plan(plan: dict, path: str | Path) -> Path:
    """Write a plan; the file appears when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        partial.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_plan(path: str | Path) -> dict[int, np.ndarray]:
    """The frames to keep by episode, for `LeRobotDataset(keep=...)`. Inverse of `write_plan` for that part.

    Raises:
        ValueError: the file is no plan.
    """
    path = Path(path)
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["version"] != PLAN_VERSION:
            raise ValueError(f"{path} is a plan of version {plan['version']}; this code reads {PLAN_VERSION}.")
        return {
            int(episode): np.concatenate([np.arange(0), *(np.arange(first, last) for first, last in ranges)])
            for episode, ranges in plan["keep"].items()
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no cleaning plan ({type(error).__name__}: {error}). Write one with `wallvla data clean`."
        ) from error


def format_inspection(inspection: Inspection, limit: int = 20) -> str:
    """The report of `wallvla data inspect`, at most `limit` findings in full."""
    facts, plan = inspection.facts, make_plan(inspection)
    lines = [f"{facts['dataset']}: {facts['episodes']} episodes, {facts['frames']} frames, {facts['fps']} fps"]
    lines.append("episode length {min} to {max} frames, median {median:g}".format(**facts["episode_frames"]))
    lines.append(
        "timestamps within {timestamp_error_s:.2g} s of their frames, tolerance {tolerance_s:.2g} s".format(**facts)
    )
    lines += [f"camera {key}: {text}" for key, text in facts["cameras"].items()]
    for name in ("state", "action"):
        ranges = zip(facts[name]["q01"], facts[name]["q99"], strict=True)
        lines.append(f"{name}: " + ", ".join(f"[{low:.3g}, {high:.3g}]" for low, high in ranges))
    tasks = list(facts["tasks"].items())
    lines.append(f"tasks ({len(tasks)}): " + "; ".join(f"{name} ({count})" for name, count in tasks[:limit]))
    lines.append("")
    lines += [f"episode {f.episode}: {f.kind}: {f.message}" for f in inspection.findings[:limit]]
    if len(inspection.findings) > limit:
        lines.append(f"... and {len(inspection.findings) - limit} more findings")
    for kind, count in sorted(inspection.counts().items()):
        lines.append(f"{count} x {kind}")
    idle = inspection.frames - sum(len(frames) for frames in inspection.kept.values())
    lines.append(f"{idle} of {inspection.frames} frames are idle")
    lines.append(
        f"a plan keeps {plan['frames_kept']} of {plan['frames']} frames and {plan['episodes_kept']} of "
        f"{plan['episodes']} episodes"
    )
    return "\n".join(lines)
