"""Trials on a real robot: stored as they are scored, summed up by policy and task.

    with TrialBook("trials.jsonl") as book:
        score_in_terminal(book, rubrics["fruit_sorting"], policy="wall-oss", operator="ada")
        print(format_trials(summarize_trials(book.trials)))

The web form is `trials_web.py`. For trials whose policy the operator must not know, see `blind.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .journal import Journal, JournalError, read_journal
from .rubric import Rubric
from .statistics import bootstrap_mean, wilson_interval


class TrialBook:
    """An append-only file of scored trials; see `journal.py` for what it survives.

    Raises:
        JournalError: the file was tampered with, is in use, or holds a trial id twice.
    """

    def __init__(self, path: Path | str) -> None:
        self._journal = Journal(path)
        try:
            self._ids = _unique_ids(self._journal.records, self._journal.path)
        except JournalError:
            self._journal.close()
            raise

    def __enter__(self) -> "TrialBook":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file free."""
        self._journal.close()

    @property
    def trials(self) -> list[dict]:
        """All trials, in the order in which they were scored."""
        return list(self._journal.records)

    @property
    def head(self) -> str:
        """The last hash of the chain: write it down to notice trials that are cut off later."""
        return self._journal.head

    def next_id(self, policy: str, rubric: Rubric) -> str:
        """A free id for another trial of a policy at a task, e.g. `fruit_sorting/wall-oss/3`."""
        number = 1
        while f"{rubric.id}/{policy}/{number}" in self._ids:
            number += 1
        return f"{rubric.id}/{policy}/{number}"

    def record(
        self, trial: str, policy: str, rubric: Rubric, counts: Sequence[int], operator: str, comment: str = ""
    ) -> dict:
        """Adds a trial; it is on the disk when this returns.

        Args:
            trial: an id that the book does not have.
            policy: what ran.
            rubric: of the task.
            counts: how often each stage was completed.
            operator: who scored.
            comment: anything worth knowing, e.g. the name of a recording.

        Raises:
            ValueError: the id is taken or empty, a name is empty, or counts that the rubric does not allow.
            OSError: the disk is full; nothing was recorded.
        """
        for name, value in (("trial", trial), ("policy", policy), ("operator", operator)):
            if not value.strip():
                raise ValueError(f"{name} is empty: every trial says who scored what under which id.")
        if trial in self._ids:
            raise ValueError(f"Trial {trial!r} is already in {self._journal.path}: give this one another id.")
        entry = {
            "trial": trial,
            "policy": policy,
            "task": rubric.id,
            "counts": list(counts),
            "points": rubric.points(counts),
            "progress": rubric.progress(counts),
            "success": rubric.success(counts),
            "operator": operator,
            "comment": comment,
        }
        self._journal.append(entry)
        self._ids.add(trial)
        return entry


def read_trials(path: Path | str) -> tuple[list[dict], str]:
    """Trials and head of a book that someone else may have open; the checks are those of `TrialBook`."""
    records, head = read_journal(path)
    _unique_ids(records, Path(path))
    return records, head


def _unique_ids(records: Sequence[Mapping], path: Path) -> set[str]:
    lines: dict[str, int] = {}
    for number, record in enumerate(records, start=1):
        if record["trial"] in lines:
            raise JournalError(
                f"{path} holds trial {record['trial']!r} in lines {lines[record['trial']]} and {number}: an id names "
                "one trial. Remove nothing by hand; start a new file without the repetition."
            )
        lines[record["trial"]] = number
    return set(lines)


def summarize_trials(trials: Sequence[Mapping]) -> dict[str, dict[str, dict]]:
    """By policy and task, and over all tasks under `"all"` (mean of the tasks, as the papers do).

    Each entry: `trials`, `successes`, `rate`, `low`, `high` (95% Wilson), `progress` (0-100), `progress_low`,
    `progress_high` (95% bootstrap).
    """
    groups: dict[str, dict[str, list[Mapping]]] = {}
    for trial in trials:
        groups.setdefault(trial["policy"], {}).setdefault(trial["task"], []).append(trial)
    summary = {}
    for policy, tasks in groups.items():
        entries = {task: summarize_group(group) for task, group in tasks.items()}
        total = summarize_group([trial for group in tasks.values() for trial in group])
        total["progress"] = sum(entry["progress"] for entry in entries.values()) / len(entries)
        summary[policy] = {**entries, "all": total}
    return summary


def summarize_group(group: Sequence[Mapping]) -> dict:
    """Rate and mean progress of some trials, each with a 95% interval; one entry of a summary."""
    successes = sum(trial["success"] for trial in group)
    low, high = wilson_interval(successes, len(group))
    values = [trial["progress"] for trial in group]
    progress_low, progress_high = bootstrap_mean(values)
    return {
        "trials": len(group),
        "successes": successes,
        "rate": successes / len(group),
        "low": low,
        "high": high,
        "progress": sum(values) / len(values),
        "progress_low": progress_low,
        "progress_high": progress_high,
    }


def format_trials(summary: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The summary as an aligned table."""
    lines = [f"{'policy':<24}{'task':<28}{'trials':>7}{'progress':>10}{'95%':>14}{'success':>9}{'95%':>13}"]
    for policy, tasks in summary.items():
        for task, entry in tasks.items():
            progress = f"{entry['progress_low']:.1f} - {entry['progress_high']:.1f}"
            rate = f"{entry['low']:.0%} - {entry['high']:.0%}"
            lines.append(
                f"{policy:<24}{task:<28}{entry['trials']:>7}{entry['progress']:>10.1f}{progress:>14}"
                f"{entry['rate']:>9.0%}{rate:>13}"
            )
    return "\n".join(lines)


def ask_counts(rubric: Rubric, ask: Callable[[str], str], tell: Callable[[str], None]) -> list[int]:
    """Asks for the count of each stage until every answer is one; an empty answer is 0."""
    tell(f"{rubric.name}: {rubric.description}\n  rule: {rubric.rule} (maximum {rubric.maximum:g})")
    if rubric.note:
        tell(f"  note: {rubric.note}")
    counts = []
    for stage in rubric.stages:
        question = f"  {stage.name} ({stage.points:.3g} each, 0-{stage.times}): "
        while not (answer := ask(question).strip() or "0").isdecimal() or int(answer) > stage.times:
            tell(f"  {answer!r} is no whole number from 0 to {stage.times}: try again.")
        counts.append(int(answer))
    return counts


def score_in_terminal(
    book: TrialBook,
    rubric: Rubric,
    policy: str,
    operator: str,
    ask: Callable[[str], str] = input,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[dict]:
    """Scores trial after trial until the operator ends it with ctrl-D; yields what was recorded.

    Args:
        book: where the trials go.
        rubric, policy, operator: of all of them.
        ask, tell: how to talk with the operator.
    """
    while True:
        trial = book.next_id(policy, rubric)
        tell(f"\nTrial {trial} (ctrl-D ends)")
        try:
            counts = ask_counts(rubric, ask, tell)
            comment = ask("  comment: ").strip()
        except EOFError:
            return
        entry = book.record(trial, policy, rubric, counts, operator, comment)
        tell(f"  recorded: {entry['points']:g} points, progress {entry['progress']:g}")
        yield entry
