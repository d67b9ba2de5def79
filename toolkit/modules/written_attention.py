"""Attention that a layer writes out: its own forward runs, and the context of a ragged batch takes scores and sum over.

Many layers call no attention function: their forward multiplies queries by keys, scales, adds masks and biases, takes a
softmax, and multiplies the weights by values. While ``Watch`` is on, the product of queries and keys is not computed.
A ``Scores`` takes its place and follows the layer's own code; where it meets the values, ``Watch.finish`` returns their
weighted sum. So projections, splits into heads and rotations stay the layer's own, in any form.

Shapes: T tokens, N query heads (of a batch of 1), G key heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolkit.errors import ToolkitError
from toolkit.modules.attention_scores import Scores, UnknownStep
from toolkit.state.active import forward_context_of
from toolkit.state.context import AttentionSettings, ForwardContext


@dataclass(frozen=True)
class Plan:
    """One attention in a layer's forward.

    Args:
        scale: factor of the scores.
        window: tokens that a query sees, itself included; 0 for all.
        slopes: [N] of ALiBi, or None.
        key_heads: distinct heads of keys and values; where the layer repeats each, the first of a run is attended to.
        chunked: whether a query sees its chunk of ``window`` positions alone.
    """

    scale: float
    window: int
    slopes: tuple[float, ...] | None
    key_heads: int
    chunked: bool = False

    def settings(self, q: Tensor) -> AttentionSettings:
        """For queries [T, N, D]."""
        own = (float(self.window),) * q.shape[1] if self.chunked else self.slopes
        if own is None:
            return AttentionSettings(self.scale, self.window)
        parameters = _per_head(own, torch.promote_types(q.dtype, torch.float32), q.device)
        modifier = "chunked" if self.chunked else "alibi"
        return AttentionSettings(self.scale, self.window, modifier=modifier, parameters=parameters)

    def __str__(self) -> str:
        kinds = {"ALiBi": self.slopes is not None, "chunks": self.chunked, "window": self.window > 0}
        return next((kind for kind, is_so in kinds.items() if is_so), "causal")


@lru_cache(maxsize=64)
def _per_head(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they are kept, and a later backward saves them
        return torch.tensor(numbers, dtype=dtype, device=device)[:, None]


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
        scores = self.start(batch1, batch2.mT) * alpha
        return scores + beta * input if beta and scores.factor is not None else scores

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
        scores = self.start(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if scores.factor is not None:
            if is_causal:
                attn_mask = torch.ones(self.length, self.length, dtype=torch.bool, device=query.device).tril()
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            elif attn_mask is not None:
                scores = scores + attn_mask
        return self.finish(scores.softmax(-1), value)


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
        self.count = len(self.left)

    def weighted_sum(self, scores: Scores, values: Tensor) -> Tensor:
        if not self.left:
            raise UnknownStep(f"it attends more often than {self.count} times")
        plan = self.left.pop(0)
        k, v = (x[:, :: x.shape[1] // plan.key_heads] for x in (heads(scores.k), heads(values)))
        q, k = heads(scores.q).to(v.dtype), k.to(v.dtype)
        out = self.context.attend(self.layer, q, k, v, plan.settings(q))
        self.layer += 1
        return out.transpose(0, 1).reshape(*scores.shape[:-1], -1)


def written_forward(own: Callable[..., Any], layer: int, plans: Sequence[Plan]) -> Callable[..., Any]:
    """``own``, a layer's forward, whose attentions are those of the context in a ragged batch.

    Attention weights that it returns are None there. It raises ToolkitError where its attentions are not ``plans``.

    Args:
        layer: as for ``BatchWatch``.
        plans: as for ``BatchWatch``.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is None:
            return own(self, *args, **kwargs)
        watch = BatchWatch(context, layer, plans)
        try:
            with watch:
                output = own(self, *args, **kwargs)
        except UnknownStep as step:
            raise ToolkitError(
                f"attention of {type(self).__name__} does something else in a batch of {watch.length} tokens than when "
                f"it was patched: {step}."
            ) from step
        if watch.left:
            raise ToolkitError(
                f"{type(self).__name__} must attend {len(plans)} times in a ragged batch of {watch.length} tokens, as "
                f"when it was patched, got {len(plans) - len(watch.left)}."
            )
        return without_scores(output)

    return forward


def without_scores(value: Any) -> Any:
    """``value`` with None for ``Scores`` in it."""
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(without_scores(one) for one in value)
    return None if isinstance(value, Scores) else value
