"""``route`` in Triton: a program takes whole rows of logits, and takes the largest value of each again and again.

A row lies in a tile by groups: each group's experts, padded to a power of two, one group after the other, so that the
place grows with the id and the first of equal places is the lowest id. Values are compared as ordered integers, below
which lies all that cannot be chosen. A row's layout goes by the number of experts alone. Contraction is pinned off.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int64

from toolkit.ops.activation.kinds import find
from toolkit.ops.sample.triton import ordered
from toolkit.ops.triton_rows import blocks, held, power_of_2, whole_row

_BARRED = tl.constexpr(-(2**31))  # below the key of -inf
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
    return tl.where(allowed, ordered(tl.where(values != values, float("-inf"), values)), _BARRED)


@triton.jit
def first_largest(keys, place, AXIS: tl.constexpr):
    """Along the last axis, AXIS, the place of the largest key; of equal ones the first."""
    largest = tl.max(keys, AXIS, keep_dims=True)
    return tl.min(tl.where(keys == largest, place, _MAX), AXIS, keep_dims=True)


@triton.jit
def kept_groups(
    values, inside, group_there,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Which experts are in the KEPT groups whose BEST highest values have the largest sum, [ROWS, GROUPS * MEMBERS]."""
    members = tl.reshape(values, [ROWS, GROUPS, MEMBERS])
    keys = tl.reshape(keys_of(values, inside), [ROWS, GROUPS, MEMBERS])
    place = tl.arange(0, MEMBERS)[None, None, :]
    total = tl.zeros([ROWS, GROUPS], tl.float32)
    for _ in range(BEST):
        hit = place == first_largest(keys, place, 2)
        total += tl.sum(tl.where(hit, members, 0.0), 2)
        keys = tl.where(hit, _BARRED, keys)
    group = tl.arange(0, GROUPS)[None, :]
    ranked = keys_of(total, group_there)
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    for _ in range(KEPT):
        hit = group == first_largest(ranked, group, 1)
        kept = tl.where(hit, 1, kept)
        ranked = tl.where(hit, _BARRED, ranked)
    spread = tl.broadcast_to(kept[:, :, None], [ROWS, GROUPS, MEMBERS])
    return tl.reshape(spread, [ROWS, GROUPS * MEMBERS]) != 0


@triton.jit(do_not_specialize=["rows"])
def route_forward(
    logits, bias, chosen, weights, ids, rows, experts, members, stride, eps, scale,
    VALUE: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    BIASED: tl.constexpr, GROUPED: tl.constexpr, CHOSEN: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """weights and ids [rows, K]. GROUPS and MEMBERS are padded; ``members`` of a group there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = row < rows
    place = tl.arange(0, GROUPS * MEMBERS)[None, :]
    expert = place // MEMBERS * members + place % MEMBERS
    there = (place % MEMBERS < members) & (expert < experts)
    inside = row_ok & there
    values = tl.load(logits + row * stride + expert, mask=inside, other=0.0).to(tl.float32)
    scores = scores_of(values, there, VALUE)
    slot = tl.arange(0, SLOTS)[None, :]
    if CHOSEN:
        keys = tl.zeros([ROWS, GROUPS * MEMBERS], tl.int32)
    else:
        ranked = scores
        if BIASED:
            ranked += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
        allowed = tl.broadcast_to(there, [ROWS, GROUPS * MEMBERS])
        if GROUPED:
            group_there = tl.arange(0, GROUPS)[None, :] * members < experts
            allowed = allowed & kept_groups(ranked, allowed, group_there, ROWS, GROUPS, MEMBERS, KEPT, BEST)
        keys = keys_of(ranked, allowed)
    total = tl.zeros([ROWS, 1], tl.float32)
    weight = tl.zeros([ROWS, SLOTS], tl.float32)
    for k in range(K):
        if CHOSEN:
            found = tl.load(chosen + row * K + k, mask=row_ok, other=0)
            hit = (expert == found) & there
        else:
            hit = place == first_largest(keys, place, 1)
            keys = tl.where(hit, _BARRED, keys)
            found = tl.sum(tl.where(hit, expert, 0), 1, keep_dims=True).to(tl.int64)
        score = tl.sum(tl.where(hit, scores, 0.0), 1, keep_dims=True)
        total += score
        weight = tl.where(slot == k, score, weight)
        tl.store(ids + row * K + k, found, mask=row_ok)
    if NORMALISED:
        weight = weight / (total + eps)
    tl.store(weights + row * K + slot, weight * scale, mask=row_ok & (slot < K))


@triton.jit(do_not_specialize=["rows"])
def route_grad(
    grad, logits, ids, dlogits, rows, experts, stride, eps, scale,
    VALUE: tl.constexpr, BOTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
        for k in range(K):
            hit = expert == tl.load(ids + row * K + k, mask=row_ok, other=0)
            score = tl.sum(tl.where(hit, scores, 0.0), 1, keep_dims=True)
            total += score
            weighted += tl.load(grad + row * K + k, mask=row_ok, other=0.0).to(tl.float32) * scale * score
        total += eps
        weighted = weighted / total
    to_scores = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(K):
        hit = expert == tl.load(ids + row * K + k, mask=row_ok, other=0)
        d = tl.load(grad + row * K + k, mask=row_ok, other=0.0).to(tl.float32) * scale
        if NORMALISED:
            d = (d - weighted) / total
        to_scores = tl.where(hit, d, to_scores)
    if VALUE is None:
        result = scores * (to_scores - tl.sum(to_scores * scores, 1)[:, None])
    else:
        _, slope = BOTH(values)
        result = to_scores * slope
    tl.store(dlogits + row * experts + expert, result.to(dlogits.dtype.element_ty), mask=row_ok & there)


def functions_of(score: str) -> tuple[object, object]:
    """A kind's Triton functions; None for softmax, which takes a row."""
    return (None, None) if score == "softmax" else find(score, plain=True).device()


def route(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, score: str, groups: int, kept: int, best: int,
    normalise: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``toolkit::route``: logits [T, E] in float32, bfloat16 or float16; weights [T, k] in float32, ids [T, k]."""
    x = held("route", logits)
    rows, experts = x.shape
    weights = empty(rows, k, dtype=float32, device=x.device)
    ids = empty(rows, k, dtype=int64, device=x.device)
    if rows:
        members = experts // groups
        padded = power_of_2(groups), power_of_2(members)
        tile = whole_row(padded[0] * padded[1], 4)
        options = tile.options() | {"GROUPS": padded[0], "MEMBERS": padded[1]}
        del options["BLOCK"]
        route_forward[(blocks(rows, tile.rows),)](
            x, weights if bias is None else bias.contiguous(), ids if chosen is None else chosen.contiguous(),
            weights, ids, rows, experts, members, x.stride(0), eps, scale,
            VALUE=functions_of(score)[0], K=k, SLOTS=power_of_2(k), KEPT=kept, BEST=best,
            BIASED=bias is not None, GROUPED=kept < groups, CHOSEN=chosen is not None, NORMALISED=normalise, **options,
        )  # fmt: skip
    return weights, ids


def route_backward(
    grad: Tensor, logits: Tensor, ids: Tensor, score: str, normalise: bool, eps: float, scale: float
) -> Tensor:
    """``toolkit::route_backward``: the gradient to the logits, in their dtype."""
    x = held("route_backward", logits)
    rows, experts = x.shape
    dlogits = empty(rows, experts, dtype=x.dtype, device=x.device)
    if rows:
        tile = whole_row(experts, 4)
        value, both = functions_of(score)
        route_grad[(blocks(rows, tile.rows),)](
            grad.contiguous(), x, ids.contiguous(), dlogits, rows, experts, x.stride(0), eps, scale,
            VALUE=value, BOTH=both, K=ids.shape[1], NORMALISED=normalise, **tile.options(),
        )  # fmt: skip
    return dlogits
