"""Triton kernels of the recurrent ops to compile ahead of time: shapes of Qwen3-Next, Mamba-2 and smaller models."""

from collections.abc import Callable

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# (K, V, the delta rule): Qwen3-Next's and Qwen3.5's heads, Mamba-2's, Bamba's and Falcon-H1's, and the largest.
STATES = ((128, 128, True), (128, 64, False), (256, 64, False), (64, 64, True), (256, 256, True))
# Of these a chunk at a time, in bfloat16: Qwen3-Next's, Mamba-2's and the largest.
CHUNKED = ((128, 128, True), (128, 64, False), (256, 256, True))
# (K, V, heads) with separate decays for keys: Kimi Linear's heads, and Mamba's and Jamba's channels.
KEYED = ((128, 128, 4), (16, 1, 64))
# (channels, taps): Qwen3-Next's, a small LFM2's, and one that fills no tile.
CONVOLUTIONS = ((8192, 4), (1024, 3), (600, 4))


def recurrence_case(dtype: torch.dtype, depth: int, width: int, *, delta: bool) -> Callable[[], None]:
    """Forward that keeps states for a gradient, from given ones, and the backward; v is a view of a projection."""

    def call() -> None:
        from toolkit.ops.linear_recurrence.triton import linear_recurrence
        from toolkit.ops.linear_recurrence.triton_backward import linear_recurrence_backward

        q = torch.empty(64, 2, depth, dtype=dtype)
        v = torch.empty(64, 3, 4, width, dtype=dtype)[:, 1]
        g, index = torch.empty(64, 4), (torch.tensor([0, 64]), torch.tensor([-2]))
        beta, initial = torch.empty(64, 4, dtype=dtype), torch.empty(1, 4, depth, width)
        out, finals, kept = linear_recurrence(q, q, v, g, beta, *index, initial, 1.0, delta, True)
        linear_recurrence_backward(out, finals, q, q, v, g, beta, *index, initial, finals, kept, 1.0, delta)

    return call


def paged_case(dtype: torch.dtype, depth: int, width: int, *, delta: bool) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.linear_recurrence.triton import linear_recurrence_paged

        q, v = torch.empty(4, 2, depth, dtype=dtype), torch.empty(4, 4, width, dtype=dtype)
        g, rows, states = torch.empty(4, 4), torch.arange(4), torch.empty(8, 4, depth, width)
        linear_recurrence_paged(q, q, v, g, g, torch.arange(5), rows, rows, rows, states, 1.0, delta)

    return call


def chunked_case(dtype: torch.dtype, depth: int, width: int, *, delta: bool) -> Callable[[], None]:
    """Forward from given states, its backward and the paged form, a chunk at a time."""

    def call() -> None:
        from toolkit.ops.linear_recurrence import triton_chunks
        from toolkit.ops.linear_recurrence.triton_chunks_backward import linear_recurrence_chunked_backward

        q = torch.empty(64, 2, depth, dtype=dtype)
        v = torch.empty(64, 3, 4, width, dtype=dtype)[:, 1]
        g, index = torch.empty(64, 4), (torch.tensor([0, 64]), torch.tensor([-2]))
        beta, initial, settings = torch.empty(64, 4, dtype=dtype), torch.empty(1, 4, depth, width), (1.0, delta)
        given = q, q, v, g, beta
        out, finals = triton_chunks.linear_recurrence_chunked(*given, *index, initial, *settings)
        linear_recurrence_chunked_backward(out, finals, *given, *index, initial, finals, *settings)
        rows, states = torch.arange(1), initial.expand(8, -1, -1, -1).contiguous()
        triton_chunks.linear_recurrence_paged_chunked(*given, index[0], rows, rows, rows, states, *settings)

    return call


def keyed_case(dtype: torch.dtype, depth: int, width: int, heads: int) -> Callable[[], None]:
    """As ``recurrence_case`` and ``paged_case``: gates for each key and the delta rule, or channels with rates."""

    def call() -> None:
        from toolkit.ops.linear_recurrence.triton import linear_recurrence, linear_recurrence_paged
        from toolkit.ops.linear_recurrence.triton_backward import linear_recurrence_backward

        scan = width == 1
        q, v = torch.empty(64, 1 if scan else heads, depth, dtype=dtype), torch.empty(64, heads, width, dtype=dtype)
        beta, rates = torch.empty(64, heads), torch.empty(heads, depth) if scan else None
        g, index = beta if scan else torch.empty(64, heads, depth), (torch.tensor([0, 64]), torch.tensor([-2]))
        initial, settings = torch.empty(1, heads, depth, width), (1.0, not scan)
        out, finals, kept = linear_recurrence(q, q, v, g, beta, *index, initial, *settings, True, rates)
        linear_recurrence_backward(out, finals, q, q, v, g, beta, *index, initial, finals, kept, *settings, rates)
        rows = torch.arange(4), torch.arange(4), torch.arange(4), initial.expand(8, -1, -1, -1).contiguous()
        few = q[:4], q[:4], v[:4], g[:4], beta[:4]
        linear_recurrence_paged(*few, torch.arange(5), *rows, *settings, rates)

    return call


def conv_case(dtype: torch.dtype, width: int, taps: int) -> Callable[[], None]:
    """Forward and backward after carried tails; x is a part of a projection's rows."""

    def call() -> None:
        from toolkit.ops.causal_conv.triton import causal_conv
        from toolkit.ops.causal_conv.triton_backward import causal_conv_backward

        x, tails = torch.empty(64, 2 * width, dtype=dtype)[:, :width], torch.empty(2, taps - 1, width, dtype=dtype)
        weight, bias = torch.empty(width, taps, dtype=dtype), torch.empty(width, dtype=dtype)
        index = torch.tensor([0, 40, 64]), torch.zeros(2, taps - 1, dtype=torch.int64)
        causal_conv(x, weight, bias, *index, tails, "silu")
        causal_conv_backward(x.contiguous(), x, weight, bias, *index, tails, "silu")
        causal_conv(x, weight, None, *index, None, None)
        causal_conv_backward(x.contiguous(), x, weight, None, *index, None, None)

    return call


def paged_conv_case(dtype: torch.dtype, width: int, taps: int) -> Callable[[], None]:
    def call() -> None:
        from toolkit.ops.causal_conv.triton import causal_conv_paged

        x, weight, rows = torch.empty(4, width, dtype=dtype), torch.empty(width, taps, dtype=dtype), torch.arange(4)
        tails = torch.empty(8, taps - 1, width, dtype=dtype)
        causal_conv_paged(x, weight, weight[:, 0], torch.arange(5), rows, rows, rows, tails, "silu")

    return call


def cases() -> dict[str, Callable[[], None]]:
    """Every kernel with every shipped tile: name -> the call that launches it."""
    found: dict[str, Callable[[], None]] = {}
    for depth, width, delta in CHUNKED:
        name = f"{'delta' if delta else 'ssd'} bf16 {depth} {width}"
        found[f"linear_recurrence_chunked {name}"] = chunked_case(torch.bfloat16, depth, width, delta=delta)
    for short, dtype in DTYPES.items():
        for depth, width, delta in STATES:
            name = f"{'delta' if delta else 'ssd'} {short} {depth} {width}"
            found[f"linear_recurrence {name}"] = recurrence_case(dtype, depth, width, delta=delta)
            found[f"linear_recurrence_paged {name}"] = paged_case(dtype, depth, width, delta=delta)
        for depth, width, heads in KEYED:
            name = f"{'scan' if width == 1 else 'keys'} {short} {depth} {width}"
            found[f"linear_recurrence {name}"] = keyed_case(dtype, depth, width, heads)
        for width, taps in CONVOLUTIONS:
            found[f"causal_conv {short} {width} {taps}"] = conv_case(dtype, width, taps)
            found[f"causal_conv_paged {short} {width} {taps}"] = paged_conv_case(dtype, width, taps)
    return found
