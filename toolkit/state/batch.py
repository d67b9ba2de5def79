"""The one structure that carries tokens into a model: segments of new tokens over prefix trees of sequences.

Shapes: T new tokens, S sequences, P blocks of the longest sequence.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.causal_conv import causal_conv
from toolkit.ops.linear_recurrence import linear_recurrence
from toolkit.state.kinds import PagedRows, Snapshots
from toolkit.state.prefix_trees import SharedPrefixes, share_prefixes
from toolkit.state.replay import check_routing, name_rows


class _Context(threading.local):
    """What a thread's forwards go by; there from the start, since compiled graphs depend on which attributes exist."""

    def __init__(self) -> None:
        self.batch: RaggedBatch | None = None
        self.observer: RouterObserver | None = None


_context = _Context()


class BatchState(Protocol):
    """What a batch's past lies in: ``StatePool``, or the blocks of a long sequence that is trained in chunks."""

    def attend(
        self, batch: "RaggedBatch", layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int,
        softcap: float, modifiers: dict[str, Any],
    ) -> Tensor: ...  # fmt: skip

    def scan(
        self, batch: "RaggedBatch", layer: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
        scale: float, delta: bool,
    ) -> Tensor: ...  # fmt: skip

    def convolve(
        self, batch: "RaggedBatch", layer: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor: ...

    def record(self, batch: "RaggedBatch", layer: int, ids: Tensor) -> None: ...


class RouterObserver(Protocol):
    """Who takes statistics of routers: see ``observing``."""

    def __call__(
        self, layer: int, logits: Tensor, ids: Tensor, multiplicity: Tensor | None, correction: Tensor | None
    ) -> None: ...


# Sharing fewer tokens than this part of all would cost more in gathered keys than it saves.
_WORTH_SHARING = 1 / 16


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """New tokens of S segments, one after the other, and where each one's past lies. All tensors int64.

    A segment is a run of new tokens of one sequence, or of several sequences that have them in common.

    tokens [T]: ids, or -1 where the maker does not know them (``for_padded``).
    positions [T]: place in the sequence.
    query_offsets [S+1]: the new tokens of s are rows query_offsets[s] .. query_offsets[s+1]. Rows from
        query_offsets[S] on are padding: position 0, slot -1, output zero.
    kv_offsets [S]: first row of s among the batch's own keys, where they lie in one run.
    kv_lengths [S]: tokens of s that exist once the batch has run; the new ones are the last of them.
    block_tables [S, L]: without state, rows of the batch that hold the keys of s, where prefixes are shared; else None.
    query_ranges [T, 3]: beside ``block_tables``: of each row, the first and end row of the queries that see it, and its
        position (segments lie depth first, so what continues a token follows it without a gap).
    parents [S]: without state, the segment that s goes on from; -1 for none. None where there is none at all.
    multiplicity [T]: how many unshared samples a shared token stands for; None for one each.
    sample_rows [N]: of ``from_sequences``: the row of each token of each sequence, one after the other; None: 0 .. T.
    state, views: what the past lies in, and where, a view a group of its layers; None where the batch brings all keys.
    routing [L, T, K]: the experts that each token is to take in each layer of experts; None to let routers choose.
    """

    tokens: Tensor
    positions: Tensor
    query_offsets: Tensor
    kv_offsets: Tensor
    kv_lengths: Tensor
    block_tables: Tensor | None = None
    query_ranges: Tensor | None = None
    parents: Tensor | None = None
    multiplicity: Tensor | None = None
    sample_rows: Tensor | None = None
    state: BatchState | None = None
    views: tuple[PagedRows | Snapshots, ...] = ()
    routing: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | Tensor],
        device: torch.device | str | None = None,
        share: bool = True,
        routing: Sequence[Tensor] | None = None,
    ) -> "RaggedBatch":
        """Whole sequences, without state: the batch of training.

        share: find common prefixes among the sequences (completions of one prompt, preference pairs, trees of turns)
        and compute each shared token once, where that saves a sixteenth of all tokens or more. ``sample_rows`` says
        where each sequence's tokens are. False packs the sequences one after the other. Sequences may be empty, and
        there may be none.
        routing: of each sequence the experts [tokens, layers of experts, K] that its tokens are to take
        (``Completion.routed_experts``); the last token may be missing, see ``check_routing``. Sequences share what they
        begin with as far as they were routed alike.
        """
        arrays = [np.asarray(torch.as_tensor(sequence, dtype=torch.int64).cpu()) for sequence in sequences]
        counts = [len(array) for array in arrays]
        experts = check_routing(routing, counts) if routing is not None else None
        if share and len(arrays) > 1:
            names, tokens_of, experts_of = name_rows(arrays, experts) if experts else (arrays, None, None)
            shared = share_prefixes(names)
            if sum(counts) - shared.size > _WORTH_SHARING * sum(counts):
                batch = cls._of_prefix_trees(shared, device)
                if tokens_of is None or experts_of is None:
                    return batch
                named = torch.from_numpy(tokens_of).to(device)[batch.tokens]
                return replace(batch, tokens=named, routing=_by_layer(experts_of, device)[:, batch.tokens])
        # Not repeat_interleave: on a busy CPU its threads have been seen to wait for 20 ms.
        places = [torch.arange(count) for count in counts]
        nothing = torch.empty(0, dtype=torch.int64)
        tokens = torch.cat([nothing, *map(torch.from_numpy, arrays)])
        positions = torch.cat([nothing, *places])
        lengths = torch.tensor(counts, dtype=torch.int64)
        offsets = _offsets(lengths)
        batch = cls._on(device, tokens, positions, offsets, offsets[:-1], lengths)
        return replace(batch, routing=_by_layer(np.concatenate(experts), device)) if experts else batch

    @classmethod
    def _of_prefix_trees(cls, trees: SharedPrefixes, device: torch.device | str | None) -> "RaggedBatch":
        segments = trees.segments
        counts = np.array([len(one.tokens) for one in segments])
        starts = np.array([one.start for one in segments])
        owner = np.repeat(np.arange(len(segments)), counts)
        rows = np.arange(trees.size)
        positions = starts[owner] + rows - np.array([one.row for one in segments])[owner]
        tables = np.zeros((len(segments), int((starts + counts).max())), dtype=np.int64)
        for index, one in enumerate(segments):
            tables[index, : one.start] = one.rows
            tables[index, one.start : one.start + len(one.tokens)] = np.arange(one.row, one.row + len(one.tokens))
        query_ranges = np.stack([rows, np.array(trees.ends)[owner], positions], 1)
        parts = (
            np.concatenate([one.tokens for one in segments]),
            positions,
            np.concatenate([[0], counts.cumsum()]),
            np.zeros(len(segments), dtype=np.int64),
            starts + counts,
            tables,
            query_ranges,
            np.array([one.parent for one in segments]),
            np.array([len(one.samples) for one in segments])[owner],
            np.concatenate(trees.rows),
        )
        tensors = [torch.from_numpy(part.astype(np.int64, copy=False)).to(device) for part in parts]
        return cls(*tensors)  # type: ignore[arg-type]

    @classmethod
    def for_padded(cls, mask: Tensor, q_len: int) -> "RaggedBatch":
        """The batch of an ordinary padded call: flattened queries [B * q_len] over flattened keys [B * S].

        mask: [B, S], true where there is a token; a row's tokens are contiguous, padded left, right or both.
        q_len: queries of each row, the last q_len of its S places.

        Nothing needs to be gathered: padding before the tokens sees no key, padding after them is a segment
        without keys, and keys are reached by offset. Rows of padding come out as zeros.

        Reads the mask on the host once, so make it once a forward. Raises ToolkitError for a mask that has
        holes or another shape, or q_len outside 0..S.
        """
        if mask.dim() != 2:
            raise ToolkitError(f"attention_mask has shape {tuple(mask.shape)}; [batch, length] is allowed.")
        rows, width = mask.shape
        if not 0 <= q_len <= width:
            raise ToolkitError(f"q_len is {q_len} for an attention_mask of length {width}; 0 to {width} are allowed.")
        # Plain tensors even inside inference mode: callers keep plans, and a later backward saves them.
        with torch.inference_mode(False), torch.no_grad():
            host = mask.detach().to("cpu", torch.bool)
            places = torch.arange(width)
            length = host.sum(1)
            end = torch.where(host, places + 1, 0).amax(1) if width else length
            start = end - length
            filled = (places >= start[:, None]) & (places < end[:, None])
            if not torch.equal(filled, host):
                row = int((filled != host).any(1).nonzero()[0])
                raise ToolkitError(f"attention_mask has a hole in row {row}; only padding left or right is allowed.")
            first = width - q_len
            seen = (end - first).clamp(0, q_len)
            kv_offsets = torch.arange(rows) * width + start
            if bool((seen < q_len).any()):
                # Padding after the tokens is a segment of its own, without keys.
                queries = torch.stack([seen, q_len - seen], 1).flatten()
                kv_offsets = torch.stack([kv_offsets, kv_offsets], 1).flatten()
                length = torch.stack([length, torch.zeros_like(length)], 1).flatten()
            else:
                queries = seen
            positions = (places[first:] - start[:, None]).clamp_min(0)
            positions = torch.where(host[:, first:], positions, 0).flatten()
            tokens = torch.tensor(-1).expand(rows * q_len)
            return cls._on(mask.device, tokens, positions, _offsets(queries), kv_offsets, length)

    @classmethod
    def unpadded(cls, rows: int, q_len: int, width: int, device: torch.device | str | None = None) -> "RaggedBatch":
        """``for_padded`` of a mask [rows, width] that is true everywhere, from the numbers alone."""
        places = torch.arange(width - q_len, width).repeat(rows)
        starts = torch.arange(rows + 1)
        tokens = torch.tensor(-1).expand(rows * q_len)
        lengths = torch.full((rows,), width, dtype=torch.int64)
        return cls._on(device, tokens, places, starts * q_len, starts[:-1] * width, lengths)

    @classmethod
    def _on(cls, device: torch.device | str | None, *parts: Tensor) -> "RaggedBatch":
        tokens, positions, query_offsets, kv_offsets, kv_lengths = (part.to(device) for part in parts)
        return cls(tokens, positions, query_offsets, kv_offsets, kv_lengths)

    @property
    def sequence(self) -> Tensor:
        """[T] sequence of each row, by its place in ``kv_lengths``; S for padding rows."""
        rows = torch.arange(len(self.tokens), device=self.query_offsets.device)
        return torch.searchsorted(self.query_offsets, rows, right=True) - 1

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | int,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        **modifiers: Any,
    ) -> Tensor:
        """Causal attention of the new tokens over their own sequences.

        q [T, Hq, D], k [T, H, D] and v [T, H, Dv] give [T, Hq, Dv]; a number for v: the first v columns of k (latent
        attention). modifiers: further arguments of ``toolkit.ops.attention``, such as ``sinks``.

        With state, k and v first go into the layer's blocks, and the past is read from there. Without, keys
        and values are the given rows (from ``for_padded``: more of them than queries), and gradients reach
        all three.
        """
        if isinstance(v, int):
            v = k[..., :v]
        if self.state is not None:
            return self.state.attend(self, layer, q, k, v, scale, window, softcap, modifiers)
        if self.query_ranges is not None:
            modifiers["query_ranges"] = self.query_ranges
        out, _ = attention(
            q, k, v, self.query_offsets, self.kv_offsets, self.kv_lengths, self.block_tables, 1,
            scale, window, softcap, **modifiers,
        )  # fmt: skip
        return out

    def scan(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None = None,
        *,
        scale: float = 1.0,
        delta: bool = False,
    ) -> Tensor:
        """``linear_recurrence`` of the new tokens along their own sequences: [T, H, V]."""
        if self.state is not None:
            return self.state.scan(self, layer, q, k, v, g, beta, scale, delta)
        out, _ = linear_recurrence(q, k, v, g, beta, self.query_offsets, self._starts, None, scale, delta)
        return out

    def convolve(
        self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """``causal_conv`` of the new tokens' channels [T, C] along their own sequences; weight [C, width]."""
        if self.state is not None:
            return self.state.convolve(self, layer, x, weight, bias, activation)
        return causal_conv(x, weight, bias, self.query_offsets, self.past(weight.shape[1] - 1), None, activation)

    def note_routing(self, layer: int, ids: Tensor) -> None:
        """Record the experts ids [T, K] that the new tokens go to in a layer of experts, where the state keeps that."""
        if self.state is not None:
            self.state.record(self, layer, ids)

    def note_scores(self, layer: int, logits: Tensor, ids: Tensor, correction: Tensor | None = None) -> None:
        """Show a layer's router, logits [T, E] and its choice ids [T, K], to who is ``observing`` this forward.

        correction: [E] the bias of the choice, where the router has one.
        """
        observer = _context.observer
        if observer is not None:
            observer(layer, logits, ids, self.multiplicity, correction)

    def replayed(self, layer: int, experts: int | None = None) -> Tensor | None:
        """[T, K] int64: what tokens are to take in a layer instead of the router's choice; None to choose.

        experts: how many there are. Raises ToolkitError where ``routing`` has no such layer, or more experts.
        """
        if self.routing is None:
            return None
        if layer >= len(self.routing):
            raise ToolkitError(f"routing has {len(self.routing)} layers of experts; the model has more.")
        if experts is not None and self._experts_named > experts:
            raise ToolkitError(f"routing has the expert {self._experts_named - 1}; allowed are 0 to {experts - 1}.")
        self._replayed_layers.add(layer)
        return self.routing[layer]

    def check_replayed(self) -> None:
        """After a forward: raise ToolkitError unless every layer of ``routing`` was asked for by a router."""
        if self.routing is not None and len(self._replayed_layers) < len(self.routing):
            missing = sorted(set(range(len(self.routing))) - self._replayed_layers)
            raise ToolkitError(
                f"routing has {len(self.routing)} layers of experts, of which no router of the model took {missing}; "
                "replaying needs every router patched (role 'router')."
            )

    @cached_property
    def _replayed_layers(self) -> set[int]:
        return set()

    @cached_property
    def _experts_named(self) -> int:
        """One more than the largest id of ``routing``."""
        return int(self.routing.amax()) + 1 if self.routing is not None and self.routing.numel() else 0

    @cached_property
    def _starts(self) -> Tensor:
        """[S] ``parents``, spelled out."""
        return torch.full_like(self.kv_lengths, -1) if self.parents is None else self.parents

    def past(self, count: int) -> Tensor:
        """[S, count] rows of the tokens before each segment's first, oldest first; -1 where there is none."""
        known = self.__dict__.setdefault("_past", {})
        if count not in known:
            start = self.kv_lengths - self.query_offsets.diff()
            place = start[:, None] + torch.arange(-count, 0, device=start.device)
            if self.block_tables is None:
                known[count] = torch.full_like(place, -1)
            else:
                known[count] = torch.where(place < 0, -1, self.block_tables.gather(1, place.clamp_min(0)))
        return known[count]

    @contextmanager
    def activate(self) -> Iterator["RaggedBatch"]:
        """Make this the thread's active batch, for models that drop keywords on the way down."""
        outer = RaggedBatch.active()
        _context.batch = self
        try:
            yield self
        finally:
            _context.batch = outer

    @staticmethod
    def active() -> "RaggedBatch | None":
        """The batch of the innermost ``activate`` of this thread, or None."""
        return _context.batch


@contextmanager
def observing(observer: RouterObserver | None) -> Iterator[None]:
    """Show ``observer`` what routers do in this thread's forwards; None: nobody.

    A layer that activation checkpointing runs again, in the backward, is not shown again.
    """
    outer = _context.observer
    _context.observer = observer
    try:
        yield
    finally:
        _context.observer = outer


def _by_layer(experts: np.ndarray, device: torch.device | str | None) -> Tensor:
    """[T, L, K] to [L, T, K]: a layer's part in one piece."""
    return torch.from_numpy(np.ascontiguousarray(experts.transpose(1, 0, 2))).to(device)


def _offsets(lengths: Tensor) -> Tensor:
    """[n] lengths to [n+1] offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
