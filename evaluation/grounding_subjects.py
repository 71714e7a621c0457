"""Models under test: a WallVLA checkpoint, or any vision-language model of transformers as the baseline."""

import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from .grounding import Box, Point, Question, Reply


# What a model that was not trained on our answer formats is told, in words that Qwen2.5-VL knows from its training
FORMAT_HINTS = {
    "point": 'Answer in JSON: [{"point_2d": [x, y], "label": "..."}]',
    "points": 'Answer in JSON: [{"point_2d": [x, y], "label": "..."}, ...]',
    "free_space": 'Answer in JSON: [{"point_2d": [x, y], "label": "..."}, ...]',
    "trajectory": 'Answer in JSON, in the order of time: [{"point_2d": [x, y], "label": "..."}, ...]',
    "box": 'Answer in JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]',
    "boxes": 'Answer in JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}, ...]',
}
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_PAIR = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")
_QUADRUPLE = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


class CheckpointSubject:
    """A WallVLA checkpoint: prompts, coordinates and constrained decoding are those of its processor.

    Args:
        model: has `generate` and `device`.
        processor: a `WallVLAProcessor`.
        constrained: decode coordinates with `processor.answer_constraint`: no answer is malformed, none can refuse.
        max_new_tokens: longest answer; constrained answers get as many as they need.
    """

    def __init__(self, model, processor, constrained: bool = False, max_new_tokens: int = 48):
        self.model = model.eval()
        self.processor = processor
        self.constrained = constrained
        self.max_new_tokens = max_new_tokens

    def prompt(self, kind: str, subject: str) -> str:
        """The question of the grounding protocol."""
        return self.processor.grounding_prompt(kind, subject)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy answers to questions of one kind."""
        import torch

        images, kind = [question.images for question in questions], questions[0].kind
        inputs = self.processor(images=images, text=[question.text for question in questions], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        options = {"max_new_tokens": self.max_new_tokens}
        if self.constrained and kind in FORMAT_HINTS:
            constraint = self.processor.answer_constraint(kind, [_size(question) for question in questions])
            options = {"max_new_tokens": constraint.max_new_tokens, "logits_processor": [constraint]}
        with torch.no_grad():
            tokens = self.model.generate(**inputs, do_sample=False, **options)
        replies = []
        texts = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :])
        for question, text in zip(questions, texts, strict=True):
            answer = self.processor.parse_answer(text, kind, _size(question))
            replies.append(Reply(answer.text, answer.points, answer.boxes, answer.refused, answer.problem))
        return replies


class VLMSubject:
    """Any image-text-to-text model of transformers, asked the same question with a format that it knows.

    Args:
        model: has `generate` and `device`.
        encode: images of each question and its text -> inputs of the model, padded on the left; see `chat_encoder`.
        decode: token ids (B, S) -> texts without special tokens.
        prompt: the question of a kind about a subject, without format: the one that the checkpoint is asked, too.
        coordinate_scale: the number that stands for the full width and height in the model's answers (1000 for
            Qwen2-VL and Qwen3-VL, 1 for RoboPoint). None: pixels of the image after resizing, as in Qwen2.5-VL.
        patch_size: of the vision encoder in pixels, for coordinates in pixels.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        model,
        encode: Callable,
        decode: Callable,
        prompt: Callable[[str, str], str],
        coordinate_scale: float | None = None,
        patch_size: int = 14,
        max_new_tokens: int = 128,
    ):
        self.model = model.eval()
        self.encode = encode
        self.decode = decode
        self.prompt = prompt
        self.coordinate_scale = coordinate_scale
        self.patch_size = patch_size
        self.max_new_tokens = max_new_tokens

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy answers to questions of one kind.

        Raises:
            ValueError: the model's answers are in pixels, but its inputs do not tell the size of the resized image.
        """
        import torch

        kind = questions[0].kind
        hint = f" {FORMAT_HINTS[kind]}" if kind in FORMAT_HINTS else ""
        inputs = self.encode([question.images for question in questions], [q.text + hint for q in questions])
        inputs = inputs.to(self.model.device)
        if self.coordinate_scale is None and "image_grid_thw" not in inputs and kind in FORMAT_HINTS:
            raise ValueError(
                f"Found inputs {', '.join(inputs)} without image_grid_thw, so pixels of the resized image mean "
                "nothing. Give the scale of this model's coordinates (--baseline-scale 1000 or 1)."
            )
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        texts = self.decode(tokens[:, inputs["input_ids"].shape[1] :])
        scales = self._scales(questions, inputs)
        return [self._read(q, text, scale) for q, text, scale in zip(questions, texts, scales, strict=True)]

    def _scales(self, questions: Sequence[Question], inputs) -> list[tuple[float, float]]:
        """What the model's full (width, height) is called, for the first image of each question."""
        if self.coordinate_scale is not None or "image_grid_thw" not in inputs:
            return [(self.coordinate_scale or 1.0,) * 2] * len(questions)
        firsts = np.cumsum([0] + [len(question.images) for question in questions[:-1]])
        grids = inputs["image_grid_thw"].cpu().numpy()[firsts]
        return [(float(columns) * self.patch_size, float(rows) * self.patch_size) for _, rows, columns in grids]

    def _read(self, question: Question, text: str, scale: tuple[float, float]) -> Reply:
        if question.kind not in FORMAT_HINTS:
            return Reply(text.strip(), problem=None if text.strip() else "the answer is empty")
        points, boxes = read_coordinates(text)
        factors = [side / whole for side, whole in zip(_size(question), scale, strict=True)]
        points = [tuple(v * f for v, f in zip(point, factors, strict=True)) for point in points]
        boxes = [tuple(v * f for v, f in zip(box, factors * 2, strict=True)) for box in boxes]
        problem = None if points or boxes else "the answer holds no coordinates"
        return Reply(text.strip(), points, boxes, problem=problem)


def read_coordinates(text: str) -> tuple[list[Point], list[Box]]:
    """Points and boxes in an answer in any of the usual forms, in the answer's own units.

    JSON with `point_2d` and `bbox_2d` (Qwen-VL); else every [x1, y1, x2, y2] or (x1, y1, x2, y2) is a box and every
    [x, y] or (x, y) a point (RoboPoint, RefSpatial).
    """
    points, boxes = [], []
    start, end = text.find("["), text.rfind("]")
    try:
        items = json.loads(text[start : end + 1])
    except json.JSONDecodeError:
        items = []
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict):
            points += _numbers(item.get("point_2d"), 2)
            boxes += _numbers(item.get("bbox_2d"), 4)
    if points or boxes:
        return points, boxes
    boxes = [tuple(map(float, match)) for match in _QUADRUPLE.findall(text)]
    return [tuple(map(float, match)) for match in _PAIR.findall(text)], boxes


def _numbers(values, count: int) -> list[tuple[float, ...]]:
    """[the values as floats] if they are so many numbers, else []."""
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, (int, float)) for v in values):
        return []
    return [tuple(map(float, values))]


def _size(question: Question) -> tuple[int, int]:
    """(width, height) of the first image of a question."""
    return question.images[0].shape[1], question.images[0].shape[0]


def chat_encoder(processor) -> Callable:
    """`encode` of `VLMSubject` for a processor of transformers with a chat template."""
    processor.tokenizer.padding_side = "left"

    def encode(images: list[list[np.ndarray]], texts: list[str]):
        from PIL import Image

        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": Image.fromarray(image)} for image in of_question]
                    + [{"type": "text", "text": text}],
                }
            ]
            for of_question, text in zip(images, texts, strict=True)
        ]
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    return encode
