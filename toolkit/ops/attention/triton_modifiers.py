"""How the Triton functions of a modifier's file come to Triton."""

from types import ModuleType
from typing import Any

import triton
import triton.language as tl


def build(module: ModuleType) -> tuple[Any, Any, Any]:
    """``triton_score``, ``triton_both``, ``triton_visible`` of a file as Triton functions; None for what it lacks."""
    vars(module).setdefault("tl", tl)
    functions = [getattr(module, f"triton_{name}", None) for name in ("score", "both", "visible")]
    score, both, visible = (None if f is None else triton.jit(f) for f in functions)
    return score, both, visible
