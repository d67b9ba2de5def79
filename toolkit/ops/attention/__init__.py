"""Attention of ragged sequences, or prefix trees of them, over contiguous or paged keys and values.

Causal, with a window where one is given, and in both directions inside of spans.
"""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import modifiers, reference
from toolkit.ops.registry import Op, register_differentiable

__all__ = ["attention", "attention_backward", "check_options"]


_FORWARD: Op[tuple[Tensor, Tensor]]
_BACKWARD: Op[tuple[Tensor, Tensor, Tensor, Tensor]]
_FORWARD, _BACKWARD = register_differentiable(
    "attention(Tensor q, Tensor k, Tensor v, Tensor query_offsets, Tensor kv_offsets, Tensor kv_lengths, "
    "Tensor? block_tables, int block_size, float scale, int window, float softcap, Tensor? sinks=None, "
    "str modifier='', Tensor? parameters=None, Tensor? query_ranges=None, Tensor? spans=None) "
    "-> (Tensor out, Tensor lse)",
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor query_offsets, Tensor kv_offsets, Tensor kv_lengths, float scale, int window, float softcap, "
    "Tensor? block_tables=None, int block_size=0, Tensor? sinks=None, str modifier='', Tensor? parameters=None, "
    "Tensor? query_ranges=None, Tensor? spans=None) -> (Tensor, Tensor, Tensor, Tensor)",
    gradients=("q", "k", "v", "sinks"),
    reference=reference,
    triton="toolkit.ops.attention.triton",
    triton_backward="toolkit.ops.attention.triton_backward",
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None = None,
    block_size: int = 0,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    query_ranges: Tensor | None = None,
    spans: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its sequence up to its position, and of its span: (out, lse).

    For query i of a sequence with n queries and L keys, at position p = L - n + i, and each of its heads h::

        j in past(p) or span(i)
        past(p) = max(0, p - window + 1) <= j <= p, and visible(p, j, parameters[h])  (window <= 0: 0 <= j <= p)
        span(i) = spans[i, 0] <= j < min(spans[i, 1], L)                     (without spans: no key)
        s_j = scale * <q_i, k_j>
        s_j = softcap * tanh(s_j / softcap)                                  (softcap > 0)
        s_j = f(s_j, p, j, parameters[h])                                    (modifier)
        lse = log(exp(sinks[h]) + sum_j exp(s_j))                            (without sinks: exp(...) is 0)
        out = sum_j exp(s_j - lse) * v_j

    Args:
        q: [T, Hq, D]; float32, float64, bfloat16 or float16.
        k: [rows, Hkv, D]. Query head h uses key/value head h // (Hq / Hkv).
        v: [rows, Hkv, Dv]. May be a part of k (MLA's latent: D 576, Dv 512, one head); the gradients are separate.
            The first two dimensions of q, k and v may have any stride; a strided last dimension is copied.
        query_offsets: [S + 1] int64; the queries of sequence s are rows query_offsets[s] ... query_offsets[s + 1] of q.
            Rows past the last one are padding and give zeros with lse -inf. A query that sees no key gives zeros and
            its sink as lse, -inf without sinks.
        kv_offsets: [S] int64; key j of s is row kv_offsets[s] + j. Ignored with block_tables.
        kv_lengths: [S] int64; keys of s, whose queries are the last of them.
        block_tables: [S, P] int64 or None. Key j of s is row block_tables[s, j // block_size] * block_size
            + j % block_size. Sequences may share blocks: in a prefix tree a shared prefix is held once. With block_size
            1 the blocks are the single rows of k. Entries whose keys no query sees are not read.
        block_size: keys per block; ignored without block_tables.
        scale: default D ** -0.5.
        window: sliding window in keys; 0 for none.
        softcap: 0 for none.
        sinks: [Hq] or None; one logit per head that takes part in the denominator alone (gpt-oss, 2025).
        modifier: "" or a file of ``toolkit/ops/attention/modifiers``. ``alibi`` adds parameters[h, 0] * (j - p);
            ``chunked`` lets p see j where both divided by parameters[h, 0] are in one chunk.
        parameters: [Hq, n] numbers of the modifier, None for one without; no gradient.
        query_ranges: [rows, 3] int64 or None: (first, end, position) of each row of k. Rows first ... end of q (none
            where first >= end) are the queries of the sequences that hold the row, and it is key ``position`` of each.
            In depth-first order, the sequences of a prefix tree have such ranges. Triton needs them for gradients with
            block_tables; the other implementations ignore them. With spans the range of a row begins with the first
            query of its span, and a span lies within one sequence's queries.
        spans: [T, 2] int64 or None: (first, end) keys of its sequence that each row of q sees besides, also outside of
            the window and where a modifier hides them; (0, 0) for none. A span holds the row's position, and neither
            the first nor the last key that rows see falls from one row of a sequence to the next: the CPU checks it.
            One span for each picture is bidirectional attention inside pictures, one over the sequence that of an
            encoder; with window 1 the spans are all that is seen.

    Returns:
        out: [T, Hq, Dv] in q's dtype.
        lse: [T, Hq], natural log; float64 for float64, else float32. No gradient.

    Raises:
        ToolkitError: for an unknown impl or modifier, parameters, sinks or spans of another shape; in Triton for
            D > 576 or Dv > 512, and in its backward for block tables without query_ranges.
        RuntimeError: from the kernel for shapes, dtypes or indices that do not fit.

    Numerics: half types are computed in float32. With P = exp(s - lse), dP = grad v^T and delta = rowsum(grad * out):
    ds = P (dP - delta) f' (1 - (s / softcap)^2), dq = scale ds k, dk = scale ds^T q, dv = P^T grad,
    dsinks = -sum_rows exp(sinks - lse) delta. A row of k or v gets the sum over all queries that see it; one that no
    query sees gets zeros. Saved for backward: q, k, v, out, lse and the indices.
    The native CPU kernel is batch-invariant, for any chunking, block layout and number of threads: keys are taken in
    tiles of 64 counted from key 0, with an online softmax in order. Keys that a row does not see are not read into it,
    even if they are NaN (those that a modifier alone hides have weight 0, and must be finite). Gradients are summed in
    the order of
    sequences, queries and heads: deterministic for any number of threads. No implementation uses atomics.
    Source: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, FlashAttention (backward).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_options(q, sinks, modifier, parameters, spans)
    plan = query_offsets, kv_offsets, kv_lengths, block_tables, block_size
    options = sinks, modifier, parameters, query_ranges, spans
    return _FORWARD.select(impl)(q, k, v, *plan, scale, window, softcap, *options)


def check_options(
    q: Tensor, sinks: Tensor | None, modifier: str, parameters: Tensor | None, spans: Tensor | None
) -> None:
    if modifier or parameters is not None:
        modifiers.check(modifier, parameters, q.shape[1])
    if sinks is not None and (sinks.dim() != 1 or sinks.shape[0] != q.shape[1]):
        raise ToolkitError(f"sinks must have shape [{q.shape[1]}], one per query head, got {list(sinks.shape)}.")
    if spans is not None and (spans.dtype != torch.int64 or spans.shape != (q.shape[0], 2)):
        raise ToolkitError(
            f"spans must be int64 of shape [{q.shape[0]}, 2], (first, end) for each row of q, got {spans.dtype} "
            f"{list(spans.shape)}."
        )


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    block_tables: Tensor | None = None,
    block_size: int = 0,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    query_ranges: Tensor | None = None,
    spans: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dsinks) of ``attention``.

    Args:
        grad: [T, Hq, Dv], the gradient of out.
        out, lse: the results of ``attention``; the other arguments as there.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k, v. Rows of k and v that no query sees, and padding rows of q, get zeros;
            rows that several sequences share get the sum.
        dsinks: [Hq] in sinks' dtype, empty without sinks.
    """
    check_options(q, sinks, modifier, parameters, spans)
    plan = query_offsets, kv_offsets, kv_lengths
    options = block_tables, block_size, sinks, modifier, parameters, query_ranges, spans
    return _BACKWARD.select(impl)(grad, q, k, v, out, lse, *plan, scale, window, softcap, *options)
