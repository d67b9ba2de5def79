"""The gated linear recurrence of linear-attention layers over a prefix tree of segments: one state matrix per head."""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.linear_recurrence import reference
from toolkit.ops.registry import register
from toolkit.ops.rowwise import compute_dtype

__all__ = ["linear_recurrence", "linear_recurrence_paged"]

CHUNKED_TOKENS = 16  # of a segment, on average, from which on the chunked form is taken; not measured


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.delta, ctx.keep, rates = inputs
    _, finals, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, finals, kept, rates)


def _backward(ctx: Any, grad: Tensor | None, grad_finals: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise ToolkitError("keep of linear_recurrence must be True for a gradient, got False.")
    if grad is None and grad_finals is None:
        return (None,) * 12
    *saved, rates = ctx.saved_tensors  # once: activation checkpointing computes them again at every look
    dq, dk, dv, dg, *others = _BACKWARD.gradient(grad, grad_finals, *saved, ctx.scale, ctx.delta, rates)
    of_given = (None if x is None else to for x, to in zip((saved[4], saved[7], rates), others, strict=True))
    to_beta, to_initial, to_rates = of_given
    return dq, dk, dv, dg, to_beta, None, None, to_initial, None, None, None, to_rates


_BACKWARD = register(
    "linear_recurrence_backward(Tensor? grad, Tensor? grad_finals, Tensor q, Tensor k, Tensor v, Tensor g,"
    " Tensor? beta, Tensor query_offsets, Tensor parents, Tensor? initial, Tensor finals, Tensor kept, float scale,"
    " bool delta, Tensor? rates=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_recurrence_backward,
    fake=reference.linear_recurrence_backward_fake,
    triton="toolkit.ops.linear_recurrence.triton_backward.linear_recurrence_backward",
)
_FORWARD = register(
    "linear_recurrence(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor query_offsets, Tensor parents,"
    " Tensor? initial, float scale, bool delta, bool keep, Tensor? rates=None)"
    " -> (Tensor out, Tensor finals, Tensor kept)",
    reference=reference.linear_recurrence,
    fake=reference.linear_recurrence_fake,
    triton="toolkit.ops.linear_recurrence.triton.linear_recurrence",
    backward=_backward,
    setup_context=_setup_context,
)
_PAGED = register(
    "linear_recurrence_paged(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor query_offsets,"
    " Tensor load_blocks, Tensor store_rows, Tensor store_blocks, Tensor(a!) states, float scale,"
    " bool delta, Tensor? rates=None) -> Tensor",
    reference=reference.linear_recurrence_paged,
    fake=reference.linear_recurrence_paged_fake,
    triton="toolkit.ops.linear_recurrence.triton.linear_recurrence_paged",
)


def _by_tokens(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``linear_recurrence_chunked`` where there is no such kernel: token by token."""
    return _FORWARD(*arguments, False, None)[:2]


def _by_tokens_backward(grad: Tensor | None, grad_finals: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *rows, finals, scale, delta = arguments
    kept = _FORWARD(*rows, scale, delta, True, None)[2]
    return tuple(_BACKWARD(grad, grad_finals, *rows, finals, kept, scale, delta, None)[:6])


def _setup_chunked_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.delta = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _chunked_backward(ctx: Any, grad: Tensor | None, grad_finals: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_finals is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again at every look
    dq, dk, dv, dg, dbeta, dinitial = _CHUNKED_BACKWARD.gradient(grad, grad_finals, *saved, ctx.scale, ctx.delta)
    to_beta, to_initial = (None if x is None else to for x, to in ((saved[4], dbeta), (saved[7], dinitial)))
    return dq, dk, dv, dg, to_beta, None, None, to_initial, None, None


_ROWS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor query_offsets"
_CHUNKED_BACKWARD = register(
    f"linear_recurrence_chunked_backward(Tensor? grad, Tensor? grad_finals, {_ROWS}, Tensor parents, Tensor? initial,"
    " Tensor finals, float scale, bool delta) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_by_tokens_backward,
    fake=lambda *x: reference.linear_recurrence_backward_fake(*(*x[:11], x[10], *x[11:]))[:6],
    triton="toolkit.ops.linear_recurrence.triton_chunks_backward.linear_recurrence_chunked_backward",
)
_CHUNKED = register(
    f"linear_recurrence_chunked({_ROWS}, Tensor parents, Tensor? initial, float scale, bool delta)"
    " -> (Tensor out, Tensor finals)",
    reference=_by_tokens,
    fake=lambda *x: reference.linear_recurrence_fake(*(*x, False))[:2],
    triton="toolkit.ops.linear_recurrence.triton_chunks.linear_recurrence_chunked",
    backward=_chunked_backward,
    setup_context=_setup_chunked_context,
)
_CHUNKED_PAGED = register(
    f"linear_recurrence_paged_chunked({_ROWS}, Tensor load_blocks, Tensor store_rows, Tensor store_blocks,"
    " Tensor(a!) states, float scale, bool delta) -> Tensor",
    reference=lambda *x: _PAGED(*x, None),
    fake=reference.linear_recurrence_paged_fake,
    triton="toolkit.ops.linear_recurrence.triton_chunks.linear_recurrence_paged_chunked",
)


def _takes_chunks(q: Tensor, g: Tensor, query_offsets: Tensor, rates: Tensor | None, impl: str | None) -> bool:
    """Whether the chunked form serves these rows: by shapes, and on a GPU in bfloat16 alone.

    float16 has no range for states, and NVIDIA's tensor cores have no float32.
    """
    enough = q.shape[0] >= CHUNKED_TOKENS * (query_offsets.shape[0] - 1)
    dtype = q.dtype == torch.bfloat16 or not q.is_cuda
    return enough and g.dim() == 2 and rates is None and dtype and impl in (None, "triton")


def _check_rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, rates: Tensor | None) -> None:
    """ToolkitError, in one sentence, for rows that do not fit each other."""
    compute_dtype(q)
    if not q.dtype == k.dtype == v.dtype:
        raise ToolkitError(f"The dtypes of q, k, v must be equal, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if q.dim() != 3 or v.dim() != 3 or k.shape != q.shape or v.shape[0] != q.shape[0]:
        raise ToolkitError(
            f"q, k, v must have shapes [T, Hk, K], [T, Hk, K], [T, H, V], got {list(q.shape)}, {list(k.shape)},"
            f" {list(v.shape)}."
        )
    if q.shape[1] == 0 or v.shape[1] % q.shape[1]:
        raise ToolkitError(f"The heads of v must be a multiple of those of k, {q.shape[1]}, got {v.shape[1]}.")
    one, of_keys = list(v.shape[:2]), [v.shape[1], k.shape[2]]
    of_g = [one[0], *of_keys] if g.dim() == 3 and rates is None else one
    for name, x, shape in (("g", g, of_g), ("beta", beta, one), ("rates", rates, of_keys)):
        if x is not None and (list(x.shape) != shape or not x.is_floating_point()):
            raise ToolkitError(f"{name} must be floating point {shape}, got {x.dtype} of shape {list(x.shape)}.")


def _check_states(name: str, states: Tensor, k: Tensor, v: Tensor) -> None:
    shape, dtype = [v.shape[1], k.shape[2], v.shape[2]], compute_dtype(k)
    if states.dim() != 4 or list(states.shape[1:]) != shape or states.dtype != dtype:
        raise ToolkitError(
            f"{name} must have shape {['N', *shape]} and dtype {dtype}, got {list(states.shape)} and {states.dtype}."
        )


def _check_indices(query_offsets: Tensor, **others: tuple[Tensor, int]) -> None:
    if query_offsets.dim() != 1 or not query_offsets.shape[0] or query_offsets.dtype != torch.int64:
        raise ToolkitError(
            f"query_offsets must be int64 [S + 1], got {query_offsets.dtype} of shape {list(query_offsets.shape)}."
        )
    for name, (x, length) in others.items():
        if x.dim() != 1 or x.shape[0] != length or x.dtype != torch.int64:
            raise ToolkitError(f"{name} must be int64 [{length}], got {x.dtype} of shape {list(x.shape)}.")


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
    rates: Tensor | None = None,
    chunked: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (``delta``) or SSD over a prefix tree of segments: (out [T, H, V], finals [S, H, K, V]).

    Every value head has a state S [K, V]. For each token t of a segment, in order::

        S <- diag(exp(g_t)) S
        u_t = beta_t (v_t - S^T k_t)      with ``delta``;  u_t = beta_t v_t without
        S <- S + k_t u_t^T
        out_t = scale S^T q_t

    Args:
        q, k: [T, Hk, K]; float32, float64, bfloat16 or float16. Normalized keys, softplus and skip connections are the
            caller's.
        v: [T, H, V] in q's dtype. Value head h uses key head ``h // (H / Hk)``.
        g: [T, H], one for all keys of a head, or [T, H, K], one for each (Kimi delta attention); floating point; the
            natural logarithm of the decay, <= 0. At -inf the state is reset.
        beta: [T, H], floating point, or None for ones.
        query_offsets: [S + 1] int64, ascending from 0; segment s has the rows ``query_offsets[s]`` to ``[s + 1]``,
            possibly none. Rows after the last are padding: their out is 0 and so is their gradient.
        parents: [S] int64; the state that segment s starts from. p >= 0 (less than s): the final state of segment p;
            -1: zeros; p <= -2: ``initial[-2 - p]``.
        initial: [N, H, K, V] or None, in finals' dtype.
        rates: [H, K], floating point, or None. With rates g is [T, H] and the logarithm of a key's decay is
            ``g_t * rates``, which is held for no token. The selective scan of Mamba-1 has a head for each channel,
            V = 1, one key head for all of them, g = beta = dt and rates = A.
        chunked: on a GPU, take 16 or 32 tokens at a time by matmuls, where g is [T, H] without rates, q is
            bfloat16 and segments have 16 tokens on average. The same mathematics in another order: not batch-invariant.
            Numerics mode fast sets it. No effect on CPU.

    Returns:
        out in v's dtype, rounded once, and finals in float32 (float64 for float64).

    Raises:
        ToolkitError: for shapes and dtypes that do not fit; in Triton for K above 256 and float64.
        RuntimeError: on CPU for offsets, parents or indices of initial out of range; on CUDA nothing is read back.

    Numerics: arithmetic and states are float32 (float64 for float64). Tokens are taken one by one, and sums over K have
    one order, so a token is bitwise identical however its sequence is split into segments, also in
    ``linear_recurrence_paged``. Gradients to q, k, v, g, beta, initial and rates, from out and finals; sums over
    columns of V, over heads, over tokens (of rates) and over the children of a segment (from the last to the first)
    have an order that depends on shapes and the tree only. Saved for backward: the inputs, finals, and the
    state after every 64 tokens of a segment (T / 64 states at most, only while a gradient is needed); the states
    between are recomputed. With ``chunked`` bfloat16 rows are multiplied as such (states and U are rounded to bfloat16
    where they enter a product), sums and states are float32; no state is saved but finals.
    Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2024); Dao and Gu, "Transformers are SSMs" (2024);
    Kimi Team, "Kimi Linear" (2025); Gu and Dao, "Mamba" (2023). The chunked form: ``triton_chunks.py``.
    """
    _check_rows(q, k, v, g, beta, rates)
    _check_indices(query_offsets, parents=(parents, query_offsets.shape[0] - 1))
    if initial is not None:
        _check_states("initial", initial, k, v)
    if chunked and _takes_chunks(q, g, query_offsets, rates, impl):
        return _CHUNKED.select(impl)(q, k, v, g, beta, query_offsets, parents, initial, scale, delta)
    differentiable = (q, k, v, g, beta, initial, rates)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    arguments = (q, k, v, g, beta, query_offsets, parents, initial, scale, delta)
    return _FORWARD.select(impl)(*arguments, keep and impl != "reference", rates)[:2]


def linear_recurrence_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    query_offsets: Tensor,
    load_blocks: Tensor,
    store_rows: Tensor,
    store_blocks: Tensor,
    states: Tensor,
    scale: float = 1.0,
    delta: bool = True,
    *,
    rates: Tensor | None = None,
    chunked: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``linear_recurrence`` for inference, on states that live in blocks of a pool: out [T, H, V].

    Segment s starts from ``states[load_blocks[s]]`` (from zeros where negative). After the token of row
    ``store_rows[i]`` the state is written to ``states[store_blocks[i]]``; a negative block is skipped.

    Args:
        q, k, v, g, beta, query_offsets, scale, delta, rates, chunked: as for ``linear_recurrence``.
        load_blocks: [S] int64.
        store_rows: [M] int64, ascending (ties allowed), each of a segment.
        store_blocks: [M] int64.
        states: [F, H, K, V], float32 (float64 for float64 q), unit stride along V. A segment loads before it stores, so
            both may be one block; a block that one segment stores to must not be loaded or stored by another in the
            same call.

    Returns:
        out in v's dtype.

    Raises:
        ToolkitError: as ``linear_recurrence``.
        RuntimeError: on CPU for blocks or rows out of range, before anything is written.

    Numerics: bitwise identical to ``linear_recurrence``, however a sequence is split into calls: a state is stored as
    it is held; with ``chunked`` equal up to rounding, for a chunk ends at every row of store_rows. No gradient.
    """
    _check_rows(q, k, v, g, beta, rates)
    _check_indices(
        query_offsets,
        load_blocks=(load_blocks, query_offsets.shape[0] - 1),
        store_rows=(store_rows, store_rows.shape[0]),
    )
    _check_indices(query_offsets, store_blocks=(store_blocks, store_rows.shape[0]))
    _check_states("states", states, k, v)
    if states.shape[3] > 1 and states.stride(3) != 1:
        raise ToolkitError(f"states must have a contiguous last dimension, got strides {list(states.stride())}.")
    q, k, v, g = (x.detach() for x in (q, k, v, g))
    beta, rates = (None if x is None else x.detach() for x in (beta, rates))
    arguments = (q, k, v, g, beta, query_offsets, load_blocks, store_rows, store_blocks, states, scale, delta)
    if chunked and _takes_chunks(q, g, query_offsets, rates, impl):
        return _CHUNKED_PAGED.select(impl)(*arguments)
    return _PAGED.select(impl)(*arguments, rates)
