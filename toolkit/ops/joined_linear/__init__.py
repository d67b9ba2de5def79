"""Linear layers of one input as one cuBLAS / MKL GEMM, where their weights lie one after another in memory."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from toolkit.ops.joined_linear import reference
from toolkit.ops.joined_linear.memory import adjoining, lie_together, placed_together
from toolkit.ops.registry import register

__all__ = ["adjoining", "joined_linear", "lie_together", "placed_together"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases = inputs
    ctx.has_biases = bool(biases)
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    need_x, need_weights, need_biases = ctx.needs_input_grad
    dx, dw, db = _BACKWARD.gradient(grad, x, weights, need_x, any(need_weights), any(need_biases))
    sizes = [len(weight) for weight in weights]

    def given(gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        if not any(needed):
            return [None] * len(needed)
        return [one if need else None for one, need in zip(gradient.split(sizes), needed, strict=True)]

    return dx if need_x else None, given(dw, need_weights), given(db, need_biases) if ctx.has_biases else []


_BACKWARD = register(
    "joined_linear_backward(Tensor grad, Tensor x, Tensor[] weights, bool need_x, bool need_weights, bool need_biases)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.joined_linear_backward,
    fake=reference.joined_linear_backward_fake,
    triton="toolkit.ops.joined_linear.reference.joined_linear_backward",
)
_OP = register(
    "joined_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    reference=reference.joined_linear,
    fake=reference.joined_linear_fake,
    triton="toolkit.ops.joined_linear.reference.joined_linear",  # cuBLAS, by torch
    backward=_backward,
    setup_context=_setup_context,
)


def joined_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, impl: str | None = None
) -> Tensor:
    """``cat([x W_i^T + b_i for W_i, b_i in zip(weights, biases)], -1)``, by cuBLAS or MKL.

    One GEMM with the weights as one matrix [sum N_i, K] where they, and the biases, lie one after another in memory
    (``placed_together``), which every call looks at; else one GEMM for each weight and a copy.

    Args:
        x: [..., K].
        weights: [N_i, K] each, x's dtype.
        biases: [N_i] each, or none at all.
        impl: None (by device), "reference", "cpu" or "triton" (cuBLAS).

    Returns:
        [..., sum N_i] in x's dtype. ``split`` gives the layers' outputs, without a copy.

    Raises:
        RuntimeError: for shapes or dtypes that do not fit.

    Numerics: those of ``torch.nn.functional.linear``, and so not batch-invariant. The gradient of x is one GEMM, and
    that of all weights another: gradients of weights are views of one tensor. Saved for backward: x and weights.
    """
    return _OP.select(impl)(x, list(weights), list(biases))
