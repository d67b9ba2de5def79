"""Backward of linear_logprob in Triton and cuBLAS, a chunk of the vocabulary at a time.

Per chunk of fixed width: one kernel computes the logits again, tile by tile as the forward did, and from them their
gradients dz; one owns tiles of d hidden and adds the chunk's part, chunks in order, batch-invariant as ``linear``'s
gradient of x; d weight is cuBLAS's, as ``linear``'s is, and summed over rows whole, so that nothing is added up between
chunks. No atomics. Rows without any gradient are sorted behind the others on the device: only the GEMM of d weight
visits them, as zeros. Gradients to the logits are rounded to the dtype of hidden, as a head's are.

Of T rows, V tokens, hidden size K and chunks of C columns in a dtype of b bytes: 6 T V K FLOPs in three GEMMs (logits,
d hidden, d weight), 3 V / C launches, 57 at V = 151,936. dz is written once and read twice, 3 b T V bytes, and held T C
numbers at a time; d hidden is added up in float32, 8 T K V / C bytes of traffic, so that C = 8192 leaves it at
hundreds of FLOPs a byte. Chunks of 4,096 columns and a Triton kernel for d weight took 114 launches, whose stores of dz
were 64 of two bytes a thread.
"""

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.linear.triton import aligned_rows, grouped_tile
from toolkit.ops.linear_logprob import tiles
from toolkit.ops.linear_logprob.triton import check, logit_tile, logits_tile


@triton.jit(do_not_specialize=["candidates", "begin"])
def logit_gradients(
    hidden, weight, bias, temperature, targets, lse, entropy, grad_logprob, grad_lse, grad_entropy, grad_mean,
    order, count, dz, begin, width, vocabulary, depth, candidates, stride_h, stride_w, stride_z, scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """dz[place, v - begin]: gradients to the products of a tile of rows with ``width`` columns from ``begin`` on."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    real = tl.load(count)
    if first >= real:
        return
    place = first + tl.arange(0, ROWS)
    row_ok = place < real
    row = tl.load(order + place, mask=row_ok, other=0)
    column = begin + tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    z, slope = logit_tile(
        hidden, weight, bias, temperature, row, row_ok, column, vocabulary, depth, stride_h, stride_w, scale, softcap,
        ROWS, COLUMNS, DEPTH, EVEN, BIASED, CAPPED, TEMPERED,
    )  # fmt: skip
    by_entropy = tl.load(grad_entropy + row, mask=row_ok, other=0.0)
    factor = tl.load(grad_lse + row, mask=row_ok, other=0.0)
    for candidate in range(candidates):
        at = row * candidates + candidate
        target = tl.load(targets + at, mask=row_ok, other=-1)
        factor -= tl.load(grad_logprob + at, mask=target >= 0, other=0.0)
    log_p = z - tl.load(lse + row, mask=row_ok, other=0.0)[:, None]
    entropy_term = tl.where(log_p < -1e4, -1e4, log_p) + tl.load(entropy + row, mask=row_ok, other=0.0)[:, None]
    # Without a gradient the entropy term must stay out: that of a row without probabilities is NaN.
    spread = tl.where((by_entropy == 0.0)[:, None], 0.0, by_entropy[:, None] * entropy_term)
    result = tl.exp(log_p) * (factor[:, None] - spread)
    result += (tl.load(grad_mean + row, mask=row_ok, other=0.0) / vocabulary)[:, None]
    for candidate in range(candidates):
        at = row * candidates + candidate
        target = tl.load(targets + at, mask=row_ok, other=-1)
        by_target = tl.load(grad_logprob + at, mask=target >= 0, other=0.0)
        result += tl.where(column[None, :] == target[:, None], by_target[:, None], 0.0)
    result = result * slope
    if EVEN:
        # Counted from the chunk's first column: a difference of columns hides from the compiler that they are aligned.
        within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    else:  # whose masks take the registers that a second index would
        within = column - begin
    at = place[:, None] * stride_z + within[None, :]
    tl.store(dz + at, result.to(dz.dtype.element_ty), mask=row_ok[:, None] & (within < width)[None, :])


@triton.jit(do_not_specialize=["begin", "rows"])
def hidden_gradient(
    dz, weight, order, count, total, dx, begin, width, depth, rows, stride_z, stride_w, stride_t,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """total[place, k] (+)= sum over the chunk, in order, of dz[place, v] * weight[v, k]; the LAST one writes dx."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(depth, COLUMNS), GROUP)
    first = row_tile.to(tl.int64) * ROWS
    real = tl.load(count)
    if first >= real:
        return
    place = first + tl.arange(0, ROWS)
    row_ok = place < real
    k = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    mask = row_ok[:, None] & (k < depth)[None, :]
    v = tl.arange(0, DEPTH)
    z_tile = dz + place[:, None] * stride_z + v[None, :]
    w_tile = weight + (begin + v.to(tl.int64))[:, None] * stride_w + k[None, :]
    k_ok = (k < depth)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            left = tl.load(z_tile, mask=row_ok[:, None], other=0.0)
            right = tl.load(w_tile, mask=k_ok, other=0.0)
        else:
            left = tl.load(z_tile, mask=row_ok[:, None] & (v < width - start)[None, :], other=0.0)
            right = tl.load(w_tile, mask=(v < width - start)[:, None] & k_ok, other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        z_tile += DEPTH
        w_tile += stride_w.to(tl.int64) * DEPTH
    at = total + place[:, None] * stride_t + k[None, :]
    if not FIRST:
        acc += tl.load(at, mask=mask, other=0.0)
    if LAST:
        row = tl.load(order + place, mask=row_ok, other=0)
        tl.store(dx + row[:, None] * depth + k[None, :], acc.to(dx.dtype.element_ty), mask=mask)
    else:
        tl.store(at, acc, mask=mask)


def linear_logprob_backward(
    grad_logprob: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_mean: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    scale: float,
    softcap: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``toolkit::linear_logprob_backward``: gradients to hidden, weight, bias; empty where one is not needed."""
    check(hidden, weight, bias)
    arch = triton_devices.architecture(hidden.device)
    hidden, matrix, targets = aligned_rows(hidden), aligned_rows(weight), targets.contiguous()
    rows, (vocabulary, depth), candidates = hidden.shape[0], matrix.shape, targets.shape[1]
    gradients = [g.to(torch.float32).contiguous() for g in (grad_logprob, grad_lse, grad_entropy, grad_mean)]
    heat = None if temperature is None else temperature.to(torch.float32).contiguous()
    shift = None if bias is None else bias.contiguous()
    passes = ((gradients[0] != 0) & (targets >= 0)).any(-1)
    for gradient in gradients[1:]:
        passes = passes | (gradient != 0)
    order = torch.sort(passes.logical_not().to(torch.int8), stable=True).indices
    count = passes.sum().reshape(1)
    counted = (torch.arange(rows, device=hidden.device) < count)[:, None]

    none = hidden.new_empty(0)
    dx = torch.zeros(rows, depth, dtype=hidden.dtype, device=hidden.device) if need_hidden else none
    dw = torch.empty(vocabulary, depth, dtype=weight.dtype, device=weight.device) if need_weight else none.clone()
    with_bias = need_bias and bias is not None
    db = torch.empty(vocabulary, dtype=hidden.dtype, device=hidden.device) if with_bias else none.clone()
    if rows == 0:
        return dx, dw.zero_(), db.zero_()
    pitch = min(tiles.CHUNK, -(-vocabulary // 16) * 16)  # aligned rows
    # Rows behind those with a gradient stay zeros, which the weight's and the bias' gradients add.
    dz = torch.zeros(rows, pitch, dtype=hidden.dtype, device=hidden.device)
    several = dx.numel() > 0 and vocabulary > pitch
    total = torch.empty(rows if several else 0, depth, dtype=torch.float32, device=hidden.device)
    size = logits_tile(hidden, softcap, temperature)
    choice = tiles.HIDDEN.find(arch, hidden.dtype, row_widths=(depth,))
    # In the order of dz. Zero times what a row without gradient holds, which may be NaN, would not be zero.
    rows_of_dz = torch.where(counted, hidden.index_select(0, order), 0.0) if dw.numel() else none
    for begin in range(0, vocabulary, pitch):
        width = min(pitch, vocabulary - begin)
        logit_gradients[(triton.cdiv(rows, size.rows), triton.cdiv(width, size.columns))](
            hidden=hidden,
            weight=matrix,
            bias=matrix if shift is None else shift,
            temperature=lse if heat is None else heat,
            targets=targets,
            lse=lse.contiguous(),
            entropy=entropy.contiguous(),
            grad_logprob=gradients[0],
            grad_lse=gradients[1],
            grad_entropy=gradients[2],
            grad_mean=gradients[3],
            order=order,
            count=count,
            dz=dz,
            begin=begin,
            width=width,
            vocabulary=vocabulary,
            depth=depth,
            candidates=candidates,
            stride_h=hidden.stride(0),
            stride_w=matrix.stride(0),
            stride_z=dz.stride(0),
            scale=float(scale),
            softcap=float(softcap),
            ROWS=size.rows,
            COLUMNS=size.columns,
            DEPTH=size.depth,
            EVEN=depth % size.depth == 0,
            BIASED=shift is not None,
            CAPPED=softcap > 0.0,
            TEMPERED=heat is not None,
            **size.options(),
        )
        if dx.numel() > 0:
            hidden_gradient[(triton.cdiv(rows, choice.rows) * triton.cdiv(depth, choice.columns),)](
                dz=dz,
                weight=matrix,
                order=order,
                count=count,
                total=total,
                dx=dx,
                begin=begin,
                width=width,
                depth=depth,
                rows=rows,
                stride_z=dz.stride(0),
                stride_w=matrix.stride(0),
                stride_t=total.stride(0),
                ROWS=choice.rows,
                COLUMNS=choice.columns,
                DEPTH=choice.depth,
                GROUP=8,
                EVEN=width % choice.depth == 0,
                FIRST=begin == 0,
                LAST=begin + width == vocabulary,
                **choice.options(),
            )
        chunk, part = slice(begin, begin + width), dz[:, :width]
        if dw.numel() > 0:
            torch.mm(part.t(), rows_of_dz, out=dw[chunk])
        if with_bias:
            db[chunk] = part.sum(0, dtype=torch.float32)
    return dx, dw, db
