"""Short depthwise causal convolutions over a prefix tree of segments, as linear-attention layers use them."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.causal_conv import reference
from toolkit.ops.registry import Op, register, register_differentiable
from toolkit.ops.rowwise import compute_dtype

__all__ = ["causal_conv", "causal_conv_paged"]

WIDTHS = range(2, 9)
ACTIVATIONS = (None, "silu")


_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor query_offsets, Tensor past, Tensor? tails,"
    " str? activation) -> Tensor",
    "causal_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor query_offsets, Tensor past,"
    " Tensor? tails, str? activation) -> (Tensor, Tensor, Tensor, Tensor)",
    gradients=("x", "weight", "bias", "tails"),
    reference=reference,
    triton="toolkit.ops.causal_conv.triton",
    triton_backward="toolkit.ops.causal_conv.triton_backward",
)
_PAGED = register(
    "causal_conv_paged(Tensor x, Tensor weight, Tensor? bias, Tensor query_offsets, Tensor load_blocks,"
    " Tensor store_rows, Tensor store_blocks, Tensor(a!) tails, str? activation) -> Tensor",
    reference=reference.causal_conv_paged,
    fake=reference.causal_conv_paged_fake,
    triton="toolkit.ops.causal_conv.triton.causal_conv_paged",
)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tensor | None, activation: str | None) -> None:
    """ToolkitError, in one sentence, for arguments that do not fit."""
    compute = compute_dtype(x)
    if x.dim() != 2:
        raise ToolkitError(f"x must have shape [T, C], got {list(x.shape)}.")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] not in WIDTHS:
        raise ToolkitError(
            f"weight must have shape [{channels}, W] for x of shape {list(x.shape)}, {WIDTHS[0]} <= W <= {WIDTHS[-1]},"
            f" got {list(weight.shape)}."
        )
    if bias is not None and list(bias.shape) != [channels]:
        raise ToolkitError(f"bias must have shape [{channels}], got {list(bias.shape)}.")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and not parameter.is_floating_point():
            raise ToolkitError(f"{name} must have a floating-point dtype, got {parameter.dtype}.")
    held = [weight.shape[1] - 1, channels]
    if tails is not None and (
        tails.dim() != 3 or list(tails.shape[1:]) != held or tails.dtype not in (x.dtype, compute)
    ):
        raise ToolkitError(
            f"tails must have shape {['N', *held]} and dtype {x.dtype} or {compute}, got {list(tails.shape)} and"
            f" {tails.dtype}."
        )
    if activation not in ACTIVATIONS:
        raise ToolkitError(must_be_one_of("activation", activation, map(str, ACTIVATIONS)))


def _check_indices(query_offsets: Tensor, **others: tuple[Tensor, list[int]]) -> None:
    if query_offsets.dim() != 1 or not query_offsets.shape[0] or query_offsets.dtype != torch.int64:
        raise ToolkitError(
            f"query_offsets must be int64 [S + 1], got {query_offsets.dtype} of shape {list(query_offsets.shape)}."
        )
    for name, (x, shape) in others.items():
        if list(x.shape) != shape or x.dtype != torch.int64:
            raise ToolkitError(f"{name} must be int64 of shape {shape}, got {x.dtype} of shape {list(x.shape)}.")


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_offsets: Tensor,
    past: Tensor,
    tails: Tensor | None = None,
    activation: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``y_t[c] = act(bias[c] + sum_{i<W} weight[c, i] x_{t-W+1+i}[c])`` over a prefix tree of segments: y [T, C].

    Args:
        x: [T, C]; float32, float64, bfloat16 or float16.
        weight: [C, W], W from 2 to 8; any floating-point dtype.
        bias: [C] or None; any floating-point dtype.
        query_offsets: [S + 1] int64, ascending from 0; segment s has the rows ``query_offsets[s]`` to ``[s + 1]``,
            possibly none. Rows after the last are padding: their y is 0 and so is their gradient.
        past: [S, W - 1] int64; the inputs before a segment's first token, oldest first. r >= 0: row r of x (the last
            tokens of its ancestors); -1: zeros; r <= -2: row ``-2 - r`` of tails flattened to [N (W - 1), C].
        tails: [N, W - 1, C] in x's dtype or that of the arithmetic, or None: inputs carried over from earlier calls.
        activation: None or "silu".

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        ToolkitError: for shapes, dtypes and activations that do not fit; in Triton for float64.
        RuntimeError: on CPU for offsets or rows out of range; on CUDA, where nothing is read back, such a row is zeros.

    Numerics: computed in float32 (float64 for float64) and rounded once. Taps are added in order, oldest first, to the
    bias; an element depends on its W inputs alone, however its sequence is split, and agrees with
    ``causal_conv_paged``; the activation is op ``activation``'s. Gradients to x, weight, bias and tails. A row that
    several segments read adds the gradient of its segment and then theirs, by ascending segment; weight and bias sum
    rows in an order that depends on their number only. Saved for backward: the inputs.
    """
    _check(x, weight, bias, tails, activation)
    _check_indices(query_offsets, past=(past, [query_offsets.shape[0] - 1, weight.shape[1] - 1]))
    return _OP.select(impl)(x, weight, bias, query_offsets, past, tails, activation)


def causal_conv_paged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_offsets: Tensor,
    load_blocks: Tensor,
    store_rows: Tensor,
    store_blocks: Tensor,
    tails: Tensor,
    activation: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``causal_conv`` for inference, on tails that live in blocks of a pool: y [T, C].

    Segment s follows the inputs ``tails[load_blocks[s]]``, oldest first (zeros where negative). The last W - 1 inputs
    of a sequence up to row ``store_rows[i]``, across its loaded block where the segment is shorter, are written to
    ``tails[store_blocks[i]]``; a negative block is skipped.

    Args:
        x, weight, bias, query_offsets, activation: as for ``causal_conv``.
        load_blocks: [S] int64.
        store_rows: [M] int64, ascending (ties allowed), each of a segment.
        store_blocks: [M] int64.
        tails: [F, W - 1, C] in x's dtype or that of the arithmetic, unit stride along C; both hold inputs exactly. A
            segment loads before it stores, so both may be one block; a block that one segment stores to must not be
            loaded or stored by another in the same call.

    Returns:
        x's shape and dtype.

    Raises:
        ToolkitError: as ``causal_conv``.
        RuntimeError: on CPU for blocks or rows out of range, before anything is written.

    Numerics: bitwise identical to ``causal_conv``, however a sequence is split into calls. No gradient.
    """
    _check(x, weight, bias, tails, activation)
    segments, stores = query_offsets.shape[0] - 1, store_rows.numel()
    _check_indices(
        query_offsets,
        load_blocks=(load_blocks, [segments]),
        store_rows=(store_rows, [stores]),
        store_blocks=(store_blocks, [stores]),
    )
    if tails.shape[2] > 1 and tails.stride(2) != 1:
        raise ToolkitError(f"tails must have a contiguous last dimension, got strides {list(tails.stride())}.")
    x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    return _PAGED.select(impl)(x, weight, bias, query_offsets, load_blocks, store_rows, store_blocks, tails, activation)
