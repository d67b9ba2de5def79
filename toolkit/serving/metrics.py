"""Counters, gauges and histograms, written in Prometheus' text format (version 0.0.4)."""

import bisect
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from toolkit.engine import Completion, Delta, EngineListener, RequestHandle

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
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
    "toolkit:prefix_cache_queries_total": Stat(
        "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "counter"
    ),
    "toolkit:prefix_cache_hits_total": Stat("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "counter"),
    "toolkit:kv_restored_tokens_total": Stat(
        "kv_restored_tokens", "Prompt tokens whose offloaded state came back.", "counter"
    ),
    "toolkit:kv_host_bytes": Stat("kv_host_bytes", "Bytes of cached prefixes in host memory."),
    "toolkit:kv_host_hits_total": Stat("kv_host_hits", "Blocks read back from host memory.", "counter"),
    "toolkit:kv_host_evictions_total": Stat("kv_host_evictions", "Blocks that left host memory for room.", "counter"),
    "toolkit:kv_disk_bytes": Stat("kv_disk_bytes", "Bytes of cached prefixes on disk."),
    "toolkit:kv_disk_hits_total": Stat("kv_disk_hits", "Blocks read back from disk.", "counter"),
    "toolkit:kv_disk_evictions_total": Stat("kv_disk_evictions", "Blocks that left the disk for room.", "counter"),
    "toolkit:kv_disk_failures_total": Stat("kv_disk_failures", "Blocks not written, or damaged.", "counter"),
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
    """Observations, in seconds or of counts, in cumulative buckets."""

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
        self._shown: list[Counter | Histogram] = []
        self.http_requests = self._counter("http_requests_total", "HTTP requests, by path and status.")
        self.success = self._counter("request_success_total", "Finished sequences, by the reason of their end.")
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens_total", "Generated tokens.")
        self.time_to_first_token = self._seconds(
            "time_to_first_token_seconds", "From the arrival of a request to the first token of a sequence."
        )
        self.inter_token_latency = self._seconds(
            "inter_token_latency_seconds", "From a token of a sequence to the next one."
        )
        self.time_per_output_token = self._seconds(
            "request_time_per_output_token_seconds", "The mean of that over a sequence."
        )
        self.e2e_latency = self._seconds("e2e_request_latency_seconds", "From the arrival to the end of a sequence.")
        self.queue_time = self._seconds("request_queue_time_seconds", "From the arrival until a request first runs.")
        self.prefill_time = self._seconds(
            "request_prefill_time_seconds", "From there to the first token of a sequence."
        )
        self.decode_time = self._seconds("request_decode_time_seconds", "From there to the end of the sequence.")
        self.inference_time = self._seconds("request_inference_time_seconds", "From its first run to its end.")
        self.request_prompt_tokens = self._counts("request_prompt_tokens", "Prompt tokens of a sequence.")
        self.request_generation_tokens = self._counts("request_generation_tokens", "Generated tokens of a sequence.")
        self.params_n = self._counts("request_params_n", "The parameter n of a prompt.")
        self.params_max_tokens = self._counts("request_params_max_tokens", "The parameter max_tokens of a prompt.")
        self._times: dict[RequestHandle, dict[tuple[int, int], _Times]] = {}

    def _counter(self, name: str, about: str) -> Counter:
        self._shown.append(made := Counter(f"toolkit:{name}", about))
        return made

    def _seconds(self, name: str, about: str) -> Histogram:
        self._shown.append(made := Histogram(f"toolkit:{name}", about))
        return made

    def _counts(self, name: str, about: str) -> Histogram:
        self._shown.append(made := Histogram(f"toolkit:{name}", about, COUNTS))
        return made

    def on_accepted(self, handle: RequestHandle) -> None:
        self._times[handle] = {}
        for params in handle.params:
            self.params_n.observe(params.n)
            if params.max_tokens is not None:
                self.params_max_tokens.observe(params.max_tokens)

    def on_delta(self, handle: RequestHandle, delta: Delta) -> None:
        now, tokens = time.perf_counter(), len(delta.token_ids)
        times, sequence = self._times[handle], (delta.prompt_index, delta.index)
        if tokens:
            self.generation_tokens.add(tokens)
            if sequence in times:
                self.inter_token_latency.observe((now - times[sequence].last) / tokens, tokens)
                times[sequence] = _Times(times[sequence].first, now)
            else:
                self.time_to_first_token.observe(now - handle.arrival_time)
                times[sequence] = _Times(now, now)
        if delta.finished is not None:
            self._on_finished(handle, delta.finished, times.get(sequence), now)
            if not handle.num_unfinished:
                del self._times[handle]

    def _on_finished(self, handle: RequestHandle, finished: Completion, times: "_Times | None", now: float) -> None:
        tokens, scheduled = len(finished.token_ids), finished.scheduled_time
        self.success.add(finished_reason=finished.finish_reason)
        self.request_prompt_tokens.observe(len(finished.prompt_token_ids))
        self.request_generation_tokens.observe(tokens)
        self.e2e_latency.observe(now - handle.arrival_time)
        if scheduled is not None:
            self.queue_time.observe(max(0.0, scheduled - handle.arrival_time))
            self.inference_time.observe(now - scheduled)
        if times is not None:
            if scheduled is not None:
                self.prefill_time.observe(times.first - scheduled)
            self.decode_time.observe(now - times.first)
            if tokens > 1:
                self.time_per_output_token.observe((now - times.first) / (tokens - 1))

    def on_failed(self, handle: RequestHandle, error: Exception) -> None:
        self._times.pop(handle, None)

    def render(self, stats: Mapping[str, float]) -> str:
        """The text of all metrics, with the engine's ``stats``."""
        lines = []
        for metric in self._shown:
            lines += _lines(metric.name, metric.about, metric.kind, metric.samples())
        for name, stat in STATS.items():
            samples = [(name, (), stats[stat.key])] if stat.key in stats else []
            lines += _lines(name, stat.about, stat.kind, samples)
        return "\n".join(lines) + "\n"


class _Times(NamedTuple):
    """When the first and the last token of a sequence came."""

    first: float
    last: float


def _lines(name: str, about: str, kind: str, samples: Iterable[Sample]) -> list[str]:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for sample, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
        number = int(value) if float(value).is_integer() else value
        lines.append(f"{sample}{'{' + inside + '}' if inside else ''} {number}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
