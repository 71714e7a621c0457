"""Grounding: does the model find what it was asked for, and not what lies beside it?

A `Subject` answers `Question`s; `evaluate_questions` scores the answers. Prompts and answer formats are not defined
here: questions about objects get the text of `subject.prompt`, and every subject reads its own answers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tqdm.auto import tqdm

from .closed_loop import wilson_interval
from .demonstrations import GroundingSample


KINDS = ("point", "box")
Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass
class Question:
    """One question about one or more images, with what is needed to score the answer.

    `kind` is a kind of the grounding protocol. Of `mask` (bool (h, w)), `box` and `answer` those are set that the
    benchmark knows; the images of questions with a mask or box are one.
    """

    kind: str
    text: str
    images: list[np.ndarray]  # uint8 (h, w, 3) each
    mask: np.ndarray | None = None
    box: Box | None = None
    answer: str | None = None
    category: str = ""


@dataclass
class Reply:
    """What a subject answered: the text, and what was read from it, in pixels of the question's image.

    `refused`: it says that there is no such thing. `problem`: what is wrong with the answer, None if nothing is.
    """

    text: str
    points: list[Point] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    refused: bool = False
    problem: str | None = None


class Subject(Protocol):
    """A model under test; see `grounding_subjects.py` for a WallVLA checkpoint and for any other VLM."""

    def prompt(self, kind: str, subject: str) -> str:
        """The question of a kind about a subject, in the words that this model is asked with."""

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers questions that fit into one batch."""


# --- geometry


def box_center(box: Box) -> Point:
    """Centre (x, y) of a box (x1, y1, x2, y2)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def box_contains(box: Box, point: Point) -> bool:
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


def on_mask(mask: np.ndarray, point: Point) -> bool:
    """Whether the pixel under a point (x, y) is True in a mask (h, w); the right and lower borders are inside."""
    height, width = mask.shape
    if not (0 <= point[0] <= width and 0 <= point[1] <= height):
        return False
    return bool(mask[min(int(point[1]), height - 1), min(int(point[0]), width - 1)])


# --- answers of a WallVLA checkpoint


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


def parse_answer(processor, text: str, image: np.ndarray) -> tuple[Point | None, Box | None]:
    """The first point and the first box of an answer, in pixels of `image`; a box also gives its centre as point."""
    points, boxes = processor.parse_grounding(text, image_size=(image.shape[1], image.shape[0]))
    return first_point(points, boxes), (tuple(float(value) for value in boxes[0]) if len(boxes) else None)


def first_point(points: Sequence[Point], boxes: Sequence[Box]) -> Point | None:
    """The first point of an answer, else the centre of its first box, else None."""
    if len(points):
        return float(points[0][0]), float(points[0][1])
    return box_center(boxes[0]) if len(boxes) else None


# --- questions and their scores


def object_questions(samples: Sequence[GroundingSample], kind: str, subject: Subject) -> list[Question]:
    """A question about the object of each sample, in the subject's words; `kind` is "point" or "box"."""
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of grounding {kind!r}: use one of {KINDS}.")
    return [
        Question(kind, subject.prompt(kind, s.name), [s.image], mask=s.mask, box=s.box, category=s.name)
        for s in samples
    ]


def ask_all(
    subject: Subject, questions: Sequence[Question], batch_size: int = 32, progress: bool = False
) -> list[Reply]:
    """The subject's replies, in the order of the questions; a batch holds questions of one kind."""
    by_kind: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_kind.setdefault(question.kind, []).append(index)
    replies: dict[int, Reply] = {}
    with tqdm(total=len(questions), desc="grounding", unit="question", disable=not progress) as bar:
        for indices in by_kind.values():
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                answered = subject.ask([questions[index] for index in chosen])
                replies.update(zip(chosen, answered, strict=True))
                bar.update(len(chosen))
    return [replies[index] for index in range(len(questions))]


def score_reply(question: Question, reply: Reply) -> dict[str, float]:
    """The metrics that a question allows, each from 0 to 1. No answer, a refusal and a malformed one score 0.

    `point_in_mask`, `point_in_box`: the first point (or the centre of the first box). `points_in_mask`: the part of
    all points that lie in the mask, Where2Place's and RefSpatial's accuracy. `iou` and `iou_50` of the first box, for
    questions of kind "box". `exact_match` of words, for questions with an answer.
    """
    scores = {}
    point = first_point(reply.points, reply.boxes)
    if question.mask is not None:
        scores["point_in_mask"] = float(point is not None and on_mask(question.mask, point))
        inside = [on_mask(question.mask, p) for p in reply.points]
        if question.kind in ("free_space", "points"):
            scores["points_in_mask"] = float(np.mean(inside)) if inside else 0.0
    if question.box is not None:
        scores["point_in_box"] = float(point is not None and box_contains(question.box, point))
        if question.kind == "box":
            scores["iou"] = box_iou(reply.boxes[0], question.box) if reply.boxes else 0.0
            scores["iou_50"] = float(scores["iou"] >= 0.5)
    if question.answer is not None:
        scores["exact_match"] = float(exact_match(reply.text, question.answer))
    return scores


def exact_match(text: str, answer: str) -> bool:
    """Whether two answers are the same, up to case, blanks and a final full stop; of a choice the letter counts.

    A choice is an answer of one letter. It matches "B", "B.", "(b)", "B. the left one" and "Answer: B".
    """
    answer = answer.strip().strip(".").lower()
    text = re.sub(r"^\s*(the )?(correct )?answer( is)?\s*:?\s*", "", text.strip().lower())
    if re.fullmatch(r"[a-z]", answer):
        found = re.match(r"\(?([a-z])(?:[\s).:,]|$)", text)
        return found is not None and found[1] == answer
    return " ".join(text.split()).strip(".") == " ".join(answer.split())


def evaluate_questions(
    subject: Subject, questions: Sequence[Question], batch_size: int = 32, progress: bool = True
) -> dict:
    """Asks all questions and averages the scores.

    Returns:
        `questions`; `metrics`: by name `{"rate", "low", "high", "count"}` with 95% Wilson intervals (of a mean of
        fractions the interval is that of as many yes-or-no outcomes, which is never narrower); `malformed_rate` and
        `refusal_rate`; `by_category`: by category the mean of each metric; `answers`: one dictionary a question.

    Raises:
        ValueError: there are no questions.
    """
    if len(questions) == 0:
        raise ValueError("There are no grounding questions to evaluate.")
    replies = ask_all(subject, questions, batch_size, progress)
    answers = [
        {
            "category": question.category,
            "question": question.text,
            "text": reply.text,
            "points": reply.points,
            "boxes": reply.boxes,
            "refused": reply.refused,
            "problem": reply.problem,
            "scores": score_reply(question, reply),
        }
        for question, reply in zip(questions, replies, strict=True)
    ]
    names = sorted({name for answer in answers for name in answer["scores"]})
    metrics, by_category = {}, {}
    for name in names:
        scored = [answer for answer in answers if name in answer["scores"]]
        metrics[name] = _rate([answer["scores"][name] for answer in scored]) | {"count": len(scored)}
        for category in sorted({answer["category"] for answer in scored}):
            values = [answer["scores"][name] for answer in scored if answer["category"] == category]
            by_category.setdefault(category, {})[name] = float(np.mean(values))
    return {
        "questions": len(questions),
        "metrics": metrics,
        "malformed_rate": float(np.mean([answer["problem"] is not None for answer in answers])),
        "refusal_rate": float(np.mean([answer["refused"] for answer in answers])),
        "by_category": by_category,
        "answers": answers,
    }


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
    subject: Subject,
    samples: Sequence[GroundingSample],
    kind: str = "box",
    batch_size: int = 32,
    progress: bool = True,
) -> dict:
    """Asks for every sample's object, and then for another one in the same image.

    Args:
        subject: the model under test.
        samples: images with a named object; see `demonstrations.record_scenes` and `grounding_scenes`.
        kind: "point" or "box".
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
    asked = object_questions(samples, kind, subject)
    swapped = [
        (question, swapped_name(sample, index))
        for index, (question, sample) in enumerate(zip(asked, samples, strict=True))
    ]
    swapped = [
        Question(kind, subject.prompt(kind, name), question.images, mask=question.mask, box=question.box)
        for question, name in swapped
        if name is not None
    ]
    replies = ask_all(subject, asked + swapped, batch_size, progress)
    answers = [_judge(question, reply) for question, reply in zip(asked, replies[: len(asked)], strict=True)]
    others = [
        _judge(question, reply)["inside"] for question, reply in zip(swapped, replies[len(asked) :], strict=True)
    ]
    return _report(answers, others, kind)


def _judge(question: Question, reply: Reply) -> dict:
    scores = score_reply(question, reply)
    return {
        "name": question.category,
        "text": reply.text,
        "point": first_point(reply.points, reply.boxes),
        "box": tuple(map(float, reply.boxes[0])) if reply.boxes else None,
        "inside": bool(scores["point_in_box"]),
        "on_mask": bool(scores["point_in_mask"]),
        "iou": scores["iou"] if question.kind == "box" else 0.0,
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


def _rate(outcomes: Sequence[float]) -> dict[str, float]:
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {"rate": sum(outcomes) / len(outcomes), "low": low, "high": high}
