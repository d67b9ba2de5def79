"""Counters, gauges and histograms, written in Prometheus' text format (version 0.0.4)."""

import bisect
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from toolkit.engine import Delta, EngineListener, RequestHandle

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labels: TypeAlias = tuple[tuple[str, str], ...]
Sample: TypeAlias = tuple[str, Labels, float]


class Counter:
    """A sum that only grows, one for each set of labels."""

    kind = "counter"

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self._lock = threading.Lock()
        self._values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._values[tuple(sorted(labels.items()))] += amount

    def samples(self) -> Iterable[Sample]:
        with self._lock:
            values = dict(self._values) or {(): 0.0}
        return [(self.name, labels, value) for labels, value in values.items()]


class Stat(NamedTuple):
    """A statistic of the engine as a metric.

    Args:
        key: of ``Engine.stats``.
        about: the help text.
        kind: "gauge" or "counter".
    """

    key: str
    about: str
    kind: str = "gauge"


STATS = {
    "toolkit:num_requests_running": Stat("num_requests_running", "Sequences that hold blocks and run."),
    "toolkit:num_requests_waiting": Stat("num_requests_waiting", "Sequences that wait to run."),
    "toolkit:kv_cache_usage_perc": Stat("kv_cache_usage_perc", "Blocks of state in use; 1 means all."),
    "toolkit:num_blocks": Stat("num_blocks", "Blocks of state."),
    "toolkit:num_cached_blocks": Stat("num_cached_blocks", "Blocks kept for prefixes that no sequence holds."),
    "toolkit:prefix_cache_hits_total": Stat("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "counter"),
    "toolkit:weight_version": Stat("weight_version", "Version of the weights that are served."),
    "toolkit:num_preemptions_total": Stat("num_preemptions", "Preempted sequences (out of KV blocks).", "counter"),
    "toolkit:spec_decode_num_drafts_total": Stat("spec_decode_num_drafts", "Drafts that were verified.", "counter"),
    "toolkit:spec_decode_num_draft_tokens_total": Stat(
        "spec_decode_num_draft_tokens", "Tokens of drafts that were verified.", "counter"
    ),
    "toolkit:spec_decode_num_accepted_tokens_total": Stat(
        "spec_decode_num_accepted_tokens", "Tokens of drafts that were right.", "counter"
    ),
}


class Histogram:
    """Observations in seconds, counted in cumulative buckets."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.about, self._bounds = name, about, bounds
        self._lock = threading.Lock()
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += times
            self._sum += value * times

    def samples(self) -> Iterable[Sample]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        running = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts):
            running += count
            yield f"{self.name}_bucket", (("le", bound),), running
        yield f"{self.name}_sum", (), total
        yield f"{self.name}_count", (), running


class Metrics(EngineListener):
    """What ``/metrics`` shows: what the server and its engine count, and ``STATS`` of the engine.

    Names and meanings are vLLM's. A request with several prompts or completions counts once per sequence, as there.
    """

    def __init__(self) -> None:
        self.http_requests = Counter("toolkit:http_requests_total", "HTTP requests, by path and status.")
        self.success = Counter("toolkit:request_success_total", "Finished sequences, by the reason of their end.")
        self.prompt_tokens = Counter("toolkit:prompt_tokens_total", "Prompt tokens of accepted requests.")
        self.generation_tokens = Counter("toolkit:generation_tokens_total", "Generated tokens.")
        self.time_to_first_token = Histogram(
            "toolkit:time_to_first_token_seconds",
            "From the arrival of a request to the first token of a sequence.",
        )
        self.inter_token_latency = Histogram(
            "toolkit:inter_token_latency_seconds", "From a token of a sequence to the next one."
        )
        self._last_token: dict[RequestHandle, dict[tuple[int, int], float]] = {}

    def on_accepted(self, handle: RequestHandle) -> None:
        self._last_token[handle] = {}

    def on_delta(self, handle: RequestHandle, delta: Delta) -> None:
        now, tokens = time.perf_counter(), len(delta.token_ids)
        if tokens:
            self.generation_tokens.add(tokens)
            times, sequence = self._last_token[handle], (delta.prompt_index, delta.index)
            if sequence in times:
                self.inter_token_latency.observe((now - times[sequence]) / tokens, tokens)
            else:
                self.time_to_first_token.observe(now - handle.arrival_time)
            times[sequence] = now
        if delta.finished is not None:
            self.success.add(finished_reason=delta.finished.finish_reason)
            if not handle.num_unfinished:
                del self._last_token[handle]

    def on_failed(self, handle: RequestHandle, error: Exception) -> None:
        self._last_token.pop(handle, None)

    def render(self, stats: Mapping[str, float]) -> str:
        """The text of all metrics, with the engine's ``stats``."""
        counted: list[Counter | Histogram] = [
            self.http_requests,
            self.success,
            self.prompt_tokens,
            self.generation_tokens,
            self.time_to_first_token,
            self.inter_token_latency,
        ]
        lines = []
        for metric in counted:
            lines += _lines(metric.name, metric.about, metric.kind, metric.samples())
        for name, stat in STATS.items():
            samples = [(name, (), stats[stat.key])] if stat.key in stats else []
            lines += _lines(name, stat.about, stat.kind, samples)
        return "\n".join(lines) + "\n"


def _lines(name: str, about: str, kind: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for sample, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        number = int(value) if float(value).is_integer() else value
        lines.append(f"{sample}{'{' + inside + '}' if inside else ''} {number}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
