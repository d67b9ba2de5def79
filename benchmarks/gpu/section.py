"""A section of the GPU suite: what it may take, what it has found so far, and the process that runs it.

``python -m benchmarks.gpu.section NAME --folder FOLDER --seconds S`` runs one section and writes ``FOLDER/NAME.json``
before each of its measurements and at its end, so that what was measured outlives a hung kernel or a sticky error of
the device. A correctness check that fails is kept beside the figures, which it marks and does not withhold.
"""

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import relative_error, write_aside
from benchmarks.gpu.device import DRY, triton_on_cpu
from toolkit.strict_json import strict_json


class Planned(NamedTuple):
    """Where a section's function is (``module.function``), its seconds, and the tests whose failure marks its figures:
    file -> pattern of names."""

    function: str
    seconds: float
    tests: dict[str, str]


LINEAR = r"test_linear(_keeps|_past|\[|$)"
MODEL = {
    "test_bounds_attention": "",
    "test_bounds_rowwise": "",
    "test_bounds_gemm": "",
    "test_bounds_linear_logprob": "",
    "test_gpu_model": "",
}
# In the order in which they run: what is most worth knowing comes first, and the tests, which mark it all, last.
SECTIONS = {
    "ceilings": Planned("ceilings.bench_ceilings", 15.0, {}),
    "decode": Planned("decode.bench_decode", 100.0, MODEL | {"test_bounds_sample": ""}),
    "training": Planned("training.bench_training", 50.0, MODEL),
    "grpo": Planned("training.bench_grpo", 25.0, MODEL),
    "row_bits": Planned("row_bits.bench_row_bits", 15.0, {}),
    "tile_invariance": Planned("tile_invariance.bench_tile_invariance", 40.0, {"test_bounds_gemm": LINEAR}),
    "attention": Planned("attention.bench_attention", 45.0, {"test_bounds_attention": ""}),
    "linear": Planned("ops.bench_linear", 25.0, {"test_bounds_gemm": LINEAR}),
    "linear_logprob": Planned("ops.bench_head", 35.0, {"test_bounds_linear_logprob": ""}),
    "moe": Planned("moe.bench_moe", 35.0, {"test_bounds_moe": ""}),
    "recurrence": Planned(
        "recurrence.bench_recurrence", 25.0, {"test_linear_recurrence": "", "test_linear_recurrence_chunked": ""}
    ),
    "sample": Planned("ops.bench_sample", 10.0, {"test_bounds_sample": ""}),
    "lora_linear": Planned("ops.bench_lora", 15.0, {"test_bounds_gemm": f"test_lora|{LINEAR}"}),
    "memory_bound": Planned("rowwise.bench_memory_bound", 50.0, {"test_bounds_rowwise": ""}),
    "tests": Planned("gate.bench_tests", 150.0, {}),
}


class Section:
    """Seconds that a section may take, and what it has found.

    result: the figures, filled by the section while it runs.
    failed: what raised, by name. failed_checks: what was not right to its bound, by name; its figures are kept.
    left_out: what did not fit.
    """

    def __init__(self, seconds: float, path: Path | None = None, ceilings: dict[str, float] | None = None) -> None:
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        self.path = path
        self.ceilings = ceilings or {}
        self.result: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.failed_checks: dict[str, str] = {}
        self.left_out: list[str] = []
        self.finished = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def allows(self, name: str, seconds: float) -> bool:
        """Whether ``seconds`` more are there; the name is kept in ``left_out`` otherwise. Writes what there is."""
        self.write()
        if self.left() >= seconds:
            return True
        self.left_out.append(name)
        return False

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What fails in the body is kept in ``failed``, so that the section continues."""
        try:
            yield
        except Exception:  # device time is scarce: the other figures are kept, and the exit code says that one failed
            self.failed[name] = traceback.format_exc()
            traceback.print_exc()

    def check(self, name: str, values: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> float:
        """The largest relative error, norm by norm; above ``limit``, or NaN, it marks the figures of ``name``."""
        errors = [relative_error(value, wanted) for value, wanted in zip(values, exact, strict=True)]
        worst = max(errors, key=lambda error: float("inf") if error != error else error)
        self.expect(name, worst <= limit, f"the relative error must be <= {limit:.0e}, got {worst:.1e}")
        return worst

    def expect(self, name: str, right: bool, otherwise: str) -> None:
        """``otherwise`` marks the figures of ``name`` unless what was looked at is ``right``."""
        if not right:
            self.failed_checks[name] = otherwise
            print(f"failed check of {name}: {otherwise}", flush=True)

    def report(self) -> dict[str, Any]:
        return {
            "result": self.result,
            "failed": self.failed,
            "failed_checks": self.failed_checks,
            "left_out": self.left_out,
            "finished": self.finished,
            "seconds": time.monotonic() - self.begun,
        }

    def write(self) -> None:
        if self.path is not None:
            write_aside(self.path, strict_json(self.report()) + "\n")


def function_of(name: str) -> Callable[[Section], None]:
    """What measures a section; its module is imported here, in the section's own process."""
    module, function = SECTIONS[name].function.split(".")
    found: Callable[[Section], None] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    return found


def ceilings_in(folder: Path) -> dict[str, float]:
    """What this device reaches: as measured by the section ``ceilings`` of this folder, or measured now."""
    from benchmarks.gpu.ceilings import measured_ceilings

    path = folder / "ceilings.json"
    found = json.loads(path.read_text())["result"] if path.exists() else {}
    return found or measured_ceilings()


def run_section(name: str, folder: Path, seconds: float) -> Section:
    """Run one section in this process; what it found is in ``folder/name.json``, too."""
    if DRY:
        triton_on_cpu()
    section = Section(seconds, folder / f"{name}.json")
    with section.trying(name):
        if name not in ("ceilings", "tests"):
            section.ceilings = ceilings_in(folder)
        torch.manual_seed(0)
        function_of(name)(section)
        section.finished = True
    section.write()
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(SECTIONS))
    parser.add_argument("--folder", type=Path, required=True, help="where name.json goes")
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    run_section(arguments.name, arguments.folder, arguments.seconds)


if __name__ == "__main__":
    main()
