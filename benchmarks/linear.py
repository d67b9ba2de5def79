"""Time of ``linear`` against ``torch.nn.functional.linear``: ``python -m benchmarks.linear``.

The shapes are those of a 32 M Llama. Each pair is timed in turns, and with as many copies of the weight as it takes to
stream it from memory, as a model's forward does; the ratio is of the smallest times. Above 1 ours is faster.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from toolkit.ops.linear import linear

SHAPES = [(512, 512), (512, 1024), (512, 1408), (1408, 512), (512, 8192)]
ROWS = [1, 4, 8, 16, 32, 2048]
_STREAM_BYTES = 96 << 20  # several times a last-level cache


def best_times(calls: Mapping[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, float]:
    """Smallest seconds a call of each, timed in turns for about ``seconds`` in all; a call is given the copy to use."""
    best = dict.fromkeys(calls, math.inf)
    end, turn = time.perf_counter() + seconds, 0
    while turn < 2 * copies or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn % copies)
            best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


def compare(rows: int, inner: int, outputs: int, seconds: float) -> tuple[float, float]:
    """Best seconds of (ours, vendor) for x [rows, inner] and weight [outputs, inner]."""
    copies = max(1, _STREAM_BYTES // (4 * inner * outputs)) if rows < 256 else 1
    weights = [torch.randn(outputs, inner) for _ in range(copies)]
    x = torch.randn(rows, inner)
    torch.testing.assert_close(linear(x, weights[0]), F.linear(x, weights[0]), rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        calls = {
            "ours": lambda i: linear(x, weights[i]),
            "vendor": lambda i: F.linear(x, weights[(i + copies // 2) % copies]),
        }
        best = best_times(calls, copies, seconds)
    return best["ours"], best["vendor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each cell of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("rows  " + "".join(f"{f'{k}x{n}':>22}" for k, n in SHAPES) + "   geomean")
    for rows in options.rows:
        ratios, cells = [], []
        for inner, outputs in SHAPES:
            ours, vendor = compare(rows, inner, outputs, options.seconds)
            ratios.append(vendor / ours)
            cells.append(f"{vendor / ours:6.2f} ({2e-9 * rows * inner * outputs / ours:5.1f} GF/s)")
        geomean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{rows:<6}" + "".join(f"{cell:>22}" for cell in cells) + f"   {geomean:7.2f}")


if __name__ == "__main__":
    main()
