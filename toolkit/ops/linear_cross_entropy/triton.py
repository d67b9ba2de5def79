"""The cross-entropy of a head on a GPU in three GEMMs, a part of the rows at a time: cuBLAS's, the fast mode's.

A part's logits are computed once; from them its loss, and in their place their gradients; from these its rows of d
hidden, and what it adds to d weight in float32. In bitwise mode a head on a GPU has dense logits and is not here.

Of T rows, V tokens, hidden size K and parts of P rows: 6 T V K FLOPs and 7 T / P launches, 28 at T = 8192. A logit is
written twice and read four times. d weight is read and written once a part, 8 T V K / P bytes: with P = 2048 about 256
FLOPs a byte of it in its own GEMM and 768 in the three, where an H200 needs some 180. ``linear_logprob`` and its
backward are 8 T V K FLOPs in four GEMMs, and 59 launches at V = 151,936.

Rows that do not count are multiplied as zeros: only the device knows how many there are.
"""

import torch
from torch import Tensor

from toolkit.ops.linear.cuda_backward import multiply_in_float32
from toolkit.ops.linear_cross_entropy.reference import row_factors
from toolkit.ops.linear_logprob import tiles
from toolkit.ops.linear_logprob.triton import check, linear_logprob
from toolkit.ops.tiles import ALIGNMENT
from toolkit.ops.token_logprob.triton import token_logprob, write_gradient
from toolkit.ops.triton_devices import check_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weights: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """``toolkit::linear_cross_entropy`` on a GPU (or on CPU tensors in Triton's interpreter).

    16-bit logits and their gradients are rounded to their dtype; sums are float32. A target of V or more gives NaN.
    """
    check(hidden, weight, bias)
    check_dtype("linear_cross_entropy", hidden.dtype)
    chosen, weights = row_factors(hidden, targets, row_weights)
    need_bias = need_bias and bias is not None
    if not (need_hidden or need_weight or need_bias):
        logprob = linear_logprob(hidden, weight, bias, chosen, None, 1.0, 0.0, 0)[0][:, 0]
        none = weights.new_empty(0)
        return -(logprob * weights).sum(), none, none.clone(), none.clone()

    def zeros(wanted: bool, *shape: int) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=torch.float32, device=hidden.device)

    rows, (vocabulary, depth) = hidden.shape[0], weight.shape
    dh, dw, db = zeros(need_hidden, rows, depth), zeros(need_weight, *weight.shape), zeros(need_bias, vocabulary)
    logprob = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    pitch = -(-vocabulary // ALIGNMENT) * ALIGNMENT  # aligned rows, which cuBLAS's fast kernels ask for
    held = torch.empty(min(tiles.PART, rows), pitch, dtype=hidden.dtype, device=hidden.device)
    for begin in range(0, rows, tiles.PART):
        part = slice(begin, begin + tiles.PART)
        target, factor = chosen[part, 0], -weights[part]
        # Zero times what a row holds that does not count, which may be NaN, would not be zero in d weight.
        x = torch.where((target >= 0)[:, None], hidden[part], 0.0)
        z = held[: x.shape[0], :vocabulary]
        torch.mm(x, weight.t(), out=z) if bias is None else torch.addmm(bias, x, weight.t(), out=z)
        logprob[part], lse = token_logprob(z, target)
        write_gradient(factor, torch.zeros_like(lse), z, target, lse, z)
        if need_hidden:
            multiply_in_float32(z, weight, dh[part], add=False)
        if need_weight:
            multiply_in_float32(z.t(), x, dw, add=begin > 0)
        if need_bias:
            db += z.sum(0, dtype=torch.float32)
    return -(logprob * weights).sum(), dh, dw, db
