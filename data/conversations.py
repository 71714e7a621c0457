"""Questions and answers about images from JSON lines or any `datasets` table, as multimodal samples.

Rows may be plain (`image`, `text` or `question`, `answer`) or chats (`messages` with role and content, `conversations`
with from and value). A chat of n answers gives n samples: each has the turns before it in its prompt, in chat format,
and learns one answer.
"""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .coordinates import CONVENTIONS, convert_text


logger = logging.getLogger(__name__)

QUESTION_KEYS = ("text", "question", "prompt", "instruction", "problem")
ANSWER_KEYS = ("answer", "response", "caption", "output", "label")
CHAT_KEYS = ("messages", "conversations")
IMAGE_KEYS = ("images", "image")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
NEXT_TURN = "<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n{question}"


class JsonLines(Sequence):
    """Rows of a JSON lines file, found by their place in it: memory holds one number per row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that is no JSON object, when it is read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        starts, position = [], 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(position)
                position += len(line)
        self._starts = np.asarray(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        with open(self.path, "rb") as file:  # opened anew: a shared position would not survive worker processes
            file.seek(int(self._starts[index]))
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, row {index} is not valid JSON: {error}. Repair or remove it.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, row {index} is {str(row)[:60]!r}; every row is a JSON object.")
        return row


class ConversationDataset:
    """Map-style dataset of multimodal samples (`docs/architecture.md`) from rows of questions and answers.

    Args:
        rows: rows by index, such as `JsonLines` or a `datasets.Dataset` (decode its images with `datasets.Image`).
        image_folder: where relative image paths start. Default: the folder of `JsonLines`.
        coordinates: what numbers of boxes and points in the texts count, a key of `coordinates.CONVENTIONS`; "text"
            leaves the texts as they are.
        processor: writes boxes and points; needed unless coordinates is "text".
        name: for messages. Default: the file.
        skip_errors: leave out rows in no known form and list them in `skipped`, instead of raising.

    Attributes:
        skipped (`dict[int, str]`): reason by number of the rows that `skip_errors` left out.

    Raises:
        ValueError: an unknown convention, or rows in no known form.
    """

    def __init__(
        self,
        rows: Sequence[Mapping],
        *,
        image_folder: str | Path | None = None,
        coordinates: str = "text",
        processor=None,
        name: str | None = None,
        skip_errors: bool = False,
        progress: bool = True,
    ):
        check_coordinates(coordinates, processor)
        self._rows, self._coordinates, self._processor = rows, coordinates, processor
        is_file = isinstance(rows, JsonLines)
        self.name = name or (str(rows.path) if is_file else "conversations")
        self._image_folder = Path(image_folder) if image_folder else (rows.path.parent if is_file else Path())
        counts = []
        bar = tqdm(range(len(rows)), desc="questions", unit="row", delay=2, disable=None if progress else True)
        self.skipped: dict[int, str] = {}
        for index in bar:
            try:
                counts.append(len(self._turns(rows[index], index)))
            except ValueError as error:
                if not skip_errors:
                    raise
                counts.append(0)
                self.skipped[index] = str(error)
        if self.skipped:
            logger.warning("%s: %d of %d rows skipped: %s", self.name, len(self.skipped), len(rows), self.skipped)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict:
        """One sample: `images` (list of uint8 (h, w, 3)), `text`, `answer`, `dataset_index`.

        Raises:
            IndexError: index outside the dataset.
            ValueError: an image that cannot be read, or coordinates outside it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} is outside {self.name}, which has {len(self)} samples.")
        index = int(index) % len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = self._rows[number]
        turns = self._turns(row, number)
        last = index - (int(self._ends[number - 1]) if number else 0)
        text = turns[0][0]
        for (_, answer), (question, _) in zip(turns[:last], turns[1 : last + 1], strict=True):
            text += NEXT_TURN.format(answer=answer, question=question)
        answer = turns[last][1]
        images = self._images(row, number)
        if self._coordinates != "text" and images:
            size = images[0].shape[1], images[0].shape[0]
            try:
                text, answer = (convert_text(t, self._coordinates, size, self._processor) for t in (text, answer))
            except ValueError as error:
                raise ValueError(f"{self.name}, row {number}: {error}") from error
        return {"images": images, "text": text, "answer": answer, "dataset_index": index}

    def _turns(self, row: Mapping, number: int) -> list[tuple[str, str]]:
        """[(question, answer)] of a row."""
        for key in CHAT_KEYS:
            if row.get(key):
                return self._chat(row[key], number)
        question = next((row[key] for key in QUESTION_KEYS if isinstance(row.get(key), str)), None)
        answer = next((row[key] for key in ANSWER_KEYS if isinstance(row.get(key), str)), None)
        if answer is None or not answer.strip() or question is None:
            raise ValueError(
                f"{self.name}, row {number} has columns {', '.join(map(str, row))}; it needs a chat "
                f"({' or '.join(CHAT_KEYS)}), or a question ({', '.join(QUESTION_KEYS)}) and an answer "
                f"({', '.join(ANSWER_KEYS)})."
            )
        return [(_without_placeholders(question), answer)]

    def _chat(self, messages: Sequence[Mapping], number: int) -> list[tuple[str, str]]:
        turns, question = [], None
        for message in messages:
            role = ROLES.get(message.get("role") or message.get("from"))
            text = _content(message.get("content") if "content" in message else message.get("value"))
            if role == "user" and question is None:
                question = text
            elif role == "assistant" and question is not None and text.strip():
                turns.append((question, text))
                question = None
            elif role != "system":
                raise ValueError(
                    f"{self.name}, row {number}: found a {message.get('role') or message.get('from')} turn "
                    f"{text[:40]!r} out of place. A chat is questions and answers in turn, none of them empty."
                )
        if not turns or question is not None:
            raise ValueError(f"{self.name}, row {number}: the chat does not end in an answer. Repair or remove it.")
        return turns

    def _images(self, row: Mapping, number: int) -> list[np.ndarray]:
        value = next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), [])
        values = list(value) if isinstance(value, list | tuple) else [value]
        try:
            return [self._pixels(image) for image in values]
        except (OSError, TypeError) as error:
            raise ValueError(f"{self.name}, row {number}: an image cannot be read: {error}.") from error

    def _pixels(self, image) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image
        if isinstance(image, Image.Image):
            return np.array(image.convert("RGB"))
        if isinstance(image, dict):
            image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
        if isinstance(image, str):
            image = self._image_folder / image
        with Image.open(image) as opened:
            return np.array(opened.convert("RGB"))


def check_coordinates(coordinates: str, processor) -> None:
    """Raises ValueError for an unknown convention, or one that needs a processor and has none."""
    if coordinates != "text" and coordinates not in CONVENTIONS:
        raise ValueError(f"coordinates is {coordinates!r}; known are text, {', '.join(CONVENTIONS)}.")
    if coordinates != "text" and processor is None:
        raise ValueError(f"coordinates={coordinates!r} needs a processor, which knows the size that the model sees.")


def _content(value) -> str:
    """Text of a message: plain, or a list of parts of which the text ones count."""
    if isinstance(value, list):
        value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    return _without_placeholders(value) if isinstance(value, str) else ""


def _without_placeholders(text: str) -> str:
    """Images come first in our prompts; placeholders of other systems would be read as text."""
    return text.replace("<image>", "").strip()
