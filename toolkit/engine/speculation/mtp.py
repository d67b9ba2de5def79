"""Drafts by the multi-token prediction layer of the model's own checkpoint."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.engine.backend import Backend, PatchedModel
from toolkit.engine.config import EngineConfig
from toolkit.engine.request import Sequence
from toolkit.engine.runner import ModelRunner
from toolkit.engine.scheduler import Chunk
from toolkit.engine.speculation.draft_model import DraftModel, DraftRequest, Followed
from toolkit.engine.speculation.drafter import Draft
from toolkit.engine.step.decode_graphs import CAPTURE_SIZES, MIXED_SIZES
from toolkit.errors import ToolkitError
from toolkit.patching.mtp import mtp_model, share_vocabulary
from toolkit.state import BlockTables, RaggedBatch, StatePool


class MtpDrafter(DraftModel):
    """A ``DraftModel`` of one layer that reads what the model said of the tokens so far.

    It reads the last hidden states from the model's own blocks, where prefix hits and forks bring them along. Row i of
    a sequence is token i + 1 with the hidden state of token i; the row's output stands in the place of that of token
    i + 1 while that is drafted only. What was drafted so is computed again from the model's own, once verified.

    Args:
        config: of the engine.
        target: the model.
        pool: of its state.
        running: sequences at once.
        max_model_len: tokens of a sequence.

    Raises:
        ToolkitError: the checkpoint has no such layer.
    """

    def __init__(
        self, config: EngineConfig, target: Backend, pool: StatePool, running: int, max_model_len: int
    ) -> None:
        if not isinstance(target, PatchedModel):
            raise ToolkitError("method of speculative_config must be another than 'mtp' for this backend.")
        self.target = target.model
        self._hidden = pool
        layer = PatchedModel(mtp_model(self.target), str(target.numerics))
        super().__init__(layer, config, target, running, max_model_len)

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        layer: Any = self.backend
        share_vocabulary(layer.model, self.target)
        return super().propose(sequences, most)

    def close(self) -> None:
        super().close()
        del self.target, self._hidden

    def _new_runner(self, running: int) -> ModelRunner:
        return _Runner(self.backend, self.pool, running, self.max_model_len, self._hidden)

    def _new_followed(self, sequence: Sequence, request: DraftRequest, tables: BlockTables) -> Followed:
        return _Followed(request, tables, source=sequence)


@dataclass(slots=True)
class _Followed(Followed):
    """``tokens[i]`` is the sequence's token i + 1. Of the first ``known`` the model itself said what comes before."""

    source: Sequence | None = None
    known: int = 0

    def follow(self, tokens: list[int]) -> None:
        first = min(self.block_tables.length, self.known, len(tokens) - 2)
        self.block_tables.truncate(max(0, first))
        self.num_known_blocks = min(self.num_known_blocks, len(self.block_tables.parts[0].blocks))
        self.tokens, self.draft, self.known = tokens[1:], [], len(tokens) - 1


class _Runner(ModelRunner):
    """Runs chunks with the hidden states that their rows read."""

    def __init__(
        self, backend: Backend, pool: StatePool, max_running: int, max_model_len: int, target: StatePool
    ) -> None:
        super().__init__(backend, pool, max_running, max_model_len)
        self._pools = target, pool
        self._read: dict[int, Tensor] = {}  # what decode steps of a size read, which stays where it is

    def build(self, chunks: list[Chunk], size: int, sequences: int) -> tuple[RaggedBatch, Tensor]:
        batch, rows = super().build(chunks, size, sequences)
        rows_of: tuple[list[int], list[int]] = [], []  # rows that read each pool
        slots: tuple[list[int], list[int]] = [], []
        row = 0
        for chunk in chunks:
            followed: Any = chunk.sequence
            drafted = chunk.start >= followed.known  # those run one by one
            tables = followed.block_tables if drafted else followed.source.block_tables
            start = chunk.start - drafted
            slots[drafted].extend(_slots(self._pools[drafted], tables, start, chunk.count))
            rows_of[drafted].extend(range(row, row + chunk.count))
            row += chunk.count
        hidden = self._hidden(len(batch.tokens))
        for pool, read_by, slots_of in zip(self._pools, rows_of, slots, strict=True):
            (kept,) = pool.find(0, "record_hidden")[0].rows
            if read_by:
                hidden[torch.tensor(read_by, device=kept.device)] = kept[torch.tensor(slots_of, device=kept.device), 0]
        return replace(batch, previous_hidden=hidden), rows

    def _hidden(self, rows: int) -> Tensor:
        """[rows, H] to be filled."""
        found = self._read.get(rows)
        if found is None:
            (kept,) = self._pools[1].find(0, "record_hidden")[0].rows
            with torch.inference_mode(False):
                found = torch.zeros(rows, kept.shape[-1], dtype=kept.dtype, device=kept.device)
            if rows in CAPTURE_SIZES or rows in MIXED_SIZES:
                self._read[rows] = found
        return found


def _slots(pool: StatePool, tables: BlockTables, start: int, count: int) -> list[int]:
    """Where the hidden states of a sequence's tokens lie."""
    size, group = pool.block_size, pool.find(0, "record_hidden")[1]
    blocks = tables.parts[group].blocks
    return [blocks[at // size] * size + at % size for at in range(start, start + count)]
