"""Choosing experts in plain torch: the specification. T tokens, E experts, K chosen of them, in G groups."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.rowwise import compute_dtype, elementwise


def first_largest(values: Tensor, count: int) -> Tensor:
    """[..., count] places of the largest values, best first; of equal ones the lower place; NaN counts as least."""
    ranked = torch.where(values.isnan(), -torch.inf, values)
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]


def affinity(logits: Tensor, score: str) -> Tensor:
    """softmax over the experts, or a kind of ``toolkit.ops.activation`` of each logit."""
    wide = logits.to(compute_dtype(logits))
    if score == "softmax":
        return torch.softmax(wide, -1)
    return elementwise(find(score, plain=True).value, wide.contiguous())


def choose(scores: Tensor, bias: Tensor | None, k: int, groups: int, kept: int, best: int) -> Tensor:
    """[T, K] ids by score plus bias, among the ``kept`` groups whose ``best`` highest values have the largest sum."""
    values = scores if bias is None else scores + bias.to(scores.dtype)
    if kept < groups:
        members = values.unflatten(-1, (groups, -1))
        ranked = first_largest(members, best)
        chosen = first_largest(members.gather(-1, ranked).sum(-1), kept)
        allowed = torch.zeros(members.shape[:-1], dtype=torch.bool, device=values.device).scatter(-1, chosen, True)
        values = torch.where(allowed.repeat_interleave(members.shape[-1], -1), values, -torch.inf)
        # What is left out comes after -inf and NaN of the groups that are kept.
        order = torch.sort(allowed.repeat_interleave(members.shape[-1], -1).int(), dim=-1, descending=True, stable=True)
        return order.indices.gather(-1, first_largest(values.gather(-1, order.indices), k))
    return first_largest(values, k)


def route(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, score: str, groups: int, kept: int, best: int,
    normalise: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weights [T, K], ids [T, K]): see ``toolkit.ops.route.route``."""
    scores = affinity(logits, score)
    ids = choose(scores, bias, k, groups, kept, best) if chosen is None else chosen.clone()
    weights = scores.gather(-1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * scale, ids


def route_backward(
    grad: Tensor, logits: Tensor, ids: Tensor, score: str, normalise: bool, eps: float, scale: float
) -> Tensor:
    """The gradient to the logits: of the chosen scores through sum and scale, and for softmax through all of them.

    With p the scores, w = p / (sum p + eps) and d = scale grad: ``dp = (d - <d, w>) / (sum p + eps)``, or d without the
    sum; softmax ``p (dp - <dp, p>)``, a kind ``f'(logit) dp``. The choice has no gradient.
    """
    wide = logits.to(compute_dtype(logits))
    scores = affinity(logits, score)
    d = grad.to(wide.dtype) * scale
    if normalise:
        p = scores.gather(-1, ids)
        total = p.sum(-1, keepdim=True) + eps
        d = (d - (d * (p / total)).sum(-1, keepdim=True)) / total
    to_scores = torch.zeros_like(scores).scatter(-1, ids, d)
    if score == "softmax":
        to_logits = scores * (to_scores - (to_scores * scores).sum(-1, keepdim=True))
    else:
        to_logits = to_scores * elementwise(find(score, plain=True).derivative, wide.contiguous())
    return to_logits.to(logits.dtype)


def route_fake(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, score: str, groups: int, kept: int, best: int,
    normalise: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (logits.shape[0], k)
    weights = torch.empty(shape, dtype=compute_dtype(logits), device=logits.device)
    return weights, torch.empty(shape, dtype=torch.int64, device=logits.device)


def route_backward_fake(
    grad: Tensor, logits: Tensor, ids: Tensor, score: str, normalise: bool, eps: float, scale: float
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
