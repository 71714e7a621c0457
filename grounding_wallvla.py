"""The grounding protocol: what to ask, how answers look, how they are read, and decoding that cannot break the form.

Questions and answers of every kind are defined here once, for training data, evaluation, and users of a checkpoint
(`processor.grounding_prompt`, `processor.parse_answer`, `processor.answer_constraint`). `docs/grounding.md` shows an
example of each. Wall-OSS-0.5 defines two elements, `<point>[x, y]</point>` and `<box>[x1, y1, x2, y2]</box>`
(section 3.2), and writes every coordinate in one of them; so several objects are several elements, and a trajectory is
a row of points in the order of time. Numbers are whole pixels of the image as the model sees it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase


Point = tuple[float, float]
Box = tuple[float, float, float, float]

# The subject of a question: a name ("red cup"), a task ("press the button"), a place or a whole question.
PROMPTS = {
    "point": "Point to the {subject}.",
    "box": "Where is the {subject}? Answer with a box.",
    "points": "Point to every {subject}.",
    "boxes": "Where is every {subject}? Answer with boxes.",
    "free_space": "Point to free space {subject}.",
    "trajectory": "Which way should the robot hand move to {subject}? Answer with points.",
    "what_is_at": "What is at {subject}?",
    "progress": "The task is to {subject}. How much of it is done? Answer in percent.",
    "next_step": "The task is to {subject}. What is the next step?",
    "vqa": "{subject}",
}
REFUSAL = "There is no {subject}."


@dataclass(frozen=True)
class Form:
    """How the coordinates of an answer look: `count` elements `<tag>[...]</tag>` of `arity` numbers."""

    tag: str
    arity: int
    min_count: int
    max_count: int


FORMS = {
    "point": Form("point", 2, 1, 1),
    "box": Form("box", 4, 1, 1),
    "points": Form("point", 2, 1, 16),
    "boxes": Form("box", 4, 1, 16),
    "free_space": Form("point", 2, 1, 8),
    "trajectory": Form("point", 2, 2, 16),
}

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_ELEMENT = re.compile(
    rf"<point>\s*\[{_NUMBER},{_NUMBER}\]\s*</point>|<box>\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*</box>"
)
_PERCENT = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*%")
_REFUSAL = re.compile(
    r"\s*(there (is|are) no\b|none\b|no such\b|(it|they) (is|are) not (visible|in)\b|i (cannot|can't))", re.I
)


@dataclass
class GroundingAnswer:
    """An answer that was read.

    points, boxes: in pixels of the original image, in the order of the text. A trajectory is its `points`.
    progress: percent of the task, for questions of kind "progress".
    refused: the model says that there is no such thing; then it gives no coordinates.
    problem: what is wrong with the answer, None for one that fits its kind. Whatever could be read is kept.
    """

    kind: str
    text: str
    points: list[Point] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    progress: float | None = None
    refused: bool = False
    problem: str | None = None


def grounding_prompt(kind: str, subject: str) -> str:
    """The question of a kind about a subject. Raises ValueError for an unknown kind or an empty subject."""
    check_kind(kind)
    if not subject.strip():
        raise ValueError(f"Found an empty subject for a question of kind {kind!r}. Say what to look for.")
    return PROMPTS[kind].format(subject=subject.strip())


def check_kind(kind: str) -> None:
    """Raises ValueError with the known kinds."""
    if kind not in PROMPTS:
        raise ValueError(f"Found the kind {kind!r} of question. Known: {', '.join(PROMPTS)}.")


def to_original(
    coordinates: Sequence[float], resized: tuple[int, int], image_size: tuple[int, int]
) -> tuple[float, ...]:
    """Coordinates (x, y, x, y, ...) in pixels of a resized image to those of the original, clamped to it."""
    return tuple(
        min(max(value * image_size[axis % 2] / resized[axis % 2], 0.0), float(image_size[axis % 2]))
        for axis, value in enumerate(coordinates)
    )


def to_resized(coordinates: Sequence[float], resized: tuple[int, int], image_size: tuple[int, int]) -> list[int]:
    """Inverse of `to_original`, in whole pixels."""
    return [
        round(min(max(value / image_size[axis % 2], 0.0), 1.0) * resized[axis % 2])
        for axis, value in enumerate(coordinates)
    ]


def find_elements(text: str) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Points and boxes as written in a text, in pixels of the resized image."""
    points, boxes = [], []
    for match in _ELEMENT.finditer(text):
        numbers = tuple(float(number) for number in match.groups() if number is not None)
        (points if len(numbers) == 2 else boxes).append(numbers)
    return points, boxes


def read_answer(kind: str, text: str, points: list[Point], boxes: list[Box]) -> GroundingAnswer:
    """Judges the form of an answer whose `points` and `boxes` are already in pixels of the original image."""
    check_kind(kind)
    answer = GroundingAnswer(kind, text, points, boxes)
    answer.refused = not points and not boxes and _REFUSAL.match(text) is not None
    if kind == "progress":
        percent = [float(number) for number in _PERCENT.findall(text)]
        if len(percent) != 1 or percent[0] > 100:
            answer.problem = f"found {len(percent)} percentages from 0 to 100, expected one"
        else:
            answer.progress = percent[0]
    elif kind not in FORMS:
        if not text.strip():
            answer.problem = "the answer is empty"
    elif not answer.refused:
        answer.problem = _form_problem(FORMS[kind], text, points, boxes)
    return answer


def _form_problem(form: Form, text: str, points: list[Point], boxes: list[Box]) -> str | None:
    wanted, others = (points, boxes) if form.tag == "point" else (boxes, points)
    if not wanted and not others:
        if not text.strip():
            return "the answer is empty"
        if f"<{form.tag}>" in text:
            return f"a <{form.tag}> is not closed, or does not hold {form.arity} numbers"
        return "the answer holds no coordinates"
    if others:
        return f"found {len(others)} elements that are no <{form.tag}>"
    if not form.min_count <= len(wanted) <= form.max_count:
        expected = form.min_count if form.min_count == form.max_count else f"{form.min_count} to {form.max_count}"
        return f"found {len(wanted)} of <{form.tag}>, expected {expected}"
    return None


@dataclass(frozen=True)
class _Place:
    """Where a text is inside its form: element, literal or number in it, and what it has written there."""

    element: int = 0
    item: int = 0
    written: str = ""
    numbers: tuple[int, ...] = ()


class CoordinateConstraint(LogitsProcessor):
    """Lets `generate` produce nothing but a well-formed answer: tags, whole numbers inside the image, ordered boxes.

    A model that is constrained cannot refuse and cannot explain: use it where coordinates are needed.

    Args:
        tokenizer: whose tokens are generated.
        form: of the answer.
        image_sizes: (width, height) of the image as the model sees it, one for each row of the batch.
        end_token_id: ends the answer.

    Use one instance for one call of `generate`, with `max_new_tokens` of at least `self.max_new_tokens`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: Form,
        image_sizes: Sequence[tuple[int, int]],
        end_token_id: int,
        token_texts: dict[int, str] | None = None,
    ):
        self.form = form
        self.image_sizes = list(image_sizes)
        self.end_token_id = end_token_id
        self._texts = answer_tokens(tokenizer, end_token_id) if token_texts is None else token_texts
        self._items = [f"<{form.tag}>[", None] + [", ", None] * (form.arity - 1) + [f"]</{form.tag}>"]
        self._prompt_length = None
        self._allowed: dict[tuple, list[int]] = {}
        digits = max(len(str(side)) for size in self.image_sizes for side in size)
        literals = sum(len(item) for item in self._items if item)
        self.max_new_tokens = form.max_count * (literals + form.arity * digits) + 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary) with everything at minus infinity that would break the form."""
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        if len(input_ids) % len(self.image_sizes):
            raise ValueError(
                f"Found {len(input_ids)} rows for {len(self.image_sizes)} image sizes. Pass one size for each prompt."
            )
        beams = len(input_ids) // len(self.image_sizes)
        constrained = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(input_ids[:, self._prompt_length :].tolist()):
            allowed = self._next_tokens(tokens, self.image_sizes[row // beams])
            constrained[row, allowed] = scores[row, allowed]
        return constrained

    def _next_tokens(self, tokens: list[int], size: tuple[int, int]) -> list[int]:
        if self.end_token_id in tokens:
            return [self.end_token_id]
        place = _Place()
        for token in tokens:
            place = self._read(place, self._texts[token], size)
        key = (place, size)
        if key not in self._allowed:
            allowed = [token for token, text in self._texts.items() if self._read(place, text, size) is not None]
            if place.item == 0 and not place.written and place.element >= self.form.min_count:
                allowed.append(self.end_token_id)
            self._allowed[key] = allowed
        if not self._allowed[key]:
            raise ValueError(
                f"No token of the tokenizer can go on after {place}. It has to have the characters of "
                f"<{self.form.tag}>[0123456789, ]</{self.form.tag}> as tokens."
            )
        return self._allowed[key]

    def _read(self, place: _Place, text: str, size: tuple[int, int]) -> _Place | None:
        """Where the text is after more of it, None if it does not fit."""
        for character in text:
            place = self._step(place, character, size)
            if place is None:
                return None
        return place

    def _step(self, place: _Place, character: str, size: tuple[int, int]) -> _Place | None:
        element, item, written, numbers = place.element, place.item, place.written, place.numbers
        if self._items[item] is None:
            if character.isdigit():
                low, high = self._bounds(numbers, size)
                fits = _can_become(written + character, low, high)
                return _Place(element, item, written + character, numbers) if fits else None
            low, high = self._bounds(numbers, size)
            if not written or not low <= int(written) <= high:
                return None
            item, written, numbers = item + 1, "", numbers + (int(written),)
        if element == self.form.max_count:
            return None
        literal = self._items[item]
        # The token of a number may take the blank before it along (`lstrip`): then there is none after the comma
        if literal == ", " and written == "," and character.isdigit():
            return self._step(_Place(element, item + 1, "", numbers), character, size)
        if literal[len(written)] != character:
            return None
        written += character
        if written != literal:
            return _Place(element, item, written, numbers)
        if item + 1 == len(self._items):
            return _Place(element + 1)
        return _Place(element, item + 1, "", numbers)

    def _bounds(self, numbers: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
        """Smallest and largest next number: inside the image, and the second corner not before the first."""
        axis = len(numbers) % 2
        return (numbers[axis] if len(numbers) >= 2 else 0), size[axis]


def _can_become(digits: str, low: int, high: int) -> bool:
    """Whether some number from low to high, written without leading zeros, starts with these digits."""
    if digits[0] == "0":
        return digits == "0" and low == 0
    first, last = int(digits), int(digits)
    while first <= high:
        if last >= low:
            return True
        first, last = first * 10, last * 10 + 9
    return False


def answer_tokens(tokenizer: PreTrainedTokenizerBase, end_token_id: int) -> dict[int, str]:
    """{id: text} of the tokens that can be a part of coordinates; 150,000 tokens take about a second."""
    ids = [token for token in range(len(tokenizer)) if token != end_token_id]
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    usable = re.compile(r"[<>/\[\], 0-9pointbx]+")
    return {token: text for token, text in zip(ids, texts, strict=True) if usable.fullmatch(text)}
