"""Gradients of one sequence whose activations do not fit: in chunks, from the last to the first.

A first pass without gradients stores, for every layer, what later chunks read: keys and values, recurrent states,
convolution tails. Then the chunks run again from the last to the first, each with gradients. The gradients of a chunk
with respect to the keys, values and states of earlier tokens are accumulated until those tokens' chunk runs. The
activations of one chunk are held at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.ops import IGNORED
from toolkit.ops.attention import attention, attention_backward
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.linear_logprob.deferred import summed_cross_entropy
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.patching.forward import context_forward
from toolkit.patching.logprobs import choose_rotary_lengths
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings, ForwardContext

Key = tuple[int, str, int]
"""A layer, what it does there ("scan" or "convolve"), and which of these it is."""


class _LayerKeys:
    """Keys and values of all tokens of one layer on ``device``, and the gradients with respect to them so far."""

    def __init__(self, length: int, k: Tensor, v: Tensor, device: torch.device) -> None:
        self.keys = k.new_zeros(length, *k.shape[1:], device=device)
        self.values = v.new_zeros(length, *v.shape[1:], device=device)
        self.dkeys: Tensor | None = None
        self.dvalues: Tensor | None = None

    def accumulate(self, dk: Tensor, dv: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Add the gradients of tokens up to ``stop``; returns the sums of tokens ``start .. stop``."""
        if self.dkeys is None or self.dvalues is None:
            self.dkeys, self.dvalues = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        self.dkeys[:stop] += dk.to(self.dkeys.device)
        self.dvalues[:stop] += dv.to(self.dvalues.device)
        return self.dkeys[start:stop].to(dk.device), self.dvalues[start:stop].to(dv.device)


class _Attend(torch.autograd.Function):
    """Attention of a chunk over all tokens so far: k and v are the chunk's, the rest comes from the layer's state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, state: _LayerKeys, batch: RaggedBatch,
        start: int, settings: AttentionSettings, spans: Tensor | None,
    ) -> Tensor:  # fmt: skip
        stop = start + len(q)
        state.keys[start:stop] = k
        state.values[start:stop] = v
        keys, values = (kept[:stop].to(q.device) for kept in (state.keys, state.values))
        plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths
        out, lse = attention(q, keys, values, *(*plan, None, 0, *settings.of_op), None, spans)
        # Saved tensors hold the sinks: autograd frees those after the backward.
        ctx.state, ctx.plan, ctx.settings, ctx.span = state, plan, settings._replace(sinks=None), (start, stop)
        ctx.save_for_backward(q, out, lse, sinks, spans)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, sinks, spans = ctx.saved_tensors
        scale, window, softcap, _, modifier, parameters = ctx.settings.of_op
        start, stop = ctx.span
        offsets, first, lengths = ctx.plan
        keys, values = (kept[:stop].to(q.device) for kept in (ctx.state.keys, ctx.state.values))
        dq, dk, dv, dsinks = attention_backward(
            grad, q, keys, values, out, lse, offsets, first, lengths, scale, window, softcap,
            sinks=sinks, modifier=modifier, parameters=parameters, spans=spans,
        )  # fmt: skip
        dk, dv = ctx.state.accumulate(dk, dv, start, stop)
        return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None, None


class ChunkedState:
    """What all chunks of one sequence of ``length`` tokens leave for each other, on ``device``.

    Attributes:
        keys: of each layer with attention.
        starts: of each recurrence and convolution, its state at the start of each chunk.
        grads: of each recurrence and convolution, the gradient of the state at the end of the chunk that runs next.
    """

    def __init__(self, length: int, device: torch.device) -> None:
        self.length = length
        self.device = device
        self.keys: dict[int, _LayerKeys] = {}
        self.starts: dict[Key, dict[int, Tensor]] = {}
        self.grads: dict[Key, Tensor] = {}


class ChunkedContext(ForwardContext):
    """The forward of chunk number ``chunk``, whose first token is ``start``, over the chunks before it.

    Without gradients it stores what later chunks read; with gradients, ``backward`` takes those of later chunks in.
    """

    def __init__(self, batch: RaggedBatch, state: ChunkedState, chunk: int, start: int) -> None:
        super().__init__(batch)
        self.state = state
        self.chunk = chunk
        self.start = start
        self._leaves: list[tuple[Key, Tensor]] = []
        self._ends: list[tuple[Key, Tensor]] = []

    def backward(self, loss: Tensor) -> None:
        """The chunk's gradients, including those from later chunks; stores those that earlier chunks need."""
        roots, seeds = [loss], [torch.ones_like(loss)]
        for key, end in self._ends:
            if key in self.state.grads:
                roots.append(end)
                seeds.append(self.state.grads.pop(key).to(end.device))
        torch.autograd.backward(roots, seeds)
        for key, leaf in self._leaves:
            if leaf.grad is not None:
                self.state.grads[key] = leaf.grad.to(self.state.device)
        for starts in self.state.starts.values():
            starts.pop(self.chunk + 1, None)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        k, v = settings.kept(k, v)
        keys = self.state.keys.get(layer)
        if keys is None:
            keys = self.state.keys[layer] = _LayerKeys(self.state.length, k, v, self.state.device)
        spans = self.seen_ahead(layer)
        out: Tensor = _Attend.apply(q, k, v, settings.sinks, keys, self.batch, self.start, settings, spans)  # type: ignore[no-untyped-call]
        return out

    def scan(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, scale: float, delta: bool,
        rates: Tensor | None = None, part: int = 0,
    ) -> Tensor:  # fmt: skip
        key, offsets = (layer, "scan", part), self.batch.query_offsets
        dtype = torch.promote_types(v.dtype, torch.float32)
        initial = self._begin(key, v.new_zeros(1, v.shape[1], k.shape[2], v.shape[2], dtype=dtype))
        plan = offsets, offsets.new_full((1,), -2), initial
        out, ends = linear_recurrence(q, k, v, g, beta, *plan, scale, delta, rates=rates, chunked=self.chunked)
        self._end(key, ends)
        return out

    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
        part: int = 0,
    ) -> Tensor:  # fmt: skip
        key, width = (layer, "convolve", part), weight.shape[1] - 1
        tails = self._begin(key, x.new_zeros(1, width, x.shape[1]))
        past = -2 - torch.arange(width, device=x.device)[None]
        out = causal_conv(x, weight, bias, self.batch.query_offsets, past, tails, activation)
        self._end(key, torch.cat([tails[0], x])[-width:][None])
        return out

    def record_routing(self, layer: int, ids: Tensor) -> None:
        """Nothing: a chunk that runs again is routed as before."""

    def _begin(self, key: Key, empty: Tensor) -> Tensor:
        """The state that the chunk continues: a leaf, whose gradient the chunk before needs."""
        stored = self.state.starts.setdefault(key, {}).get(self.chunk)
        leaf = (empty if stored is None else stored.to(empty.device)).detach().requires_grad_(torch.is_grad_enabled())
        if self.chunk:
            self._leaves.append((key, leaf))
        return leaf

    def _end(self, key: Key, end: Tensor) -> None:
        if torch.is_grad_enabled():
            self._ends.append((key, end))
        else:
            self.state.starts[key][self.chunk + 1] = end.to(self.state.device)


def backward_in_chunks(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    targets: Tensor | None = None,
    chunk_tokens: int = 1024,
    state_device: torch.device | str | None = None,
) -> float:
    """The mean next-token loss of one long sequence, in nats, whose gradient is added to the parameters' ``grad``.

    loss = -mean_t log p(target_t | tokens up to t). Gradients equal those of the whole sequence at once up to rounding.
    Memory is that of ``chunk_tokens`` tokens, and twice (itself and its gradient) that of every layer's state of the
    sequence. Costs one more forward.

    Args:
        model: patched.
        tokens: [L] ids.
        targets: [L] int64, the token that follows each token, -100 where it does not count; None: the next token.
        chunk_tokens: tokens of a chunk, 8 or more.
        state_device: where the state is stored; "cpu" keeps it out of a GPU's memory. None: where the model is.

    Raises:
        ToolkitError: for a chunk of less than 8 tokens, targets of another length, or a model that is not patched.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    if chunk_tokens < 8:
        raise ToolkitError(f"chunk_tokens must be >= 8, got {chunk_tokens}.")
    if targets is None:
        targets = torch.cat([ids[1:], ids.new_full((min(1, len(ids)),), IGNORED)])
    if targets.shape != ids.shape:
        raise ToolkitError(f"targets must have the tokens' shape {list(ids.shape)}, got {list(targets.shape)}.")
    targets = targets.to(device)
    counted = int((targets != IGNORED).sum())
    if counted == 0:
        return 0.0
    starts = list(range(0, len(ids), chunk_tokens))
    rotary = choose_rotary_lengths(model, [len(ids)])
    state = ChunkedState(len(ids), torch.device(state_device) if state_device is not None else device)

    def forward(chunk: int) -> tuple[ChunkedContext, Tensor]:
        start = starts[chunk]
        stop = min(start + chunk_tokens, len(ids))
        offsets, first, length = (torch.tensor(one, device=device) for one in ([0, stop - start], [0], [stop]))
        positions = torch.arange(start, stop, device=device)
        of_rows = None if rotary is None else offsets.new_full((stop - start,), rotary[0])
        batch = RaggedBatch(ids[start:stop], positions, offsets, first, length, rotary_lengths=of_rows)
        context = ChunkedContext(batch, state, chunk, start)
        rows = (targets[start:stop] != IGNORED).nonzero().flatten()
        if not torch.is_grad_enabled():
            rows = rows[:1]  # the head is only wanted for its loss
        logits = context_forward(model, context, rows)
        return context, summed_cross_entropy(logits, targets[start:stop][rows]) / counted

    with torch.no_grad():
        for chunk in range(len(starts) - 1):
            forward(chunk)
    total = 0.0
    with torch.enable_grad():
        for chunk in reversed(range(len(starts))):
            context, loss = forward(chunk)
            context.backward(loss)
            total += float(loss.detach())
    return total
