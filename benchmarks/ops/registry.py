"""The sections of ``python -m benchmarks.ops``: a name and the function that measures it."""

import importlib
from collections.abc import Callable
from typing import Any

GATE = 1e-5  # largest relative error of outputs and gradients to float64
# section -> (module of this package, function of the seconds for each cell of its table)
SECTIONS = {
    "bits": ("verify", "bench_bits"),
    "linear": ("linear", "bench_linear"),
    "rowwise": ("rowwise", "bench_rowwise"),
    "head": ("head", "bench_head"),
    "lora": ("lora", "bench_lora"),
}


def section(name: str) -> Callable[[float], dict[str, Any]]:
    """The function that measures the section ``name``."""
    module, function = SECTIONS[name]
    found: Callable[[float], dict[str, Any]] = getattr(importlib.import_module(f"benchmarks.ops.{module}"), function)
    return found
