"""A batch of LoRA and DoRA adapters of different ranks, and what it should give: row by row, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.ops.lora_linear import lora_add


@dataclass(frozen=True)
class Batch:
    """The arguments of ``lora_add``."""

    base: Tensor
    x: Tensor
    a: list[Tensor]
    b: list[Tensor]
    scaling: list[float]
    adapters: Tensor
    groups: Tensor | None = None
    column_scales: list[Tensor | None] | None = None
    bias: Tensor | None = None
    impl: str | None = None

    def __call__(self) -> Tensor:
        options = {"groups": self.groups, "column_scales": self.column_scales, "bias": self.bias, "impl": self.impl}
        return lora_add(self.base, self.x, self.a, self.b, self.scaling, self.adapters, **options)

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that a gradient goes to, by name."""
        found = {"base": self.base, "x": self.x}
        for name, of in (("a", self.a), ("b", self.b), ("c", self.column_scales or [])):
            found |= {f"{name}{at}": one for at, one in enumerate(of) if one is not None}
        return found if self.bias is None or not self.column_scales else found | {"bias": self.bias}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """With ``function`` of every tensor that a gradient goes to."""
        scales = self.column_scales
        return replace(
            self,
            base=function(self.base),
            x=function(self.x),
            a=[function(one) for one in self.a],
            b=[function(one) for one in self.b],
            column_scales=None if scales is None else [None if one is None else function(one) for one in scales],
            bias=None if self.bias is None else function(self.bias),
        )

    def rows(self, chosen: Tensor) -> "Batch":
        """Some of its rows, in the order of ``chosen``."""
        groups = None if self.groups is None else self.groups[chosen]
        return replace(
            self, base=self.base[chosen], x=self.x[chosen], adapters=self.adapters[chosen], groups=groups
        )  # fmt: skip

    def only(self, adapter: int) -> "Batch":
        """One adapter with its rows alone, as adapter 0."""
        own = self.rows((self.adapters == adapter).nonzero().squeeze(-1))
        one = slice(adapter, adapter + 1)
        return replace(
            own,
            a=self.a[one],
            b=self.b[one],
            scaling=self.scaling[one],
            adapters=torch.zeros_like(own.adapters),
            column_scales=None if self.column_scales is None else self.column_scales[one],
        )


def make_batch(
    rows: int,
    inner: int,
    outputs: int,
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    slices: Sequence[int] | None = None,
    scaled: Sequence[bool] | None = None,
    bias: bool = True,
    seed: int = 0,
) -> Batch:
    """Random adapters of ``ranks`` and rows that choose among them and none.

    slices: of each adapter, 0 for matrices without; None: no groups.
    scaled: which adapters are DoRA; None: no column scales at all.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, device="cpu") * scale).to(device, dtype)

    def below(high: Tensor | int, low: int = 0) -> Tensor:
        uniform = torch.rand(rows, generator=g, device="cpu", dtype=torch.float64)
        return (low + uniform * (torch.as_tensor(high, device="cpu") - low)).floor().long().to(device)

    count, parts = len(ranks), list(slices or [0] * len(ranks))
    adapters = below(count, -1)
    of_row = torch.tensor([max(1, part) for part in parts] or [1], device="cpu")[adapters.cpu().clamp_min(0)]
    return Batch(
        base=normal(rows, outputs),
        x=normal(rows, inner),
        a=[normal(*[part] * bool(part), rank, inner, scale=max(inner, 1) ** -0.5) for part, rank in zip(parts, ranks)],
        b=[normal(*[part] * bool(part), outputs, rank, scale=max(rank, 1) ** -0.5) for part, rank in zip(parts, ranks)],
        scaling=[0.5 + 0.25 * at for at in range(count)],
        adapters=adapters,
        groups=None if slices is None else below(of_row),
        column_scales=None if scaled is None else [normal(outputs) + 1.5 if one else None for one in scaled],
        bias=normal(outputs) if bias else None,
    )


def oracle(batch: Batch) -> Tensor:
    """Row by row, in the dtype of the batch; differentiable."""
    found = [batch.base[:0]]
    for t, index in enumerate(batch.adapters.tolist()):
        if index < 0:
            found.append(batch.base[t : t + 1])
            continue
        a, b = batch.a[index], batch.b[index]
        if a.dim() == 3:
            part = 0 if batch.groups is None else int(batch.groups[t])
            a, b = a[part], b[part]
        delta = batch.scaling[index] * (b @ (a @ batch.x[t]))
        scale = None if batch.column_scales is None else batch.column_scales[index]
        if scale is None:
            row = batch.base[t] + delta
        else:
            bias = torch.zeros_like(batch.base[t]) if batch.bias is None else batch.bias
            row = scale * (batch.base[t] - bias + delta) + bias
        found.append(row[None])
    return torch.cat(found)


def evaluate(function: Callable[[Batch], Tensor], batch: Batch, grad: Tensor) -> dict[str, Tensor]:
    """The output as "y", and the gradient to every leaf; zeros where there is none."""
    graded = batch.mapped(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    leaves, y = graded.leaves(), function(graded)
    grads = torch.autograd.grad(y, list(leaves.values()), grad, allow_unused=True)
    named = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }
    return {"y": y.detach(), **named}
