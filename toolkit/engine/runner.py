"""From chunks to logits: builds the ragged batch, copies forked pages, runs the model's forward."""

import math
from collections import abc
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.backend import Backend
from toolkit.engine.media import MediaChunk, media_fields
from toolkit.engine.scheduler import Chunk
from toolkit.engine.step.cuda_device import ReadBack
from toolkit.engine.step.decode_graphs import CAPTURE_SIZES, MIXED_SIZES, padded_size
from toolkit.engine.step.inputs import Columns, ResidentTables
from toolkit.engine.step.sampling import Row, SamplingInputs
from toolkit.state import PagedContext, PagedRows, RaggedBatch, Snapshots, StatePool
from toolkit.state.media import Features

UNKNOWN = -1
"""Stands for a token that only the device knows: no embedding has it, so that it shows where it is not replaced."""

ReadResult = abc.Callable[[], Tensor]
AdapterIds = abc.Callable[[list[str | None]], tuple[tuple[str, ...], list[int]] | None]


@dataclass(frozen=True, slots=True)
class SampledStep:
    """What a step left that sampled its rows.

    Args:
        result: [R, 4] on the device, see ``StepSampling``; overwritten by the next step.
        read: waits for it and gives it on the host; valid until the next step, or the next but one where a runner
            ``keeps_results``.
    """

    result: Tensor
    read: ReadResult


class ModelRunner:
    """Runs chunks. Owns the memory of a step's inputs, and writes in it what changed.

    Args:
        backend: the model.
        pool: of the state.
        max_running: most sequences.
        max_model_len: most tokens of one.
        keeps_results: whether what a step has sampled may be read after the next one was launched.
        budget: most tokens of a step, for what is captured ahead.

    Attributes:
        adapter_ids: of the adapter that each sequence of a step chooses, what ``RaggedBatch`` says of it: the names,
            and an index of them for each sequence; None where none chooses one, and for a backend without adapters.
    """

    def __init__(
        self,
        backend: Backend,
        pool: StatePool,
        max_running: int,
        max_model_len: int,
        keeps_results: bool = False,
        budget: int = MIXED_SIZES[-1],
    ) -> None:
        self.adapter_ids: AdapterIds | None = None
        self.backend = backend
        self.pool = pool
        self._shared = backend.device.type == "cpu"
        in_place = _kept if keeps_results else _in_place
        self._read_back: abc.Callable[[Tensor], ReadResult] = in_place if self._shared else ReadBack()
        self._max_running, self._budget = max_running, budget
        width = math.ceil(max_model_len / pool.block_size)
        paged = [at for at, group in enumerate(pool.groups) if not group.snapshot_interval]
        self._tables = ResidentTables(paged, padded_size(max_running), width, backend.device, self._shared)
        self._columns: dict[int, Columns] = {}
        exact = backend.dtype == torch.float64 and self._shared
        self._sampling = SamplingInputs(backend.vocab_size, torch.float64 if exact else torch.float32, backend.device)
        self._sources = torch.zeros(0, dtype=torch.int64, device=backend.device)  # of the rows of the last step
        self._names = [*_COLUMNS]
        for at, group in enumerate(pool.groups):
            self._names += [f"{name} {at}" for name in (_SNAPSHOTS if group.snapshot_interval else _SLOTS)]
        if getattr(backend, "captures_ahead", False):
            self.capture_ahead()

    def forward(self, chunks: list[Chunk], features: abc.Mapping[bytes, Features]) -> Tensor:
        """The logits of ``step``."""
        return self.step(chunks, features)[0]

    def step(
        self,
        chunks: list[Chunk],
        features: abc.Mapping[bytes, Features],
        sampled_rows: abc.Sequence[Row] | None = None,
        previous: Tensor | None = None,
    ) -> tuple[Tensor, SampledStep | None]:
        """Logits [R, V] of the chunks, in order: of each its scored rows, then those that are sampled.

        Writes the state of all chunks.

        Args:
            chunks: of this step.
            features: of the pictures that they take rows of, by digest.
            sampled_rows: what each row of a step that decodes alone is, for the model to sample them; None for not.
            previous: ``SampledStep.result`` of the step before, of which the tokens of chunks with a ``source`` are
                taken on the device; None where there are none.

        Returns:
            The logits, and what the model sampled, where it did.
        """
        copies: list[list[tuple[int, int]]] = [[] for _ in self.pool.groups]
        size, sequences = self._padded(chunks)
        ends = [-(-(chunk.start + chunk.count) // self.pool.block_size) for chunk in chunks]
        with torch.inference_mode(False):
            self._tables.begin(max(len(chunks), sequences), max(ends))
        for row, chunk in enumerate(chunks):
            for of_group, found in zip(copies, self._sync(row, chunk, ends[row]), strict=True):
                of_group += found
        batch, rows = self.build(chunks, size, sequences)
        if previous is not None:
            batch.tokens[: len(chunks)] = previous[:, 0].index_select(0, self._sources)
        batch = self._with_media(batch, chunks, features)
        self.pool.copy_blocks(copies)
        context, backend = PagedContext(batch, self.pool), self.backend
        if sampled_rows is None or not size or not hasattr(backend, "sampled"):
            return backend.forward(context, rows)[: _wanted(chunks)], None
        with torch.inference_mode(False):
            sampling = self._sampling.of(sampled_rows, len(batch.tokens))
        sampler: Any = backend
        logits = sampler.forward(context, rows, sampling)
        if not sampler.sampled:
            return logits, None
        return logits, SampledStep(sampling.result, self._read_back(sampling.result))

    def capture_ahead(self) -> None:
        """Capture the plain step of every size, largest first, so that later ones fit in its memory.

        It writes no state: each sequence's one token has no slot.
        """
        sampler: Any = self.backend
        mixed = [size for size in MIXED_SIZES if sampler.mixed_size(min(size, self._budget)) == size]
        decoding = [size for size in CAPTURE_SIZES if size <= padded_size(self._max_running)]
        # As many rows as sequences are a decode step, also where some of them are a prompt's.
        sizes = {(size, self._sequences(size)) for size in mixed} | {(size, size) for size in decoding}
        with torch.inference_mode():
            sampler.version()
            for columns in self._tables.all_columns:
                for size, sequences in sorted(sizes, reverse=True):
                    with torch.inference_mode(False):
                        self._tables.begin(sequences, columns)
                        sampling = [self._sampling.of([], size)] if size == sequences else []
                    batch, rows = self._stateless(size, sequences)
                    sampler.forward(PagedContext(batch, self.pool), rows, *sampling)

    def _stateless(self, size: int, sequences: int) -> tuple[RaggedBatch, Tensor]:
        """``sequences`` of one token each and padding to ``size`` rows, none of which has a place for its state.

        Second the rows whose logits are wanted: none of a decode step, one for each sequence of a mixed one.
        """
        columns = self._columns_of(size)
        nowhere = [-1] * size
        views: list[PagedRows | Snapshots] = []
        for at in range(len(self.pool.groups)):
            if at in self._tables.groups:
                views.append(PagedRows(self._tables.view(at, sequences), columns.write(f"slots {at}", nowhere)))
            else:
                parts = zip(_SNAPSHOTS, (nowhere[:sequences], range(size), nowhere))
                views.append(Snapshots(*(columns.write(f"{name} {at}", [*part]) for name, part in parts)))
        rotary_length: Any = getattr(self.backend, "rotary_length", lambda declared: None)
        own: dict[str, Any] = {}
        if rotary_length(1) is not None:
            own["rotary_lengths"] = columns.write("rotary", [1] * size)
        batch = RaggedBatch(
            columns.write("tokens", [0] * size),
            columns.write("positions", [0] * size),
            columns.write("query_offsets", [*range(sequences + 1)]),
            columns.view("zeros", sequences),
            columns.write("kv_lengths", [1] * sequences),
            views=tuple(views),
            **own,
        )
        wanted = columns.write("rows", [0] * sequences)
        columns.upload()
        return batch, wanted[:0] if size == sequences else wanted

    def build(self, chunks: list[Chunk], size: int, sequences: int) -> tuple[RaggedBatch, Tensor]:
        """The batch of the chunks, and the rows [R] whose logits are wanted. The next step's are written over both.

        Args:
            chunks: of the step.
            size: rows that it is padded to; 0 for none.
            sequences: that it is padded to. Fewer than rows: of a mixed step, whose wanted rows are padded to as many.
        """
        tokens: list[int] = []
        positions: list[int] = []
        offsets = [0]
        lengths: list[int] = []
        rows: list[int] = []
        rotary: list[int] = []
        prompts: list[int] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.start
            end = start + chunk.count
            if chunk.count == 1:
                tokens.append(sequence.tokens[start] if chunk.source < 0 else UNKNOWN)
                positions.append(start)
            else:
                tokens += chunk.tokens
                positions += range(start, end)
            offsets.append(len(tokens))
            lengths.append(end)
            if sequence.request.rotary_length is not None:
                rotary += [sequence.request.rotary_length] * chunk.count
            if sequence.request.prompt_length is not None:
                prompts += [sequence.request.prompt_length] * chunk.count
            rows += [len(tokens) - end + position for position in chunk.scored]
            if chunk.samples:
                rows += range(len(tokens) - 1 - chunk.drafts, len(tokens))
        count = len(tokens)
        # A decode step is padded with rows that have no slot and with sequences that have no keys and no queries, to
        # as many of one as of the other: one captured graph serves any division of its rows into sequences.
        # A mixed step has fewer sequences than rows, and as many wanted rows as sequences.
        padding, empty = (size - count, sequences - len(chunks)) if size else (0, 0)
        if sequences < size:
            rows += [0] * (sequences - len(rows))
        of_groups = [
            _snapshots(chunks, at, size, empty) if group.snapshot_interval else _slots(chunks, at, padding)
            for at, group in enumerate(self.pool.groups)
        ]
        columns = self._columns_of(max(size, count, *(len(part) for found in of_groups for part in found), len(rows)))
        pad = [0] * padding

        def written(name: str, values: list[int]) -> Tensor:
            return columns.write(name, values)

        chosen = None
        if self.adapter_ids is not None:
            chosen = self.adapter_ids([chunk.sequence.params.lora_name for chunk in chunks])
        own: dict[str, Any] = {}
        if chosen is not None:
            adapters = [one for one, chunk in zip(chosen[1], chunks) for _ in range(chunk.count)]
            own |= {"adapter_ids": written("adapters", adapters + [-1] * padding), "adapters": chosen[0]}
        if rotary:
            own["rotary_lengths"] = written("rotary", rotary + [1] * padding)
        if prompts:
            own["prompt_lengths"] = written("prompts", prompts + [-1] * padding)
        views: list[PagedRows | Snapshots] = []
        for at, found in enumerate(of_groups):
            if at in self._tables.groups:
                table = self._tables.view(at, len(chunks) + empty)
                views.append(PagedRows(table, written(f"slots {at}", found[0])))
            else:
                views.append(Snapshots(*(written(f"{name} {at}", part) for name, part in zip(_SNAPSHOTS, found))))
        batch = RaggedBatch(
            written("tokens", tokens + pad),
            written("positions", positions + pad),
            written("query_offsets", offsets + [count] * empty),
            columns.view("zeros", len(chunks) + empty),
            written("kv_lengths", lengths + [0] * empty),
            views=tuple(views),
            **own,
        )
        if chunks and chunks[0].source >= 0:
            self._sources = written("sources", [chunk.source for chunk in chunks])
        wanted = written("rows", rows)
        columns.upload()
        self._tables.upload()
        return batch, wanted

    def _padded(self, chunks: list[Chunk]) -> tuple[int, int]:
        """The rows and the sequences that a step is padded to; both are 0 where it is not."""
        count = sum(chunk.count for chunk in chunks)
        if all(chunk.decodes for chunk in chunks):
            size = self.backend.decode_size(count)
            return size, size
        of_mixed: abc.Callable[[int], int] = getattr(self.backend, "mixed_size", lambda count: 0)
        size = of_mixed(count)
        sequences = self._sequences(size)
        return (size, sequences) if size and _wanted(chunks) <= sequences else (0, 0)

    def _sequences(self, size: int) -> int:
        """The sequences that a mixed step of ``size`` rows is padded to."""
        return min(size, padded_size(self._max_running))

    def _columns_of(self, rows: int) -> Columns:
        """The columns of a step of so many rows: captured steps of one padded size have theirs."""
        size = rows if rows in CAPTURE_SIZES else 1 << (rows - 1).bit_length()
        found = self._columns.get(size)
        if found is None:
            with torch.inference_mode(False):
                found = Columns(self._names, size, self.backend.device, self._shared)
            self._columns[size] = found
        return found

    def _with_media(
        self, batch: RaggedBatch, chunks: list[Chunk], features: abc.Mapping[bytes, Features]
    ) -> RaggedBatch:
        """``batch`` with the rows of pictures, and with positions along axes where a picture gives them."""
        given = [chunk.sequence.request.media for chunk in chunks]
        axes = next((len(media.positions) for media in given if media and media.positions is not None), None)
        if axes is not None:
            along = batch.positions.expand(axes, -1)
            columns = self._columns_of(len(batch.tokens))
            whole = columns.size == len(batch.tokens)  # what a captured step reads stays where it is
            batch = replace(batch, positions=columns.along_axes(axes).copy_(along) if whole else along.clone())
        found, row = [], 0
        for chunk, media in zip(chunks, given, strict=True):
            if media is not None:
                if media.positions is not None:
                    batch.positions[:, row : row + chunk.count] = media.positions_of(chunk.start, chunk.count)
                if chunk.start < len(media.tokens):
                    found.append(MediaChunk(media, row, chunk.start, chunk.count))
            row += chunk.count
        if not found:
            return batch
        layers = getattr(self.backend, "span_layers", None)
        fields = media_fields(found, len(batch.tokens), layers, features, self.backend.device)
        return replace(batch, **fields)

    def _sync(self, row: int, chunk: Chunk, blocks: int) -> list[list[tuple[int, int]]]:
        """Write a sequence's new blocks into its table row; the block copies that must run before the forward."""
        sequence = chunk.sequence
        tables = sequence.block_tables
        assert tables is not None
        copies = tables.take_copies()
        if any(copies):
            sequence.num_known_blocks = 0
        self._tables.write(row, sequence, blocks)
        return copies


_LENGTHS = ("query_offsets", "zeros", "kv_lengths")
_COLUMNS = ("tokens", "sources", "positions", *_LENGTHS, "rows", "rotary", "prompts", "adapters")
_SLOTS = ("slots",)
_SNAPSHOTS = ("loads", "store_rows", "stores")


def _in_place(result: Tensor) -> ReadResult:
    return lambda: result


def _kept(result: Tensor) -> ReadResult:
    kept = result.clone()
    return lambda: kept


def _slots(chunks: list[Chunk], group: int, padding: int) -> list[list[int]]:
    """The slot of each token."""
    return [[slot for chunk in chunks for slot in chunk.slots[group]] + [-1] * padding]


def _wanted(chunks: list[Chunk]) -> int:
    """Rows of logits that the chunks want."""
    return sum(len(chunk.scored) + (1 + chunk.drafts if chunk.samples else 0) for chunk in chunks)


def _snapshots(chunks: list[Chunk], group: int, size: int, empty: int) -> list[list[int]]:
    """The block that each chunk loads, rows after which the state is stored, and the blocks that it is stored to.

    Padded to ``size`` stores: no row has more than one.
    """
    loads, rows, stores, row = [], [], [], 0
    for chunk in chunks:
        assert chunk.sequence.block_tables is not None
        table = chunk.sequence.block_tables.parts[group]
        loads.append(table.load_block())
        for offset, block in table.store_blocks(chunk.count):
            rows.append(row + offset)
            stores.append(block)
        row += chunk.count
    padding = max(0, size - len(stores))
    return [loads + [-1] * empty, rows + [row - 1] * padding, stores + [-1] * padding]
