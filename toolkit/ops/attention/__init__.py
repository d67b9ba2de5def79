"""Causal attention of ragged sequences over contiguous or paged keys and values."""

from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import reference
from toolkit.ops.registry import register

__all__ = ["attention", "attention_backward"]


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=reference.result_dtype(q))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, query_offsets, kv_offsets, kv_lengths, block_tables, _, scale, window, softcap = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.paged = block_tables is not None
    ctx.attributes = scale, window, softcap
    ctx.save_for_backward(q, k, v, out, lse, query_offsets, kv_offsets, kv_lengths)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise ToolkitError(
            "block_tables is given and a gradient is asked for; attention is differentiable over contiguous "
            "keys only (block_tables=None)."
        )
    grads = _BACKWARD(grad, *ctx.saved_tensors, *ctx.attributes)
    return (*grads, *(None,) * 8)


_BACKWARD = register(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor query_offsets, Tensor kv_offsets, Tensor kv_lengths, float scale, int window, float softcap) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    fake=_fake_backward,
    triton="toolkit.ops.attention.triton_backward.attention_backward",
)
_FORWARD = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor query_offsets, Tensor kv_offsets, Tensor kv_lengths, "
    "Tensor? block_tables, int page_size, float scale, int window, float softcap) -> (Tensor, Tensor)",
    reference=reference.attention,
    fake=_fake,
    triton="toolkit.ops.attention.triton.attention",
    backward=_backward,
    setup_context=_setup_context,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None = None,
    page_size: int = 0,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its own sequence up to its own position.

    For query i of a sequence with n queries and L keys, at position p = L - n + i, and each of its heads::

        s_j = scale * <q_i, k_j>      for max(0, p - window + 1) <= j <= p   (window <= 0: for 0 <= j <= p)
        s_j = softcap * tanh(s_j / softcap)                                  (softcap > 0)
        lse = log(sum_j exp(s_j)),    out = sum_j exp(s_j - lse) * v_j

    q: [T, Hq, D]. k: [rows, Hkv, D]. v: [rows, Hkv, Dv]. Query head h uses key/value head h // (Hq / Hkv).
        The first two dimensions may have any stride; a strided last dimension is copied.
    query_offsets: [S + 1], the queries of sequence s are rows query_offsets[s] ... query_offsets[s + 1] of q.
        Rows past the last one are padding and give zeros with lse -inf, as does a query that sees no key.
    kv_offsets: [S], key j of s is row kv_offsets[s] + j; ignored with block_tables.
    kv_lengths: [S], keys of s; its queries are the last of them.
    block_tables: [S, P] or None. Key j of s is row block_tables[s, j // page_size] * page_size
        + j % page_size.
    scale: default D ** -0.5.

    dtypes: float32, float64, bfloat16, float16 (half types are computed in float32); indices int64.
    Returns out [T, Hq, Dv] of q's dtype and lse [T, Hq] (natural log; float64 for float64, else float32).
    lse has no gradient. Saved for backward: q, k, v, out, lse. With P = exp(s - lse), dP = grad v^T and
    delta = rowsum(grad * out): ds = P (dP - delta) (1 - (s / softcap)^2), dq = scale ds k, dk = scale ds^T q,
    dv = P^T grad. Gradients need block_tables=None.

    Determinism (native CPU kernel): a row's bits depend on its query and visible keys alone, whatever the
    other rows, the chunking, the page layout and the number of threads: keys are taken in tiles of 64 counted
    from key 0, with an online softmax in order. Keys that a row does not see are not read into it, whatever
    they hold. Gradients do not depend on the number of threads.

    Raises ``ToolkitError`` for an unknown impl and, in backward, for block tables; ``RuntimeError`` from the
    kernel for shapes, dtypes or indices that do not fit.
    Source: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022, FlashAttention (backward).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = _FORWARD.select(impl)
    return run(q, k, v, query_offsets, kv_offsets, kv_lengths, block_tables, page_size, scale, window, softcap)


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
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of ``attention`` over contiguous keys, given grad [T, Hq, Dv] of its out.

    Rows of k and v that no query sees, and padding rows of q, get zeros. Sequences may share rows of k and v.
    """
    run = _BACKWARD.select(impl)
    return run(grad, q, k, v, out, lse, query_offsets, kv_offsets, kv_lengths, scale, window, softcap)
