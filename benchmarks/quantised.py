"""GEMMs with weights of few bits beside float32, bfloat16 and torch's packed ones: ``python -m benchmarks.quantised``.

One and 16 rows of x, the projections and the head of SmolLM2-135M and two square weights. Every format is first held to
``linear`` of its dequantised weight, bit for bit. Calls take turns; ratios are of medians, to ``linear`` in float32.
With one thread the clock is that thread's CPU time, which other programs of a busy machine disturb less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import describe, turns
from toolkit.ops.linear import linear
from toolkit.ops.quantised_linear import dequantise, find, quantised_linear

SHAPES = [(576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 2048), (4096, 4096)]
FORMATS: dict[str, dict[str, Any]] = {"int8": {}, "q8_0": {}, "int4": {}, "nf4": {}, "fp8": {}}
GROUP = 128  # inputs that share a scale of 4-bit codes, ours and torch's


def ours(x: torch.Tensor, weight: torch.Tensor, name: str, **options: Any) -> Callable[[], torch.Tensor]:
    """The call of one format; RuntimeError where it lacks the bits of ``linear``."""
    codes, scales = find(name).quantise(weight, **options)
    outputs, inputs = weight.shape

    def call() -> torch.Tensor:
        return quantised_linear(x, codes, scales, None, name, outputs)

    if not torch.equal(call(), linear(x, dequantise(codes, scales, name, outputs, inputs, x.dtype))):
        raise RuntimeError(f"{name} differs from linear of the dequantised weight [{outputs}, {inputs}].")
    return call


def torchs(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """torch's packed GEMMs of bfloat16 rows; the one of 4 bits where the group divides K."""
    rows, (outputs, inputs) = x.bfloat16(), weight.shape
    whole = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    per_output = torch.rand(outputs).bfloat16()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch int8": lambda: torch._weight_int8pack_mm(rows, whole, per_output)
    }
    group = GROUP if inputs % GROUP == 0 else 64
    if inputs % group == 0:
        halves = torch._convert_weight_to_int4pack_for_cpu(
            torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
        )
        per_group = torch.rand(inputs // group, outputs, 2).bfloat16()
        calls["torch int4"] = lambda: torch._weight_int4pack_mm_for_cpu(rows, halves, group, per_group)
    return calls


def measure(rows: int, outputs: int, inputs: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    narrow_x, narrow_weight = x.bfloat16(), weight.bfloat16()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "float32": lambda: linear(x, weight),
        "bfloat16": lambda: linear(narrow_x, narrow_weight),
        **{name: ours(x, weight, name, **options) for name, options in FORMATS.items()},
        "int4 of bfloat16 x": ours(narrow_x, narrow_weight, "int4"),
        **torchs(x, weight),
    }
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = max(1, 10_000_000 // (outputs * inputs))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # in inference mode, as an engine calls them: autograd's wrappers cost 20 us
        call()
    for name in turns(calls, repeats):
        start = clock()
        for _ in range(times):
            calls[name]()
        seconds[name].append((clock() - start) / times)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--largest", type=int, default=49152 * 576, help="weights above this many numbers are left out")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    print(json.dumps(describe()["machine"]))
    for outputs, inputs in SHAPES:
        if outputs * inputs > settings.largest:
            continue
        for rows in settings.rows:
            with torch.inference_mode():
                seconds = measure(rows, outputs, inputs, settings.repeats)
            ratios = ", ".join(f"{name} {seconds['float32'] / taken:.2f}" for name, taken in seconds.items())
            print(f"{rows} x {outputs} x {inputs}: float32 {seconds['float32'] * 1e6:.0f} us; {ratios}", flush=True)


if __name__ == "__main__":
    main()
