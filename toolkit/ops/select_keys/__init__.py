"""The keys that a sparse attention layer attends: the best of each row, by the scores of an indexer."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import register
from toolkit.ops.select_keys import reference

__all__ = ["select_keys", "selected_rows"]

_OP = register(
    "select_keys(Tensor q, Tensor k, Tensor weights, Tensor query_offsets, Tensor kv_offsets, Tensor kv_lengths, "
    "Tensor? block_tables, int block_size, int topk, int width, float scale) -> Tensor",
    reference=reference.select_keys,
    fake=reference.select_keys_fake,
    triton="toolkit.ops.select_keys.triton.select_keys",
)


def select_keys(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None = None,
    block_size: int = 0,
    *,
    topk: int,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """[T, K] positions of the ``topk`` keys with the highest score among those that a row sees, ascending.

    For query i of a sequence with n queries and L keys, at position p = L - n + i::

        score_j = sum_h weights[i, h] * max(0, scale * <q[i, h], k_j>)     for 0 <= j <= p

    Args:
        q: [T, H, D]; float32, float64, bfloat16 or float16.
        k: [rows, D] in q's dtype; one key per token, which all heads of the indexer share.
        weights: [T, H], floating point.
        query_offsets, kv_offsets, kv_lengths, block_tables, block_size: as in ``toolkit.ops.attention``.
        topk: keys to select.
        scale: default D ** -0.5.

    Returns:
        [T, K] int64, with K the smaller of topk and the rows of k. A row that sees fewer keys selects them all; -1
        stands behind the last one. Rows of padding have -1 alone.

    Raises:
        ToolkitError: for shapes that do not fit, or topk below 1.
        RuntimeError: from the kernel for dtypes or indices that do not fit.

    Numerics: half types are computed in float32, on CPU by the reference in float64. Of equal scores the lower
    position; NaN ranks as -inf. A row's selection is batch-invariant: it depends on the row's inputs and keys alone.
    No gradient: an indexer learns by ``toolkit.ops.index_loss``. No [T, rows] matrix is held; work is linear in the
    context.
    Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp (lightning indexer, without its quantisation).
    """
    if q.dim() != 3 or k.dim() != 2 or k.shape[1] != q.shape[2] or weights.shape != q.shape[:2]:
        raise ToolkitError(
            "q, k and weights must have shapes [T, H, D], [rows, D] and [T, H], got "
            f"{list(q.shape)}, {list(k.shape)} and {list(weights.shape)}."
        )
    if topk < 1:
        raise ToolkitError(f"topk must be >= 1, got {topk}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width = min(topk, k.shape[0])  # not by the width of the tables, which a captured decode step does not know
    plan = query_offsets, kv_offsets, kv_lengths, block_tables, block_size
    return _OP.select(impl)(q.detach(), k.detach(), weights.detach(), *plan, topk, width, scale)


def selected_rows(
    selected: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """[T, K] rows of the keys at ``selected`` positions of each row's sequence, for ``toolkit.ops.sparse_attention``.

    Args:
        selected: [T, K] int64 positions; -1 behind the last one, which stays.
        query_offsets, kv_offsets, kv_lengths, block_tables, block_size: as in ``toolkit.ops.attention``.
    """
    if kv_lengths.numel() == 0:
        return torch.full_like(selected, -1)
    rows = torch.arange(selected.shape[0], device=selected.device)
    sequence = (torch.searchsorted(query_offsets, rows, right=True) - 1).clamp(max=kv_lengths.numel() - 1)
    position = selected.clamp_min(0)
    if block_tables is None:
        found = kv_offsets[sequence][:, None] + position
    else:
        block = block_tables[sequence[:, None], torch.div(position, block_size, rounding_mode="floor")]
        found = block * block_size + position % block_size
    return torch.where(selected < 0, -1, found)
