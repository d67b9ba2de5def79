"""Ops against their peers on CPU, each behind a float64 gate: ``python -m benchmarks.ops``.

``linear`` against ``torch.nn.functional.linear``; the row-wise ops against transformers' own code, eager and compiled
by ``torch.compile``, forward and backward; ``linear_cross_entropy`` and ``linear_logprob`` against a dense head with
cross-entropy and against ``torch.nn.functional.linear_cross_entropy``, in time and in peak memory. Calls are timed in
turns; a ratio is of medians, above 1 ours is faster.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    both_ways,
    gate,
    geomean,
    in_fresh_process,
    interleaved,
    peak_rss,
    print_table,
    relative_error,
    write_json,
)
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.linear import linear
from toolkit.ops.linear_cross_entropy import linear_cross_entropy
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.rms_norm import rms_norm
from toolkit.ops.rotary import rotary

# (K, N) of a 32 M Llama: attention out, keys and values together, gate or up, down, head.
LINEAR_SHAPES = [(512, 512), (512, 1024), (512, 1408), (1408, 512), (512, 8192)]
FEW_ROWS, MANY_ROWS = [1, 4, 8, 16, 32], 2048
STREAM_BYTES = 96 << 20  # weights that are this large together come from memory each time, as in a model
TOKENS, WIDTH, HEADS, HEAD_DIM, GATED = 2048, 512, 8, 64, 1408
HEAD = {"tokens": 2048, "depth": 512, "vocabulary": 32768}
GATE = 1e-5  # largest relative error of outputs and gradients against float64


def in_turns(calls: Mapping[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, float]:
    """Median seconds of each call, taken in turns for about ``seconds`` in all; a call is given the copy to use."""

    def next_copy(call: Callable[[int], object]) -> Callable[[], object]:
        copy = itertools.cycle(range(copies))
        return lambda: call(next(copy))

    cycling = {name: next_copy(call) for name, call in calls.items()}
    once = sum(sum(taken) for taken in interleaved(cycling, 1).values())
    taken = interleaved(cycling, max(5, 2 * copies, int(seconds / once)), warmup=0)
    return {name: statistics.median(times) for name, times in taken.items()}


def bench_linear(seconds: float) -> dict[str, Any]:
    """Ratios to the vendor's product, by rows and shape."""
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
                    "vendor": lambda i, x=x, w=weights: F.linear(x, w[(i + len(w) // 2) % len(w)]),
                }
                taken = in_turns(calls, copies, seconds)
            ratios[rows].append(taken["vendor"] / taken["ours"])
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


def bench_bits(seconds: float) -> dict[str, Any]:
    """What docs/numerics.md says of the products: errors, and how many smaller calls have other bits."""
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
    title = f"Calls of few rows whose bits are not those of one call of 64 rows, {shapes[-1]}"
    print_table(title, ["rows a call", *differing["linear"]], counts)
    return {"rms_error": errors, "differing_calls": differing}


def rowwise_cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]]:
    """name -> (ours, transformers' own, inputs); shapes of the 32 M Llama at 2,048 tokens."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    norm = LlamaRMSNorm(WIDTH, 1e-6)

    def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    angles = torch.rand(TOKENS, HEAD_DIM) * 6.0
    cos, sin = angles.cos(), angles.sin()

    def our_rotary(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(rotary(x.view(TOKENS, HEADS, HEAD_DIM), cos, sin).view(1, TOKENS, -1) for x in (q, k))

    def stock_rotary(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        heads = (x.view(1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for x in (q, k))
        turned = apply_rotary_pos_emb(*heads, cos[None].to(q.dtype), sin[None].to(q.dtype))
        return tuple(x.transpose(1, 2).reshape(1, TOKENS, -1) for x in turned)

    def wide(*widths: int) -> list[Tensor]:
        return [torch.randn(1, TOKENS, width) for width in widths]

    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), stock_norm, [*wide(WIDTH), torch.randn(WIDTH)]),
        "rotary": (our_rotary, stock_rotary, wide(WIDTH, WIDTH)),
        "gated_activation": (
            lambda g, u: gated_activation(g, u, "silu"),
            lambda g, u: F.silu(g) * u,
            wide(GATED, GATED),
        ),
    }


def bench_rowwise(seconds: float) -> dict[str, Any]:
    """Ratios of forward plus backward to transformers' code, eager and compiled."""
    results, shown = {}, []
    for name, (ours, stock, inputs) in rowwise_cases().items():
        outputs = ours(*inputs)
        cotangents = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        exact = both_ways(stock_in_double(name, stock), [x.double() for x in inputs], [g.double() for g in cotangents])
        error = gate(name, both_ways(ours, inputs, cotangents), exact, GATE)
        compiled = torch.compile(stock)
        calls = {
            key: lambda _, f=f, x=inputs, g=cotangents: both_ways(f, x, g)
            for key, f in (("ours", ours), ("eager", stock), ("compiled", compiled))
        }
        taken = in_turns(calls, 1, seconds)
        ratios = {peer: taken[peer] / taken["ours"] for peer in ("eager", "compiled")}
        results[name] = {"seconds": taken, "ratios": ratios, "gate": error}
        shown.append([name, taken["ours"] * 1e3, *(f"{ratio:.2f}x" for ratio in ratios.values()), f"{error:.0e}"])
    title = f"Row-wise ops, {TOKENS} tokens, fp32, forward and backward, over transformers' code"
    print_table(title, ["op", "ours ms", "over eager", "over torch.compile", "error"], shown)
    return results


def stock_in_double(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle: transformers' norm computes in float32 whatever it is given, so its formula is written out."""
    if name != "rms_norm":
        return stock
    return lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def head_losses() -> dict[str, Callable[..., Tensor]]:
    """Mean cross-entropy of a head: ours and the peers that this torch has."""
    losses: dict[str, Callable[..., Tensor]] = {
        "ours": lambda x, w, y: linear_cross_entropy(x, w, y) / len(y),
        "linear_logprob": lambda x, w, y: -linear_logprob(x, w, y).logprob.mean(),
        "F.linear, F.cross_entropy": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    }
    fused: Any = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy"] = lambda x, w, y: fused(x, w, y)
        losses["F.linear_cross_entropy, chunked"] = lambda x, w, y: fused(x, w, y, options=chunked)
    return losses


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    tokens, depth, vocabulary = HEAD.values()
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, depth) * depth**-0.5).requires_grad_()
    return torch.randn(tokens, depth, requires_grad=True), weight, torch.randint(vocabulary, (tokens,))


def measure_head_memory(name: str) -> None:
    """In this process alone: bytes of the peak above weights, inputs and gradients; prints JSON as the last line."""
    hidden, weight, targets = head_inputs()
    loss = head_losses()[name]
    small = hidden[:2].detach().requires_grad_()
    loss(small, weight, targets[:2]).backward()  # code, threads, and the gradient that stays
    hidden.grad = torch.zeros_like(hidden)
    before = peak_rss()
    loss(hidden, weight, targets).backward()
    # The weight's new gradient exists beside the accumulated one for every side alike.
    print(json.dumps({"extra": peak_rss() - before, "gradient": weight.nbytes}))


def bench_head(seconds: float) -> dict[str, Any]:
    """A head's loss forward and backward: time against the peers, and peak memory of each."""
    hidden, weight, targets = head_inputs()
    losses = head_losses()

    def step(loss: Callable[..., Tensor]) -> list[Tensor]:
        value = loss(hidden, weight, targets)
        return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    value = losses["F.linear, F.cross_entropy"](*leaves, targets)
    exact = [value.detach(), *torch.autograd.grad(value, leaves)]
    error = max(gate(name, step(losses[name]), exact, GATE) for name in ("ours", "linear_logprob"))
    del leaves, value, exact
    calls = {name: partial(lambda f, _: step(f), f) for name, f in losses.items()}
    taken = in_turns(calls, 1, seconds * 20)
    logits = HEAD["tokens"] * HEAD["vocabulary"] * 4
    memory = {name: in_fresh_process("benchmarks.ops", "--head-memory", name) for name in losses}
    shown = [
        [name, taken[name], f"{taken[name] / taken['ours']:.2f}x", used["extra"] / 2**20,
         (used["extra"] - used["gradient"]) / logits]
        for name, used in memory.items()
    ]  # fmt: skip
    size = "{tokens} tokens x {vocabulary} words x {depth}".format(**HEAD)
    title = f"Head and loss, {size}, fp32, forward and backward; the logits are {logits / 2**20:.0f} MiB"
    print_table(title, ["", "seconds", "over ours", "peak MiB", "peak above gradients / logits"], shown)
    return {"seconds": taken, "memory": memory, "logits_bytes": logits, "gate": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each cell of a table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("bits", "linear", "rowwise", "head"), nargs="+")
    parser.add_argument("--head-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.head_memory:
        measure_head_memory(options.head_memory)
        return
    sections = {"bits": bench_bits, "linear": bench_linear, "rowwise": bench_rowwise, "head": bench_head}
    chosen = options.only or list(sections)
    results = {name: sections[name](options.seconds) for name in chosen}
    if chosen == list(sections):
        print(f"written to {write_json('ops-cpu', results)}")


if __name__ == "__main__":
    main()
