"""The one structure that carries tokens into a model: segments of new tokens over prefix trees of sequences.

Data and its factories alone; what layers do with a batch is a ``ForwardContext``. Shapes: T new tokens, S segments,
L longest sequence, N tokens of all sequences, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.kinds import PagedRows, Snapshots
from toolkit.state.prefix_trees import SharedPrefixes, share_prefixes
from toolkit.state.replay import Recorded, name_rows
from toolkit.state.spans import Spans, check_spans, spans_of_rows

# Sharing fewer tokens than this part of all would cost more in gathered keys than it saves.
_WORTH_SHARING = 1 / 16


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """New tokens of S segments, one after the other, and where each one's past lies. All tensors int64.

    A segment is a run of new tokens of one sequence, or of several sequences that have them in common.

    Args:
        tokens: [T] ids, or -1 where the maker does not know them (``for_padded``).
        positions: [T] position in the sequence.
        query_offsets: [S+1] the new tokens of s are rows query_offsets[s] .. query_offsets[s+1]. Rows from
            query_offsets[S] on are padding: position 0, slot -1, output zero.
        kv_offsets: [S] first row of s among the batch's own keys, where they lie in one run.
        kv_lengths: [S] tokens of s that exist once the batch has run; the new ones are the last of them.
        block_tables: [S, L] rows of the batch that hold the keys of s, where prefixes are shared; None where each
            segment's keys lie in one run, and for paged batches.
        query_ranges: [T, 3] beside ``block_tables``: of each row, the first and end row of the queries that see it, and
            its position. Segments lie depth first, so what continues a token follows it without a gap, and the tokens
            of its span lie in its segment.
        parents: [S] the segment that s continues, -1 for none; None where no segment continues another.
        multiplicity: [T] how many unshared samples a shared token stands for; None for one each.
        sample_rows: [N] of ``from_sequences``: the row of each token of each sequence, one after the other; None for
            0 .. T.
        views: where the past lies in each group of layers, for ``PagedContext``; empty where the batch brings all keys.
        routing: [layers of experts, T, K] the experts that each token is to take; None to let routers choose.
        selection: [layers with an indexer, T, K] the positions that each token is to attend in the place of its
            indexers' choice, ascending, -1 behind the last one; None to let indexers choose.
        rotary_lengths: [T] the length of the sequence by which each row's rotary tables are made, fixed for the life of
            a sequence; None where the model's tables do not depend on it, or by its own length (``RotaryRegimes``).
        spans: [T, 2] the (first, end) index in its sequence of the span that each row lies in, (0, 0) for none; None
            for no spans. The tokens of a span see each other, later ones too (a picture's): a row sees what it would
            without, and its span from there on. A span lies in one segment and in one step of the engine.
        span_layers: the layers that look at spans; None for all.

    What is to come fits without another shape of class. Nothing here is derived or cached: contexts derive what they
    need, so fields may be buffers that a runner owns and updates in place, and a captured step reads them again.

    - Rows given as embeddings: a field ``embeddings`` [T, H] beside ``tokens`` (-1 there), which
      ``context_forward`` hands to the model in the place of ids.
    - Positions along several axes: ``positions`` [axes, T]. Only ``context_forward`` reads positions; contexts go by
      offsets and lengths.
    - An adapter per row: a field ``adapter_ids`` [T], which linear layers read from the active context's batch.
    - R rows per sequence (verification of drafts): ``query_offsets`` in steps of R; which rows want logits is an
      argument of the forward.
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
    views: tuple[PagedRows | Snapshots, ...] = ()
    routing: Tensor | None = None
    rotary_lengths: Tensor | None = None
    spans: Tensor | None = None
    span_layers: frozenset[int] | None = None
    selection: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | Tensor],
        device: torch.device | str | None = None,
        share: bool = True,
        routing: Sequence[Tensor] | None = None,
        rotary_lengths: Sequence[int] | None = None,
        spans: Spans | None = None,
        selection: Sequence[Tensor] | None = None,
    ) -> "RaggedBatch":
        """The batch of whole sequences, without state: what training runs.

        Args:
            sequences: token ids of each sequence. Sequences may be empty, and there may be none.
            device: of the batch's tensors.
            share: find common prefixes among the sequences (completions of one prompt, preference pairs, trees of
                turns) and compute each shared token once, where that saves a sixteenth of all tokens or more.
                ``sample_rows`` says where each sequence's tokens are. False packs the sequences one after the other.
            routing: of each sequence the experts [tokens, layers of experts, K] that its tokens are to take
                (``Completion.routed_experts``); the last token may be missing, see ``check_routing``. Sequences share
                a prefix as far as they have its routing in common.
            rotary_lengths: of each sequence, see the field. Sequences share prefixes only where these are equal.
            spans: of each sequence the (first, end) positions of its spans, in order. Sequences share whole spans.
            selection: of each sequence the positions [tokens, layers with an indexer, K] that its tokens are to attend
                (``SelectionReplay.kept``); the last token may be missing. Shared as a routing is.

        Raises:
            ToolkitError: for a routing, selection, rotary_lengths or spans that do not fit the sequences.
        """
        arrays = [np.asarray(torch.as_tensor(sequence, dtype=torch.int64).cpu()) for sequence in sequences]
        counts = [len(array) for array in arrays]
        recorded = Recorded.of(routing, selection, counts)
        if rotary_lengths is not None and len(rotary_lengths) != len(arrays):
            raise ToolkitError(
                f"rotary_lengths must have one entry per sequence ({len(arrays)}), got {len(rotary_lengths)}."
            )
        if spans is not None:
            check_spans(spans, counts)
            spans = spans if any(map(len, spans)) else None
        spans_by_row = None if spans is None else [spans_of_rows(*one) for one in zip(spans, counts)]
        if share and len(arrays) > 1:
            names, tokens_of, recorded_of = name_rows(arrays, recorded.rows) if recorded else (arrays, None, None)
            distinct, kinds, low, span = _spread(names, rotary_lengths)
            names = [one + span * kind for one, kind in zip(names, kinds, strict=True)]
            shared = share_prefixes(names, spans)
            if sum(counts) - shared.size > _WORTH_SHARING * sum(counts):
                batch = cls._of_prefix_trees(shared, spans_by_row, device)
                if rotary_lengths is not None:
                    kind = (batch.tokens - low) // span
                    lengths_of = torch.from_numpy(distinct).to(device)[kind]
                    batch = replace(batch, tokens=batch.tokens - span * kind, rotary_lengths=lengths_of)
                if recorded is None or tokens_of is None or recorded_of is None:
                    return batch
                named = batch.tokens.cpu().numpy()
                tokens = torch.from_numpy(tokens_of[named]).to(device)
                return replace(batch, tokens=tokens, **recorded.fields(recorded_of[named], device))
        # Not repeat_interleave: on a busy CPU its threads have been seen to wait for 20 ms.
        indices = [torch.arange(count) for count in counts]
        nothing = torch.empty(0, dtype=torch.int64)
        tokens = torch.cat([nothing, *map(torch.from_numpy, arrays)])
        positions = torch.cat([nothing, *indices])
        lengths = torch.tensor(counts, dtype=torch.int64)
        offsets = _offsets(lengths)
        batch = cls._on(device, tokens, positions, offsets, offsets[:-1], lengths)
        if rotary_lengths is not None:
            of_rows = np.repeat(np.asarray(rotary_lengths, dtype=np.int64), counts)
            batch = replace(batch, rotary_lengths=torch.from_numpy(of_rows).to(device))
        if spans_by_row is not None:
            batch = replace(batch, spans=torch.from_numpy(np.concatenate(spans_by_row)).to(device))
        return replace(batch, **recorded.fields(np.concatenate(recorded.rows), device)) if recorded else batch

    @classmethod
    def _of_prefix_trees(
        cls, trees: SharedPrefixes, spans: list[np.ndarray] | None, device: torch.device | str | None
    ) -> "RaggedBatch":
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
        own_spans, first_queries = None, rows
        if spans is not None:
            own_spans = np.concatenate(
                [spans[one.samples[0]][one.start : one.start + len(one.tokens)] for one in segments]
            )
            inside = own_spans[:, 0] < own_spans[:, 1]
            first_queries = np.where(inside, rows - positions + own_spans[:, 0], rows)
        query_ranges = np.stack([first_queries, np.array(trees.ends)[owner], positions], 1)
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
        of_rows = None if own_spans is None else torch.from_numpy(own_spans).to(device)
        return cls(*tensors, spans=of_rows)  # type: ignore[arg-type]

    @classmethod
    def for_padded(cls, mask: Tensor, q_len: int) -> "RaggedBatch":
        """The batch of an ordinary padded call: flattened queries [B * q_len] over flattened keys [B * L].

        Nothing needs to be gathered: padding before the tokens sees no key, padding after them is a segment
        without keys, and keys are reached by offset. Rows of padding come out as zeros.
        Reads the mask on the host once, so make it once per forward.

        Args:
            mask: [B, L], true where there is a token; a row's tokens are contiguous, padded left, right or both.
            q_len: queries of each row, the last q_len of its L positions.

        Raises:
            ToolkitError: for a mask that has holes or another shape, or q_len outside 0..L.
        """
        if mask.dim() != 2:
            raise ToolkitError(f"attention_mask must have shape [batch, length], got {list(mask.shape)}.")
        rows, width = mask.shape
        if not 0 <= q_len <= width:
            raise ToolkitError(f"q_len must be between 0 and the attention_mask's length {width}, got {q_len}.")
        # Plain tensors even inside inference mode: callers keep plans, and a later backward saves them.
        with torch.inference_mode(False), torch.no_grad():
            host = mask.detach().to("cpu", torch.bool)
            indices = torch.arange(width)
            length = host.sum(1)
            end = torch.where(host, indices + 1, 0).amax(1) if width else length
            start = end - length
            filled = (indices >= start[:, None]) & (indices < end[:, None])
            if not torch.equal(filled, host):
                row = int((filled != host).any(1).nonzero()[0])
                raise ToolkitError(f"attention_mask must be padded left or right only, got a hole in row {row}.")
            first = width - q_len
            seen = (end - first).clamp(0, q_len)
            kv_offsets = torch.arange(rows) * width + start
            if bool((seen < q_len).any()):
                # Padding after the tokens is a separate segment without keys.
                queries = torch.stack([seen, q_len - seen], 1).flatten()
                kv_offsets = torch.stack([kv_offsets, kv_offsets], 1).flatten()
                length = torch.stack([length, torch.zeros_like(length)], 1).flatten()
            else:
                queries = seen
            positions = (indices[first:] - start[:, None]).clamp_min(0)
            positions = torch.where(host[:, first:], positions, 0).flatten()
            tokens = torch.tensor(-1).expand(rows * q_len)
            return cls._on(mask.device, tokens, positions, _offsets(queries), kv_offsets, length)

    @classmethod
    def unpadded(cls, rows: int, q_len: int, width: int, device: torch.device | str | None = None) -> "RaggedBatch":
        """``for_padded`` of a mask [rows, width] that is true everywhere, from the numbers alone."""
        indices = torch.arange(width - q_len, width).repeat(rows)
        starts = torch.arange(rows + 1)
        tokens = torch.tensor(-1).expand(rows * q_len)
        lengths = torch.full((rows,), width, dtype=torch.int64)
        return cls._on(device, tokens, indices, starts * q_len, starts[:-1] * width, lengths)

    @classmethod
    def _on(cls, device: torch.device | str | None, *parts: Tensor) -> "RaggedBatch":
        tokens, positions, query_offsets, kv_offsets, kv_lengths = (part.to(device) for part in parts)
        return cls(tokens, positions, query_offsets, kv_offsets, kv_lengths)

    @property
    def sequence_ids(self) -> Tensor:
        """[T] segment of each row, by its index in ``kv_lengths``; S for padding rows."""
        rows = torch.arange(len(self.tokens), device=self.query_offsets.device)
        return torch.searchsorted(self.query_offsets, rows, right=True) - 1


def _spread(names: Sequence[np.ndarray], lengths: Sequence[int] | None) -> tuple[np.ndarray, Sequence[int], int, int]:
    """(distinct lengths, index of each sequence's, lowest name, span of the names): sequences whose names are moved by
    their index times the span have no prefix in common with those of another length."""
    if lengths is None:
        return np.empty(0, dtype=np.int64), [0] * len(names), 0, 0
    distinct, kinds = np.unique(np.asarray(lengths, dtype=np.int64), return_inverse=True)
    flat = np.concatenate(names)
    low, high = (int(flat.min()), int(flat.max())) if len(flat) else (0, 0)
    return distinct, kinds.tolist(), low, high - low + 1


def _offsets(lengths: Tensor) -> Tensor:
    """[n] lengths to [n+1] offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
