"""The result tables of four papers as data, to print a run beside them. They never are a comparison: other robots,
other scenes, other judges, other numbers of trials. Every rendering says so.
"""

import difflib
import json
from pathlib import Path


FOLDER = Path(__file__).with_name("published")
WARNING = (
    "Published figures, obtained under different conditions (robots or simulators, scenes, trials, judges). "
    "They are shown for orientation; differences to this run mean nothing by themselves."
)


def reference_names() -> list[str]:
    """What `load_reference` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_reference(name: str) -> dict:
    """One paper: `{"name", "paper", "tables": [{"id", "title", "metric", "conditions", "columns", "rows"}]}`.

    Cells are numbers, texts, or None where the paper has none.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    known = reference_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
        raise ValueError(f"Unknown reference {name!r}: {hint}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
