"""Rows by index, where an index may repeat: the gradient is summed in a fixed order, on every device."""

from typing import Any

import torch
from torch import Tensor

from toolkit.ops.transforms import first_derivative_only, transformed


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.count, *grad.shape[1:])
        if rows.numel():
            order = rows.argsort(stable=True)
            ranked = rows[order]
            first = torch.searchsorted(ranked, ranked)  # where the run of equal rows begins
            turn = torch.arange(len(rows), device=rows.device) - first
            # Within a turn no row occurs twice, so no two additions race.
            for at in range(int(turn.max()) + 1):
                now = order[turn == at]
                total[rows[now]] += grad[now]
        (total,) = first_derivative_only("take_rows", [total], [grad])
        return total, None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, whose gradient is deterministic.

    Args:
        x: [T, ...].
        rows: [N] int64 from 0 to T - 1; may repeat.

    Returns:
        [N, ...] in x's dtype.

    Numerics: the gradient of a row is the sum over its repetitions in the order of ``rows``, bitwise identical every
    time, which ``x[rows]`` does not guarantee (its backward adds atomically). Takes as many steps as the most frequent
    row has repetitions.
    """
    if transformed():
        return x[rows]
    taken: Tensor = _TakeRows.apply(x, rows)  # type: ignore[no-untyped-call]
    return taken
