"""``lora_add`` with adapters of several ranks in one batch, against a loop over the adapters in torch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import gate, geomean, print_table
from benchmarks.ops.registry import GATE
from benchmarks.ops.timing import in_turns
from toolkit.ops.lora_linear import lora_add

SIZES = [(192, 192), (576, 1536), (1536, 576), (1536, 1536)]  # (K, N)
RANKS = [4, 8, 16, 32, 64]
STREAM_BYTES = (
    96 << 20
)  # adapters that are this large together come from memory each time, as in a model of many layers


@dataclass(frozen=True)
class Load:
    """How many rows choose among how many adapters, a share of them none."""

    rows: int
    adapters: int
    plain: float = 0.0
    backward: bool = False


LOADS = {
    "decode, 32 rows, 16 adapters": Load(32, 16),
    "decode, 32 rows, 1 adapter": Load(32, 1),
    "decode, 32 rows, 16 adapters, half without": Load(32, 16, 0.5),
    "decode, 32 rows, none with one": Load(32, 16, 1.0),
    "forward, 4096 rows, 1 adapter": Load(4096, 1),
    "forward and backward, 4096 rows, 1 adapter": Load(4096, 1, backward=True),
    "forward and backward, 1024 rows, 16 adapters": Load(1024, 16, backward=True),
}


def loop(base: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scaling: list[float], adapters: Tensor) -> Tensor:
    """Each adapter on its rows."""
    y = base.clone()
    for at, factor in enumerate(scaling):
        own = (adapters == at).nonzero().squeeze(-1)
        if own.numel():
            y = y.index_add(0, own, F.linear(F.linear(x[own], a[at]), b[at]) * factor)
    return y


@dataclass(frozen=True)
class Case:
    """One load at one size: rows, adapters of a few layers, and the gradient that they are given."""

    base: Tensor
    x: Tensor
    factors: list[tuple[list[Tensor], list[Tensor]]]
    scaling: list[float]
    adapters: Tensor
    grad: Tensor | None

    def call(self, function: Callable[..., Tensor], layer: int) -> None:
        a, b = self.factors[layer]
        if self.grad is None:
            with torch.inference_mode():
                function(self.base, self.x, a, b, self.scaling, self.adapters)
            return
        leaf = self.x.detach().requires_grad_()
        y = function(self.base, leaf, a, b, self.scaling, self.adapters)
        torch.autograd.grad(y, [leaf, *a, *b], self.grad, allow_unused=True)

    def error(self, name: str) -> float:
        """Relative error to float64; ends the run where it is too large."""
        a, b = ([one.detach().double() for one in of] for of in self.factors[0])
        exact = loop(self.base.double(), self.x.double(), a, b, self.scaling, self.adapters)
        return gate(name, [lora_add(self.base, self.x, *self.factors[0], self.scaling, self.adapters)], [exact], GATE)


def make_case(load: Load, inner: int, outputs: int) -> Case:
    """Random rows, and adapters for as many layers as it takes to come from memory."""
    ranks = list(itertools.islice(itertools.cycle(RANKS), load.adapters)) if load.adapters > 1 else [16]
    layers = max(1, min(64, STREAM_BYTES // (4 * sum(ranks) * (inner + outputs)))) if load.rows < 256 else 1
    ids = torch.arange(load.rows) % load.adapters
    return Case(
        base=torch.randn(load.rows, outputs),
        x=torch.randn(load.rows, inner),
        factors=[_factors(ranks, inner, outputs, load.backward) for _ in range(layers)],
        scaling=[2.0] * len(ranks),
        adapters=torch.where(torch.rand(load.rows) < load.plain, -1, ids)[torch.randperm(load.rows)],
        grad=torch.randn(load.rows, outputs) if load.backward else None,
    )


def bench_lora(seconds: float) -> dict[str, Any]:
    """Ratios to the loop, by load and size."""
    ratios: dict[str, list[float]] = {}
    shown, worst = [], 0.0
    for name, load in LOADS.items():
        cells, ratios[name] = [], []
        for inner, outputs in SIZES:
            case = make_case(load, inner, outputs)
            worst = max(worst, case.error(name))
            calls = {"ours": partial(case.call, lora_add), "loop": partial(case.call, loop)}
            taken = in_turns(calls, len(case.factors), seconds)
            ratios[name].append(taken["loop"] / taken["ours"])
            cells.append(f"{ratios[name][-1]:.2f}x ({1e6 * taken['ours']:.0f} µs)")
        shown.append([name, *cells, f"{geomean(ratios[name]):.2f}x"])
    title = f"lora_add, fp32, ranks {RANKS}, over a loop over adapters"
    print_table(title, ["load", *(f"{inner} to {outputs}" for inner, outputs in SIZES), "geomean"], shown)
    return {"sizes": SIZES, "ratios": ratios, "gate": worst}


def _factors(ranks: list[int], inner: int, outputs: int, trained: bool) -> tuple[list[Tensor], list[Tensor]]:
    a = [torch.randn(rank, inner).div_(inner**0.5).requires_grad_(trained) for rank in ranks]
    b = [torch.randn(outputs, rank).div_(rank**0.5).requires_grad_(trained) for rank in ranks]
    return a, b
