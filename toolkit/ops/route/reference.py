"""Routing in plain torch: the specification. T tokens, E experts, K selected per token."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.rowwise import compute_dtype, elementwise


def stable_topk(values: Tensor, count: int) -> Tensor:
    """[..., count] indices of the largest values, largest first; ties go to the lower index; NaN ranks as -inf."""
    ranked = torch.where(values.isnan(), -torch.inf, values)
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]


def expert_scores(logits: Tensor, scoring_func: str) -> Tensor:
    """[T, E]: softmax over the experts, or an activation of ``toolkit.ops.activation`` of each logit."""
    x = logits.to(compute_dtype(logits))
    if scoring_func == "softmax":
        return torch.softmax(x, -1)
    return elementwise(find(scoring_func, plain=True).value, x.contiguous())


def select(
    scores: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    experts_per_group_score: int,
) -> Tensor:
    """[T, K] ids by score plus bias, among the ``topk_group`` groups with the highest group score."""
    values = scores if expert_bias is None else scores + expert_bias.to(scores.dtype)
    if topk_group < n_group:
        members = values.unflatten(-1, (n_group, -1))
        ranked = stable_topk(members, experts_per_group_score)
        groups = stable_topk(members.gather(-1, ranked).sum(-1), topk_group)
        allowed = torch.zeros(members.shape[:-1], dtype=torch.bool, device=values.device).scatter(-1, groups, True)
        values = torch.where(allowed.repeat_interleave(members.shape[-1], -1), values, -torch.inf)
        # Experts of the other groups rank behind -inf and NaN of the selected groups.
        order = torch.sort(allowed.repeat_interleave(members.shape[-1], -1).int(), dim=-1, descending=True, stable=True)
        return order.indices.gather(-1, stable_topk(values.gather(-1, order.indices), top_k))
    return stable_topk(values, top_k)


def route(
    logits: Tensor, expert_bias: Tensor | None, topk_ids: Tensor | None, top_k: int, scoring_func: str,
    n_group: int, topk_group: int, experts_per_group_score: int,
    norm_topk_prob: bool, eps: float, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(topk_weights [T, K], topk_ids [T, K]): see ``toolkit.ops.route.route``."""
    scores = expert_scores(logits, scoring_func)
    if topk_ids is None:
        ids = select(scores, expert_bias, top_k, n_group, topk_group, experts_per_group_score)
    else:
        ids = topk_ids.clone()
    weights = scores.gather(-1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * routed_scaling_factor, ids


def route_backward(
    grad: Tensor, logits: Tensor, topk_ids: Tensor, scoring_func: str,
    norm_topk_prob: bool, eps: float, routed_scaling_factor: float,
) -> Tensor:  # fmt: skip
    """The gradient to the logits: of the selected scores through sum and scale, and for softmax through all of them.

    With p the scores, w = p / (sum p + eps) and d = routed_scaling_factor grad: ``dp = (d - <d, w>) / (sum p + eps)``,
    or d without the sum; softmax ``p (dp - <dp, p>)``, an activation ``f'(logit) dp``. The selection has no gradient.
    """
    x = logits.to(compute_dtype(logits))
    scores = expert_scores(logits, scoring_func)
    d = grad.to(x.dtype) * routed_scaling_factor
    if norm_topk_prob:
        p = scores.gather(-1, topk_ids)
        total = p.sum(-1, keepdim=True) + eps
        d = (d - (d * (p / total)).sum(-1, keepdim=True)) / total
    to_scores = torch.zeros_like(scores).scatter(-1, topk_ids, d)
    if scoring_func == "softmax":
        to_logits = scores * (to_scores - (to_scores * scores).sum(-1, keepdim=True))
    else:
        to_logits = to_scores * elementwise(find(scoring_func, plain=True).derivative, x.contiguous())
    return to_logits.to(logits.dtype)


def route_fake(
    logits: Tensor, expert_bias: Tensor | None, topk_ids: Tensor | None, top_k: int, scoring_func: str,
    n_group: int, topk_group: int, experts_per_group_score: int,
    norm_topk_prob: bool, eps: float, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=compute_dtype(logits), device=logits.device)
    return weights, torch.empty(shape, dtype=torch.int64, device=logits.device)


def route_backward_fake(
    grad: Tensor, logits: Tensor, topk_ids: Tensor, scoring_func: str,
    norm_topk_prob: bool, eps: float, routed_scaling_factor: float,
) -> Tensor:  # fmt: skip
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
