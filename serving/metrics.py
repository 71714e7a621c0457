"""Counters, gauges and histograms in Prometheus' text format, without a dependency."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable


LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """All metrics of a server. A label set is a tuple of (name, value) pairs."""

    def __init__(self) -> None:
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[tuple, float]] = defaultdict(lambda: defaultdict(float))
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, dict[tuple, list]] = defaultdict(dict)
        self._buckets: dict[str, tuple] = {}

    def counter(self, name: str, help_text: str) -> None:
        """Declares a counter."""
        self._help[name] = ("counter", help_text)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Declares a gauge that is read when somebody asks."""
        self._help[name] = ("gauge", help_text)
        self._gauges[name] = read

    def histogram(self, name: str, help_text: str, buckets: tuple) -> None:
        """Declares a histogram with these upper bounds."""
        self._help[name] = ("histogram", help_text)
        self._buckets[name] = buckets

    def add(self, name: str, amount: float = 1, labels: tuple = ()) -> None:
        """Adds to a counter."""
        self._values[name][labels] += amount

    def observe(self, name: str, value: float, labels: tuple = ()) -> None:
        """Adds one observation to a histogram."""
        buckets = self._buckets[name]
        # [count of each bucket and of the rest, sum]
        cells = self._histograms[name].setdefault(labels, [[0] * (len(buckets) + 1), 0.0])
        cells[0][bisect_left(buckets, value)] += 1
        cells[1] += value

    def value(self, name: str, labels: tuple = ()) -> float:
        """The present value of a counter."""
        return self._values[name][labels]

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines = []
        for name, (kind, help_text) in self._help.items():
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            if kind == "gauge":
                lines.append(f"{name} {self._gauges[name]():g}")
            for labels, value in self._values[name].items():
                lines.append(f"{name}{_braces(labels)} {value:.17g}")
            for labels, (counts, total) in self._histograms[name].items():
                running = 0
                for bound, count in zip((*self._buckets[name], "+Inf"), counts, strict=True):
                    running += count
                    lines.append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {running}")
                lines += [f"{name}_sum{_braces(labels)} {total:.17g}", f"{name}_count{_braces(labels)} {running}"]
        return "\n".join(lines) + "\n"


def _braces(labels: tuple) -> str:
    if not labels:
        return ""
    escaped = [
        (name, str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels
    ]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
