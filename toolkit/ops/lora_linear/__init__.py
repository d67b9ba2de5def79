"""A linear layer with low-rank adapters (Hu et al., 2021) chosen row by row: many adapters in one batch."""

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
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[1:4]):
        gradients = _BACKWARD(grad, *ctx.saved_tensors, *needs[1:4])
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
        raise ToolkitError(f"a has shape {list(a.shape)}; x of shape {list(x.shape)} needs [L, R, {x.shape[-1]}].")
    expected = [a.shape[0], base.shape[-1], a.shape[1]]
    if list(b.shape) != expected:
        raise ToolkitError(f"b has shape {list(b.shape)}; with a of shape {list(a.shape)} it must be {expected}.")
    if scaling.shape != a.shape[:1]:
        raise ToolkitError(f"scaling has shape {list(scaling.shape)}; {a.shape[0]} adapters need [{a.shape[0]}].")
    if scaling.requires_grad:
        raise ToolkitError("scaling requires a gradient; it is a constant of the adapters: scale b instead.")
    if not scaling.is_floating_point():
        raise ToolkitError(f"scaling has dtype {scaling.dtype}; allowed are floating-point dtypes.")
    if adapters.shape != x.shape[:-1] or adapters.dtype != torch.int64:
        raise ToolkitError(
            f"adapters are {adapters.dtype} of shape {list(adapters.shape)}; x of shape {list(x.shape)} needs int64 "
            f"{list(x.shape[:-1])}."
        )
    if base.shape[:-1] != x.shape[:-1]:
        raise ToolkitError(f"base has shape {list(base.shape)}; x of shape {list(x.shape)} needs as many rows.")
    if not base.dtype == x.dtype == a.dtype == b.dtype:
        raise ToolkitError(
            f"base, x, a, b have dtypes {base.dtype}, {x.dtype}, {a.dtype}, {b.dtype}; they must be equal."
        )


def lora_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, adapters: Tensor, *, impl: str | None = None
) -> Tensor:
    """``base[t] + scaling[l] * (x[t] A_l^T) B_l^T`` with ``l = adapters[t]``; ``base[t]`` where l is negative.

    The part of ``lora_linear`` beside the base product, for bases that something else computes (quantised weights).
    base: [..., N]; the other arguments, numerics, gradients and errors are ``lora_linear``'s. Saved for backward: all
    inputs but base.
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

    x: [..., K]; weight: [N, K]; bias: [N] or None; a: [L, R, K]; b: [L, N, R]; y: [..., N]; all of one dtype: float32,
    float64, bfloat16 or float16. scaling: [L], floating point. adapters: int64 [...], 0 to L - 1, negative: none.
    Adapters of different ranks are padded to R with rows of zeros.

    It is ``linear`` (``fast``: the vendor's product, as in the fast tier) followed by ``lora_add``, which reads that
    sum once and adds to it in float32. Keeping the base product an op of its own is what gives a row without adapter
    exactly the bits of ``linear``, at the price of one more rounding of the sum in 16-bit dtypes. Everything between
    x and that addition is float32 (float64 for float64).

    Numerics: a row's bits depend on the row and its adapter, whatever adapters its neighbours use; rows are grouped
    by adapter with a stable sort. Gradients to x, weight, bias, a and b; those of a and b sum an adapter's rows in
    their order, in blocks of a fixed number of rows, so they are the same from run to run. Saved for backward: the
    inputs; the low-rank products are computed again.

    Errors: ToolkitError for shapes and dtypes that do not fit and for a scaling that requires a gradient. An adapter of
    L or more is an IndexError on CPU; on CUDA, where nothing is read back, its rows are NaN.
    """
    if fast and impl is None:
        base = F.linear(x, weight, bias)
    else:
        base = linear(x, weight, bias, impl=impl)
    return lora_add(base, x, a, b, scaling, adapters, impl=impl)
