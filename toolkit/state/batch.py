"""The one structure that carries tokens into a model: segments of new tokens over a forest of sequences.

Shapes: T new tokens, S sequences, P pages of the longest sequence.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import attention
from toolkit.ops.state_write import state_write
from toolkit.state.pool import StatePool

_context = threading.local()


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """New tokens of S sequences, one after the other, and where each sequence's past lies. All tensors int64.

    tokens [T]: ids, or -1 where the maker does not know them (``for_padded``).
    positions [T]: place in the sequence.
    query_offsets [S+1]: the new tokens of s are rows query_offsets[s] .. query_offsets[s+1]. Rows from
        query_offsets[S] on are padding: position 0, slot -1, output zero.
    kv_offsets [S]: first row of s among the batch's own keys, where there is no state.
    kv_lengths [S]: tokens of s that exist once the batch has run; the new ones are the last of them.
    block_tables [S, P]: physical pages of s in order, ``page_size`` slots each; None without state.
    slots [T]: where a new token's state goes, page * page_size + place; None without state.
    multiplicity [T]: how many unshared samples a shared token stands for; None for one each.
    state: the pool that the pages are of; None where the batch brings all its keys.
    """

    tokens: Tensor
    positions: Tensor
    query_offsets: Tensor
    kv_offsets: Tensor
    kv_lengths: Tensor
    block_tables: Tensor | None = None
    slots: Tensor | None = None
    page_size: int = 1
    multiplicity: Tensor | None = None
    state: StatePool | None = None

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
    ) -> "RaggedBatch":
        """Whole sequences packed one after the other, without state: the batch of training.

        Sequences may be empty, and there may be none.
        """
        counts = [len(sequence) for sequence in sequences]
        parts = [torch.as_tensor(sequence, dtype=torch.int64).cpu() for sequence in sequences]
        # Not repeat_interleave: on a busy CPU its threads have been seen to wait for 20 ms.
        places = [torch.arange(count) for count in counts]
        nothing = torch.empty(0, dtype=torch.int64)
        tokens, positions = torch.cat([nothing, *parts]), torch.cat([nothing, *places])
        lengths = torch.tensor(counts, dtype=torch.int64)
        offsets = _offsets(lengths)
        return cls._on(device, tokens, positions, offsets, offsets[:-1], lengths)

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
        v: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Causal attention of the new tokens over their own sequences.

        q [T, Hq, D], k [T, H, D] and v [T, H, Dv] give [T, Hq, Dv].

        With state, k and v first go into the layer's pages, and the past is read from there. Without, keys
        and values are the given rows (from ``for_padded``: more of them than queries), and gradients reach
        all three.
        """
        if self.state is None:
            keys, values = k, v
        else:
            keys, values = self.state.keys[layer], self.state.values[layer]
            assert self.slots is not None
            state_write(keys, k, self.slots)
            state_write(values, v, self.slots)
        out, _ = attention(
            q,
            keys,
            values,
            self.query_offsets,
            self.kv_offsets,
            self.kv_lengths,
            self.block_tables,
            self.page_size,
            scale,
            window,
            softcap,
        )
        return out

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
        return getattr(_context, "batch", None)


def _offsets(lengths: Tensor) -> Tensor:
    """[n] lengths to [n+1] offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
