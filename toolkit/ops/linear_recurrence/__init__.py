"""The gated linear recurrence: what linear-attention layers remember, a matrix a head, over a forest of segments."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import reference
from toolkit.ops.registry import register
from toolkit.ops.rowwise import compute_dtype

__all__ = ["linear_recurrence", "linear_recurrence_paged"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.delta, ctx.keep = inputs
    _, finals, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, finals, kept)


def _backward(ctx: Any, grad: Tensor | None, grad_finals: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise ToolkitError("keep is False for linear_recurrence; a gradient needs it to be True.")
    if grad is None and grad_finals is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again at every look
    beta, initial = saved[4], saved[7]
    dq, dk, dv, dg, dbeta, dinitial = _BACKWARD(grad, grad_finals, *saved, ctx.scale, ctx.delta)
    to_beta, to_initial = None if beta is None else dbeta, None if initial is None else dinitial
    return dq, dk, dv, dg, to_beta, None, None, to_initial, None, None, None


_BACKWARD = register(
    "linear_recurrence_backward(Tensor? grad, Tensor? grad_finals, Tensor q, Tensor k, Tensor v, Tensor g,"
    " Tensor? beta, Tensor query_offsets, Tensor parents, Tensor? initial, Tensor finals, Tensor kept, float scale,"
    " bool delta) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_recurrence_backward,
    fake=reference.linear_recurrence_backward_fake,
    triton="toolkit.ops.linear_recurrence.triton_backward.linear_recurrence_backward",
)
_FORWARD = register(
    "linear_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor query_offsets, Tensor parents,"
    " Tensor? initial, float scale, bool delta, bool keep) -> (Tensor out, Tensor finals, Tensor kept)",
    reference=reference.linear_recurrence,
    fake=reference.linear_recurrence_fake,
    triton="toolkit.ops.linear_recurrence.triton.linear_recurrence",
    backward=_backward,
    setup_context=_setup_context,
)
_PAGED = register(
    "linear_recurrence_paged(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor query_offsets,"
    " Tensor sources, Tensor save_rows, Tensor save_frames, Tensor(a!) states, float scale, bool delta) -> Tensor",
    reference=reference.linear_recurrence_paged,
    fake=reference.linear_recurrence_paged_fake,
    triton="toolkit.ops.linear_recurrence.triton.linear_recurrence_paged",
)


def _check_rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> None:
    """ToolkitError, in one sentence, for rows that do not fit each other."""
    compute_dtype(q)
    if not q.dtype == k.dtype == v.dtype:
        raise ToolkitError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal.")
    if q.dim() != 3 or v.dim() != 3 or k.shape != q.shape or v.shape[0] != q.shape[0]:
        raise ToolkitError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; [T, Hk, K], [T, Hk, K] and"
            " [T, H, V] are required."
        )
    if q.shape[1] == 0 or v.shape[1] % q.shape[1]:
        raise ToolkitError(f"v has {v.shape[1]} heads and k {q.shape[1]}; a multiple of those of k is required.")
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and (x.shape != v.shape[:2] or not x.is_floating_point()):
            raise ToolkitError(
                f"{name} has shape {list(x.shape)} and dtype {x.dtype}; floating point {list(v.shape[:2])} is required."
            )


def _check_states(name: str, states: Tensor, k: Tensor, v: Tensor) -> None:
    shape, dtype = [v.shape[1], k.shape[2], v.shape[2]], compute_dtype(k)
    if states.dim() != 4 or list(states.shape[1:]) != shape or states.dtype != dtype:
        raise ToolkitError(
            f"{name} has shape {list(states.shape)} and dtype {states.dtype}; {['N', *shape]} in {dtype} is required."
        )


def _check_indices(query_offsets: Tensor, **others: tuple[Tensor, int]) -> None:
    if query_offsets.dim() != 1 or not len(query_offsets) or query_offsets.dtype != torch.int64:
        raise ToolkitError(
            f"query_offsets is {query_offsets.dtype} of shape {list(query_offsets.shape)}; int64 [S + 1] is required."
        )
    for name, (x, length) in others.items():
        if x.dim() != 1 or len(x) != length or x.dtype != torch.int64:
            raise ToolkitError(f"{name} is {x.dtype} of shape {list(x.shape)}; int64 [{length}] is required.")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    query_offsets: Tensor,
    parents: Tensor,
    initial: Tensor | None = None,
    scale: float = 1.0,
    delta: bool = True,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (``delta``) or SSD, over a forest of segments: (out [T, H, V], finals [S, H, K, V]).

    Every value head has a state S [K, V]. For each token t of a segment, in order::

        S <- exp(g_t) S
        u_t = beta_t (v_t - S^T k_t)      with ``delta``;  u_t = beta_t v_t without
        S <- S + k_t u_t^T
        out_t = scale S^T q_t

    q, k: [T, Hk, K]; v: [T, H, V]; of one dtype: float32, float64, bfloat16 or float16. Value head h uses key head
    ``h // (H / Hk)``. g: [T, H], the natural logarithm of the decay, at most 0; at -inf the state is forgotten. beta:
    [T, H], or None for ones. g and beta may be of another floating-point dtype than q. Normalised keys, softplus and
    skip connections are the caller's.
    query_offsets: [S + 1] int64, ascending from 0; segment s has the rows ``query_offsets[s]`` to ``[s + 1]``, maybe
    none. Rows after the last are padding: their out is 0 and so is their gradient.
    parents: [S] int64; where segment s starts: p >= 0 (less than s): from the state at the end of segment p; -1: from
    zeros; p <= -2: from ``initial[-2 - p]``. initial: [N, H, K, V] or None, in finals' dtype.
    Arithmetic, states and finals are float32 (float64 for float64); out is rounded once to v's dtype.

    Numerics: tokens are taken one by one, and sums over K have one order; so a token has the same bits however its
    sequence is cut into segments, and the same as in ``linear_recurrence_paged``. Gradients to q, k, v, g, beta and
    initial, from out and finals; sums over columns of V, over heads and over the children of a segment (from the last
    to the first) have an order that depends on shapes and the forest only.
    Saved for backward: the inputs, finals, and the state after every 64 tokens of a segment (T / 64 states at most,
    only while a gradient is wanted); the states between are computed again.

    Errors: ToolkitError for shapes and dtypes that do not fit; on CPU RuntimeError for offsets, parents or indices of
    initial out of range, on CUDA, where nothing is read back, they are not seen. Triton takes K up to 256, no float64.
    Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2024); Dao and Gu, "Transformers are SSMs" (2024).
    """
    _check_rows(q, k, v, g, beta)
    _check_indices(query_offsets, parents=(parents, len(query_offsets) - 1))
    if initial is not None:
        _check_states("initial", initial, k, v)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, beta, initial))
    arguments = (q, k, v, g, beta, query_offsets, parents, initial, scale, delta)
    return _FORWARD.select(impl)(*arguments, keep and impl != "reference")[:2]


def linear_recurrence_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    query_offsets: Tensor,
    sources: Tensor,
    save_rows: Tensor,
    save_frames: Tensor,
    states: Tensor,
    scale: float = 1.0,
    delta: bool = True,
    *,
    impl: str | None = None,
) -> Tensor:
    """``linear_recurrence`` for inference, on states that live in frames of a pool: out [T, H, V].

    Segment s starts from ``states[sources[s]]`` (from zeros where negative). After the token of row ``save_rows[i]``
    the state is written to ``states[save_frames[i]]``; a negative frame is skipped.
    q, k, v, g, beta, query_offsets, scale, delta: as there. sources: [S] int64. save_rows, save_frames: [M] int64, the
    rows ascending (equal ones allowed), each of a segment. states: [F, H, K, V], float32 (float64 for float64 q), unit
    stride along V. A segment reads its source before it writes, so the two may be one frame; a frame that one segment
    writes must not be another's source or target in the same call.

    No gradient. A token's bits are those of ``linear_recurrence``, however its sequence is cut into calls: a state is
    saved as it is held.
    Errors: as there; on CPU RuntimeError for frames or rows out of range, before anything is written.
    """
    _check_rows(q, k, v, g, beta)
    _check_indices(query_offsets, sources=(sources, len(query_offsets) - 1), save_frames=(save_frames, len(save_rows)))
    _check_indices(query_offsets, save_rows=(save_rows, len(save_rows)))
    _check_states("states", states, k, v)
    if states.shape[3] > 1 and states.stride(3) != 1:
        raise ToolkitError(f"states has strides {list(states.stride())}; a contiguous last dimension is required.")
    q, k, v, g = (x.detach() for x in (q, k, v, g))
    beta = None if beta is None else beta.detach()
    return _PAGED.select(impl)(q, k, v, g, beta, query_offsets, sources, save_rows, save_frames, states, scale, delta)
