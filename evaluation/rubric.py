"""Task rubrics of real-robot evaluation: stages with points, which make a task progress of 0 to 100.

    rubric = load_rubrics()["fruit_sorting"]
    rubric.progress([1, 1, 0])        # grasped, right tray, no retraction: 90.0

The data are `rubrics/*.json`: 31 tasks of the Wall-OSS-0.5 report and 4 of the scaling study, with the papers' own
wording under `rule`. A stage is `[name, points, times]`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


RUBRIC_FOLDER = Path(__file__).with_name("rubrics")


@dataclass(frozen=True)
class Stage:
    """One thing to do: `points` each time, up to `times` times."""

    name: str
    points: float
    times: int


@dataclass(frozen=True)
class Rubric:
    """How a trial of one task is scored.

    `rule` is the paper's wording, `maximum` what 100% means. `unstated_points` is what the paper's stages lack to the
    maximum; `note` says what we had to assume.
    """

    id: str
    name: str
    description: str
    rule: str
    maximum: float
    stages: tuple[Stage, ...]
    source: str
    unstated_points: float = 0.0
    note: str = ""

    def __post_init__(self):
        total = sum(stage.points * stage.times for stage in self.stages) + self.unstated_points
        if abs(total - self.maximum) > 1e-9:
            raise ValueError(f"The stages of {self.id} add up to {total:g}, but its maximum is {self.maximum:g}.")

    def points(self, counts: Sequence[int]) -> float:
        """Points of a trial.

        Args:
            counts: how often each stage was completed, in the order of `stages`.

        Raises:
            ValueError: wrong number of counts, or one outside its range.
        """
        if len(counts) != len(self.stages):
            raise ValueError(f"{self.id} has {len(self.stages)} stages, got {len(counts)} counts.")
        for stage, count in zip(self.stages, counts, strict=True):
            if not isinstance(count, int) or not 0 <= count <= stage.times:
                raise ValueError(f"{self.id}, {stage.name!r}: a whole number from 0 to {stage.times}, got {count!r}.")
        return sum(stage.points * count for stage, count in zip(self.stages, counts, strict=True))

    def progress(self, counts: Sequence[int]) -> float:
        """Task progress of a trial, 0 to 100."""
        return round(100 * self.points(counts) / self.maximum, 9)

    def success(self, counts: Sequence[int]) -> bool:
        """Whether all stages were completed, which is what the papers call success."""
        self.points(counts)
        return all(count == stage.times for stage, count in zip(self.stages, counts, strict=True))


def read_rubrics(path: Path | str) -> dict[str, Rubric]:
    """The rubrics of one JSON file by id, for instance of tasks of your own.

    Raises:
        ValueError: an id appears twice, or a rubric contradicts itself; the message names it.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    rubrics: dict[str, Rubric] = {}
    for entry in data["rubrics"]:
        stages = tuple(Stage(name, float(points), int(times)) for name, points, times in entry["stages"])
        rubric = Rubric(**{**entry, "stages": stages, "source": data["source"]})
        if rubric.id in rubrics:
            raise ValueError(f"{path} has two rubrics called {rubric.id!r}: rename one.")
        rubrics[rubric.id] = rubric
    return rubrics


def load_rubrics() -> dict[str, Rubric]:
    """The 35 published rubrics by id."""
    rubrics: dict[str, Rubric] = {}
    for path in sorted(RUBRIC_FOLDER.glob("*.json"), reverse=True):  # Wall-OSS first
        rubrics |= read_rubrics(path)
    return rubrics


def find_rubric(name: str, rubrics: Mapping[str, Rubric]) -> Rubric:
    """The rubric of an id; an unknown one is an error with close matches."""
    if name not in rubrics:
        close = difflib.get_close_matches(name, rubrics, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(rubrics)}."
        raise ValueError(f"Unknown rubric {name!r}: {hint}")
    return rubrics[name]
