"""``route`` in Triton: a program holds whole rows of logits and selects each row's maximum K times.

A row lies in a tile group by group, each group padded to a power of two, so that the column grows with the expert's id
and the first of equal values is the lowest id. Values are compared as ordered integers; excluded experts rank below all
of them. The layout of a row depends on the number of experts alone. FP contraction is disabled.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int64

from toolkit.ops.activation.kinds import find
from toolkit.ops.sample.triton import ordered
from toolkit.ops.triton_rows import blocks, held, power_of_2, whole_row

_EXCLUDED = tl.constexpr(-(2**31))  # below the key of -inf
_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def scores_of(logits, inside, VALUE: tl.constexpr):
    """float32 scores of a tile of logits [rows, experts]: softmax, or VALUE of each; 0 outside."""
    if VALUE is None:
        shifted = tl.where(inside, logits, float("-inf"))
        weight = tl.where(inside, tl.exp(shifted - tl.max(shifted, 1)[:, None]), 0.0)
        scores = weight / tl.sum(weight, 1)[:, None]
    else:
        scores = tl.where(inside, VALUE(logits), 0.0)
    return scores


@triton.jit
def keys_of(values, allowed):
    """int32 keys in the order of the values, NaN as -inf, and what is not allowed below them."""
    return tl.where(allowed, ordered(tl.where(values != values, float("-inf"), values)), _EXCLUDED)


@triton.jit
def first_argmax(keys, column, AXIS: tl.constexpr):
    """The index of the largest key along the last axis, AXIS; the first of equal ones."""
    largest = tl.max(keys, AXIS, keep_dims=True)
    return tl.min(tl.where(keys == largest, column, _MAX), AXIS, keep_dims=True)


@triton.jit
def selected_groups(
    values, inside, group_there,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    TOPK_GROUP: tl.constexpr, PER_GROUP_SCORE: tl.constexpr,
):  # fmt: skip
    """[ROWS, GROUPS * MEMBERS]: the experts of the TOPK_GROUP groups with the highest group score."""
    members = tl.reshape(values, [ROWS, GROUPS, MEMBERS])
    keys = tl.reshape(keys_of(values, inside), [ROWS, GROUPS, MEMBERS])
    column = tl.arange(0, MEMBERS)[None, None, :]
    total = tl.zeros([ROWS, GROUPS], tl.float32)
    for _ in range(PER_GROUP_SCORE):
        hit = column == first_argmax(keys, column, 2)
        total += tl.sum(tl.where(hit, members, 0.0), 2)
        keys = tl.where(hit, _EXCLUDED, keys)
    group = tl.arange(0, GROUPS)[None, :]
    ranked = keys_of(total, group_there)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in range(TOPK_GROUP):
        hit = group == first_argmax(ranked, group, 1)
        kept = tl.where(hit, 1, kept)
        ranked = tl.where(hit, _EXCLUDED, ranked)
    spread = tl.broadcast_to(kept[:, :, None], [ROWS, GROUPS, MEMBERS])
    return tl.reshape(spread, [ROWS, GROUPS * MEMBERS]) != 0


@triton.jit(do_not_specialize=["rows"])
def route_forward(
    logits, expert_bias, given_ids, topk_weights, topk_ids, rows, experts, members, stride, eps, scale,
    VALUE: tl.constexpr, TOP_K: tl.constexpr, PADDED_K: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOPK_GROUP: tl.constexpr, PER_GROUP_SCORE: tl.constexpr,
    BIASED: tl.constexpr, GROUPED: tl.constexpr, GIVEN: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """topk_weights and topk_ids [rows, K]. GROUPS and MEMBERS are padded; a group has ``members`` experts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < rows
    column = tl.arange(0, GROUPS * MEMBERS)[None, :]
    expert = column // MEMBERS * members + column % MEMBERS
    there = (column % MEMBERS < members) & (expert < experts)
    inside = row_ok & there
    values = tl.load(logits + row * stride + expert, mask=inside, other=0.0).to(tl.float32)
    scores = scores_of(values, there, VALUE)
    index = tl.arange(0, PADDED_K)[None, :]
    if GIVEN:
        keys = tl.zeros([ROWS, GROUPS * MEMBERS], tl.int32)
    else:
        ranked = scores
        if BIASED:
            ranked += tl.load(expert_bias + expert, mask=there, other=0.0).to(tl.float32)
        allowed = tl.broadcast_to(there, [ROWS, GROUPS * MEMBERS])
        if GROUPED:
            group_there = tl.arange(0, GROUPS)[None, :] * members < experts
            allowed = allowed & selected_groups(
                ranked, allowed, group_there, ROWS, GROUPS, MEMBERS, TOPK_GROUP, PER_GROUP_SCORE
            )  # fmt: skip
        keys = keys_of(ranked, allowed)
    total = tl.zeros([ROWS, 1], tl.float32)
    weight = tl.zeros([ROWS, PADDED_K], tl.float32)
    for k in range(TOP_K):
        if GIVEN:
            found = tl.load(given_ids + row * TOP_K + k, mask=row_ok, other=0)
            hit = (expert == found) & there
        else:
            hit = column == first_argmax(keys, column, 1)
            keys = tl.where(hit, _EXCLUDED, keys)
            found = tl.sum(tl.where(hit, expert, 0), 1, keep_dims=True).to(tl.int64)
        score = tl.sum(tl.where(hit, scores, 0.0), 1, keep_dims=True)
        total += score
        weight = tl.where(index == k, score, weight)
        tl.store(topk_ids + row * TOP_K + k, found, mask=row_ok)
    if NORMALISED:
        weight = weight / (total + eps)
    tl.store(topk_weights + row * TOP_K + index, weight * scale, mask=row_ok & (index < TOP_K))


@triton.jit(do_not_specialize=["rows"])
def route_grad(
    grad, logits, topk_ids, dlogits, rows, experts, stride, eps, scale,
    VALUE: tl.constexpr, BOTH: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < rows
    expert = tl.arange(0, BLOCK)[None, :]
    there = expert < experts
    values = tl.load(logits + row * stride + expert, mask=row_ok & there, other=0.0).to(tl.float32)
    scores = scores_of(values, there, VALUE)
    total = tl.zeros([ROWS, 1], tl.float32)
    weighted = tl.zeros([ROWS, 1], tl.float32)  # <d, p>
    if NORMALISED:
        for k in range(TOP_K):
            hit = expert == tl.load(topk_ids + row * TOP_K + k, mask=row_ok, other=0)
            score = tl.sum(tl.where(hit, scores, 0.0), 1, keep_dims=True)
            total += score
            weighted += tl.load(grad + row * TOP_K + k, mask=row_ok, other=0.0).to(tl.float32) * scale * score
        total += eps
        weighted = weighted / total
    to_scores = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(TOP_K):
        hit = expert == tl.load(topk_ids + row * TOP_K + k, mask=row_ok, other=0)
        d = tl.load(grad + row * TOP_K + k, mask=row_ok, other=0.0).to(tl.float32) * scale
        if NORMALISED:
            d = (d - weighted) / total
        to_scores = tl.where(hit, d, to_scores)
    if VALUE is None:
        result = scores * (to_scores - tl.sum(to_scores * scores, 1)[:, None])
    else:
        _, slope = BOTH(values)
        result = to_scores * slope
    tl.store(dlogits + row * experts + expert, result.to(dlogits.dtype.element_ty), mask=row_ok & there)


def functions_of(scoring_func: str) -> tuple[object, object]:
    """The Triton functions of an activation; None for softmax, which spans a row."""
    return (None, None) if scoring_func == "softmax" else find(scoring_func, plain=True).device()


def route(
    logits: Tensor,
    expert_bias: Tensor | None,
    topk_ids: Tensor | None,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    experts_per_group_score: int,
    norm_topk_prob: bool,
    eps: float,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """``toolkit::route``: logits [T, E] in float32, bfloat16 or float16; weights [T, K] in float32, ids [T, K]."""
    x = held("route", logits)
    rows, experts = x.shape
    weights = empty(rows, top_k, dtype=float32, device=x.device)
    ids = empty(rows, top_k, dtype=int64, device=x.device)
    if rows:
        members = experts // n_group
        groups, padded_members = power_of_2(n_group), power_of_2(members)
        options = whole_row(groups * padded_members, 4).options()
        del options["BLOCK"]
        route_forward[(blocks(rows, options["ROWS"]),)](
            logits=x,
            expert_bias=weights if expert_bias is None else expert_bias.contiguous(),
            given_ids=ids if topk_ids is None else topk_ids.contiguous(),
            topk_weights=weights,
            topk_ids=ids,
            rows=rows,
            experts=experts,
            members=members,
            stride=x.stride(0),
            eps=eps,
            scale=routed_scaling_factor,
            VALUE=functions_of(scoring_func)[0],
            TOP_K=top_k,
            PADDED_K=power_of_2(top_k),
            GROUPS=groups,
            MEMBERS=padded_members,
            TOPK_GROUP=topk_group,
            PER_GROUP_SCORE=experts_per_group_score,
            BIASED=expert_bias is not None,
            GROUPED=topk_group < n_group,
            GIVEN=topk_ids is not None,
            NORMALISED=norm_topk_prob,
            **options,
        )
    return weights, ids


def route_backward(
    grad: Tensor,
    logits: Tensor,
    topk_ids: Tensor,
    scoring_func: str,
    norm_topk_prob: bool,
    eps: float,
    routed_scaling_factor: float,
) -> Tensor:
    """``toolkit::route_backward``: the gradient to the logits, in their dtype."""
    x = held("route_backward", logits)
    rows, experts = x.shape
    dlogits = empty(rows, experts, dtype=x.dtype, device=x.device)
    if rows:
        tile = whole_row(experts, 4)
        value, both = functions_of(scoring_func)
        route_grad[(blocks(rows, tile.rows),)](
            grad=grad.contiguous(),
            logits=x,
            topk_ids=topk_ids.contiguous(),
            dlogits=dlogits,
            rows=rows,
            experts=experts,
            stride=x.stride(0),
            eps=eps,
            scale=routed_scaling_factor,
            VALUE=value,
            BOTH=both,
            TOP_K=topk_ids.shape[1],
            NORMALISED=norm_topk_prob,
            **tile.options(),
        )
    return dlogits
