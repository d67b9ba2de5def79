"""Low-rank adapters chosen row by row, in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.linear.reference import linear as linear_reference
from toolkit.ops.rowwise import upcast


def _rows_of(adapters: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """Each adapter that has rows, with its rows, ascending."""
    if adapters.device.type == "cpu" and adapters.numel() and int(adapters.max()) >= count:
        raise IndexError(f"adapters must be negative or 0 to {count - 1}, got {int(adapters.max())}.")
    used = [index for index in adapters.unique().tolist() if index >= 0]
    return [(index, (adapters == index).nonzero().squeeze(-1)) for index in used]


def lora_add(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor) -> Tensor:
    """base [T, N] + scaling_l (x A_l^T) B_l^T: x [T, K], a [L, R, K], b [L, N, R], scaling [L], adapters [T].

    In float32 (float64 for float64) from x on, rounded once. Rows of a negative adapter are base's. Differentiable.
    """
    y = upcast(base)
    for index, rows in _rows_of(adapters, a.shape[0]):
        low = linear_reference(upcast(x[rows]), upcast(a[index])) * scaling[index].to(y.dtype)
        y = y.index_copy(0, rows, y[rows] + linear_reference(low, upcast(b[index])))
    return y.to(base.dtype) if y is not base else base.clone()


def lora_add_backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor,
    need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, a and b; an empty tensor for one that is not needed.

    With ``u = scaling_l g B_l`` and ``h = scaling_l x A_l^T``: ``dx = u A_l``, ``dA_l = u^T x``, ``dB_l = g^T h``, sums
    over the rows of adapter l.
    """
    none = x.new_empty(0)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need_x else none
    da = torch.zeros(a.shape, dtype=a.dtype, device=a.device) if need_a else none.clone()
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device) if need_b else none.clone()
    for index, rows in _rows_of(adapters, a.shape[0]):
        g, values, first, second = (upcast(t) for t in (grad[rows], x[rows], a[index], b[index]))
        factor = scaling[index].to(g.dtype)
        up = factor * (g @ second)
        if need_x:
            dx[rows] = (up @ first).to(dx.dtype)
        if need_a:
            da[index] = (up.T @ values).to(da.dtype)
        if need_b:
            db[index] = (g.T @ (factor * (values @ first.T))).to(db.dtype)
    return dx, da, db


def lora_add_fake(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


def lora_add_backward_fake(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor,
    need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def like(t: Tensor, needed: bool) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else x.new_empty(0)

    return like(x, need_x), like(a, need_a), like(b, need_b)
