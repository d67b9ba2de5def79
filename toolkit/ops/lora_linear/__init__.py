"""A linear layer with low-rank adapters (Hu et al., 2021) chosen row by row: many adapters in one batch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear import linear
from toolkit.ops.lora_linear import reference
from toolkit.ops.registry import register

__all__ = ["lora_add", "lora_linear"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    gradients: Sequence[Tensor | None] = (None, None, None)
    if any(needs[1:4]):
        gradients = _BACKWARD.gradient(grad, *ctx.saved_tensors, *needs[1:4])
    return grad, *(gradient if need else None for gradient, need in zip(gradients, needs[1:4])), None, None


_BACKWARD = register(
    "lora_add_backward(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor scaling, Tensor adapters,"
    " bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    reference=reference.lora_add_backward,
    fake=reference.lora_add_backward_fake,
    triton="toolkit.ops.lora_linear.triton_backward.lora_add_backward",
)
_FORWARD = register(
    "lora_add(Tensor base, Tensor x, Tensor a, Tensor b, Tensor scaling, Tensor adapters) -> Tensor",
    reference=reference.lora_add,
    fake=reference.lora_add_fake,
    triton="toolkit.ops.lora_linear.triton.lora_add",
    backward=_backward,
    setup_context=_setup_context,
)


def _check(base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor) -> None:
    """ToolkitError, in one sentence, for arguments that do not fit."""
    if a.dim() != 3 or a.shape[-1] != x.shape[-1]:
        raise ToolkitError(
            f"a must have shape [L, R, {x.shape[-1]}] for x of shape {list(x.shape)}, got {list(a.shape)}."
        )
    expected = [a.shape[0], base.shape[-1], a.shape[1]]
    if list(b.shape) != expected:
        raise ToolkitError(f"b must have shape {expected} for a of shape {list(a.shape)}, got {list(b.shape)}.")
    if scaling.shape != a.shape[:1]:
        raise ToolkitError(
            f"scaling must have shape [{a.shape[0]}] for {a.shape[0]} adapters, got {list(scaling.shape)}."
        )
    if scaling.requires_grad:
        raise ToolkitError(
            "scaling must not require a gradient, got requires_grad=True; it is a constant: scale b instead."
        )
    if not scaling.is_floating_point():
        raise ToolkitError(f"scaling must have a floating-point dtype, got {scaling.dtype}.")
    if adapters.shape != x.shape[:-1] or adapters.dtype != torch.int64:
        raise ToolkitError(
            f"adapters must be int64 {list(x.shape[:-1])} for x of shape {list(x.shape)}, got {adapters.dtype} of shape"
            f" {list(adapters.shape)}."
        )
    if base.shape[:-1] != x.shape[:-1]:
        raise ToolkitError(f"base must have as many rows as x of shape {list(x.shape)}, got {list(base.shape)}.")
    if not base.dtype == x.dtype == a.dtype == b.dtype:
        raise ToolkitError(
            f"The dtypes of base, x, a, b must be equal, got {base.dtype}, {x.dtype}, {a.dtype}, {b.dtype}."
        )


def lora_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor, *, impl: str | None = None
) -> Tensor:
    """``base[t] + scaling[l] * (x[t] A_l^T) B_l^T`` with ``l = adapters[t]``; ``base[t]`` where l is negative.

    The part of ``lora_linear`` beside the base GEMM, for a base that something else computes (quantized weights).

    Args:
        base: [..., N].
        x, a, b, scaling, adapters: as for ``lora_linear``.

    Returns:
        [..., N] in base's dtype.

    Numerics, gradients and errors are those of ``lora_linear``. Saved for backward: all inputs but base.
    """
    _check(base, x, a, b, scaling, adapters)
    rows = adapters.numel()
    arguments = (base.reshape(rows, base.shape[-1]), x.reshape(rows, x.shape[-1]), a, b, scaling, adapters.reshape(-1))
    return _FORWARD.select(impl)(*arguments).view(base.shape)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: Tensor,
    adapters: Tensor,
    *,
    fast: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``y[t] = x[t] W^T + bias + scaling[l] * (x[t] A_l^T) B_l^T`` with ``l = adapters[t]``, the adapter of row t.

    Args:
        x: [..., K]; float32, float64, bfloat16 or float16, as weight, bias, a and b.
        weight: [N, K].
        bias: [N] or None.
        a: [L, R, K]. Adapters of different ranks are padded to R with rows of zeros.
        b: [L, N, R].
        scaling: [L], floating point, a constant.
        adapters: [...] int64, 0 to L - 1; negative: no adapter.
        fast: the base GEMM is cuBLAS / MKL's, as in numerics mode "fast".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ToolkitError: for shapes and dtypes that do not fit, and for a scaling that requires a gradient.
        IndexError: on CPU for an adapter >= L; on CUDA, where nothing is read back, its rows are NaN.

    Numerics: ``linear`` (with ``fast`` cuBLAS / MKL) followed by ``lora_add``, which reads that sum once and adds to it
    in float32. With the base GEMM as a separate op a row without adapter is bitwise identical to ``linear``; the cost
    is one more rounding of the sum in 16-bit dtypes. Everything between x and that addition is float32 (float64 for
    float64). Batch-invariant, with any adapters in neighbouring rows: rows are grouped by adapter with a stable sort.
    Gradients of a and b sum an adapter's rows in their order, in blocks of a fixed number of rows, so they are
    deterministic.
    Saved for backward: the inputs; the low-rank GEMMs are recomputed.
    Source: Hu et al., "LoRA" (2021).
    """
    if fast and impl is None:
        base = F.linear(x, weight, bias)
    else:
        base = linear(x, weight, bias, impl=impl)
    return lora_add(base, x, a, b, scaling, adapters, impl=impl)
