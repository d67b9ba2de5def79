"""The gated delta rule on a GPU: training forward and backward, a chunk at a time, token by token, and fla's kernels.

The shape is a Qwen3-Next layer's: 16 key heads, 32 value heads, K = V = 128. fla is named where it is missing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import both_ways, print_table
from benchmarks.gpu import device
from benchmarks.gpu.device import DEVICE, DRY, GATE, HALF, doubles, normal
from benchmarks.gpu.section import Section
from toolkit.ops.linear_recurrence import linear_recurrence, reference

KEY_HEADS, HEADS, WIDTH = (1, 2, 16) if DRY else (16, 32, 128)
# name -> (sequences, tokens of each)
CASES = {"training": (1, 20)} if DRY else {"training 1x8192": (1, 8192), "training 16x512": (16, 512)}
CHECKED = 34 if DRY else 160  # tokens of the check, in two sequences of more than a chunk


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v, g, beta of ``tokens``: normalized keys, decays near 1."""
    q, k = (normalize(normal(tokens, KEY_HEADS, WIDTH).float(), dim=-1).to(HALF) for _ in range(2))
    g = -torch.rand(tokens, HEADS, device=DEVICE) * 0.1
    return [q, k, normal(tokens, HEADS, WIDTH), g, torch.rand(tokens, HEADS, device=DEVICE)]


def offsets_of(sequences: int, tokens: int) -> dict[str, Tensor]:
    offsets = torch.arange(sequences + 1, device=DEVICE) * tokens
    return {"offsets": offsets, "parents": torch.full((sequences,), -1, device=DEVICE)}


def ours(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, parents: Tensor, chunked: bool
) -> Tensor:
    return linear_recurrence(q, k, v, g, beta, offsets, parents, None, WIDTH**-0.5, True, chunked=chunked)[0]


OURS = {"chunked": partial(ours, chunked=True), "token by token": partial(ours, chunked=False)}


def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, parents: Tensor) -> Tensor:
    """The specification, differentiated by autograd."""
    return reference.linear_recurrence(q, k, v, g, beta, offsets, parents, None, WIDTH**-0.5, True, False)[0]


def fla() -> Callable[..., Tensor]:
    """fla's chunked kernel, with the sequences as its variable lengths."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, offsets: Tensor, parents: Tensor) -> Tensor:
        repeated = [x.repeat_interleave(HEADS // KEY_HEADS, 1)[None] for x in (q, k)]
        given = (*repeated, v[None], g[None], beta[None])
        out: Tensor = chunk_gated_delta_rule(*given, scale=WIDTH**-0.5, cu_seqlens=offsets)[0]
        return out[0]

    return call


def bench_recurrence(section: Section) -> None:
    """Each case: a check of results and gradients on a few tokens, then every side."""
    for name, (sequences, tokens) in CASES.items():
        if not section.allows(name, 4.0):
            continue
        with section.trying(name):
            few = offsets_of(2, CHECKED // 2)
            small, grad = inputs(CHECKED), normal(CHECKED, HEADS, WIDTH)
            exact = both_ways(partial(oracle, **few), doubles(small), [grad.double()])
            errors = {}
            for side, call in OURS.items():
                values = both_ways(partial(call, **few), small, [grad])
                errors[side] = section.check(f"{name}, {side}", values, exact, GATE[HALF])
            rows = [x.requires_grad_() for x in inputs(sequences * tokens)]
            grad = normal(sequences * tokens, HEADS, WIDTH)
            whole = offsets_of(sequences, tokens)
            entry = section.result[name] = {"gate": errors, "tokens": sequences * tokens, "sides": {}, "missing": []}
            for side, call in OURS.items():
                entry["sides"][side] = device.measure(partial(call, **whole), rows, [grad])
            try:
                entry["sides"]["fla"] = device.measure(partial(fla(), **whole), rows, [grad])
            except ImportError:
                entry["missing"].append("fla")


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [
        [name, side, taken["forward_s"] * 1e3, taken["backward_s"] * 1e3, entry["tokens"] / taken["forward_s"]]
        for name, entry in result.items()
        for side, taken in entry["sides"].items()
    ]
    rows += [[name, side, "missing", "", ""] for name, entry in result.items() for side in entry["missing"]]
    title = f"Gated delta rule, {KEY_HEADS} key heads, {HEADS} value heads of {WIDTH}"
    print_table(title, ["case", "side", "forward ms", "backward ms", "tokens/s"], rows)
