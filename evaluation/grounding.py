"""Grounding: does the model find the object that it was asked for, and not the one beside it?

The prompts live here, for training samples and evaluation alike. Answers are read by `processor.parse_grounding`.
"""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from .closed_loop import wilson_interval
from .demonstrations import GroundingSample


KINDS = ("point", "box")
Box = tuple[float, float, float, float]


def grounding_prompt(name: str, kind: str) -> str:
    """The question for an object, `kind` "point" or "box"."""
    if kind == "point":
        return f"Point to the {name}."
    if kind == "box":
        return f"Where is the {name}? Answer with a box."
    raise ValueError(f"Unknown kind of grounding {kind!r}: use one of {KINDS}.")


def box_center(box: Box) -> tuple[float, float]:
    """Centre (x, y) of a box (x1, y1, x2, y2)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_contains(box: Box, point: tuple[float, float]) -> bool:
    """Whether a point (x, y) lies in a box, borders included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for an empty or inverted box."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def generate_answers(
    model,
    processor,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answers to one question about each image, special tokens included.

    The prompts of a batch are padded on the left by the processor, so that all answers begin at the same position.
    """
    import torch

    answers = []
    bar = tqdm(total=len(prompts), desc="grounding", unit="question", disable=not progress)
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        batch = {"images": [[image] for image in images[chosen]], "text": list(prompts[chosen])}
        inputs = processor(**batch, return_tensors="pt").to(model.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.extend(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]))
        bar.update(len(batch["text"]))
    bar.close()
    return answers


def generate_answer(model, processor, image: np.ndarray, prompt: str, max_new_tokens: int = 48) -> str:
    """The model's greedy answer to a question about one image; see `generate_answers`."""
    return generate_answers(model, processor, [image], [prompt], max_new_tokens)[0]


def parse_answer(processor, text: str, image: np.ndarray) -> tuple[tuple[float, float] | None, Box | None]:
    """The first point and the first box of an answer, in pixels of `image`; a box also gives its centre as point."""
    points, boxes = processor.parse_grounding(text, image_size=(image.shape[1], image.shape[0]))
    box = tuple(float(value) for value in boxes[0]) if len(boxes) else None
    if len(points):
        return (float(points[0][0]), float(points[0][1])), box
    return (None if box is None else box_center(box)), box


def swapped_name(sample: GroundingSample, choice: int) -> str | None:
    """Another object of the same image that lies elsewhere: its centre is not in the sample's box, nor the reverse.

    None when there is none, for instance a handle that lies inside the door.
    """
    names = [
        name
        for name, box in sample.others.items()
        if not box_contains(sample.box, box_center(box)) and not box_contains(box, box_center(sample.box))
    ]
    return names[choice % len(names)] if names else None


def evaluate_grounding(
    model,
    processor,
    samples: Sequence[GroundingSample],
    kind: str = "box",
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: bool = True,
) -> dict:
    """Asks for every sample's object, and then for another one in the same image.

    Args:
        model: has `generate` and `device`.
        processor: has `__call__`, `batch_decode` and `parse_grounding`.
        samples: images with a named object; see `demonstrations.record_scenes`.
        kind: "point" or "box".
        max_new_tokens: longest answer.
        batch_size: questions answered at once.
        progress: whether to show a progress bar.

    Returns:
        `samples`; `point_in_object` (the point, or the centre of the box, lies in the object's box) and
        `point_on_mask` (on one of its visible pixels), each `{"rate", "low", "high"}` with a 95% interval;
        `point_in_object_when_swapped`: the same test after asking for another object, which a model that reads the
        name fails; `malformed_rate` (no point or box, counted as wrong); for boxes `mean_iou` and `iou_50`;
        `by_name`: point_in_object's rate by object; `answers`: one dictionary a sample, with its box or None.

    Raises:
        ValueError: no samples, or an unknown kind.
    """
    if len(samples) == 0:
        raise ValueError("There are no grounding samples to evaluate.")
    model.eval()
    swaps = [(sample, swapped_name(sample, index)) for index, sample in enumerate(samples)]
    swaps = [(sample, name) for sample, name in swaps if name is not None]
    questions = [(sample, sample.name) for sample in samples] + swaps
    texts = generate_answers(
        model,
        processor,
        [sample.image for sample, _ in questions],
        [grounding_prompt(name, kind) for _, name in questions],
        max_new_tokens,
        batch_size,
        progress,
    )
    answers = [_judge(processor, sample, text) for sample, text in zip(samples, texts[: len(samples)], strict=True)]
    swapped = [
        _judge(processor, sample, text)["inside"]
        for (sample, _), text in zip(swaps, texts[len(samples) :], strict=True)
    ]
    return _report(answers, swapped, kind)


def _judge(processor, sample: GroundingSample, text: str) -> dict:
    point, box = parse_answer(processor, text, sample.image)
    return {
        "name": sample.name,
        "text": text,
        "point": point,
        "box": box,
        "inside": point is not None and box_contains(sample.box, point),
        "on_mask": point is not None and _on_mask(sample.mask, point),
        "iou": 0.0 if box is None else box_iou(box, sample.box),
    }


def _report(answers: list[dict], swapped: list[bool], kind: str) -> dict:
    by_name: dict[str, list[bool]] = {}
    for answer in answers:
        by_name.setdefault(answer["name"], []).append(answer["inside"])
    report = {
        "kind": kind,
        "samples": len(answers),
        "point_in_object": _rate([answer["inside"] for answer in answers]),
        "point_on_mask": _rate([answer["on_mask"] for answer in answers]),
        "point_in_object_when_swapped": _rate(swapped) if swapped else None,
        "malformed_rate": float(np.mean([answer["point"] is None for answer in answers])),
        "by_name": {name: float(np.mean(inside)) for name, inside in sorted(by_name.items())},
        "answers": answers,
    }
    if kind == "box":
        report["mean_iou"] = float(np.mean([answer["iou"] for answer in answers]))
        report["iou_50"] = float(np.mean([answer["iou"] >= 0.5 for answer in answers]))
    return report


def _rate(outcomes: Sequence[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {"rate": sum(outcomes) / len(outcomes), "low": low, "high": high}


def _on_mask(mask: np.ndarray, point: tuple[float, float]) -> bool:
    column, row = int(np.floor(point[0])), int(np.floor(point[1]))
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])
