"""Scores of attention that are not computed: they follow a layer's code up to where the weights meet the values."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

HIDDEN = -5e3
"""A key with a lower bias has weight 0: masks are written as -1e4, the lowest number there is, or -inf."""


class UnknownStep(Exception):
    """What a layer did to its scores is not part of attention as it is known here."""


class Continues(Protocol):
    """What takes over where the weights meet the values."""

    def finish(self, scores: "Scores", values: Tensor) -> Tensor:
        """[..., T, Dv], the weighted sum of values [..., T, Dv]."""


class Scores:
    """``factor * (q k^T) + bias`` of all pairs of tokens, or once ``is_weights`` its softmax; nothing is computed.

    It has the shape and dtype that the layer's code expects. An operation that attention does not have raises
    ``UnknownStep``.

    Args:
        watch: takes over where the weights meet the values.
        q: [..., T, D].
        k: [..., T, D].
        shape: [..., T, T].
        factor, bias: tensors of this shape, where ``watch`` records them, else None.
    """

    def __init__(
        self,
        watch: "Continues",
        q: Tensor,
        k: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        factor: Tensor | None = None,
        bias: Tensor | None = None,
        is_weights: bool = False,
    ) -> None:
        self.watch, self.q, self.k = watch, q, k
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, q.device
        self.factor, self.bias, self.is_weights = factor, bias, is_weights

    def replaced(self, **changes: Any) -> "Scores":
        fields = ("watch", "q", "k", "shape", "dtype", "factor", "bias", "is_weights")
        return Scores(**{name: changes.get(name, getattr(self, name)) for name in fields})

    def affine(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> "Scores":
        """With ``change(factor, bias)``, where they are recorded."""
        if self.is_weights:
            raise UnknownStep("its attention weights are changed after the softmax")
        if self.factor is None or self.bias is None:
            return self
        factor, bias = change(self.factor, self.bias)
        if factor.shape != self.shape or bias.shape != self.shape:
            raise UnknownStep("its scores are broadcast to another shape")
        return self.replaced(factor=factor, bias=bias)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        step = _STEPS.get(name.removesuffix("_"))
        if step is None:
            raise UnknownStep(f"its scores go through {name}")
        return partial(_in_place(step) if name.endswith("_") else step, self)

    def __add__(self, other: Any) -> "Scores":
        return _add(self, other)

    def __sub__(self, other: Any) -> "Scores":
        return _sub(self, other)

    def __rsub__(self, other: Any) -> "Scores":
        return _sub(other, self)

    def __mul__(self, other: Any) -> "Scores":
        return _mul(self, other)

    def __truediv__(self, other: Any) -> "Scores":
        return _div(self, other)

    def __matmul__(self, other: Any) -> Tensor:
        return _matmul(self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        step = _STEPS.get(_ALIASES.get(name, name))
        if step is None or (func.__name__.endswith("_") and not func.__name__.startswith("_")):
            raise UnknownStep(f"its scores go through {func.__name__}")
        return step(*args, **(kwargs or {}))


def _in_place(step: Callable[..., Any]) -> Callable[..., Scores]:
    def changed(scores: Scores, *args: Any, **kwargs: Any) -> Scores:
        scores.__dict__.update(step(scores, *args, **kwargs).__dict__)
        return scores

    return changed


def _add(one: Any, other: Any, *, alpha: float = 1.0) -> Scores:
    scores, term = (one, other) if isinstance(one, Scores) else (other, one)
    if isinstance(term, Scores) or (alpha != 1.0 and scores is other):
        raise UnknownStep("its scores are added to each other")
    return scores if term is None else scores.affine(lambda factor, bias: (factor, bias + alpha * term))


def _sub(one: Any, other: Any) -> Scores:
    if not isinstance(one, Scores):
        raise UnknownStep("its scores change their sign")
    return _add(one, -other)


def _mul(one: Any, other: Any) -> Scores:
    scores, by = (one, other) if isinstance(one, Scores) else (other, one)
    return scores.affine(lambda factor, bias: (factor * by, bias * by))


def _div(one: Any, other: Any, **_: Any) -> Scores:
    if not isinstance(one, Scores):
        raise UnknownStep("something is divided by its scores")
    return one.affine(lambda factor, bias: (factor / other, bias / other))


def _masked_fill(scores: Scores, mask: Tensor, value: Any) -> Scores:
    return scores.affine(lambda factor, bias: (factor.masked_fill(mask, 0.0), bias.masked_fill(mask, float(value))))


def _where(condition: Tensor, one: Any, other: Any) -> Scores:
    if isinstance(one, Scores):
        return one.affine(
            lambda factor, bias: (torch.where(condition, factor, 0.0), torch.where(condition, bias, float(other)))
        )
    assert isinstance(other, Scores)
    return other.affine(
        lambda factor, bias: (torch.where(condition, 0.0, factor), torch.where(condition, float(one), bias))
    )


def _floor(one: Any, other: Any) -> Scores:
    """At least some number: nothing, for the lowest one there is."""
    scores, least = (one, other) if isinstance(one, Scores) else (other, one)

    def raised(factor: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if float(least) > HIDDEN:
            raise UnknownStep("its scores are bounded below")
        return factor, bias.clamp_min(float(least))

    return scores.affine(raised)


def _softmax(scores: Scores, dim: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Scores:
    if scores.is_weights or dim not in (-1, len(scores.shape) - 1):
        raise UnknownStep("its softmax is not over the keys")
    return scores.replaced(is_weights=True, dtype=dtype or scores.dtype)


def _to(scores: Scores, *args: Any, **kwargs: Any) -> Scores:
    dtypes = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)]
    dtypes += [one.dtype for one in args if isinstance(one, (Tensor, Scores))]
    return scores.replaced(dtype=dtypes[0]) if dtypes else scores


def _as(dtype: torch.dtype) -> Callable[[Scores], Scores]:
    return lambda scores: scores.replaced(dtype=dtype)


def _view(scores: Scores, *shape: Any) -> Scores:
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if -1 in sizes:
        sizes[sizes.index(-1)] = scores.shape.numel() // -math.prod(sizes)
    new = torch.Size(sizes)
    if new[-2:] != scores.shape[-2:] or new.numel() != scores.shape.numel():
        raise UnknownStep("the tokens of its scores are split or merged")
    parts = {
        name: None if (part := getattr(scores, name)) is None else part.reshape(new) for name in ("factor", "bias")
    }
    return scores.replaced(shape=new, **parts)


def _dropout(scores: Scores, *_: Any, **__: Any) -> Scores:
    """None: neither a probe nor the forward over a ragged batch has dropout in attention."""
    if not scores.is_weights:
        raise UnknownStep("its scores are dropped out before the softmax")
    return scores


def _matmul(one: Any, other: Any) -> Tensor:
    if not isinstance(one, Scores) or not isinstance(other, Tensor) or not one.is_weights:
        raise UnknownStep("its scores are multiplied by something else than values")
    return one.watch.finish(one, other)


_STEPS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "masked_fill": _masked_fill, "where": _where,
    "max": _floor, "maximum": _floor, "clamp_min": _floor,
    "softmax": _softmax, "dropout": _dropout, "matmul": _matmul, "bmm": _matmul,
    "to": _to, "type_as": _to, "float": _as(torch.float32), "double": _as(torch.float64),
    "half": _as(torch.float16), "bfloat16": _as(torch.bfloat16),
    "view": _view, "reshape": _view, "contiguous": lambda scores: scores,
    "expand_as": lambda x, scores: x if scores.bias is None else x.expand(scores.shape),
    "size": lambda scores, dim=None: scores.shape if dim is None else scores.shape[dim],
    "dim": lambda scores: len(scores.shape),
}  # fmt: skip
_ALIASES = {
    "iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "truediv": "div", "itruediv": "div", "divide": "div", "true_divide": "div", "rmatmul": "matmul",
}  # fmt: skip
