"""The attention kernels with every shipped tile, for ``python -m tools.compile_kernels``."""

from collections.abc import Callable
from typing import Any

import torch

TOKENS, PAGE = 64, 16
LONG = 4096  # keys: several splits, for which a few queries have a program each, and many are one program's
MLA = 576, 512  # widths of keys and values of a latent head that all query heads share


def _tensors(
    dtype: torch.dtype, widths: tuple[int, int], heads: int, kv_heads: int, tokens: int = TOKENS, keys: int = TOKENS
) -> tuple[torch.Tensor, ...]:
    depth, width = widths
    shapes = (tokens, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, width)
    return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)


def _options(heads: int, modifier: str, *, sunk: bool) -> dict[str, Any]:
    parameters = torch.ones(heads, 1) if modifier else None
    return {"sinks": torch.zeros(heads) if sunk else None, "modifier": modifier, "parameters": parameters}


def _spans(tokens: int, *, spanned: bool) -> dict[str, Any]:
    return {"spans": torch.zeros(tokens, 2, dtype=torch.int64) if spanned else None}


def attention_case(
    dtype: torch.dtype, head_dim: int, *, paged: bool, v_dim: int = 0, heads: int = 8, kv_heads: int = 2,
    window: int = 0, softcap: float = 0.0, modifier: str = "", sunk: bool = False, spanned: bool = False,
    tokens: int = TOKENS, keys: int = TOKENS,
) -> Callable:  # fmt: skip
    """A call of the attention forward."""

    def call() -> None:
        from toolkit.ops.attention.triton import attention

        q, k, v = _tensors(dtype, (head_dim, v_dim or head_dim), heads, kv_heads, tokens, keys)
        offsets, one = torch.tensor([0, tokens]), torch.tensor([keys])
        tables = torch.arange(keys // PAGE)[None] if paged else None
        options = _options(heads, modifier, sunk=sunk) | _spans(tokens, spanned=spanned)
        plan = offsets, one * 0, one, tables, PAGE if paged else 0
        attention(q, k, v, *plan, head_dim**-0.5, window, softcap, **options)

    return call


def attention_backward_case(
    dtype: torch.dtype, head_dim: int, *, paged: bool = False, v_dim: int = 0, heads: int = 8, kv_heads: int = 2,
    window: int = 0, softcap: float = 0.0, modifier: str = "", sunk: bool = False, spanned: bool = False,
) -> Callable:  # fmt: skip
    """A call of the attention backward: its kernels of contiguous keys, or of a prefix tree."""

    def call() -> None:
        from toolkit.ops.attention.triton_backward import attention_backward

        q, k, v = _tensors(dtype, (head_dim, v_dim or head_dim), heads, kv_heads)
        out = torch.empty(TOKENS, heads, v.shape[-1], dtype=dtype)
        offsets, one = torch.tensor([0, TOKENS]), torch.tensor([TOKENS])
        tensors = out, q, k, v, out, torch.empty(TOKENS, heads), offsets, one * 0, one
        options = _options(heads, modifier, sunk=sunk) | _spans(TOKENS, spanned=spanned)
        if paged:
            tables, query_ranges = torch.arange(TOKENS)[None], torch.zeros(TOKENS, 3, dtype=torch.int64)
            options |= {"block_tables": tables, "block_size": 1, "query_ranges": query_ranges}
        attention_backward(*tensors, head_dim**-0.5, window, softcap, **options)

    return call


def select_keys_case(dtype: torch.dtype, head_dim: int, *, heads: int, paged: bool) -> Callable:
    """A call of the selection of keys, with its scores."""

    def call() -> None:
        from toolkit.ops.select_keys.triton import select_keys

        q, k = torch.empty(TOKENS, heads, head_dim, dtype=dtype), torch.empty(LONG, head_dim, dtype=dtype)
        tables = torch.arange(LONG // PAGE)[None] if paged else None
        plan = torch.tensor([0, TOKENS]), torch.tensor([0]), torch.tensor([LONG]), tables, PAGE if paged else 0
        select_keys(q, k, torch.empty(TOKENS, heads), *plan, 2048, 2048, head_dim**-0.5)

    return call


def sparse_attention_case(dtype: torch.dtype, head_dim: int, v_dim: int, *, heads: int, kv_heads: int) -> Callable:
    """A call of attention over listed rows and of its backward."""

    def call() -> None:
        from toolkit.ops.sparse_attention.triton import sparse_attention, sparse_attention_backward

        q, k, v = _tensors(dtype, (head_dim, v_dim), heads, kv_heads)
        rows, out = torch.zeros(TOKENS, 32, dtype=torch.int64), torch.empty(TOKENS, heads, v_dim, dtype=dtype)
        sparse_attention(q, k, v, rows, head_dim**-0.5)
        sparse_attention_backward(out, q, k, v, rows, out, torch.empty(TOKENS, heads), head_dim**-0.5)

    return call


def cases() -> dict[str, Callable]:
    """name -> the call that launches the kernels."""
    found: dict[str, Callable] = {}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for head_dim in (64, 128, 256):
            found[f"attention {short} {head_dim} paged"] = attention_case(dtype, head_dim, paged=True)
            found[f"attention {short} {head_dim}"] = attention_case(dtype, head_dim, paged=False)
            found[f"attention_backward {short} {head_dim}"] = attention_backward_case(dtype, head_dim)
            found[f"attention_backward {short} {head_dim} tree"] = attention_backward_case(dtype, head_dim, paged=True)
            ahead: dict[str, Any] = {"spanned": True, "window": 1024}
            for paged in (True, False):
                name = f"{short} {head_dim} spans{' paged' * paged}"
                found[f"attention {name}"] = attention_case(dtype, head_dim, paged=paged, **ahead)
                found[f"attention_backward {name}"] = attention_backward_case(dtype, head_dim, paged=paged, **ahead)
        depth, width = MLA
        for paged in (True, False):
            found[f"select_keys {short} 128{' paged' * paged}"] = select_keys_case(dtype, 128, heads=64, paged=paged)
        found[f"sparse_attention {short} {depth}/{width}"] = sparse_attention_case(
            dtype, depth, width, heads=128, kv_heads=1
        )
        found[f"sparse_attention {short} 128"] = sparse_attention_case(dtype, 128, 128, heads=8, kv_heads=2)
        for paged in (True, False):
            shape: dict[str, Any] = {"paged": paged, "v_dim": width, "heads": 128, "kv_heads": 1}
            name = f"{short} {depth}/{width}"
            found[f"attention {name}{' paged' * paged}"] = attention_case(dtype, depth, **shape)
            found[f"attention_backward {name}{' tree' * paged}"] = attention_backward_case(dtype, depth, **shape)
        for tokens, way in ((TOKENS, "splits apart"), (1024, "splits in turn")):
            deep: dict[str, Any] = {"paged": True, "tokens": tokens, "keys": LONG}
            for head_dim in (64, 128, 256):
                found[f"attention {short} {head_dim} {way}"] = attention_case(dtype, head_dim, **deep)
            latent = deep | {"v_dim": width, "heads": 128, "kv_heads": 1}
            found[f"attention {short} {depth}/{width} {way}"] = attention_case(dtype, depth, **latent)
        for modifier in ("alibi", "chunked"):
            every: dict[str, Any] = {"paged": True, "window": 4096, "softcap": 50.0, "modifier": modifier, "sunk": True}
            for head_dim in (64, 128, 256, depth):
                name = f"{short} {head_dim} sinks, window, cap, {modifier}"
                every["v_dim"] = min(head_dim, width)
                found[f"attention {name}"] = attention_case(dtype, head_dim, **every)
                found[f"attention_backward {name}"] = attention_backward_case(dtype, head_dim, **every)
    return found
