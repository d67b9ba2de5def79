"""Attention that a layer writes out: its own forward runs, and the context of a ragged batch takes scores and sum over.

Many layers call no attention function: their forward multiplies queries by keys, scales, adds masks and biases, takes a
softmax, and multiplies the weights by values. While ``Watch`` is on, the product of queries and keys is not computed.
A ``Scores`` takes its place and follows the layer's own code; where it meets the values, ``Watch.finish`` returns their
weighted sum. So projections, splits into heads and rotations stay the layer's own, in any form.

Shapes: T tokens, N query heads (of a batch of 1), G key heads, D head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolkit.state.active import forward_context_of
from toolkit.state.context import AttentionSettings, ForwardContext


class UnknownStep(Exception):
    """What a layer did to its scores is not part of attention as it is known here."""


@dataclass(frozen=True)
class Plan:
    """One attention in a layer's forward.

    Args:
        scale: factor of the scores.
        window: tokens that a query sees, itself included; 0 for all.
        slopes: [N] of ALiBi, or None.
        key_heads: distinct heads of keys and values; where the layer repeats each, the first of a run is attended to.
    """

    scale: float
    window: int
    slopes: tuple[float, ...] | None
    key_heads: int

    def settings(self, like: Tensor) -> AttentionSettings:
        if self.slopes is None:
            return AttentionSettings(self.scale, self.window)
        slopes = _slopes(self.slopes, torch.promote_types(like.dtype, torch.float32), like.device)
        return AttentionSettings(self.scale, self.window, modifier="alibi", parameters=slopes)


@lru_cache(maxsize=64)
def _slopes(slopes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they are kept, and a later backward saves them
        return torch.tensor(slopes, dtype=dtype, device=device)[:, None]


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
        watch: "Watch",
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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.strip("_")
        step = _STEPS.get(_ALIASES.get(name, name))
        if step is None or (func.__name__.endswith("_") and not func.__name__.startswith("_")):
            raise UnknownStep(f"its scores go through {func.__name__}")
        return step(*args, **(kwargs or {}))


def _operator(name: str, swapped: bool = False) -> Callable[[Any, Any], Any]:
    return lambda self, other: _STEPS[name](other, self) if swapped else _STEPS[name](self, other)


def _in_place(step: Callable[..., Any]) -> Callable[..., Scores]:
    def changed(scores: Scores, *args: Any, **kwargs: Any) -> Scores:
        scores.__dict__.update(step(scores, *args, **kwargs).__dict__)
        return scores

    return changed


for _name, _step in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "div"), ("matmul", "matmul")):
    for _prefix in ("", "i", "r"):
        setattr(Scores, f"__{_prefix}{_name}__", _operator(_step, _prefix == "r"))


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
        if float(least) > -_HIDDEN:
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


_HIDDEN = 5e3
"""A key whose bias is below minus this has weight 0: masks are written as -1e4, the lowest number, or -inf."""

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

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SUMS_OF_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}


class Watch(TorchFunctionMode):
    """While it is on, products of queries and keys of ``length`` tokens are ``Scores``.

    Args:
        length: T.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._finishing = False

    def weighted_sum(self, scores: Scores, values: Tensor) -> Tensor:
        """[..., T, Dv], of values [..., T, Dv]."""
        raise NotImplementedError

    def start(self, q: Tensor, k: Tensor) -> Scores:
        """The scores of q [..., T, D] and k [..., T, D]."""
        return Scores(self, q, k, (*_leading(q, k), self.length, self.length), q.dtype)

    def finish(self, scores: Scores, values: Tensor) -> Tensor:
        self._finishing = True
        try:
            return self.weighted_sum(scores, values)
        finally:
            self._finishing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._finishing or not self.begins(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _PRODUCTS:
            q, k = _operands(func, args, kwargs)
            return self.start(q, k.mT)
        return (self._sum_of_products if func in _SUMS_OF_PRODUCTS else self._fused)(*args, **kwargs)

    def begins(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call of torch makes scores: queries times keys, or attention as a whole."""
        if func not in _PRODUCTS and func not in _SUMS_OF_PRODUCTS:
            return func is F.scaled_dot_product_attention
        q, k = _operands(func, args, kwargs)
        if not (type(q) is Tensor and type(k) is Tensor and q.dim() == k.dim() and q.dim() in (3, 4)):
            return False
        return q.shape[-2] == self.length == k.shape[-1] and q.shape[-1] == k.shape[-2]

    def _sum_of_products(
        self, input: Any, batch1: Any, batch2: Any, *, beta: float = 1.0, alpha: float = 1.0
    ) -> Scores:
        scores = _mul(self.start(batch1, batch2.mT), alpha)
        return _add(scores, beta * input) if beta and scores.factor is not None else scores

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if key.shape[-2] == self.length == 1 and query.shape[-2] > 1:
            # transformers lets one token's heads that share a key stand for several tokens.
            packed = query.shape[:-1]
            query = query.flatten(-3, -2)[..., None, :]
            return self._fused(query, key, value, None, 0.0, False, scale).reshape(*packed, -1)
        if query.shape[-2] != self.length or key.shape[-2] != self.length:
            raise UnknownStep("its queries and keys are not the tokens of the batch")
        scores = _mul(self.start(query, key), query.shape[-1] ** -0.5 if scale is None else scale)
        if scores.factor is not None:
            if is_causal:
                attn_mask = torch.ones(self.length, self.length, dtype=torch.bool, device=query.device).tril()
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = _masked_fill(scores, ~attn_mask, -torch.inf)
            elif attn_mask is not None:
                scores = _add(scores, attn_mask)
        return self.finish(_softmax(scores, -1), value)


def _operands(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The factors of a product, or of one that is added to something."""
    if func in _SUMS_OF_PRODUCTS:
        args = args[1:]
    rest = [*args, *(value for name, value in kwargs.items() if name not in ("alpha", "beta", "input"))]
    return (rest[0], rest[1]) if len(rest) == 2 else (None, None)


def _leading(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Leading dimensions of the scores; fewer key heads than query heads are shared."""
    return tuple(max(sizes) for sizes in zip(q.shape[:-2], k.shape[:-2], strict=True))


def heads(x: Tensor) -> Tensor:
    """[T, N, D], of [1, N, T, D] or [N, T, D]."""
    return x.reshape(-1, *x.shape[-2:]).transpose(0, 1)


class BatchWatch(Watch):
    """The attentions of one layer, by the context of a ragged batch.

    Args:
        context: of the batch.
        layer: index of the first attention's state; the next ones follow.
        plans: of the attentions in order.
    """

    def __init__(self, context: ForwardContext, layer: int, plans: Sequence[Plan]) -> None:
        super().__init__(len(context.batch.positions))
        self.context, self.layer, self.left = context, layer, list(plans)

    def weighted_sum(self, scores: Scores, values: Tensor) -> Tensor:
        plan = self.left.pop(0)
        k, v = (x[:, :: x.shape[1] // plan.key_heads] for x in (heads(scores.k), heads(values)))
        q, k = heads(scores.q).to(v.dtype), k.to(v.dtype)
        out = self.context.attend(self.layer, q, k, v, plan.settings(q))
        self.layer += 1
        return out.transpose(0, 1).reshape(*scores.shape[:-1], -1)


def written_forward(own: Callable[..., Any], layer: int, plans: Sequence[Plan]) -> Callable[..., Any]:
    """``own``, a layer's forward, whose attentions are those of the context in a ragged batch.

    Attention weights that it returns are None there.

    Args:
        layer: as for ``BatchWatch``.
        plans: as for ``BatchWatch``.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is None:
            return own(self, *args, **kwargs)
        with BatchWatch(context, layer, plans):
            return without_scores(own(self, *args, **kwargs))

    return forward


def without_scores(value: Any) -> Any:
    """``value`` with None for ``Scores`` in it."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(without_scores(one) for one in value)
    return None if isinstance(value, Scores) else value
