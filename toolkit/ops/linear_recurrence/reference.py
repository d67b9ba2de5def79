"""The gated linear recurrence in plain torch, token by token: the specification."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.ops.rowwise import compute_dtype

CHUNK = 64  # tokens of a segment from one saved state to the next
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # to q, k, v, g, beta, initial, rates


def _heads(x: Tensor, count: int) -> Tensor:
    """[Hk, K] as [H, K, 1]: every key head under each of the value heads that use it."""
    return x.repeat_interleave(count // x.shape[0], 0)[..., None]


class _Tokens:
    """The rows of one call in the dtype of the arithmetic; ``step`` takes a state over one of them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float, delta: bool,
        rates: Tensor | None,
    ) -> None:  # fmt: skip
        self.type = compute_dtype(q)
        self.q, self.k, self.v, self.g = (x.to(self.type) for x in (q, k, v, g))
        self.rates = None if rates is None else rates.to(self.type)
        self.beta = self.g.new_ones(v.shape[:2]) if beta is None else beta.to(self.type)
        self.scale, self.delta, self.heads = scale, delta, v.shape[1]
        self.shape = (v.shape[1], k.shape[-1], v.shape[-1])

    def zeros(self, *leading: int) -> Tensor:
        return self.q.new_zeros(*leading, *self.shape)

    def decay(self, t: int) -> Tensor:
        """[H, K, 1], or [H, 1, 1] where all keys have one."""
        log = self.g[t] if self.g.dim() == 3 else self.g[t][:, None]
        log = log if self.rates is None else log * self.rates
        return log.exp()[..., None]  # a row at a time: eager exp's bits depend on the place in a tensor

    def write(self, t: int, decayed: Tensor) -> tuple[Tensor, Tensor]:
        """(v_t minus what the state answers to k_t, u_t), both [H, V]."""
        left = self.v[t]
        if self.delta:
            left = left - (decayed * _heads(self.k[t], self.heads)).sum(1)
        return left, self.beta[t][:, None] * left

    def advance(self, t: int, state: Tensor) -> Tensor:
        decayed = self.decay(t) * state
        _, u = self.write(t, decayed)
        return decayed + _heads(self.k[t], self.heads) * u[:, None]

    def step(self, t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.advance(t, state)
        return state, self.scale * (state * _heads(self.q[t], self.heads)).sum(1)


def _start(s: int, parents: list[int], finals: list[Tensor] | Tensor, initial: Tensor | None, zero: Tensor) -> Tensor:
    if parents[s] >= 0:
        return finals[parents[s]]
    if parents[s] == -1:
        return zero
    assert initial is not None
    return initial[-2 - parents[s]]


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, parents: Tensor,
    initial: Tensor | None, scale: float, delta: bool, keep: bool = False, rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, finals, states kept for the backward). Differentiable."""
    tokens = _Tokens(q, k, v, g, beta, scale, delta, rates)
    bounds, origins = query_offsets.tolist(), parents.tolist()
    kept = tokens.zeros(q.shape[0] // CHUNK if keep else 0)
    rows: list[Tensor] = []
    finals: list[Tensor] = []
    for s, (first, end) in enumerate(pairwise(bounds)):
        state = _start(s, origins, finals, initial, tokens.zeros())
        for t in range(first, end):
            chunk, within = divmod(t - first, CHUNK)
            if keep and chunk and not within:
                kept[first // CHUNK + chunk - 1] = state.detach()
            state, row = tokens.step(t, state)
            rows.append(row)
        finals.append(state)
    padding = tokens.v.new_zeros(v.shape[0] - len(rows), *v.shape[1:])
    out = torch.cat([torch.stack(rows), padding]) if rows else padding
    return out.to(v.dtype), torch.stack(finals) if finals else tokens.zeros(0), kept


def linear_recurrence_backward(
    grad: Tensor | None, grad_finals: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    query_offsets: Tensor, parents: Tensor, initial: Tensor | None, finals: Tensor, kept: Tensor,
    scale: float, delta: bool, rates: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients to q, k, v, g, beta, initial and rates (the last three empty where there is none).

    With ``D = exp(g) S_before``, ``p = D^T k``, ``dS`` the gradient to the state after the token plus ``scale q do^T``:
    ``dq = scale S do``, ``du = dS^T k``, ``dv = beta du``, ``dbeta = du . (v - p)``, ``dp = -beta du`` (0 without the
    delta rule), ``dk = dS u + D dp``, ``dD = dS + k dp^T``, the gradient to a key's logarithm is ``dD . D`` summed over
    its row (``dg`` sums it over rows, times their rates where there are rates), and ``exp(g) dD`` is passed to the
    token before. Segments are walked from the last to the first, so a parent adds its children's in that order.
    """
    tokens = _Tokens(q, k, v, g, beta, scale, delta, rates)
    bounds, origins = query_offsets.tolist(), parents.tolist()
    upstream = torch.zeros_like(tokens.v) if grad is None else grad.to(tokens.type)
    pending = torch.zeros_like(finals) if grad_finals is None else grad_finals.clone()
    dq, dk, dv, dg, dbeta = (torch.zeros_like(x) for x in (tokens.q, tokens.k, tokens.v, tokens.g, tokens.beta))
    drates = None if tokens.rates is None else torch.zeros_like(tokens.rates)
    dinitial = q.new_empty(0) if initial is None else torch.zeros_like(initial)
    for s in reversed(range(len(origins))):
        before = [_start(s, origins, finals, initial, tokens.zeros())]
        for t in range(bounds[s], bounds[s + 1]):
            before.append(tokens.advance(t, before[-1]))
        above = pending[s]
        for t in reversed(range(bounds[s], bounds[s + 1])):
            after, decay = before.pop(), tokens.decay(t)
            key, query, row = _heads(tokens.k[t], tokens.heads), _heads(tokens.q[t], tokens.heads), upstream[t]
            decayed = decay * before[-1]
            left, u = tokens.write(t, decayed)
            above = above + scale * query * row[:, None]
            du = (above * key).sum(1)
            to_query, to_key = scale * (after * row[:, None]).sum(2), (above * u[:, None]).sum(2)
            dv[t] = tokens.beta[t][:, None] * du
            dbeta[t] = (du * left).sum(1)
            if delta:
                to_key = to_key - (decayed * dv[t][:, None]).sum(2)
                above = above - key * dv[t][:, None]
            if tokens.rates is not None and drates is not None:
                of_keys = (above * decayed).sum(2)
                dg[t] = (of_keys * tokens.rates).sum(1)
                drates = drates + of_keys * tokens.g[t][:, None]
            else:
                dg[t] = (above * decayed).sum((1, 2) if g.dim() == 2 else 2)
            above = decay * above
            dq[t] = to_query.unflatten(0, (q.shape[1], -1)).sum(1)
            dk[t] = to_key.unflatten(0, (q.shape[1], -1)).sum(1)
        if origins[s] >= 0:
            pending[origins[s]] += above
        elif origins[s] < -1:
            dinitial[-2 - origins[s]] += above
    to_beta = dbeta.to(beta.dtype) if beta is not None else q.new_empty(0)
    to_rates = drates.to(rates.dtype) if rates is not None and drates is not None else q.new_empty(0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), to_beta, dinitial, to_rates


def linear_recurrence_paged(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, load_blocks: Tensor,
    store_rows: Tensor, store_blocks: Tensor, states: Tensor, scale: float, delta: bool, rates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out; writes the frames of ``states`` that are asked for."""
    tokens = _Tokens(q, k, v, g, beta, scale, delta, rates)
    bounds, origins = query_offsets.tolist(), load_blocks.tolist()
    frames: dict[int, list[int]] = {}
    for row, frame in zip(store_rows.tolist(), store_blocks.tolist()):
        if frame >= 0:
            frames.setdefault(row, []).append(frame)
    out = torch.zeros_like(tokens.v, memory_format=torch.contiguous_format)
    for s, (first, end) in enumerate(pairwise(bounds)):
        state = tokens.zeros() if origins[s] < 0 else states[origins[s]].clone()
        for t in range(first, end):
            state, out[t] = tokens.step(t, state)
            for frame in frames.get(t, ()):
                states[frame] = state
    return out.to(v.dtype)


def linear_recurrence_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, parents: Tensor,
    initial: Tensor | None, scale: float, delta: bool, keep: bool, rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    state = (v.shape[1], k.shape[2], v.shape[2])
    options: dict[str, Any] = {"dtype": compute_dtype(q), "device": q.device}
    kept = torch.empty(q.shape[0] // CHUNK if keep else 0, *state, **options)
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(parents.shape[0], *state, **options),
        kept,
    )


def linear_recurrence_backward_fake(
    grad: Tensor | None, grad_finals: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    query_offsets: Tensor, parents: Tensor, initial: Tensor | None, finals: Tensor, kept: Tensor,
    scale: float, delta: bool, rates: Tensor | None = None,
) -> Gradients:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return like(q), like(k), like(v), like(g), like(beta), like(initial), like(rates)


def linear_recurrence_paged_fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, load_blocks: Tensor,
    store_rows: Tensor, store_blocks: Tensor, states: Tensor, scale: float, delta: bool, rates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)
