"""Log-probability of given tokens in Triton; the logits are read once each way and no softmax is stored.

A row is split into blocks of a fixed width, one program per block, so that one row fills a GPU as well as many do; a
second kernel joins a row's blocks. Batch-invariant.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import EXACT, blocks, matrix, part_of_row, power_of_2, tile_of

BLOCK = 4096  # logits that a program sums


@triton.jit
def block_sums(logits, tops, sums, width, stride, BLOCK: tl.constexpr):
    """The largest logit x of a block, and the sum of exp(x - it). A block of nothing but -inf sums to 0."""
    across = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
    top = tl.max(values, 0)
    shifted = values - tl.where(top == float("-inf"), 0.0, top)
    tl.store(tops + program, top)
    # NaN passes through exp, also where the maximum has left it out.
    tl.store(sums + program, tl.sum(tl.exp(shifted), 0))


@triton.jit
def join_blocks(logits, targets, tops, sums, logprob, lse, width, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    of_block = tl.load(tops + row * COUNT + block, mask=block < COUNT, other=float("-inf"))
    top = tl.max(of_block, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.load(sums + row * COUNT + block, mask=block < COUNT, other=0.0)
    log_sum = tl.log(tl.sum(total * tl.exp(of_block - top), 0))
    target = tl.load(targets + row)
    there = (target >= 0) & (target < width)
    own = tl.load(logits + row * stride + target, mask=there, other=float("nan")).to(tl.float32)
    tl.store(lse + row, log_sum + top)
    tl.store(logprob + row, tl.where(target < 0, 0.0, (own - top) - log_sum))


@triton.jit(do_not_specialize=["rows"])
def token_logprob_grad(
    grad_logprob, grad_lse, logits, targets, lse, dlogits, rows, width, stride, stride_d,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(g_lse - g) exp(x - lse) + g onehot, with g = 0 where the target is ignored."""
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    own = tl.load(grad_logprob + row, mask=(row < rows) & (target >= 0), other=0.0).to(tl.float32)
    weight = tl.load(grad_lse + row, mask=row < rows, other=0.0).to(tl.float32) - own
    top = tl.load(lse + row, mask=row < rows, other=0.0)
    values = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(weight == 0.0, 0.0, tl.exp(values - top) * weight) + tl.where(column == target, own, 0.0)
    tl.store(dlogits + row * stride_d + column, result.to(dlogits.dtype.element_ty), mask=inside)


def token_logprob(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``toolkit::token_logprob``: logits [..., V] in float32, bfloat16 or float16; (logprob, lse) in float32.

    A target of V or more gives NaN: there is no error without waiting for the device.
    """
    flat, wanted = matrix("token_logprob", logits), targets.contiguous()
    logprob = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    rows, width = flat.shape
    if rows:
        block = min(BLOCK, power_of_2(width))
        count = blocks(width, block)
        tops = torch.empty(rows * count, dtype=torch.float32, device=logits.device)
        sums = torch.empty(rows * count, dtype=torch.float32, device=logits.device)
        block_sums[(rows * count,)](
            flat, tops, sums, width, flat.stride(0), BLOCK=block, num_warps=max(1, block // 512), **EXACT
        )
        join_blocks[(rows,)](
            flat, wanted, tops, sums, logprob, lse, width, flat.stride(0),
            COUNT=count, BLOCK=power_of_2(count), num_warps=1, **EXACT,
        )  # fmt: skip
    return logprob, lse


def token_logprob_backward(
    grad_logprob: Tensor, grad_lse: Tensor, logits: Tensor, targets: Tensor, lse: Tensor
) -> Tensor:
    """``toolkit::token_logprob_backward``: the gradient to logits, [..., V]."""
    flat = matrix("token_logprob_backward", logits)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if dlogits.numel():
        write_gradient(grad_logprob, grad_lse, flat, targets, lse, dlogits.view(flat.shape))
    return dlogits


def write_gradient(
    grad_logprob: Tensor, grad_lse: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, dlogits: Tensor
) -> None:
    """``token_logprob_backward`` of logits [T, V] into ``dlogits`` [T, V], which may be the logits themselves.

    Both have unit stride along V.
    """
    rows, width = logits.shape
    tile = part_of_row(width, logits.itemsize)
    token_logprob_grad[(blocks(rows, tile.rows) * blocks(width, tile.block),)](
        grad_logprob.contiguous(), grad_lse.contiguous(), logits, targets.contiguous(), lse.contiguous(), dlogits,
        rows, width, logits.stride(0), dlogits.stride(0), **tile.options(),
    )  # fmt: skip
