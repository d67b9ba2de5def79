"""Gradients of one sequence that is longer than its activations allow: in chunks, backwards.

A first pass without gradients leaves, of every layer, what later chunks read: keys and values, recurrent states,
convolution tails. Then the chunks are run again from the last to the first, each with gradients; what a chunk's
backward owes to earlier tokens (the gradient of their keys, values and states) waits until their chunk is run.
Activations of one chunk are held at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention, attention_backward
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.linear_logprob.deferred import summed_cross_entropy
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.patching.forward import ragged_forward
from toolkit.state.batch import RaggedBatch


class _Attention:
    """Keys and values of all tokens of one layer, and the gradients that are owed to them, on ``device``."""

    def __init__(self, length: int, k: Tensor, v: Tensor, device: torch.device) -> None:
        self.keys = k.new_zeros(length, *k.shape[1:], device=device)
        self.values = v.new_zeros(length, *v.shape[1:], device=device)
        self.dkeys: Tensor | None = None
        self.dvalues: Tensor | None = None

    def owe(self, dk: Tensor, dv: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Note the gradients of tokens before ``start``; returns all that tokens ``start .. stop`` have got by now."""
        if self.dkeys is None or self.dvalues is None:
            self.dkeys, self.dvalues = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        self.dkeys[:stop] += dk.to(self.dkeys.device)
        self.dvalues[:stop] += dv.to(self.dvalues.device)
        return self.dkeys[start:stop].to(dk.device), self.dvalues[start:stop].to(dv.device)


class _Attend(torch.autograd.Function):
    """Attention of a chunk over all tokens so far: k and v are the chunk's, the rest comes from the layer's state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, state: _Attention, batch: RaggedBatch,
        start: int, settings: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        stop = start + len(q)
        state.keys[start:stop] = k
        state.values[start:stop] = v
        keys, values = (kept[:stop].to(q.device) for kept in (state.keys, state.values))
        plan = batch.query_offsets, batch.kv_offsets, batch.kv_lengths
        scale, window, softcap, modifier, parameters = settings
        out, lse = attention(q, keys, values, *plan, None, 0, scale, window, softcap, sinks, modifier, parameters)
        ctx.state, ctx.plan, ctx.settings, ctx.span = state, plan, settings, (start, stop)
        ctx.save_for_backward(q, out, lse, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, sinks = ctx.saved_tensors
        scale, window, softcap, modifier, parameters = ctx.settings
        start, stop = ctx.span
        offsets, first, lengths = ctx.plan
        keys, values = (kept[:stop].to(q.device) for kept in (ctx.state.keys, ctx.state.values))
        dq, dk, dv, dsinks = attention_backward(
            grad, q, keys, values, out, lse, offsets, first, lengths, scale, window, softcap,
            sinks=sinks, modifier=modifier, parameters=parameters,
        )  # fmt: skip
        dk, dv = ctx.state.owe(dk, dv, start, stop)
        return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


class ChunkedState:
    """The past of one sequence of ``length`` tokens: the ``state`` of its chunks' batches."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.length = length
        self.device = device
        self.start = 0
        self.chunk = 0
        self._attention: dict[int, _Attention] = {}
        # What each recurrence and convolution goes on from at the start of each chunk, and the gradient owed to it.
        self._carried: dict[tuple[int, str], dict[int, Tensor]] = {}
        self._owed: dict[tuple[int, str], Tensor] = {}
        self._leaves: list[tuple[tuple[int, str], Tensor]] = []
        self._ends: list[tuple[tuple[int, str], Tensor]] = []

    def begin(self, chunk: int, start: int) -> None:
        """Before a chunk's forward."""
        self.chunk, self.start = chunk, start
        self._leaves, self._ends = [], []

    def backward(self, loss: Tensor) -> None:
        """The chunk's gradients, with those that later chunks owe it; notes what it owes to the ones before."""
        roots, seeds = [loss], [torch.ones_like(loss)]
        for key, end in self._ends:
            if key in self._owed:
                roots.append(end)
                seeds.append(self._owed.pop(key).to(end.device))
        torch.autograd.backward(roots, seeds)
        for key, leaf in self._leaves:
            if leaf.grad is not None:
                self._owed[key] = leaf.grad.to(self.device)
        for kept in self._carried.values():
            kept.pop(self.chunk + 1, None)

    def attend(
        self, batch: RaggedBatch, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int,
        softcap: float, modifiers: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        state = self._attention.get(layer)
        if state is None:
            state = self._attention[layer] = _Attention(self.length, k, v, self.device)
        settings = scale, window, softcap, modifiers.get("modifier", ""), modifiers.get("parameters")
        return _Attend.apply(q, k, v, modifiers.get("sinks"), state, batch, self.start, settings)

    def _before(self, key: tuple[int, str], empty: Tensor) -> Tensor:
        """What a layer goes on from: a leaf, whose gradient the chunk before is owed."""
        kept = self._carried.setdefault(key, {}).get(self.chunk)
        leaf = (empty if kept is None else kept.to(empty.device)).detach().requires_grad_(torch.is_grad_enabled())
        if self.chunk:
            self._leaves.append((key, leaf))
        return leaf

    def _after(self, key: tuple[int, str], end: Tensor) -> None:
        if torch.is_grad_enabled():
            self._ends.append((key, end))
        else:
            self._carried[key][self.chunk + 1] = end.to(self.device)

    def scan(
        self, batch: RaggedBatch, layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
        scale: float, delta: bool,
    ) -> Tensor:  # fmt: skip
        key = (layer, "scan")
        dtype = torch.promote_types(v.dtype, torch.float32)
        initial = self._before(key, v.new_zeros(1, v.shape[1], k.shape[2], v.shape[2], dtype=dtype))
        parents = batch.query_offsets.new_full((1,), -2)
        out, ends = linear_recurrence(q, k, v, g, beta, batch.query_offsets, parents, initial, scale, delta)
        self._after(key, ends)
        return out

    def convolve(
        self, batch: RaggedBatch, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        key, width = (layer, "convolve"), weight.shape[1] - 1
        tails = self._before(key, x.new_zeros(1, width, x.shape[1]))
        past = -2 - torch.arange(width, device=x.device)[None]
        out = causal_conv(x, weight, bias, batch.query_offsets, past, tails, activation)
        self._after(key, torch.cat([tails[0], x])[-width:][None])
        return out

    def record(self, batch: RaggedBatch, layer: int, ids: Tensor) -> None:
        """Nothing: a chunk that is run again is routed as before."""


def backward_in_chunks(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    targets: Tensor | None = None,
    chunk_tokens: int = 1024,
    state_device: torch.device | str | None = None,
) -> float:
    """Add the gradient of the mean next-token loss of one long sequence to the parameters' ``grad``.

    loss = -mean_t log p(target_t | tokens up to t), in nats; returned. Equal, up to rounding, to the backward of the
    whole sequence at once; its memory is that of ``chunk_tokens`` tokens, and what every layer remembers of the
    sequence, twice (itself and its gradient). Costs one more forward.

    model: patched. tokens: [L]. targets: [L] int64, what each token is followed by, negative where nothing counts;
    None: the next token. state_device: where the state waits; "cpu" keeps it out of a GPU's memory. None: where the
    model is. Raises ToolkitError for a chunk of less than 8 tokens, targets of another length, or a model that is not
    patched.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    if chunk_tokens < 8:
        raise ToolkitError(f"chunk_tokens is {chunk_tokens}; allowed are 8 and more.")
    if targets is None:
        targets = torch.cat([ids[1:], ids.new_full((min(1, len(ids)),), -1)])
    if targets.shape != ids.shape:
        raise ToolkitError(
            f"targets have shape {list(targets.shape)}; allowed is {list(ids.shape)}, that of the tokens."
        )
    targets = targets.to(device)
    counted = int((targets >= 0).sum())
    if counted == 0:
        return 0.0
    starts = list(range(0, len(ids), chunk_tokens))
    state = ChunkedState(len(ids), torch.device(state_device) if state_device is not None else device)

    def forward(chunk: int) -> Tensor:
        start = starts[chunk]
        stop = min(start + chunk_tokens, len(ids))
        state.begin(chunk, start)
        offsets, first, length = (torch.tensor(one, device=device) for one in ([0, stop - start], [0], [stop]))
        positions = torch.arange(start, stop, device=device)
        batch = RaggedBatch(ids[start:stop], positions, offsets, first, length, state=state)
        rows = (targets[start:stop] >= 0).nonzero().flatten()
        if not torch.is_grad_enabled():
            rows = rows[:1]  # the head is only wanted for its loss
        logits = ragged_forward(model, batch, rows)
        return summed_cross_entropy(logits, targets[start:stop][rows]) / counted

    with torch.no_grad():
        for chunk in range(len(starts) - 1):
            forward(chunk)
    total = 0.0
    with torch.enable_grad():
        for chunk in reversed(range(len(starts))):
            loss = forward(chunk)
            state.backward(loss)
            total += float(loss.detach())
    return total
