"""Rotary position embedding (Su et al., 2021) and the tables it reads."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import register
from toolkit.ops.rotary import reference


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return (
        _ROTARY(grad, cos, reference.transposed_sin(sin, ctx.interleaved), ctx.interleaved),
        None,
        None,
        None,
    )


_ROTARY = register(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=reference.rotary,
    fake=reference.rotary_fake,
    triton="toolkit.ops.rotary.triton.rotary",
    backward=_backward,
    setup_context=_setup_context,
)
_TABLES = register(
    "rotary_tables(Tensor positions, Tensor inv_freq, float scaling, ScalarType dtype, Tensor? axes=None)"
    " -> (Tensor, Tensor)",
    reference=reference.rotary_tables,
    fake=reference.rotary_tables_fake,
    triton="toolkit.ops.rotary.triton_tables.rotary_tables",
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, impl: str | None = None) -> Tensor:
    """x with pairs of the first R of its D channels rotated by the token's angles; channels R to D pass through.

    Half layout, pairs (i, i + R/2)::

        y[i]       = x[i] cos[i] - x[i + R/2] sin[i]
        y[i + R/2] = x[i + R/2] cos[i + R/2] + x[i] sin[i + R/2]

    Interleaved layout, pairs (2i, 2i + 1), reads only the first R/2 entries, one per pair: models with this layout
    repeat each entry for both members of its pair, so ``cos[:, :R/2].repeat_interleave(2, -1)`` is the table they
    multiply with::

        y[2i]     = x[2i] cos[i] - x[2i + 1] sin[i]
        y[2i + 1] = x[2i + 1] cos[i] + x[2i] sin[i]

    Args:
        x: [T, H, D], any strides in the first two dimensions (a view of a projection's rows costs no copy); float32,
            float64, bfloat16 or float16.
        cos, sin: [T, R], R even and <= D, as ``rotary_tables`` returns them: the R/2 frequencies, twice.
        interleaved: the layout.

    Returns:
        [T, H, D] in x's dtype, contiguous.

    Raises:
        ToolkitError: for tables of other shapes, other dtypes; on Triton for float64.

    Numerics: computed in float32 (float64 for float64) and rounded once. Every multiplication and addition is rounded
    separately, so float32 is bitwise identical to eager torch. Gradient to x only, by the transposed map (the rotation
    by minus the angle, for tables of one angle per pair). Saved for backward: cos and sin.
    Source: Su et al., "RoFormer" (2021).
    """
    rotated = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape != (x.shape[0], rotated) or rotated % 2 or rotated > x.shape[-1]:
        raise ToolkitError(
            f"cos and sin must have shape [{x.shape[0]}, R] for x of shape {list(x.shape)}, R even and"
            f" <= {x.shape[-1]}, got {list(cos.shape)} and {list(sin.shape)}."
        )
    return _ROTARY.select(impl)(x, cos, sin, interleaved)


def rotary_tables(
    positions: Tensor,
    inv_freq: Tensor,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    axes: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``scaling * cos(position * inv_freq)`` and the same of sin, the F frequencies twice: two tensors [..., 2F].

    Args:
        positions: [...] int64; with ``axes`` [A, ...], a token's position along each of A axes (time, height, width).
        inv_freq: [F], radians per position.
        scaling: factor of both tables.
        dtype: of the tables.
        axes: [F] int64, below A; the axis whose position frequency f uses. The sections of Qwen2-VL are
            ``torch.arange(A).repeat_interleave(sections)``, and Qwen3-VL's interleaved ones 0, 1, 2, 0, 1, 2, ... then
            0.

    Returns:
        cos and sin, [..., 2F] in ``dtype``.

    Raises:
        ToolkitError: for axes of another shape or dtype, or positions without a first dimension for them. An axis that
            positions do not have is an error of the native CPU kernel and of torch, and NaN on Triton.

    Numerics: the angle is the float32 product, as models are trained with, unless ``dtype`` is float64; the result is
    cast to ``dtype``. Batch-invariant. No gradient.
    """
    if axes is not None and (axes.shape != inv_freq.shape or axes.dtype != torch.int64 or not positions.dim()):
        raise ToolkitError(
            f"axes must be int64 {list(inv_freq.shape)} and positions [A, ...], got axes {axes.dtype} of shape"
            f" {list(axes.shape)} and positions {list(positions.shape)}."
        )
    return _TABLES.select(impl)(positions, inv_freq, scaling, dtype, axes)
