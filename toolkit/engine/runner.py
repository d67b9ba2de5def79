"""From chunks to logits: builds the ragged batch, copies forked pages, runs the model's forward."""

import math
import os
from collections.abc import Iterator
from collections.abc import Sequence as Collection
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.engine.decode import DecodePrograms, padded_size
from toolkit.engine.scheduler import Chunk
from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.patch import patch, report_of
from toolkit.patch.forward import ragged_forward
from toolkit.patch.state_spec import state_spec
from toolkit.patch.weights import weight_clock, weight_version
from toolkit.state import LayerSpec, RaggedBatch, StatePool

_CPU_BYTES = 4 << 30


@runtime_checkable
class Backend(Protocol):
    """What the engine needs of a model: anything with these can stand in for one."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos: frozenset[int]

    def layers(self) -> Collection[LayerSpec]:
        """What each layer remembers of a token."""

    def version(self) -> int:
        """Moves whenever the weights do."""

    def forward(self, batch: RaggedBatch, rows: Tensor) -> Tensor:
        """Logits [len(rows), vocab_size] at ``rows`` of the batch's tokens."""

    def decode_size(self, sequences: int) -> int:
        """Sequences to pad a batch of one new token each to; ``sequences`` for no padding."""


class PatchedModel:
    """A Hugging Face causal language model as a backend. Patches it unless it is patched already."""

    def __init__(self, model: nn.Module, numerics: str | None = None) -> None:
        report = report_of(model)
        if report is None:
            report = patch(model, numerics=numerics)
        parameter = next(model.parameters())
        if numerics is not None and report.numerics is not Numerics.choose(numerics, parameter.device):
            raise ToolkitError(
                f"numerics is {numerics!r} but the model is patched as '{report.numerics}'; "
                "allowed are that one and None, or unpatch the model first."
            )
        self.model = model
        self.device = parameter.device
        self.dtype = parameter.dtype
        config: Any = model.config
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.vocab_size = int(embeddings.num_embeddings)
        self.max_model_len = int(getattr(text, "max_position_embeddings", None) or 2048)
        sources = (getattr(model, "generation_config", None), config, text)
        self.eos = frozenset().union(*(_ids(getattr(source, "eos_token_id", None)) for source in sources))
        self.programs = DecodePrograms(model)

    def layers(self) -> Collection[LayerSpec]:
        return state_spec(self.model)

    def version(self) -> int:
        return weight_version(self.model)

    def decode_size(self, sequences: int) -> int:
        return padded_size(sequences)

    def forward(self, batch: RaggedBatch, rows: Tensor) -> Tensor:
        with _evaluating(self.model):
            if self.programs.serves(batch):
                return self.programs.forward(batch)[rows]
            # A prompt enters: the moment to notice that the model is made of other parts than before.
            self.programs.refresh()
            weight_clock(self.model).refresh()
            return ragged_forward(self.model, batch, rows)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout is for training: a model in train mode is sampled without it, and stays in train mode."""
    training = [module for module in model.modules() if module.training] if model.training else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _ids(eos: Any) -> frozenset[int]:
    return frozenset() if eos is None else frozenset(eos) if isinstance(eos, list | tuple) else frozenset([eos])


def default_pages(layers: Collection[LayerSpec], page_size: int, wanted: int, backend: Backend) -> int:
    """``wanted`` pages, or as many as the device has memory to spend on.

    That is 80 % of what a GPU has free, and a quarter of a CPU's memory up to 4 GiB.
    """
    if backend.device.type == "cuda":
        memory = int(0.8 * torch.cuda.mem_get_info(backend.device)[0])
    else:
        memory = min(_CPU_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    page = max(1, StatePool.page_bytes(layers, page_size, backend.dtype))
    return max(1, min(wanted, memory // page))


class Runner:
    """Runs chunks. Owns the block tables of what runs: a row a sequence, written only where it changed."""

    def __init__(self, backend: Backend, pool: StatePool, max_running: int, max_model_len: int) -> None:
        self.backend = backend
        self.pool = pool
        width = min(pool.num_pages, math.ceil(max_model_len / pool.page_size))
        self._tables = np.zeros((max_running + 1, width), dtype=np.int64)
        self._padding = max_running  # a row that no sequence has

    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Logits [samples, V] of the chunks that sample, in order. Fills the chunks' slots."""
        copies = [pair for chunk in chunks for pair in self._sync(chunk)]
        batch, rows = self.build(chunks)
        self.pool.copy_pages(copies)
        return self.backend.forward(batch, rows)

    def build(self, chunks: list[Chunk]) -> tuple[RaggedBatch, Tensor]:
        """The batch of the chunks, and the rows [samples] whose logits are wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        offsets = [0]
        lengths: list[int] = []
        rows: list[int] = []
        places: list[int] = []
        pages = 0
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.start
            end = start + chunk.count
            if chunk.count == 1:
                tokens.append(sequence.tokens[start])
                positions.append(start)
            else:
                tokens += sequence.tokens[start:end]
                positions += range(start, end)
            slots += chunk.slots
            offsets.append(len(tokens))
            lengths.append(end)
            places.append(sequence.place)
            pages = max(pages, sequence.known_pages)
            if chunk.samples:
                rows.append(len(tokens) - 1)
        count = len(chunks)
        if len(tokens) == count:  # a decode step: padding rows have no slot, no keys and no queries of theirs
            padding = [0] * (self.backend.decode_size(count) - count)
            tokens += padding
            positions += padding
            slots += [-1] * len(padding)
            offsets += [count] * len(padding)
            lengths += padding
            places += [self._padding] * len(padding)
        # One array, one transfer, then views.
        parts = [tokens, positions, slots, offsets, [0] * len(lengths), lengths, rows]
        flat = np.array([value for part in parts for value in part], dtype=np.int64)
        device = self.backend.device
        on_device = torch.from_numpy(flat).to(device).split([len(part) for part in parts])
        tokens_T, positions_T, slots_T, offsets_S, kv_offsets_S, lengths_S, rows_R = on_device
        tables_SP = torch.from_numpy(np.ascontiguousarray(self._tables[places, :pages])).to(device)
        batch = RaggedBatch(
            tokens=tokens_T,
            positions=positions_T,
            query_offsets=offsets_S,
            kv_offsets=kv_offsets_S,
            kv_lengths=lengths_S,
            block_tables=tables_SP,
            slots=slots_T,
            page_size=self.pool.page_size,
            state=self.pool,
        )
        return batch, rows_R

    def _sync(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Write the sequence's new pages into its row; the page copies that must run before the forward."""
        sequence = chunk.sequence
        table = sequence.table
        assert table is not None
        copies = table.take_copies()
        pages = len(table.pages)
        if copies:
            sequence.known_pages = 0
        if sequence.known_pages != pages:
            self._tables[sequence.place, sequence.known_pages : pages] = table.pages[sequence.known_pages :]
            sequence.known_pages = pages
        return copies
