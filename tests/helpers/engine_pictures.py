"""A stand-in model whose prompts have pictures: its logits are a function of every token, feature and position.

A prompt is written as a list: an int is a token, a ``Picture`` some rows of a picture.
"""

import copy
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.engine_standin import HistoryModel, logits_of
from toolkit.engine.media import PromptMedia
from toolkit.ops.state_write import state_write
from toolkit.state import PagedContext, PagedRows
from toolkit.state.media import Features, MediaSpan

PLACEHOLDER = 7


class Picture(NamedTuple):
    """``length`` rows of a picture from ``offset`` on."""

    name: str
    length: int
    offset: int = 0
    bidirectional: bool = False


def _feature(name: str, row: int) -> int:
    return 1000 + (hash_of(name)[0] << 8) + row


def hash_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class PictureModel(HistoryModel):
    """Rotary positions have two axes; behind pictures both are ahead of the index."""

    span_layers = frozenset({1})

    def __init__(self, max_model_len: int = 256) -> None:
        super().__init__(max_model_len)
        self.encoded: list[str] = []
        self.fail_on = ""

    def expand(self, inputs: dict) -> PromptMedia:
        tokens: list[int] = []
        spans: list[MediaSpan] = []
        (parts,) = inputs["input_ids"]
        for part in parts:
            if isinstance(part, Picture):
                spans.append(MediaSpan(len(tokens), part.length, hash_of(part.name), part.offset, part.bidirectional))
                tokens += [PLACEHOLDER] * part.length
            else:
                tokens.append(part)
        index = torch.arange(len(tokens))
        ahead = 3 * sum(((index >= span.first + span.length).long() for span in spans), torch.zeros_like(index))
        positions = torch.stack([index + ahead, index * 2])
        delta = 3 * len(spans)
        items = {hash_of(part.name): part.name for part in parts if isinstance(part, Picture)}
        return PromptMedia(tokens, tuple(spans), items, positions, delta)

    def encode(self, item: str) -> Features:
        if item == self.fail_on:
            raise RuntimeError("a broken picture")
        self.encoded.append(item)
        return Features(torch.tensor([[float(_feature(item, row))] for row in range(64)]))

    def decode_size(self, sequences: int) -> int:
        return sequences

    def forward(self, context: PagedContext, rows: Tensor) -> Tensor:
        batch, pool = context.batch, context.pool
        self.batches.append(copy.deepcopy(batch))  # the runner writes the next step over it
        (view,) = batch.views
        assert isinstance(view, PagedRows)
        tokens = batch.tokens.float()
        if batch.embedding_rows is not None:
            assert (batch.tokens[batch.embedding_rows] == PLACEHOLDER).all()
            tokens[batch.embedding_rows] = batch.embeddings[:, 0]
        for state, written in zip(pool.states, (tokens, batch.positions.movedim(0, -1).float()), strict=True):
            columns = written[:, None, None] if written.dim() == 1 else written[:, None, :]
            for store, values in zip(state.rows, columns.split(1, -1) if columns.shape[-1] > 1 else (columns,) * 2):
                state_write(store, values.contiguous(), view.slot_mapping)
        self._check_blocks(context)
        found = []
        for row in rows.tolist():
            owner = int(batch.sequence_ids[row])
            length = int(batch.kv_lengths[owner]) - (int(batch.query_offsets[owner + 1]) - 1 - row)
            at = torch.arange(length)
            slots = view.block_tables[owner][at // pool.block_size] * pool.block_size + at % pool.block_size
            columns = [store[slots, 0, 0] for state in pool.states for store in state.rows]
            found.append(logits_of(tuple(int(value) for column in columns for value in column), self.weights))
        return torch.stack(found) if found else torch.empty(0, self.vocab_size)

    def _check_blocks(self, context: PagedContext) -> None:
        """Blocks are whole, in one segment, and only where there are pictures."""
        batch = context.batch
        if batch.spans is None:
            return
        assert batch.span_layers == self.span_layers
        ends = batch.query_offsets.tolist()
        for at, (first, end) in enumerate(batch.spans.tolist()):
            if end:
                owner = int(batch.sequence_ids[at])
                start = int(batch.kv_lengths[owner]) - (ends[owner + 1] - ends[owner])
                assert start <= first <= start + at - ends[owner] < end <= int(batch.kv_lengths[owner])


def expected_history(model: PictureModel, prompt: list, output: list[int]) -> tuple[int, ...]:
    """What the logits after ``prompt`` and ``output`` are a function of."""
    media = model.expand({"input_ids": [prompt]})
    tokens = [*media.tokens, *output]
    values = tokens.copy()
    for span in media.spans:
        for row in range(span.length):
            values[span.first + row] = _feature(media.items[span.digest], span.offset + row)
    known = len(media.tokens)
    first, second = (
        [*media.positions[axis].tolist(), *(at + media.delta for at in range(known, len(tokens)))] for axis in range(2)
    )
    return (*values, *values, *first, *second)
