"""``linear`` against ``torch.nn.functional.linear`` (MKL on CPU)."""

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import gate, geomean, print_table
from benchmarks.ops.registry import GATE
from benchmarks.ops.timing import in_turns
from toolkit.ops.linear import linear

# (K, N) of a 32 M Llama: attention out, keys and values together, gate or up, down, head.
LINEAR_SHAPES = [(512, 512), (512, 1024), (512, 1408), (1408, 512), (512, 8192)]
FEW_ROWS, MANY_ROWS = [1, 4, 8, 16, 32], 2048
STREAM_BYTES = 96 << 20  # weights that are this large together come from memory each time, as in a model


def bench_linear(seconds: float) -> dict[str, Any]:
    """Ratios to MKL's GEMM, by rows and shape."""
    ratios: dict[int, list[float]] = {}
    rows_shown, worst = [], 0.0
    for rows in [*FEW_ROWS, MANY_ROWS]:
        ratios[rows], cells = [], []
        for inner, outputs in LINEAR_SHAPES:
            copies = max(1, STREAM_BYTES // (4 * inner * outputs)) if rows < 256 else 1
            weights = [torch.randn(outputs, inner) for _ in range(copies)]
            x = torch.randn(rows, inner)
            worst = max(worst, gate("linear", [linear(x, weights[0])], [x.double() @ weights[0].double().T], GATE))
            with torch.inference_mode():
                calls = {
                    "ours": lambda i, x=x, w=weights: linear(x, w[i]),
                    "mkl": lambda i, x=x, w=weights: F.linear(x, w[(i + len(w) // 2) % len(w)]),
                }
                taken = in_turns(calls, copies, seconds)
            ratios[rows].append(taken["mkl"] / taken["ours"])
            speed = 2e-9 * rows * inner * outputs / taken["ours"]
            cells.append(f"{ratios[rows][-1]:.2f}x ({speed:.0f} GF/s)")
        rows_shown.append([rows, *cells, f"{geomean(ratios[rows]):.2f}x"])
    few = geomean([ratio for rows in FEW_ROWS for ratio in ratios[rows]])
    shapes = [f"{inner} to {outputs}" for inner, outputs in LINEAR_SHAPES]
    title = f"linear, bitwise, over F.linear, fp32; all of {FEW_ROWS} rows: {few:.2f}x"
    print_table(title, ["rows", *shapes, "geomean"], rows_shown)
    return {
        "shapes": LINEAR_SHAPES,
        "ratios": {str(rows): values for rows, values in ratios.items()},
        "few_rows": few,
        "many_rows": geomean(ratios[MANY_ROWS]),
        "gate": worst,
    }
