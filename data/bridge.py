"""Embodied bridge data: questions about the robot's own view, made from trajectories (Wall-OSS-0.5, section 3.2).

Four levels, ten kinds:

    object    grounding, pointing, trajectory (2D path of the end effector), attribute (colour)
    spatial   relation of two objects, multi_view (the same object in another camera)
    scene     caption, question (is there ..., how many ...)
    task      progress, affordance (where it grasps next), next_step

A `BridgeFrame` says what is known about one image. In simulation that is the ground truth; for real data
`frames_of_episode` projects the end effector into calibrated cameras and takes grasps from the gripper, and an
annotator (any image-text model, `annotator.py`) adds what only a look at the image can tell: captions, next steps, and
boxes of objects if it can point. A kind whose facts are missing gives no sample.

Boxes are (x1, y1, x2, y2) and points (x, y), in pixels; (h, w) is the size of an image.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..action_space_wallvla import Embodiment
from .annotator import Annotator
from .coordinates import CONVENTIONS, to_pixels
from .multimodal import MultimodalWriter


Box = tuple[float, float, float, float]

LEVELS = {
    "grounding": "object", "pointing": "object", "trajectory": "object", "attribute": "object",
    "relation": "spatial", "multi_view": "spatial",
    "caption": "scene", "question": "scene",
    "progress": "task", "affordance": "task", "next_step": "task",
}  # fmt: skip
OBJECTS_QUESTION = (
    "List the objects that the robot could touch. Answer with JSON alone, one entry for each object: "
    '[{"bbox_2d": [x1, y1, x2, y2], "label": "name of the object"}]'
)
CAPTION_QUESTION = "Describe what the robot sees in one sentence: the objects and where they are."
GRIPPER = "robot's gripper"  # what the projected end effector is called
STEP_QUESTION = "The robot's task is: {}. What should it do next? Answer with one short imperative sentence."
TRAJECTORY_POINTS = 5
# A relation is asked for only if the centres are this far apart, in box sizes: nobody can tell "left" from less.
MIN_SEPARATION = 0.75
# Hues in degrees and their names; the rest is too close to a border to be named.
_HUES = ((0, 12, "red"), (20, 38, "orange"), (48, 66, "yellow"), (85, 150, "green"), (195, 255, "blue"))
_HUES += ((272, 310, "purple"), (348, 360, "red"))


@dataclass(frozen=True)
class BridgeFrame:
    """What is known about one image; everything but image and instruction may be missing.

    Args:
        image: uint8 (h, w, 3).
        instruction: the task.
        boxes: box by object name.
        masks: visible pixels, bool (h, w), by object name.
        points: a point on other things, in pixels, by name.
        path: end effector now and in the following frames, (N, 2) pixels.
        grasp: where the gripper closes next, (2,) pixels.
        progress: finished share of the episode, 0 to 1.
        next_step: what is done now or next, in words.
        plan: all steps of the task, in words.
        caption: what is to be seen, in words.
        other_view: image of another camera at the same time, and a point on each thing in it by name.
    """

    image: np.ndarray
    instruction: str
    boxes: dict[str, Box] = field(default_factory=dict)
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    points: dict[str, tuple[float, float]] = field(default_factory=dict)
    path: np.ndarray | None = None
    grasp: np.ndarray | None = None
    progress: float | None = None
    next_step: str | None = None
    plan: str | None = None
    caption: str | None = None
    other_view: tuple[np.ndarray, dict[str, tuple[float, float]]] | None = None

    @property
    def named_points(self) -> dict[str, tuple[float, float]]:
        """A point on each thing whose place is known, by name."""
        boxes = {name: _center(box) for name, box in self.boxes.items()}
        return boxes | {name: _inner_point(mask) for name, mask in self.masks.items()} | self.points

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image."""
        return self.image.shape[1], self.image.shape[0]


@dataclass(frozen=True)
class BridgeSample:
    """A question and its answer; `kind` is a key of LEVELS."""

    kind: str
    images: tuple[np.ndarray, ...]
    text: str
    answer: str

    @property
    def level(self) -> str:
        return LEVELS[self.kind]


def bridge_samples(
    frame: BridgeFrame, processor, rng: np.random.Generator, kinds: Sequence[str] = tuple(LEVELS)
) -> list[BridgeSample]:
    """At most one sample of each kind that the frame has facts for.

    Args:
        frame: what is known.
        processor: writes boxes and points: `format_box`, `format_point` of a `WallVLAProcessor`.
        rng: chooses objects and wording.
        kinds: kinds to make.

    Raises:
        ValueError: an unknown kind.
    """
    unknown = [kind for kind in kinds if kind not in _MAKERS]
    if unknown:
        raise ValueError(f"Found kinds {', '.join(unknown)}; known are {', '.join(LEVELS)}.")
    samples = []
    for kind in kinds:
        made = _MAKERS[kind](frame, processor, rng)
        if made is not None:
            images, text, answer = made
            samples.append(BridgeSample(kind, images, text, answer))
    return samples


# --------------------------------------------------------------------------------------------------------------------
# Object
# --------------------------------------------------------------------------------------------------------------------


def _choose(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _grounding(frame: BridgeFrame, processor, rng: np.random.Generator):
    if not frame.boxes:
        return None
    name = _choose(sorted(frame.boxes), rng)
    text = _choose(("Where is the {}? Answer with a box.", "Give the box of the {}.", "Detect the {}."), rng)
    return (frame.image,), text.format(name), processor.format_box(frame.boxes[name], frame.size)


def _pointing(frame: BridgeFrame, processor, rng: np.random.Generator):
    points = frame.named_points
    if not points:
        return None
    name = _choose(sorted(points), rng)
    text = _choose(("Point to the {}.", "Show me the {}.", "Which point lies on the {}?"), rng)
    return (frame.image,), text.format(name), processor.format_point(points[name], frame.size)


def _inner_point(mask: np.ndarray) -> tuple[float, float]:
    """A pixel on the object near its middle: the centre of a box can lie beside a bent object."""
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return float(columns[nearest]) + 0.5, float(rows[nearest]) + 0.5


def _center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _trajectory(frame: BridgeFrame, processor, rng: np.random.Generator):
    path = None if frame.path is None else frame.path[_inside(frame.path, frame.size)]
    if path is None or len(path) < 2:
        return None
    # Equal distances along the path: in equal times a pause would take all points.
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    if travelled[-1] < 0.05 * max(frame.size):
        return None
    at = np.linspace(0, travelled[-1], TRAJECTORY_POINTS)
    points = np.stack([np.interp(at, travelled, path[:, axis]) for axis in (0, 1)], axis=1)
    text = _choose(("Which path does the robot's hand take to {}?", "Draw the path of the gripper to {}."), rng)
    answer = ", ".join(processor.format_point(point, frame.size) for point in points)
    return (frame.image,), text.format(_lower(frame.instruction)), answer


def _attribute(frame: BridgeFrame, processor, rng: np.random.Generator):
    colors = {name: color_name(frame.image[mask]) for name, mask in sorted(frame.masks.items())}
    # The colour of "the red button" is in its name already.
    named = [name for name, color in colors.items() if color is not None and color not in name]
    if not named:
        return None
    name = _choose(named, rng)
    return (frame.image,), f"What colour is the {name}?", f"The {name} is {colors[name]}."


def color_name(pixels: np.ndarray) -> str | None:
    """Name of the colour that most of `pixels` uint8 (N, 3) have, or `None` where it is not clear."""
    values = pixels.reshape(-1, 3).astype(np.float64) / 255
    high, low = values.max(axis=1), values.min(axis=1)
    spread = high - low
    coloured = (spread > 0.3 * high) & (high > 0.2)
    if coloured.mean() < 0.1:
        brightness = np.median(high)
        return "white" if brightness > 0.8 else "black" if brightness < 0.2 else "grey" if brightness < 0.7 else None
    if coloured.mean() < 0.6:
        return None
    red, green, blue = values[coloured].T
    scale = spread[coloured]
    hue = np.where(
        high[coloured] == red,
        (green - blue) / scale % 6,
        np.where(high[coloured] == green, (blue - red) / scale + 2, (red - green) / scale + 4),
    )
    votes = {}
    for first, last, name in _HUES:
        votes[name] = votes.get(name, 0.0) + float(((hue * 60 >= first) & (hue * 60 < last)).mean())
    best = max(votes, key=votes.get)
    return best if votes[best] > 0.6 else None


# --------------------------------------------------------------------------------------------------------------------
# Spatial
# --------------------------------------------------------------------------------------------------------------------


def relation(first: Box, second: Box) -> str | None:
    """Where the first box is, seen from the second: "left of", "right of", "above", "below", or `None` if unclear."""
    (x1, y1), (x2, y2) = _center(first), _center(second)
    widths, heights = (
        (first[2] - first[0] + second[2] - second[0]) / 2,
        (first[3] - first[1] + second[3] - second[1]) / 2,
    )
    across, along = (x1 - x2) / max(widths, 1e-9), (y1 - y2) / max(heights, 1e-9)
    if max(abs(across), abs(along)) < MIN_SEPARATION or 0.5 < abs(x1 - x2) / max(abs(y1 - y2), 1e-9) < 2:
        return None
    if abs(x1 - x2) > abs(y1 - y2):
        return "left of" if x1 < x2 else "right of"
    return "above" if y1 < y2 else "below"


def _relation(frame: BridgeFrame, processor, rng: np.random.Generator):
    names = sorted(frame.boxes)
    clear = [
        (a, b, found) for a in names for b in names if a != b and (found := relation(frame.boxes[a], frame.boxes[b]))
    ]
    if not clear:
        return None
    first, second, found = _choose(clear, rng)
    if rng.random() < 0.5:
        return (frame.image,), f"Where is the {first}, seen from the {second}?", f"It is {found} the {second}."
    asked = _choose(("left of", "right of", "above", "below"), rng)
    answer = "Yes." if asked == found else f"No, it is {found} the {second}."
    return (frame.image,), f"Is the {first} {asked} the {second} in the image?", answer


def _multi_view(frame: BridgeFrame, processor, rng: np.random.Generator):
    if frame.other_view is None:
        return None
    image, others = frame.other_view
    points = frame.named_points
    common = sorted(set(others) & set(points))
    if not common:
        return None
    name = _choose(common, rng)
    marked = processor.format_point(points[name], frame.size)
    text = f"The {name} is at {marked} in the first image. Point to it in the second image."
    answer = processor.format_point(others[name], (image.shape[1], image.shape[0]))
    return (frame.image, image), text, answer


# --------------------------------------------------------------------------------------------------------------------
# Scene
# --------------------------------------------------------------------------------------------------------------------


def _caption(frame: BridgeFrame, processor, rng: np.random.Generator):
    text = _choose(("Describe the scene.", "What do you see?", "Write a caption for the image."), rng)
    if frame.caption is not None:
        return (frame.image,), text, frame.caption
    if not frame.boxes:
        return None
    names = sorted(frame.boxes, key=lambda name: _center(frame.boxes[name])[0])
    listed = (
        f"the {names[0]}" if len(names) == 1 else ", ".join(f"the {n}" for n in names[:-1]) + f" and the {names[-1]}"
    )
    return (frame.image,), text, f"From left to right: {listed}. The robot's task is to {_lower(frame.instruction)}."


# Things that are asked for although they are not there; an object of that name removes it from the list.
_ABSENT = (
    "banana",
    "teddy bear",
    "laptop",
    "bottle",
    "cup",
    "ball",
    "hammer",
    "drawer",
    "window",
    "plate",
    "robot hand",
)


def _question(frame: BridgeFrame, processor, rng: np.random.Generator):
    if not frame.boxes:
        return None
    names = sorted(frame.boxes)
    absent = [name for name in _ABSENT if not any(name in present or present in name for present in names)]
    # Only what has masks is known completely: without them an object may be there and have no box.
    if frame.masks and absent and rng.random() < 0.5:
        name = _choose(absent, rng)
        return (frame.image,), f"Is there a {name} in the image?", f"No, there is no {name}."
    name = _choose(names, rng)
    return (
        (frame.image,),
        f"Is there a {name} in the image?",
        f"Yes, at {processor.format_box(frame.boxes[name], frame.size)}.",
    )


# --------------------------------------------------------------------------------------------------------------------
# Task
# --------------------------------------------------------------------------------------------------------------------


def _progress(frame: BridgeFrame, processor, rng: np.random.Generator):
    if frame.progress is None:
        return None
    percent = int(round(frame.progress * 10)) * 10
    text = f"The task is: {frame.instruction}. How far has the robot got? Answer in percent."
    return (frame.image,), text, f"{percent}%"


def _affordance(frame: BridgeFrame, processor, rng: np.random.Generator):
    if frame.grasp is None or not _inside(frame.grasp[None], frame.size)[0]:
        return None
    text = f"Where should the robot grasp to {_lower(frame.instruction)}?"
    return (frame.image,), text, processor.format_point(frame.grasp, frame.size)


def _next_step(frame: BridgeFrame, processor, rng: np.random.Generator):
    known = [
        (question, answer)
        for question, answer in (
            ("What should the robot do next?", frame.next_step), ("What are the steps?", frame.plan),
        )
        if answer is not None
    ]  # fmt: skip
    if not known:
        return None
    question, answer = _choose(known, rng)
    return (frame.image,), f"The task is: {frame.instruction}. {question}", answer


_MAKERS: dict[str, Callable] = {
    "grounding": _grounding, "pointing": _pointing, "trajectory": _trajectory, "attribute": _attribute,
    "relation": _relation, "multi_view": _multi_view, "caption": _caption, "question": _question,
    "progress": _progress, "affordance": _affordance, "next_step": _next_step,
}  # fmt: skip


def _inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return ((points >= 0) & (points <= np.asarray(size))).all(axis=1)


def _lower(instruction: str) -> str:
    """An instruction inside a sentence."""
    text = instruction.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def annotate(frame: BridgeFrame, annotator: Annotator, coordinates: str | None = None) -> BridgeFrame:
    """`frame` with what it has not and the annotator answers: a caption, a next step, and boxes of objects.

    Args:
        coordinates: what the numbers of the annotator's boxes count, a key of `coordinates.CONVENTIONS` ("pixel" for a
            Qwen2.5-VL, "thousand" for a Qwen3-VL). `None`: it is not asked for boxes.
    """
    caption = frame.caption or annotator([frame.image], CAPTION_QUESTION).strip() or None
    next_step = frame.next_step or annotator([frame.image], STEP_QUESTION.format(frame.instruction)).strip() or None
    boxes = frame.boxes
    if coordinates is not None and not boxes:
        boxes = boxes_of_answer(annotator([frame.image], OBJECTS_QUESTION), coordinates, frame.size)
    return replace(frame, caption=caption, next_step=next_step, boxes=boxes)


def boxes_of_answer(answer: str, coordinates: str, size: tuple[int, int]) -> dict[str, Box]:
    """Boxes in pixels by name from an annotator's JSON, for an image of `size` (width, height).

    What is no box inside the image is left out, and so is every name that comes twice: which one would be meant?
    """
    found: dict[str, list[Box]] = {}
    for entry in re.findall(r"\{[^{}]*\}", answer):
        try:
            values = json.loads(entry)
            name, corners = values["label"].strip().lower(), [float(number) for number in values["bbox_2d"]]
            box = to_pixels(corners, coordinates, size)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if name and len(box) == 4 and box[2] - box[0] >= 2 and box[3] - box[1] >= 2:
            found.setdefault(name, []).append(box)
    return {name: boxes[0] for name, boxes in found.items() if len(boxes) == 1}


# --------------------------------------------------------------------------------------------------------------------
# Facts of recorded episodes
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """A calibrated pinhole camera.

    Args:
        intrinsics: (3, 3), pixels.
        extrinsics: (4, 4), from the robot's base frame in the model's axes (x forward, y left, z up) to the camera's
            (x right, y down, z into the image).
        size: (width, height) of the images that the intrinsics belong to; other sizes are scaled.
    """

    intrinsics: np.ndarray
    extrinsics: np.ndarray
    size: tuple[int, int]

    @classmethod
    def from_dict(cls, values: dict) -> "Camera":
        """Camera of a JSON dictionary with the three fields. Raises ValueError where one is missing or misshaped."""
        try:
            intrinsics, extrinsics = np.asarray(values["intrinsics"], float), np.asarray(values["extrinsics"], float)
            size = tuple(int(side) for side in values["size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"A camera needs intrinsics (3, 3), extrinsics (4, 4) and size (width, height): {error}."
            ) from error
        if intrinsics.shape != (3, 3) or extrinsics.shape != (4, 4) or len(size) != 2 or min(size) < 1:
            raise ValueError(
                f"Found intrinsics {intrinsics.shape}, extrinsics {extrinsics.shape} and size {size}; a camera has "
                "(3, 3), (4, 4) and (width, height)."
            )
        return cls(intrinsics, extrinsics, size)

    def project(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Pixels (N, 2) in an image of `size` (width, height) of points (N, 3) in metres; NaN behind the camera."""
        local = points @ self.extrinsics[:3, :3].T + self.extrinsics[:3, 3]
        image = local @ self.intrinsics.T
        with np.errstate(divide="ignore", invalid="ignore"):
            pixels = image[:, :2] / image[:, 2:]
        pixels[local[:, 2] <= 0] = np.nan
        return pixels * (np.asarray(size) / np.asarray(self.size))


def gripper_closings(opening: np.ndarray, closed: float = 0.4, opened: float = 0.6) -> np.ndarray:
    """Frames at which a gripper closes. `opening` (T,) is 0 closed to 1 open; two levels keep noise from counting."""
    events, is_open = [], bool(opening[0] > closed)
    for frame, value in enumerate(opening):
        if is_open and value < closed:
            events.append(frame)
            is_open = False
        elif not is_open and value > opened:
            is_open = True
    return np.asarray(events, dtype=np.int64)


def frames_of_episode(
    dataset,
    position: int,
    embodiment: Embodiment,
    cameras: Mapping[str, Camera | None],
    *,
    stride: int = 20,
    horizon_s: float = 2.0,
    arm: str = "left",
) -> Iterator[BridgeFrame]:
    """Facts of a recorded episode that need no look at the images: progress, steps, and where the camera is calibrated
    the gripper, its path and its next grasp. A second calibrated camera shows the gripper in another view.

    Args:
        dataset: a `LeRobotDataset`.
        position: place of the episode in the dataset.
        embodiment: layout of the states, with an end-effector position (and a gripper for grasps).
        cameras: fixed cameras, full key to calibration (or `None`): the one that is asked about, and maybe a second.
        stride: frames between two samples.
        horizon_s: seconds of the path.
        arm: which end effector.
    """
    start, stop = (int(value) for value in dataset.episode_bounds[position])
    positions, opening = _arm_facts(dataset.states[start:stop], embodiment, arm)
    closings = gripper_closings(opening) if opening is not None else np.empty(0, dtype=np.int64)
    ahead = max(2, int(horizon_s * dataset.fps) + 1)

    def seen(camera: str, frames: Sequence[int]) -> np.ndarray:
        """Gripper at these frames in the camera's image, pixels (N, 2); without those that cannot be seen."""
        if cameras[camera] is None or positions is None:
            return np.empty((0, 2))
        pixels = cameras[camera].project(positions[frames], sizes[camera])
        return pixels[np.isfinite(pixels).all(axis=1)]

    def gripper(camera: str, frame: int) -> dict[str, tuple[float, float]]:
        pixels = seen(camera, [frame])
        return {GRIPPER: tuple(pixels[0])} if len(pixels) and _inside(pixels, sizes[camera])[0] else {}

    for frame in range(0, stop - start, stride):
        index = start + frame
        images = {camera: dataset.image(index, camera) for camera in cameras}
        sizes = {camera: (image.shape[1], image.shape[0]) for camera, image in images.items()}
        first, *others = cameras
        path = seen(first, range(frame, min(frame + ahead, stop - start)))
        grasp = seen(first, closings[closings >= frame][:1])
        step = dataset.subtask_indices[index]
        yield BridgeFrame(
            image=images[first],
            instruction=dataset.tasks[int(dataset.task_indices[index])],
            points=gripper(first, frame),
            path=path if len(path) else None,
            grasp=grasp[0] if len(grasp) else None,
            progress=frame / max(stop - start - 1, 1),
            next_step=dataset.subtasks[step] if step >= 0 else None,
            plan=dataset.language[position].plan,
            other_view=(images[others[0]], gripper(others[0], frame)) if others else None,
        )


def _arm_facts(states: np.ndarray, embodiment: Embodiment, arm: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Positions (T, 3) in the model's axes and gripper openings (T,) of an arm, `None` where the state has none."""
    if dict(embodiment.state_layout).get("native") or not embodiment.state_width:
        return None, None
    values = embodiment.transform_state(states)
    channels = {int(channel): column for column, channel in enumerate(embodiment.state_channels)}
    position, gripper = embodiment.channels_of(f"{arm}_ee_position"), embodiment.channels_of(f"{arm}_gripper")[0]
    positions = values[:, [channels[channel] for channel in position]] if position[0] in channels else None
    return positions, values[:, channels[gripper]] if gripper in channels else None


def frames_of_demonstration(demonstration, *, fps: float, horizon_s: float = 1.0) -> Iterator[BridgeFrame]:
    """Facts of a simulated episode, from the simulator's ground truth.

    Args:
        demonstration: an `evaluation.demonstrations.Demonstration`, recorded with `grounding_every` above 0 (and
            `all_views=True` for questions about two cameras). Its last state number is the gripper's opening.
        fps: frames per second.
        horizon_s: seconds of the path.
    """
    by_frame: dict[int, dict[str, list]] = {}
    for sample in demonstration.grounding:
        by_frame.setdefault(sample.frame_index, {}).setdefault(sample.camera, []).append(sample)
    closings = gripper_closings(demonstration.states[:, -1])
    ahead = max(2, int(horizon_s * fps) + 1)
    for frame, views in sorted(by_frame.items()):
        (_, objects), *others = views.items()
        following = closings[closings >= frame]
        other_view = None
        if others:
            _, seen = others[0]
            other_view = seen[0].image, {sample.name: _inner_point(sample.mask) for sample in seen}
        yield BridgeFrame(
            image=objects[0].image,
            instruction=demonstration.instruction,
            boxes={sample.name: sample.box for sample in objects},
            masks={sample.name: sample.mask for sample in objects},
            path=demonstration.effector_pixels[frame : frame + ahead],
            grasp=demonstration.effector_pixels[following[0]] if len(following) else None,
            progress=frame / max(len(demonstration.states) - 1, 1),
            other_view=other_view,
        )


def write_bridge_samples(
    frames: Iterator[BridgeFrame],
    path: str | Path,
    processor,
    *,
    seed: int = 0,
    kinds: Sequence[str] = tuple(LEVELS),
    annotator: Annotator | None = None,
    coordinates: str | None = None,
) -> dict[str, int]:
    """Samples of all frames as one parquet file that `MultimodalDataset` reads. Returns their number by kind.

    Args:
        frames: facts, one image after the other.
        path: file to create; it appears when it is complete.
        processor, kinds: see `bridge_samples`.
        seed: of the choice of objects and wordings.
        annotator, coordinates: add to the frames what they have not, see `annotate`.

    Raises:
        ValueError: an unknown convention of coordinates, or no frame gave a sample of these kinds.
    """
    if coordinates is not None and coordinates not in CONVENTIONS:
        raise ValueError(f"Found coordinates {coordinates!r}; known are {', '.join(CONVENTIONS)}.")
    counts: dict[str, int] = {}
    with MultimodalWriter(path) as writer:
        for number, frame in enumerate(tqdm(frames, desc="bridge", unit="frame", disable=None)):
            frame = annotate(frame, annotator, coordinates) if annotator is not None else frame
            for sample in bridge_samples(frame, processor, np.random.default_rng([seed, number]), kinds):
                metadata = {"kind": sample.kind, "level": sample.level, "instruction": frame.instruction}
                writer.add(sample.images[0], sample.text, sample.answer, metadata, sample.images[1:])
                counts[sample.kind] = counts.get(sample.kind, 0) + 1
    return counts
