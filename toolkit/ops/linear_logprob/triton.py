"""Log-probabilities straight from hidden states in Triton: the logits exist a tile at a time.

Forward: a program owns a tile of rows and one split of the vocabulary, walks it tile by tile and keeps per row the
largest logit, the sum of exponentials, their first moment and the sum of logits; a second kernel joins the splits in
order. Batch-invariant for a given tile table.
"""

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import tanh
from toolkit.ops.linear.triton import aligned_rows, row_product
from toolkit.ops.linear.triton import linear as linear_triton
from toolkit.ops.linear_logprob import tiles
from toolkit.ops.tiles import GemmTile


@triton.jit
def logit_tile(
    hidden, weight, bias, temperature, row, row_ok, column, vocabulary, depth, stride_h, stride_w, scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """(logits, d logit / d product) of rows x columns, in float32; the product is rounded as a head's output is."""
    z = row_product(
        hidden, weight, row, row_ok, column, vocabulary, depth, stride_h, stride_w, ROWS, COLUMNS, DEPTH, EVEN
    )  # fmt: skip
    if BIASED:
        z += tl.load(bias + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
    z = z.to(hidden.dtype.element_ty).to(tl.float32) * scale
    slope = tl.full([1, 1], 1.0, tl.float32) * scale
    if CAPPED:
        squashed = tanh(z / softcap)
        z = squashed * softcap
        slope = (1.0 - squashed * squashed) * scale
    if TEMPERED:
        heat = tl.load(temperature + row, mask=row_ok, other=1.0)[:, None]
        z = z / heat
        slope = slope / heat
    return z, slope


@triton.jit
def joined(top, total, moment, other_top, other_total, other_moment):
    """Statistics of two parts of a row: largest logit, sum of exp(z - top) and of exp(z - top) * (z - top)."""
    new = tl.maximum(top, other_top)
    # A part without any probability has nothing to rescale; a distance at which exp is 0 anyway stays finite.
    lag = tl.where(top == float("-inf"), 0.0, top - new)
    other_lag = tl.where(other_top == float("-inf"), 0.0, other_top - new)
    lag, other_lag = tl.where(lag < -1e4, -1e4, lag), tl.where(other_lag < -1e4, -1e4, other_lag)
    keep, add = tl.exp(lag), tl.exp(other_lag)
    return (
        new,
        total * keep + other_total * add,
        keep * (moment + total * lag) + add * (other_moment + other_total * other_lag),
    )


@triton.jit(do_not_specialize=["rows", "candidates"])
def logprob_splits(
    hidden, weight, bias, temperature, targets, tops, totals, moments, sums, chosen,
    rows, vocabulary, depth, candidates, stride_h, stride_w, scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile of rows over one split of the vocabulary, and the logits of targets that lie in it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1).to(tl.int64) * SPLIT
    for begin in range(first, tl.minimum(first + SPLIT, vocabulary), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        inside = (column < vocabulary)[None, :]
        z, _ = logit_tile(
            hidden, weight, bias, temperature, row, row_ok, column, vocabulary, depth, stride_h, stride_w,
            scale, softcap, ROWS, COLUMNS, DEPTH, EVEN, BIASED, CAPPED, TEMPERED,
        )  # fmt: skip
        for candidate in range(candidates):
            target = tl.load(targets + row * candidates + candidate, mask=row_ok, other=-1)
            own = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
            here = (target >= begin) & (target < begin + COLUMNS) & (target < vocabulary)
            tl.store(chosen + row * candidates + candidate, own, mask=here)
        plain += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        tile_top = tl.max(z, 1)
        # Where all are -inf, any finite anchor gives them probability 0.
        shifted = z - tl.where(tile_top == float("-inf"), 0.0, tile_top)[:, None]
        weights = tl.exp(shifted)
        tile_total = tl.sum(weights, 1)
        # The moment of an entry without probability is 0, not 0 times infinity.
        tile_moment = tl.sum(weights * tl.where(shifted < -1e4, -1e4, shifted), 1)
        top, total, moment = joined(top, total, moment, tile_top, tile_total, tile_moment)
    place = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(tops + place, top, mask=row_ok)
    tl.store(totals + place, total, mask=row_ok)
    tl.store(moments + place, moment, mask=row_ok)
    tl.store(sums + place, plain, mask=row_ok)


@triton.jit(do_not_specialize=["rows", "candidates", "splits"])
def logprob_join(
    tops, totals, moments, sums, chosen, targets, logprob, lse, entropy, mean, rows, vocabulary, candidates, splits,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The splits of a row joined in order, and the log-probabilities of its targets."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    place = row
    for _ in range(splits):
        split_top = tl.load(tops + place, mask=row_ok, other=0.0)
        split_total = tl.load(totals + place, mask=row_ok, other=1.0)
        split_moment = tl.load(moments + place, mask=row_ok, other=0.0)
        top, total, moment = joined(top, total, moment, split_top, split_total, split_moment)
        plain += tl.load(sums + place, mask=row_ok, other=0.0)
        place += rows
    anchor = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log(total)
    tl.store(lse + row, log_total + anchor, mask=row_ok)
    tl.store(entropy + row, log_total - moment / total, mask=row_ok)
    tl.store(mean + row, plain / vocabulary, mask=row_ok)
    for candidate in range(candidates):
        at = row * candidates + candidate
        target = tl.load(targets + at, mask=row_ok, other=-1)
        real = (target >= 0) & (target < vocabulary)
        own = tl.load(chosen + at, mask=real, other=float("nan"))
        tl.store(logprob + at, tl.where(target < 0, 0.0, (own - anchor) - log_total), mask=row_ok)


def check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """One sentence for shapes and dtypes that the kernels do not take."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ToolkitError(
            "linear_logprob: hidden and weight must have shapes [T, K] and [V, K] with V >= 1,"
            f" got {list(hidden.shape)} and {list(weight.shape)}."
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ToolkitError(
            f"linear_logprob: the dtypes of hidden, weight and bias must be equal, got {hidden.dtype}, {weight.dtype}"
            f"{'' if bias is None else f' and {bias.dtype}'}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ToolkitError(
            f"linear_logprob: bias must have shape [V] for weight {list(weight.shape)}, got {list(bias.shape)}."
        )


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest of each row and their ids, best first (a NaN before all), the lower id among equals.

    topk promises no order among equals, so it is given keys that have none: the float's bits in an order that
    integers keep, then the id counted down.
    """
    logits = torch.where(logits.isnan(), torch.nan, logits + 0.0)  # one NaN, one zero
    bits = logits.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    found = torch.topk(ordered * (1 << 32) + ids, count, dim=-1).values
    ids = logits.shape[1] - 1 - (found & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def top_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor | None,
    scale: float,
    softcap: float,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits and their ids, from logits of a few rows at a time."""
    values = torch.empty(hidden.shape[0], count, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(hidden.shape[0], count, dtype=torch.int64, device=hidden.device)
    for begin in range(0, hidden.shape[0] if count else 0, 128):
        rows = slice(begin, begin + 128)
        z = linear_triton(hidden[rows], weight, bias).to(torch.float32) * scale
        if softcap > 0.0:
            z = torch.tanh(z / softcap) * softcap
        if temperature is not None:
            z = z / temperature[rows, None]
        values[rows], ids[rows] = largest(z, count)
    return values, ids


def logits_tile(hidden: torch.Tensor, softcap: float, temperature: torch.Tensor | None) -> GemmTile:
    """The tile of the logits, the same in forward and backward."""
    table = tiles.SHAPED_LOGITS if softcap > 0.0 or temperature is not None else tiles.LOGITS
    arch = triton_devices.architecture(hidden.device)
    return table.find(arch, hidden.dtype, row_widths=(hidden.shape[1],))


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    scale: float,
    softcap: float,
    top_k: int,
) -> tuple[torch.Tensor, ...]:
    """``toolkit::linear_logprob`` on a GPU (or on CPU tensors in Triton's interpreter).

    hidden [T, K], weight [V, K], bias [V] or None in float32, bfloat16 or float16; targets [T, C]. Returns logprob
    [T, C], lse, entropy, mean [T], the largest logits and their ids [T, top_k]. A target of V or more gives NaN.
    """
    check(hidden, weight, bias)
    size = logits_tile(hidden, softcap, temperature)
    hidden, matrix, targets = aligned_rows(hidden), aligned_rows(weight), targets.contiguous()
    rows, (vocabulary, depth), candidates = hidden.shape[0], matrix.shape, targets.shape[1]
    heat = None if temperature is None else temperature.to(torch.float32).contiguous()
    shift = None if bias is None else bias.contiguous()
    splits = triton.cdiv(vocabulary, tiles.SPLIT)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=hidden.device)

    logprob, lse, entropy, mean = empty(rows, candidates), empty(rows), empty(rows), empty(rows)
    values, ids = top_logits(hidden, matrix, shift, heat, scale, softcap, top_k)
    if rows == 0:
        return logprob, lse, entropy, mean, values, ids
    parts = [empty(splits, rows) for _ in range(4)]
    chosen = empty(rows, candidates)
    logprob_splits[(triton.cdiv(rows, size.rows), splits)](
        hidden=hidden,
        weight=matrix,
        bias=matrix if shift is None else shift,
        temperature=lse if heat is None else heat,
        targets=targets,
        tops=parts[0],
        totals=parts[1],
        moments=parts[2],
        sums=parts[3],
        chosen=chosen,
        rows=rows,
        vocabulary=vocabulary,
        depth=depth,
        candidates=candidates,
        stride_h=hidden.stride(0),
        stride_w=matrix.stride(0),
        scale=float(scale),
        softcap=float(softcap),
        ROWS=size.rows,
        COLUMNS=size.columns,
        DEPTH=size.depth,
        SPLIT=tiles.SPLIT,
        EVEN=depth % size.depth == 0,
        BIASED=shift is not None,
        CAPPED=softcap > 0.0,
        TEMPERED=heat is not None,
        **size.options(),
    )
    logprob_join[(triton.cdiv(rows, 32),)](
        tops=parts[0],
        totals=parts[1],
        moments=parts[2],
        sums=parts[3],
        chosen=chosen,
        targets=targets,
        logprob=logprob,
        lse=lse,
        entropy=entropy,
        mean=mean,
        rows=rows,
        vocabulary=vocabulary,
        candidates=candidates,
        splits=splits,
        ROWS=32,
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return logprob, lse, entropy, mean, values, ids
