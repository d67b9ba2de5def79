"""The specification of ``joined_linear`` in plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.joined_linear.memory import adjoining


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """``cat([x W_i^T + b_i])``: x ``[..., K]``, weights ``[N_i, K]``, biases ``[N_i]`` or none."""
    weight, bias = adjoining(weights), adjoining(biases)
    if weight is not None and (not biases or bias is not None):
        return F.linear(x, weight, bias)
    shifts: Sequence[Tensor | None] = biases or [None] * len(weights)
    return torch.cat([F.linear(x, weight, shift) for weight, shift in zip(weights, shifts, strict=True)], -1)


def joined_linear_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


def joined_linear_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], need_x: bool, need_weights: bool, need_biases: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx = g W``, ``dW = g^T x`` and ``db = sum g`` of W, the weights as one matrix, and b; an empty tensor for one
    that is not needed."""
    none = x.new_empty(0)
    to_x, to_weights, to_biases = none, none.clone(), none.clone()
    rows = grad.reshape(-1, grad.shape[-1])
    if need_x:
        whole = adjoining(weights)
        to_x = rows.mm(torch.cat(list(weights)) if whole is None else whole).view(x.shape)
    if need_weights:
        to_weights = rows.t().mm(x.reshape(-1, x.shape[-1]))
    if need_biases:
        to_biases = rows.sum(0)
    return to_x, to_weights, to_biases


def joined_linear_backward_fake(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], need_x: bool, need_weights: bool, need_biases: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else none,
        x.new_empty(grad.shape[-1], x.shape[-1]) if need_weights else none.clone(),
        x.new_empty(grad.shape[-1]) if need_biases else none.clone(),
    )
