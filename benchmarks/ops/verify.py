"""What ``linear`` promises, measured: errors to float64, and how often the number of rows changes bits."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import print_table, relative_error
from toolkit.ops.linear import linear


def bench_bits(seconds: float) -> dict[str, Any]:
    """What docs/numerics.md says of the GEMMs: errors, and how many smaller calls are not bitwise identical."""
    errors: dict[str, dict[str, float]] = {}
    differing: dict[str, dict[str, str]] = {}
    sides: dict[str, Callable[..., Tensor]] = {"linear": linear, "F.linear": F.linear}
    for inner, outputs in ((512, 512), (512, 8192)):
        x, weight = torch.randn(256, inner), torch.randn(outputs, inner)
        exact = x.double() @ weight.double().T
        for side, function in sides.items():
            errors.setdefault(side, {})[f"{inner} to {outputs}"] = relative_error(function(x, weight), exact)
    few, whole = x[:64], {side: function(x[:64], weight) for side, function in sides.items()}
    for side, function in sides.items():
        for rows in (1, 2, 3, 4, 8, 16):
            starts = range(0, 65 - rows, rows)
            other = sum(not torch.equal(function(few[i : i + rows], weight), whole[side][i : i + rows]) for i in starts)
            differing.setdefault(side, {})[str(rows)] = f"{other} of {len(starts)}"
    shapes = list(errors["linear"])
    print_table("RMS error relative to float64, 256 rows", ["", *shapes], [[s, *errors[s].values()] for s in sides])
    counts = [[side, *differing[side].values()] for side in sides]
    title = f"Calls of few rows that are not bitwise identical to one call of 64 rows, {shapes[-1]}"
    print_table(title, ["rows per call", *differing["linear"]], counts)
    return {"rms_error": errors, "differing_calls": differing}
