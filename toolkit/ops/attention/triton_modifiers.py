"""How the Triton functions of a modifier's file come to Triton."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import triton
import triton.language as tl


def build(module: ModuleType, names: Sequence[str]) -> dict[str, Any]:
    """``triton_<name>`` of a file as Triton functions, by name; None for what it lacks."""
    vars(module).setdefault("tl", tl)
    functions = {name: getattr(module, f"triton_{name}", None) for name in names}
    return {name: None if f is None else triton.jit(f) for name, f in functions.items()}
