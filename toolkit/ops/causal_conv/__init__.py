"""Short depthwise causal convolutions over a forest of segments, as linear-attention layers use before their state."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
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
    "causal_conv_paged(Tensor x, Tensor weight, Tensor? bias, Tensor query_offsets, Tensor sources, Tensor save_rows,"
    " Tensor save_frames, Tensor(a!) tails, str? activation) -> Tensor",
    reference=reference.causal_conv_paged,
    fake=reference.causal_conv_paged_fake,
    triton="toolkit.ops.causal_conv.triton.causal_conv_paged",
)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tensor | None, activation: str | None) -> None:
    """ToolkitError, in one sentence, for arguments that do not fit."""
    wide = compute_dtype(x)
    if x.dim() != 2:
        raise ToolkitError(f"x has shape {list(x.shape)}; [T, C] is required.")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] not in WIDTHS:
        raise ToolkitError(
            f"weight has shape {list(weight.shape)}; x of shape {list(x.shape)} needs [{channels}, W] with W from"
            f" {WIDTHS[0]} to {WIDTHS[-1]}."
        )
    if bias is not None and list(bias.shape) != [channels]:
        raise ToolkitError(f"bias has shape {list(bias.shape)}; [{channels}] is required.")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and not parameter.is_floating_point():
            raise ToolkitError(f"{name} has dtype {parameter.dtype}; allowed are floating-point dtypes.")
    held = [weight.shape[1] - 1, channels]
    if tails is not None and (tails.dim() != 3 or list(tails.shape[1:]) != held or tails.dtype not in (x.dtype, wide)):
        raise ToolkitError(
            f"tails has shape {list(tails.shape)} and dtype {tails.dtype}; {['N', *held]} in {x.dtype} or {wide} is"
            " required."
        )
    if activation not in ACTIVATIONS:
        raise ToolkitError(f"activation is {activation!r}; allowed are None and 'silu'.")


def _check_indices(query_offsets: Tensor, **others: tuple[Tensor, list[int]]) -> None:
    if query_offsets.dim() != 1 or not len(query_offsets) or query_offsets.dtype != torch.int64:
        raise ToolkitError(
            f"query_offsets is {query_offsets.dtype} of shape {list(query_offsets.shape)}; int64 [S + 1] is required."
        )
    for name, (x, shape) in others.items():
        if list(x.shape) != shape or x.dtype != torch.int64:
            raise ToolkitError(f"{name} is {x.dtype} of shape {list(x.shape)}; int64 {shape} is required.")


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
    """``y_t[c] = act(bias[c] + sum_{i<W} weight[c, i] x_{t-W+1+i}[c])`` over a forest of segments: y [T, C].

    x: [T, C]; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once). weight: [C, W],
    W from 2 to 8; bias: [C] or None; both of any floating-point dtype. activation: None or "silu".
    query_offsets: [S + 1] int64, ascending from 0; segment s has the rows ``query_offsets[s]`` to ``[s + 1]``, maybe
    none. Rows after the last are padding: their y is 0 and so is their gradient.
    past: [S, W - 1] int64: the inputs before a segment's first token, oldest first: r >= 0: row r of x (the last tokens
    of its ancestors); -1: zeros; r <= -2: row ``-2 - r`` of tails flattened to [N (W - 1), C].
    tails: [N, W - 1, C] in x's dtype or that of the arithmetic, or None: inputs carried over from earlier calls.
    Returns x's shape and dtype, contiguous.

    Numerics: taps are added in order, oldest first, to the bias; an element's bits depend on its W inputs alone,
    however its sequence is cut, and agree with ``causal_conv_paged``; the activation is op ``activation``'s.
    Gradients to x, weight, bias and tails. A row that several segments read adds what its own segment gives and then
    theirs, by ascending segment; weight and bias sum rows in an order that depends on their number only.
    Saved for backward: the inputs.

    Errors: ToolkitError for shapes, dtypes and activations that do not fit; on CPU RuntimeError for offsets or rows
    out of range, on CUDA, where nothing is read back, such a row is taken as zeros. Triton has no float64.
    """
    _check(x, weight, bias, tails, activation)
    _check_indices(query_offsets, past=(past, [len(query_offsets) - 1, weight.shape[1] - 1]))
    return _OP.select(impl)(x, weight, bias, query_offsets, past, tails, activation)


def causal_conv_paged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_offsets: Tensor,
    sources: Tensor,
    save_rows: Tensor,
    save_frames: Tensor,
    tails: Tensor,
    activation: str | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """``causal_conv`` for inference, on tails that live in frames of a pool: y [T, C].

    Segment s follows the inputs ``tails[sources[s]]``, oldest first (zeros where negative). The last W - 1 inputs of a
    sequence up to row ``save_rows[i]``, across its source where the segment is shorter, are written to
    ``tails[save_frames[i]]``; a negative frame is skipped.
    x, weight, bias, query_offsets, activation: as there. sources: [S] int64. save_rows, save_frames: [M] int64, the
    rows ascending (equal ones allowed), each of a segment. tails: [F, W - 1, C] in x's dtype or that of the
    arithmetic, unit stride along C; both hold inputs exactly. A segment reads its source before it writes, so the two
    may be one frame; a frame that one segment writes must not be another's source or target in the same call.

    No gradient. An element's bits are those of ``causal_conv``, however its sequence is cut into calls.
    Errors: as there; on CPU RuntimeError for frames or rows out of range, before anything is written.
    """
    _check(x, weight, bias, tails, activation)
    segments, saves = len(query_offsets) - 1, save_rows.numel()
    _check_indices(
        query_offsets, sources=(sources, [segments]), save_rows=(save_rows, [saves]), save_frames=(save_frames, [saves])
    )
    if tails.shape[2] > 1 and tails.stride(2) != 1:
        raise ToolkitError(f"tails has strides {list(tails.stride())}; a contiguous last dimension is required.")
    x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    return _PAGED.select(impl)(x, weight, bias, query_offsets, sources, save_rows, save_frames, tails, activation)
