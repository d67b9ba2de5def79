"""From chunks to logits: builds the ragged batch, copies forked pages, runs the model's forward."""

import math
from collections import abc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.engine.media import MediaChunk, PromptMedia, media_fields
from toolkit.engine.scheduler import Chunk
from toolkit.engine.step.decode_graphs import DecodeGraphs, padded_size
from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.ops.executor import step_threads
from toolkit.patching import patch, report_of
from toolkit.patching.adapters import adapter_parts, fuse_adapters, inner_model, refresh_scales, vocabulary_size
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import context_forward
from toolkit.patching.multimodal import encode, expand, span_layers, takes_media
from toolkit.patching.sharding import check_unsharded
from toolkit.patching.state_spec import state_spec
from toolkit.patching.weights import weight_clock
from toolkit.state import PagedContext, PagedRows, PrefixKey, RaggedBatch, Snapshots, StatePool, StateSpec
from toolkit.state.media import Features

AdapterIds = abc.Callable[[list[str | None]], tuple[tuple[str, ...], list[int]] | None]


@runtime_checkable
class Backend(Protocol):
    """What the engine needs of a model; anything with these methods may stand in for one.

    A backend whose rotary tables depend on the length of the sequence also has ``rotary_length``, as ``PatchedModel``;
    batches then say by which length each row's are made (``RaggedBatch.rotary_lengths``). ``sampling_threads`` gives a
    context in which the logits of the last forward are sampled. One that takes pictures has
    ``expand``, ``encode`` and ``span_layers``. One with ``keeps_prompts`` is told what each row's prompt is
    (``RaggedBatch.prompt_lengths``).
    """

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos: frozenset[int]

    def layers(self) -> abc.Sequence[StateSpec]:
        """What each layer remembers of a token."""

    def version(self) -> int:
        """A number that changes whenever the weights do."""

    def prefix_key(self) -> PrefixKey:
        """The key of state computed by the weights that ``version`` found."""

    def forward(self, context: PagedContext, rows: Tensor) -> Tensor:
        """Logits [len(rows), vocab_size] at ``rows`` of the batch's tokens."""

    def decode_size(self, rows: int) -> int:
        """The number of rows to pad a decode batch of ``rows`` to; ``rows`` for no padding.

        It is padded to as many sequences too, where several rows are one's.
        """


class PatchedModel:
    """A Hugging Face causal language model as a backend. Patches it unless it is patched already."""

    def __init__(self, model: nn.Module, numerics: str | None = None) -> None:
        model = inner_model(model)
        report = report_of(model)
        if report is None:
            report = patch(model, numerics=numerics)
        parameter = next(model.parameters())
        if numerics is not None and report.numerics is not Numerics.choose(numerics, parameter.device):
            raise ToolkitError(
                f"numerics must be '{report.numerics}', as the model is patched, or None, got {numerics!r}; "
                "unpatch the model first to change it."
            )
        self.model = model
        self.numerics = report.numerics
        self._rotary_regimes = report.rotary_regimes()
        self.keeps_prompts = report.keeps_prompts
        self.device = parameter.device
        self.dtype = parameter.dtype
        config: Any = model.config
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocab_size = vocabulary_size(model)
        # A table of positions has no rows for those before a sequence's first one.
        self.max_model_len = int(getattr(text, "max_position_embeddings", None) or 2048) - report.ragged.position_offset
        self.uncounted_token = report.ragged.uncounted_token
        sources = (getattr(model, "generation_config", None), config, text)
        self.eos = frozenset().union(*(_ids(getattr(source, "eos_token_id", None)) for source in sources))
        self.graphs = DecodeGraphs(model)
        self.clock = weight_clock(model)
        self._seen = (-1, -1)
        self._adapter_parts: list[nn.Module] = []

    def layers(self) -> abc.Sequence[StateSpec]:
        return state_spec(self.model)

    @property
    def grows(self) -> bool:
        """Whether sequences may be longer than ``max_model_len`` when asked for: dynamic NTK, in fast mode."""
        varies = self._rotary_regimes is not None and self._rotary_regimes.varies_after is not None
        return varies and self.numerics is Numerics.FAST

    def rotary_length(self, declared: int) -> int | None:
        """``Completion.rotary_length`` of a request of ``declared`` tokens, so that its tables stay while it grows.

        None where tables do not depend on the length. Raises ToolkitError in bitwise mode where every length has other
        ones.
        """
        regimes = self._rotary_regimes
        if regimes is None:
            return None
        most = regimes.varies_after
        if self.numerics is Numerics.BITWISE and most is not None and declared > most:
            raise ToolkitError(
                f"prompt and max_tokens together must be <= {most} tokens in bitwise mode, got {declared}: beyond that "
                "this model's rotary tables (dynamic NTK) are others for every length. Set a smaller max_tokens, or "
                'numerics="fast".'
            )
        return regimes.canonical(declared)

    def version(self) -> int:
        version = self.clock.version()
        seen = self.clock.layout, self.clock.changes
        if seen != self._seen:
            if seen[0] != self._seen[0]:
                check_unsharded(self.model, "generating")
                fuse_adapters(self.model, self.numerics)
                self._adapter_parts = adapter_parts(self.model)
            refresh_scales(self.model)
            self._seen = seen
        return version

    def prefix_key(self) -> PrefixKey:
        return self.clock.key

    def decode_size(self, rows: int) -> int:
        return padded_size(rows)

    def sampling_threads(self) -> AbstractContextManager[None]:
        """In what the logits of the last forward are sampled: on its threads."""
        return step_threads() if self.graphs.own_threads else nullcontext()

    @property
    def span_layers(self) -> frozenset[int] | None:
        """Indices of the layers in which the tokens of a picture see each other."""
        return span_layers(self.model)

    def expand(self, inputs: abc.Mapping[str, Any]) -> PromptMedia:
        """A prompt of the outputs of the model's processor.

        Raises ToolkitError for a model that takes no pictures, and for outputs that it does not take.
        """
        if not takes_media(self.model):
            raise ToolkitError(
                f"prompt must be a text or token ids, since {type(self.model).__name__} takes no pictures."
            )
        found = expand(self.model, inputs)
        return PromptMedia(found.tokens.tolist(), found.spans, found.items, found.positions, found.delta, found.prompt)

    def encode(self, item: Any) -> Features:
        """What the model computes of one picture, alone: no bit depends on others."""
        with eval_mode(self.model), torch.no_grad():
            return encode(self.model, item)

    def forward(self, context: PagedContext, rows: Tensor) -> Tensor:
        with eval_mode(self.model, self._adapter_parts):
            self.graphs.own_threads = False
            if self.graphs.serves(context):
                logits = self.graphs.forward(context)
                # A native replay's memory is fresh, and to copy these rows would wake OpenMP's threads.
                if self.graphs.own_threads and len(rows) and int(rows[-1]) == len(rows) - 1:
                    return logits[: len(rows)]
                return logits[rows]
            self.graphs.find_hooks()
            return context_forward(self.model, context, rows)


def _ids(eos: Any) -> frozenset[int]:
    return frozenset() if eos is None else frozenset(eos) if isinstance(eos, list | tuple) else frozenset([eos])


class ModelRunner:
    """Runs chunks. Owns the block tables of what runs: one row per sequence, written only where it changed.

    Args:
        backend: the model.
        pool: of the state.
        max_running: most sequences.
        max_model_len: most tokens of one.

    Attributes:
        adapter_ids: of the adapter that each sequence of a step chooses, what ``RaggedBatch`` says of it: the names,
            and an index of them for each sequence; None where none chooses one, and for a backend without adapters.
    """

    def __init__(self, backend: Backend, pool: StatePool, max_running: int, max_model_len: int) -> None:
        self.adapter_ids: AdapterIds | None = None
        self.backend = backend
        self.pool = pool
        width = math.ceil(max_model_len / pool.block_size)
        self._paged = [at for at, group in enumerate(pool.groups) if not group.snapshot_interval]
        self._tables = {at: np.zeros((max_running + 1, width), dtype=np.int64) for at in self._paged}
        self._padding = max_running  # a row that no sequence has

    def forward(self, chunks: list[Chunk], features: abc.Mapping[bytes, Features]) -> Tensor:
        """Logits [R, V] of the chunks, in order: of each its scored rows, then those that are sampled.

        Writes the state of all chunks.

        Args:
            chunks: of this step.
            features: of the pictures that they take rows of, by digest.
        """
        copies: list[list[tuple[int, int]]] = [[] for _ in self.pool.groups]
        for chunk in chunks:
            for of_group, found in zip(copies, self._sync(chunk), strict=True):
                of_group += found
        batch, rows = self.build(chunks)
        batch = self._with_media(batch, chunks, features)
        self.pool.copy_blocks(copies)
        return self.backend.forward(PagedContext(batch, self.pool), rows)

    def build(self, chunks: list[Chunk]) -> tuple[RaggedBatch, Tensor]:
        """The batch of the chunks, and the rows [R] whose logits are wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        offsets = [0]
        lengths: list[int] = []
        rows: list[int] = []
        table_rows: list[int] = []
        rotary: list[int] = []
        prompts: list[int] = []
        blocks = 0
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.start
            end = start + chunk.count
            if chunk.count == 1:
                tokens.append(sequence.tokens[start])
                positions.append(start)
            else:
                tokens += chunk.tokens
                positions += range(start, end)
            offsets.append(len(tokens))
            lengths.append(end)
            table_rows.append(sequence.table_row)
            if sequence.request.rotary_length is not None:
                rotary += [sequence.request.rotary_length] * chunk.count
            if sequence.request.prompt_length is not None:
                prompts += [sequence.request.prompt_length] * chunk.count
            blocks = max(blocks, sequence.num_known_blocks)
            rows += [len(tokens) - end + position for position in chunk.scored]
            if chunk.samples:
                rows += range(len(tokens) - 1 - chunk.drafts, len(tokens))
        count = len(tokens)
        # A decode step is padded with rows that have no slot and with sequences that have no keys and no queries, to
        # as many of one as of the other: one captured graph serves any division of its rows into sequences.
        decodes = all(chunk.decodes for chunk in chunks)
        size = self.backend.decode_size(count) if decodes else 0
        padding = [0] * (size - count)
        empty = size - len(chunks)
        tokens += padding
        positions += padding
        offsets += [count] * empty
        lengths += [0] * empty
        table_rows += [self._padding] * empty
        rotary += [1] * len(padding) if rotary else []
        prompts += [-1] * len(padding) if prompts else []
        # One array, one transfer, then views.
        chosen = None
        if self.adapter_ids is not None:
            chosen = self.adapter_ids([chunk.sequence.params.lora_name for chunk in chunks])
        adapters = [] if chosen is None else [one for one, chunk in zip(chosen[1], chunks) for _ in range(chunk.count)]
        adapters += [-1] * len(padding) if chosen is not None else []
        parts = [tokens, positions, offsets, [0] * len(lengths), lengths, rows, rotary, prompts, adapters]
        of_groups = [
            _snapshots(chunks, at, len(padding), empty) if group.snapshot_interval else _slots(chunks, at, len(padding))
            for at, group in enumerate(self.pool.groups)
        ]
        for found in of_groups:
            parts += found
        flat = np.array([value for part in parts for value in part], dtype=np.int64)
        device = self.backend.device
        tensors = iter(torch.from_numpy(flat).to(device).split([len(part) for part in parts]))
        tokens_T, positions_T, offsets_S, kv_offsets_S, lengths_S, rows_R = (next(tensors) for _ in range(6))
        rotary_T, prompts_T, adapters_T = (next(tensors) for _ in range(3))
        views: list[PagedRows | Snapshots] = []
        for at, found in enumerate(of_groups):
            mine = [next(tensors) for _ in found]
            if at in self._tables:
                table = torch.from_numpy(np.ascontiguousarray(self._tables[at][table_rows, :blocks])).to(device)
                views.append(PagedRows(table, *mine))
            else:
                views.append(Snapshots(*mine))
        batch = RaggedBatch(tokens_T, positions_T, offsets_S, kv_offsets_S, lengths_S, views=tuple(views))
        if chosen is not None:
            batch = replace(batch, adapter_ids=adapters_T, adapters=chosen[0])
        lengths_T = rotary_T if rotary else None
        return replace(batch, rotary_lengths=lengths_T, prompt_lengths=prompts_T if prompts else None), rows_R

    def _with_media(
        self, batch: RaggedBatch, chunks: list[Chunk], features: abc.Mapping[bytes, Features]
    ) -> RaggedBatch:
        """``batch`` with the rows of pictures, and with positions along axes where a picture gives them."""
        given = [chunk.sequence.request.media for chunk in chunks]
        axes = next((len(media.positions) for media in given if media and media.positions is not None), None)
        if axes is not None:
            batch = replace(batch, positions=batch.positions.expand(axes, -1).clone())
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

    def _sync(self, chunk: Chunk) -> list[list[tuple[int, int]]]:
        """Write the sequence's new blocks into its table row; the block copies that must run before the forward."""
        sequence = chunk.sequence
        tables = sequence.block_tables
        assert tables is not None
        copies = tables.take_copies()
        blocks = -(-(chunk.start + chunk.count) // self.pool.block_size)
        if any(copies):
            sequence.num_known_blocks = 0
        known = sequence.num_known_blocks
        if known != blocks:
            for at in self._paged:
                fresh = tables.parts[at].blocks[known:blocks]
                # Blocks before the lookback are not read, but a kernel may load their numbers.
                self._tables[at][sequence.table_row, known:blocks] = [max(block, 0) for block in fresh]
            sequence.num_known_blocks = blocks
        return copies


def _slots(chunks: list[Chunk], group: int, padding: int) -> list[list[int]]:
    """The slot of each token."""
    return [[slot for chunk in chunks for slot in chunk.slots[group]] + [-1] * padding]


def _snapshots(chunks: list[Chunk], group: int, padding: int, empty: int) -> list[list[int]]:
    """The block that each chunk loads, rows after which the state is stored, and the blocks that it is stored to."""
    loads, rows, stores, row = [], [], [], 0
    for chunk in chunks:
        assert chunk.sequence.block_tables is not None
        table = chunk.sequence.block_tables.parts[group]
        loads.append(table.load_block())
        for offset, block in table.store_blocks(chunk.count):
            rows.append(row + offset)
            stores.append(block)
        row += chunk.count
    return [loads + [-1] * empty, rows + [row - 1] * padding, stores + [-1] * padding]
