"""The one structure that carries tokens into a model: segments of new tokens over prefix trees of sequences.

Data and its factories alone; what layers do with a batch is a ``ForwardContext``. Shapes: T new tokens, S segments,
L longest sequence, N tokens of all sequences, K experts per token, A axes of positions, M rows given as embeddings of
width H.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.kinds import PagedRows, Snapshots
from toolkit.state.media import Features, MediaRows, MediaSpan, blocks
from toolkit.state.prefix_trees import SharedPrefixes, share_prefixes
from toolkit.state.replay import Recorded
from toolkit.state.row_columns import RowColumns
from toolkit.state.spans import Spans, check_spans, spans_of_rows

# Sharing fewer tokens than this part of all would cost more in gathered keys than it saves.
_WORTH_SHARING = 1 / 16


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """New tokens of S segments, one after the other, and where each one's past lies. All tensors int64.

    A segment is a run of new tokens of one sequence, or of several sequences that have them in common.

    Args:
        tokens: [T] ids, or -1 where the maker does not know them (``for_padded``).
        positions: [T] position in the sequence; or [A, T] positions along A axes, where images have a height and a
            width. They turn queries and keys, and are no index into the sequence: offsets and lengths are.
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
        prompt_lengths: [T] the tokens of the prompt of each row's sequence, -1 for a row that lies in it; None where
            all tokens are a prompt's. Layers look at it that see a prompt and a window of what was written after it.
        adapter_ids: [T] the adapter of each row, as an index of ``adapters``, -1 for none; None where what the model
            has switched on acts on all rows.
        adapters: names of adapters.
        previous_hidden: [T, H] what the model said of the token before each of these, its last hidden state; None where
            nothing reads that. A multi-token prediction layer does.
        spans: [T, 2] the (first, end) index in its sequence of the span that each row lies in, (0, 0) for none; None
            for no spans. The tokens of a span see each other, later ones too (a picture's): a row sees what it would
            without, and its span from there on. A span lies in one segment and in one step of the engine.
        span_layers: the layers that look at spans; None for all.
        embedding_rows: [M] the rows that are given as embeddings, ascending; None for none.
        embeddings: [M, H] theirs, with gradients. ``tokens`` has the ids of their placeholders.
        embedding_levels: [L, M, H] added to them in L of the layers, which are the model's choice; None for none.

    What is to come fits without another shape of class. Nothing here is derived or cached: contexts derive what they
    need, so fields may be buffers that a runner owns and updates in place, and a captured step reads them again. R rows
    per sequence (verification of drafts) are ``query_offsets`` in steps of R; which rows want logits is an argument of
    the forward.
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
    embedding_rows: Tensor | None = None
    embeddings: Tensor | None = None
    embedding_levels: Tensor | None = None
    prompt_lengths: Tensor | None = None
    adapter_ids: Tensor | None = None
    adapters: tuple[str, ...] = ()
    previous_hidden: Tensor | None = None

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
        media: Sequence[Sequence[MediaSpan]] | None = None,
        features: Mapping[bytes, Features] | None = None,
        sequence_positions: Sequence[Tensor | None] | None = None,
        span_layers: frozenset[int] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        adapters: Sequence[str | None] | None = None,
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
            spans: of each sequence the (first, end) positions of its spans, in order; None for those that media have.
                Sequences share whole spans.
            selection: of each sequence the positions [tokens, layers with an indexer, K] that its tokens are to attend
                (``SelectionReplay.kept``); the last token may be missing. Shared as a routing is.
            media: of each sequence the runs of tokens that take rows of items. Sequences share a prefix as far as they
                have its items in common.
            features: of every item that a span names, by its digest.
            sequence_positions: of each sequence positions [tokens] or [A, tokens] in the place of 0, 1, ...; None for
                those, along every axis that another sequence has.
            span_layers: see the field.
            prompt_lengths: of each sequence the tokens of its prompt, see the field. Behind the shorter prompt
                sequences share prefixes only where these are equal.
            adapters: of each sequence the name of the adapter that acts on it, None for none. Sequences of one adapter
                share prefixes.

        Raises:
            ToolkitError: for a routing, selection, rotary_lengths, spans, media or positions that do not fit the
                sequences.
        """
        arrays = [np.asarray(torch.as_tensor(sequence, dtype=torch.int64).cpu()) for sequence in sequences]
        counts = [len(array) for array in arrays]
        recorded = Recorded.of(routing, selection, counts)
        items = MediaRows()
        rows = recorded.rows if recorded else None
        names = tuple(dict.fromkeys(one for one in adapters or () if one is not None))
        ids = None if adapters is None else [-1 if one is None else names.index(one) for one in adapters]
        columns = RowColumns.of_sequences(
            arrays, rows, rotary_lengths, media, sequence_positions, items, prompt_lengths, ids
        )
        if spans is None and media is not None:
            spans = [blocks(one) for one in media]
        if spans is not None:
            check_spans(spans, counts)
            spans = spans if any(map(len, spans)) else None
        by_row = None if spans is None else [spans_of_rows(*one) for one in zip(spans, counts)]
        batch = None
        if share and len(arrays) > 1:
            shared = share_prefixes(columns.names(counts), spans)
            if sum(counts) - shared.size > _WORTH_SHARING * sum(counts):
                batch = cls._of_prefix_trees(shared, by_row, device)
                columns = columns.take(_sources(shared))
        if batch is None:
            batch = cls._packed(counts, device)
            if by_row is not None:
                batch = replace(batch, spans=torch.from_numpy(np.concatenate(by_row)).to(device))
        batch = replace(batch._with_columns(columns, device), adapters=names)
        if recorded is not None and columns.recorded is not None:
            given_fields: dict[str, Any] = dict(recorded.fields(columns.recorded, device))
            batch = replace(batch, **given_fields)
        if batch.spans is not None:
            batch = replace(batch, span_layers=span_layers)
        given = None if columns.media is None else items.embeddings(columns.media, features or {}, device)
        if given is None:
            return batch
        return replace(batch, embedding_rows=given.rows, embeddings=given.values, embedding_levels=given.levels)

    def _with_columns(self, columns: RowColumns, device: torch.device | str | None) -> "RaggedBatch":
        """The batch whose rows have the numbers of ``columns``."""

        def on(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        found = replace(self, tokens=on(columns.tokens))
        if columns.positions is not None:
            found = replace(found, positions=on(columns.positions.T).squeeze(0))
        if columns.rotary_lengths is not None:
            found = replace(found, rotary_lengths=on(columns.rotary_lengths))
        if columns.prompt_lengths is not None:
            found = replace(found, prompt_lengths=on(columns.prompt_lengths))
        if columns.adapter_ids is not None:
            found = replace(found, adapter_ids=on(columns.adapter_ids))
        return found

    @classmethod
    def _packed(cls, counts: Sequence[int], device: torch.device | str | None) -> "RaggedBatch":
        """Sequences of ``counts`` tokens one after the other; ``tokens`` are -1."""
        # Not repeat_interleave: on a busy CPU its threads have been seen to wait for 20 ms.
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(count) for count in counts)])
        lengths = torch.tensor(counts, dtype=torch.int64)
        offsets = _offsets(lengths)
        return cls._on(device, torch.full_like(positions, -1), positions, offsets, offsets[:-1], lengths)

    @classmethod
    def _of_prefix_trees(
        cls, trees: SharedPrefixes, spans: list[np.ndarray] | None, device: torch.device | str | None
    ) -> "RaggedBatch":
        """The batch of ``trees``; ``tokens`` are -1."""
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
            np.full(trees.size, -1),
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
        return replace(cls(*tensors), spans=of_rows)  # type: ignore[arg-type]

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


def _sources(trees: SharedPrefixes) -> np.ndarray:
    """[T] of each row one of the tokens that share it, by its index among the tokens of all sequences."""
    found = np.zeros(trees.size, dtype=np.int64)
    rows = np.concatenate(trees.rows)
    found[rows] = np.arange(len(rows))
    return found


def _offsets(lengths: Tensor) -> Tensor:
    """[n] lengths to [n+1] offsets."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
