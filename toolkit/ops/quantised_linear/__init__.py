"""A batch-invariant GEMM with a weight in few bits: the bits of ``linear`` with the dequantised weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.ops.quantised_linear import reference
from toolkit.ops.quantised_linear.formats import FORMATS, Format, find, makers
from toolkit.ops.quantised_linear.packing import PANEL
from toolkit.ops.registry import Op, register

__all__ = [
    "FORMATS", "PANEL", "Format", "dequantise", "dequantise_rows", "find", "makers", "quantised_linear",
    "quantised_linear_group",
]  # fmt: skip

_ROWS = 256  # whose panels are dequantised at once: 16 rows each

_TRITON = "toolkit.ops.quantised_linear.triton"
_BACKWARD: Op[tuple[Tensor, Tensor]] = register(
    "quantised_linear_backward(Tensor grad, Tensor codes, Tensor[] scales, str format, int inputs, bool need_x,"
    " bool need_bias) -> (Tensor, Tensor)",
    reference=reference.quantised_linear_backward,
    fake=reference.quantised_linear_backward_fake,
    triton=f"{_TRITON}.quantised_linear_backward",
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, format, _ = inputs
    ctx.save_for_backward(codes, *scales)  # of x only the size: the weight has no gradient
    ctx.format, ctx.inputs, ctx.biased = format, x.shape[-1], bias is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codes, *scales = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad[0], ctx.biased and ctx.needs_input_grad[3]
    to_x, to_bias = _BACKWARD.gradient(grad, codes, scales, ctx.format, ctx.inputs, need_x, need_bias)
    return to_x if need_x else None, None, [None] * len(scales), to_bias if need_bias else None, None, None


_OP: Op[Tensor] = register(
    "quantised_linear(Tensor x, Tensor codes, Tensor[] scales, Tensor? bias, str format, int outputs) -> Tensor",
    reference=reference.quantised_linear,
    fake=reference.quantised_linear_fake,
    triton=f"{_TRITON}.quantised_linear",
    backward=_gradients,
    setup_context=_save,
)
_GROUP: Op[list[Tensor]] = register(
    "quantised_linear_group(Tensor x, Tensor[] codes, Tensor[] scales, int[] scale_counts, Tensor?[] biases,"
    " str[] formats, int[] outputs) -> Tensor[]",
    reference=reference.quantised_linear_group,
    fake=reference.quantised_linear_group_fake,
    triton=f"{_TRITON}.quantised_linear_group",
)
_DEQUANTISE: Op[Tensor] = register(
    "dequantise(Tensor codes, Tensor[] scales, str format, int outputs, int inputs, ScalarType dtype) -> Tensor",
    reference=reference.dequantise,
    fake=reference.dequantise_fake,
    triton=f"{_TRITON}.dequantise",
)


def quantised_linear(
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    bias: Tensor | None,
    format: str,
    outputs: int,
    *,
    impl: str | None = None,
) -> Tensor:
    """``linear(x, dequantise(codes, scales, format, outputs, K, x.dtype), bias)``, bitwise identical, without the dense
    weight in memory.

    Args:
        x: [..., K]; float32, float64, bfloat16 or float16.
        codes: packed codes of a weight [N, K] (``packing``), in the dtype of the format.
        scales: the format's tensors of scales, zeros and offsets, in the order of its file in ``formats``.
        bias: [N] in x's dtype, or None.
        format: a file of ``formats``: int8, q8_0, int4, nf4, fp8 or q4_k.
        outputs: N.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ToolkitError, RuntimeError: for shapes or dtypes that do not fit, or another format.

    Numerics: those of ``linear``, for any number of rows and threads, forward and gradients. A weight is
    ``((code value - zero) * scale) - offset`` in float32, each step rounded, and then rounded once to x's dtype.
    Gradients to x and bias; codes and scales have none. Saved for backward: codes and scales.
    """
    return _OP.select(impl)(x, codes, list(scales), bias, format, outputs)


def quantised_linear_group(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    formats: Sequence[str],
    outputs: Sequence[int],
    *,
    impl: str | None = None,
) -> list[Tensor]:
    """``[quantised_linear(x, ...) for ...]`` of several weights, bitwise identical, in one parallel section.

    Args:
        x: [..., K].
        codes, scales, biases, formats, outputs: those of ``quantised_linear``, one of each per weight. The op itself
            takes ``scales`` one after the other and ``scale_counts``, how many belong to each weight. No gradient.

    Returns:
        [..., N_i] each.
    """
    flat = [scale for some in scales for scale in some]
    counts = [len(some) for some in scales]
    return _GROUP.select(impl)(x, list(codes), flat, counts, list(biases), list(formats), list(outputs))


def dequantise(
    codes: Tensor,
    scales: Sequence[Tensor],
    format: str,
    outputs: int,
    inputs: int,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str | None = None,
) -> Tensor:
    """The dense weight [outputs, inputs] in ``dtype`` that packed codes and scales stand for.

    Numerics: float32, each operation of ``((code value - zero) * scale) - offset`` rounded, then rounded once to
    ``dtype``. No gradient.
    """
    return _DEQUANTISE.select(impl)(codes, list(scales), format, outputs, inputs, dtype)


def dequantise_rows(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: Sequence[torch.Tensor],
    format: str,
    inputs: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``dequantise(codes, scales, ...)[rows]``, bitwise identical: the rows of an embedding, by their own codes.

    A row costs the panel of 16 that it is of.

    Args:
        rows: [T] int64, from 0 to 16 P - 1.
        codes, scales: packed, of P panels.
        inputs: K.

    Returns:
        [T, K] of dtype.

    Raises:
        IndexError: on CPU, for a row of no panel.
    """
    known, found = find(format), []
    for some in rows.split(_ROWS):
        panels = some // PANEL
        dense = dequantise(
            codes.index_select(0, panels), known.of_panels(scales, panels), format, PANEL * len(some), inputs, dtype
        )
        lanes = torch.arange(len(some), device=rows.device) * PANEL + some % PANEL
        found.append(dense.index_select(0, lanes))
    return torch.cat(found) if found else torch.empty(0, inputs, dtype=dtype, device=codes.device)
