"""What the benchmarks share: models, machine description, timing, peak memory, tables and JSON."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from toolkit.strict_json import strict_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("TOOLKIT_BENCHMARK_RESULTS", ROOT / "benchmarks" / "results"))
Result = TypeVar("Result")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")


def llama(**changes: Any) -> Any:
    """A 32 M Llama with random weights: 8 layers, hidden size 512, 8 heads, vocabulary size 8,192."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig, changes)


def qwen3(**changes: Any) -> Any:
    """The same sizes as ``llama`` with Qwen3's query and key norms and 2 key/value heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _build(Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 64} | changes)


def qwen3_moe(**changes: Any) -> Any:
    """An 89 M Qwen3-MoE with random weights: 6 layers, hidden size 512, 32 experts of 256, 4 per token.

    Its experts run as transformers' eager loop until another implementation is asked for.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "experts_implementation": "eager",
    }
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig, sizes | changes)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "qwen3": qwen3, "qwen3_moe": qwen3_moe}


def _build(model: Any, config: Any, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return model(config(**(sizes | changes))).eval()


def describe() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda or torch.version.hip
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": machine,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform's own word below
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def turns(names: Iterable[str], repeats: int) -> Iterator[str]:
    """Every name once a turn, so that a noisy neighbour slows all of them; the order alternates."""
    order = list(names)
    for turn in range(repeats):
        yield from order if turn % 2 == 0 else reversed(order)


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def clocked(call: Callable[[], Result], seconds: Mapping[str, list[float]]) -> Result:
    """What ``call`` returns; the time that it took by each of ``CLOCKS`` is added to ``seconds``."""
    begun = {clock: read() for clock, read in CLOCKS.items()}
    returned = call()
    for clock, read in CLOCKS.items():
        seconds[clock].append(read() - begun[clock])
    return returned


def interleaved(
    calls: Mapping[str, Callable[..., Any]],
    repeats: int,
    warmup: int = 1,
    synchronize: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, taken in ``turns``."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in turns(calls, repeats):
        if synchronize:
            torch.cuda.synchronize()
        start = clock()
        calls[name]()
        if synchronize:
            torch.cuda.synchronize()
        seconds[name].append(clock() - start)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of timings in seconds."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected|| in float64; a NaN anywhere gives NaN, which passes no gate."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return float((value - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def gate(name: str, values: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], limit: float) -> float:
    """The largest relative error; RuntimeError above ``limit``, so that no wrong result is timed."""
    worst = 0.0
    for value, wanted in zip(values, exact, strict=True):
        error = relative_error(value, wanted)
        if not error <= limit:
            raise RuntimeError(f"The relative error of {name} to float64 must be <= {limit:.0e}, got {error:.1e}.")
        worst = max(worst, error)
    return worst


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def both_ways(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs, then the gradients to the floating-point inputs."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = as_tuple(function(*leaves))
    wanted = [x for x in leaves if x.requires_grad]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def geomean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def peak_rss() -> int:
    """Bytes of the largest resident set this program has had.

    The kernel's own high-water mark first: getrusage's figure survives exec, so a child would report its
    parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m module arguments`` in its own process; the JSON object it prints last.

    Peak memory is a process's lifetime maximum, so each side of a comparison runs in a separate process.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def take_steps(step: Callable[[], Any], warmup: int = 2) -> None:
    """A side of ``in_turns``: a step for every line of standard input, its seconds as a line; at the end what memory it
    took, before the first step and at the most."""
    before = peak_rss()
    for _ in range(warmup):
        step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
    print(json.dumps({"before": before, "peak": peak_rss()}), flush=True)


class Side:
    """``python -m module arguments``, a process that calls ``take_steps``."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def read(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with status {self.process.wait()}")
        return json.loads(line)

    def step(self) -> float:
        with suppress(BrokenPipeError):  # it has ended: `read` says how
            print("step", file=self.process.stdin, flush=True)
        return float(self.read())

    def finish(self) -> Any:
        if self.process.stdin:
            self.process.stdin.close()
        return self.read()


def in_turns(
    module: str, arguments: Mapping[str, Sequence[str]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Seconds of each side's steps, taken in turns, and the bytes of memory it came to.

    Each is a process that trains one model, as a user's is: in one process a side works in the heap that the others
    leave.
    """
    sides: dict[str, Side] = {}
    try:
        for name, given in arguments.items():
            sides[name] = Side(module, given)
            sides[name].read()  # ready
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for name in turns(sides, repeats):
            seconds[name].append(sides[name].step())
        return seconds, {name: side.finish() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.process.kill()
            side.process.wait()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on the terminal: rich where it is installed, aligned plain text elsewhere."""
    cells = [[_cell(value) for value in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
        print(title)
        for row in [list(header), ["-" * width for width in widths], *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in cells:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 110) if not console.is_terminal else None).print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``, whole or not at all; its path."""
    return write_aside(RESULTS / f"{name}.json", strict_json({**describe(), **result}, indent=2) + "\n")


def write_aside(path: Path, text: str) -> Path:
    """Write a file aside and move it into place; its path."""
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)
    return path
