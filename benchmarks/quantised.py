"""GEMMs with weights of few bits beside float32, bfloat16 and torch's packed ones: ``python -m benchmarks.quantised``.

One and 16 rows of x, the projections and the head of SmolLM2-135M and two square weights. Every format is first held to
``linear`` of its dequantised weight, bit for bit. Then the experts of one MoE layer, E of them, K for each token, of
widths H and I (``--experts E K H I``). Calls take turns; ratios are of medians, to ``linear`` in float32.
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
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.experts import experts
from toolkit.ops.linear import linear
from toolkit.ops.quantised_linear import dequantise, find, quantised_linear
from toolkit.quantised import QuantisedWeight

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
    return timed(calls, max(1, 10_000_000 // (outputs * inputs)), repeats)


def timed(calls: dict[str, Callable[[], torch.Tensor]], times: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call, of ``times`` in a row."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # in inference mode, as an engine calls them: autograd's wrappers cost 20 us
        call()
    for name in turns(calls, repeats):
        start = clock()
        for _ in range(times):
            calls[name]()
        seconds[name].append((clock() - start) / times)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure_experts(tokens: int, sizes: tuple[int, int, int, int], repeats: int) -> list[str]:
    """A line for each format: ``experts`` of codes, and of the weights dequantised for the call, beside float32.

    Args:
        sizes: experts, of each token the chosen ones, hidden width, inner width.
    """
    count, chosen, hidden, inner = sizes
    dense = [torch.randn(count, 2 * inner, hidden) / 20, torch.randn(count, hidden, inner) / 20]
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, chosen)
    plan = dispatch_plan(torch.rand(tokens, count).topk(chosen, -1).indices, count)
    coded = {name: [QuantisedWeight.of(one, name) for one in dense] for name in ("int8", "int4", "nf4")}

    def of(up: Any, down: Any) -> torch.Tensor:
        return experts(x, weights, up, down, plan, "silu")

    calls: dict[str, Callable[[], torch.Tensor]] = {"float32": lambda: of(*dense)}
    for name, both in coded.items():
        calls[name] = lambda both=both: of(*both)  # type: ignore[misc]
        calls[f"{name} dequantised"] = lambda both=both: of(*(one.dequantise() for one in both))  # type: ignore[misc]
        if not torch.equal(calls[name](), calls[f"{name} dequantised"]()):
            raise RuntimeError(f"experts of {name} differ from those of the dequantised weights.")
    seconds = timed(calls, 1, repeats)
    sizes_of = {name: sum(one.quantised_bytes for one in both) for name, both in coded.items()}
    whole = sum(one.nbytes for one in dense)
    lines = [f"experts, {tokens} tokens: float32 {1e3 * seconds['float32']:.2f} ms, {whole / 2**20:.0f} MiB"]
    for name in coded:
        took, dequantised = seconds[name], seconds[f"{name} dequantised"]
        lines.append(
            f"  {name} {1e3 * took:.2f} ms ({seconds['float32'] / took:.1f}x), {sizes_of[name] / 2**20:.0f} MiB; "
            f"dequantised for the call {1e3 * dequantised:.1f} ms"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--experts", type=int, nargs=4, default=[32, 8, 512, 512], metavar=("E", "K", "H", "I"))
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
    for tokens in settings.rows:
        with torch.inference_mode():
            print("\n".join(measure_experts(tokens, tuple(settings.experts), settings.repeats)), flush=True)


if __name__ == "__main__":
    main()
