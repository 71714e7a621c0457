"""Language beyond the task: steps of an episode and other wordings, where a LeRobot dataset has them.

Two forms exist: `subtask_index` with `meta/subtasks.parquet` (lerobot 0.4.4 to 0.5), and the columns
`language_persistent` (valid from its timestamp on, repeated in every row of an episode) and `language_events` (on its
exact frame) of lerobot 0.6.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .lerobot_metadata import read_parquet


PERSISTENT, EVENTS, SUBTASK_INDEX = "language_persistent", "language_events", "subtask_index"


@dataclass(frozen=True)
class EpisodeLanguage:
    """Texts of one episode.

    `steps` are the step-level instructions (start in seconds, text) by time; `paraphrases` other wordings of the
    task; `plan` the whole plan, if there is one.
    """

    steps: tuple[tuple[float, str], ...] = ()
    paraphrases: tuple[str, ...] = ()
    plan: str | None = None

    def step_at(self, times: np.ndarray) -> list[str | None]:
        """The step of each time (T,) in seconds: the last that has begun."""
        # Timestamps of rows are float32, those of steps are not: a step begins on its frame, not one later.
        places = np.searchsorted([start - 1e-4 for start, _ in self.steps], times, side="right") - 1
        return [self.steps[place][1] if place >= 0 else None for place in places]


def read_persistent(column: pa.ChunkedArray, row: int) -> EpisodeLanguage:
    """The language of the episode that `row` belongs to.

    Raises:
        ValueError: an entry without text, role or time.
    """
    steps, paraphrases, plan = [], [], None
    for entry in column[row].as_py() or []:
        style, text, time = entry.get("style"), entry.get("content"), entry.get("timestamp")
        if style not in ("subtask", "task_aug", "plan"):
            continue  # memory, motion: nothing that an instruction could be
        if not isinstance(text, str) or not text.strip() or time is None:
            raise ValueError(
                f"{PERSISTENT} has a {style} entry with content {text!r} at timestamp {time}; both are needed. "
                "Annotate the episode again, or leave it out with episodes=[...]."
            )
        if style == "subtask":
            steps.append((float(time), text))
        elif style == "task_aug":
            paraphrases.append(text)
        else:
            plan = text
    return EpisodeLanguage(tuple(sorted(steps)), tuple(paraphrases), plan)


def read_questions(column: pa.ChunkedArray, row: int) -> list[dict]:
    """Questions about the frame of `row`: [{"text", "answer", "camera"}], from its vqa events in pairs of roles."""
    questions, waiting = [], {}
    for entry in column[row].as_py() or []:
        if entry.get("style") != "vqa" or not entry.get("content"):
            continue
        camera = entry.get("camera")
        other = waiting.pop(camera, None)
        if other is None or other["role"] == entry["role"]:
            waiting[camera] = entry
            continue
        pair = {each["role"]: each["content"] for each in (other, entry)}
        if pair.keys() == {"user", "assistant"}:
            questions.append({"text": pair["user"], "answer": pair["assistant"], "camera": camera})
    return questions


def read_subtasks(root: Path) -> dict[int, str]:
    """Steps of the older form, {subtask_index: text}; empty where the dataset has none."""
    path = root / "meta" / "subtasks.parquet"
    if not path.is_file():
        return {}
    table = read_parquet(path)
    names = [name for name in ("subtask", "__index_level_0__") if name in table.column_names]
    if not names or SUBTASK_INDEX not in table.column_names:
        raise ValueError(
            f"{path} has columns {table.column_names}; expected {SUBTASK_INDEX} and subtask. Download the file again."
        )
    return dict(zip(table[SUBTASK_INDEX].to_pylist(), table[names[0]].to_pylist(), strict=True))
