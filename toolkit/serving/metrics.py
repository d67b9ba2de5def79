"""Counters, gauges and histograms, written in Prometheus' text format (version 0.0.4)."""

import bisect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """A sum that only grows, one for each set of labels."""

    kind = "counter"

    def __init__(self, name: str, about: str):
        self.name, self.about = name, about
        self._lock = threading.Lock()
        self._values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._values[tuple(sorted(labels.items()))] += amount

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        with self._lock:
            values = dict(self._values) or {(): 0.0}
        return [(self.name, labels, value) for labels, value in values.items()]


class Reading(NamedTuple):
    """A statistic of the engine as a metric: its key there, the help text, and gauge or counter."""

    key: str
    about: str
    kind: str = "gauge"


READINGS = {
    "toolkit_sequences_running": Reading("running", "Sequences that hold pages and run."),
    "toolkit_sequences_waiting": Reading("waiting", "Sequences that wait for their turn."),
    "toolkit_pages_used": Reading("blocks_used", "Pages of state in use."),
    "toolkit_pages_cached": Reading("blocks_cached", "Pages kept for prefixes that no sequence holds."),
    "toolkit_pages_total": Reading("blocks_total", "Pages of state there are."),
    "toolkit_prefix_hit_tokens_total": Reading(
        "prefix_hit_tokens", "Prompt tokens found in the prefix cache.", "counter"
    ),
    "toolkit_weight_version": Reading("weight_version", "Version of the weights that are served."),
    "toolkit_preemptions_total": Reading("preemptions", "Sequences set back for want of pages.", "counter"),
}


class Read:
    """A metric whose value is read when the metrics are asked for; left out while ``read`` gives None."""

    def __init__(self, name: str, about: str, kind: str, read: Callable[[], float | None]):
        self.name, self.about, self.kind, self._read = name, about, kind, read

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        value = self._read()
        return [] if value is None else [(self.name, (), float(value))]


class Histogram:
    """Observations in seconds, counted in cumulative buckets."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: tuple[float, ...] = SECONDS):
        self.name, self.about, self._bounds = name, about, bounds
        self._lock = threading.Lock()
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def samples(self) -> Iterable[tuple[str, Labels, float]]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        running = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts):
            running += count
            yield f"{self.name}_bucket", (("le", bound),), running
        yield f"{self.name}_sum", (), total
        yield f"{self.name}_count", (), running


class Metrics:
    """What ``/metrics`` shows: what the server counts, and ``READINGS`` of the engine's ``stats``."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]):
        self.requests = Counter("toolkit_requests_total", "Requests answered, by endpoint and HTTP status.")
        self.finished = Counter("toolkit_generations_total", "Generated sequences, by reason of their end.")
        self.prompt_tokens = Counter("toolkit_prompt_tokens_total", "Tokens of prompts taken in.")
        self.generated_tokens = Counter("toolkit_generated_tokens_total", "Tokens generated.")
        self.first_token = Histogram(
            "toolkit_time_to_first_token_seconds",
            "From the arrival of a request to the first token of a sequence.",
        )
        self.next_token = Histogram(
            "toolkit_inter_token_latency_seconds", "Between a token of a sequence and the next one."
        )
        self._all: list[Counter | Read | Histogram] = [
            self.requests,
            self.finished,
            self.prompt_tokens,
            self.generated_tokens,
            self.first_token,
            self.next_token,
            *(
                Read(name, reading.about, reading.kind, lambda key=reading.key: stats().get(key))  # type: ignore[misc]
                for name, reading in READINGS.items()
            ),
        ]

    def render(self) -> str:
        lines = []
        for metric in self._all:
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            for name, labels, value in metric.samples():
                inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                number = int(value) if float(value).is_integer() else value
                lines.append(f"{name}{'{' + inside + '}' if inside else ''} {number}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
