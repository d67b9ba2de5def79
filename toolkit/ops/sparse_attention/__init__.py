"""Attention of every row over a list of rows of keys: what a selection leaves, by whichever rule it was made."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.sparse_attention import reference

__all__ = ["sparse_attention"]


_FORWARD: Op[tuple[Tensor, Tensor]]
_FORWARD, _ = register_differentiable(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor rows, float scale, Tensor? sinks=None)"
    " -> (Tensor out, Tensor lse)",
    "sparse_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor rows, Tensor out, Tensor lse,"
    " float scale, Tensor? sinks=None) -> (Tensor, Tensor, Tensor, Tensor)",
    gradients=("q", "k", "v", "sinks"),
    reference=reference,
    triton="toolkit.ops.sparse_attention.triton",
)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every row over the rows of k and v that its list names: (out, lse).

    For row t and each of its heads h, over the entries j of rows[t]::

        s_j = scale * <q[t, h], k_j>
        lse = log(exp(sinks[h]) + sum_j exp(s_j))        (without sinks: exp(...) is 0)
        out = sum_j exp(s_j - lse) * v_j

    Args:
        q: [T, Hq, D]; float32, float64, bfloat16 or float16.
        k: [rows, Hkv, D]. Query head h uses key/value head h // (Hq / Hkv).
        v: [rows, Hkv, Dv]. May be a part of k (MLA's latent: D 576, Dv 512, one head); the gradients are separate.
        rows: [T, K] int64; different rows of k (``toolkit.ops.select_keys.selected_rows``), in the order in which they
            are summed; negative entries stand behind the last one. A row without any gives zeros and its sink as lse,
            -inf without sinks.
        scale: default D ** -0.5.
        sinks: [Hq] or None; one logit per head that takes part in the denominator alone.

    Returns:
        out: [T, Hq, Dv] in q's dtype.
        lse: [T, Hq], natural log; float64 for float64, else float32. No gradient.

    Raises:
        ToolkitError: for rows or sinks of another shape; in Triton for D > 576 or Dv > 512.
        RuntimeError: from the kernel for shapes, dtypes or indices that do not fit.

    Numerics: as ``toolkit.ops.attention`` of one sequence per row whose keys are the listed ones, and bitwise identical
    to it: a row that lists all keys it sees has the bits of dense attention. The gradient of a row of k or v is the
    sum over the queries that list it, in the order of queries and heads: deterministic, without atomics. The list has
    no gradient. Saved for backward: q, k, v, rows, out, lse.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if rows.dim() != 2 or rows.shape[0] != q.shape[0]:
        raise ToolkitError(f"rows must have shape [{q.shape[0]}, K], got {list(rows.shape)}.")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ToolkitError(f"sinks must have shape [{q.shape[1]}], one per query head, got {list(sinks.shape)}.")
    return _FORWARD.select(impl)(q, k, v, rows.contiguous(), scale, sinks)
