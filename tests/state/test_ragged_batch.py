"""RaggedBatch: whoever builds it, every token sees its own sequence's past and nothing else."""

import math
import random
import threading

import pytest
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state import (
    AttentionSettings,
    BlockAllocator,
    BlockTable,
    BlockTables,
    DenseContext,
    Group,
    PagedContext,
    PagedRows,
    PrefixKey,
    RaggedBatch,
    StatePool,
    StateSpec,
)
from toolkit.state.active import forward_context_of, get_forward_context, set_forward_context

HEADS, GROUPS, DIM, V_DIM = 4, 2, 8, 6
SCALE = DIM**-0.5


def dense(q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float) -> Tensor:
    """One sequence's attention, [n, H, D] over [m, G, D]; the queries are the last n of m."""
    n, m = len(q), len(k)
    k, v = k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * SCALE
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    age = torch.arange(m - n, m)[:, None] - torch.arange(m)
    hidden = (age < 0) | (age >= (window if window > 0 else math.inf))
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def qkv(queries: int, keys: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, HEADS, DIM), (keys, GROUPS, DIM), (keys, GROUPS, V_DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def test_from_sequences_packs() -> None:
    batch = RaggedBatch.from_sequences([[5, 6, 7], [], torch.tensor([8, 9])])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.query_offsets.tolist() == [0, 3, 3, 5]
    assert batch.kv_offsets.tolist() == [0, 3, 3]
    assert batch.kv_lengths.tolist() == [3, 0, 2]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 2, 2]
    assert batch.block_tables is batch.sample_rows is batch.multiplicity is None
    parts = (batch.tokens, batch.positions, batch.query_offsets, batch.kv_offsets, batch.kv_lengths)
    assert {part.dtype for part in parts} == {torch.int64}
    for empty in ([], [[]]):
        nothing = RaggedBatch.from_sequences(empty)
        assert len(nothing.tokens) == len(nothing.positions) == 0
        assert nothing.query_offsets.tolist() == [0] * (len(empty) + 1)
        assert DenseContext(nothing).attend(0, *qkv(0, 0), AttentionSettings(SCALE)).shape == (0, HEADS, V_DIM)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (0, 5.0), (4, 2.0)])
def test_packed_outputs_and_gradients_equal_each_sequence_alone(window: int, softcap: float) -> None:
    lengths = [7, 1, 0, 19, 2]
    batch = RaggedBatch.from_sequences([[0] * length for length in lengths], share=False)
    inputs = [part.requires_grad_() for part in qkv(sum(lengths), sum(lengths))]
    out = DenseContext(batch).attend(0, *inputs, AttentionSettings(SCALE, window, softcap))
    expected = torch.cat(
        [dense(q, k, v, window, softcap) for q, k, v in zip(*(part.split(lengths) for part in inputs)) if len(q)]
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, inputs, direction), torch.autograd.grad(expected, inputs, direction)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Runner:
    """A one-layer engine: random schedules over real blocks, poisoned wherever nothing was written."""

    def __init__(self, dtype: torch.dtype, num_blocks: int = 40, block_size: int = 4) -> None:
        specs = [StateSpec(layer, "full", ((GROUPS, DIM), (GROUPS, V_DIM))) for layer in range(2)]
        self.pool = StatePool(specs, {Group(): num_blocks}, block_size, dtype)
        for state in self.pool.states:
            for store in state.stores:
                store.fill_(math.nan)
        self.allocator = BlockAllocator(num_blocks, block_size)

    def step(
        self, work: list[tuple[BlockTable, list[int], tuple[Tensor, Tensor, Tensor]]], padding: int = 0
    ) -> list[Tensor]:
        """Append tokens with their q, k, v to tables, in one batch; returns each one's output rows."""
        tables = [table for table, _, _ in work]
        counts = [len(tokens) for _, tokens, _ in work]
        starts = [table.length for table in tables]
        slots = []
        for table, tokens, _ in work:
            slots += table.reserve(len(tokens))
            self.pool.copy_blocks([table.take_copies()])
        longest = max(len(table.blocks) for table in tables)
        positions = [start + i for start, count in zip(starts, counts) for i in range(count)]
        tokens = [token for _, new, _ in work for token in new]
        batch = RaggedBatch(
            tokens=torch.tensor(tokens + [0] * padding),
            positions=torch.tensor(positions + [0] * padding),
            query_offsets=torch.tensor([0, *counts]).cumsum(0),
            kv_offsets=torch.zeros(len(tables), dtype=torch.int64),
            kv_lengths=torch.tensor([start + count for start, count in zip(starts, counts)]),
            views=(
                PagedRows(
                    torch.tensor([table.blocks + [0] * (longest - len(table.blocks)) for table in tables]),
                    torch.tensor(slots + [-1] * padding),
                ),
            ),
        )
        assert batch.sequence_ids.tolist()[: len(tokens)] == [i for i, n in enumerate(counts) for _ in range(n)]
        assert batch.sequence_ids.tolist()[len(tokens) :] == [len(tables)] * padding
        parts = [torch.cat([part[i] for _, _, part in work]) for i in range(3)]
        q, k, v = (torch.cat([part, torch.full_like(part[:1], 3.0).expand(padding, -1, -1)]) for part in parts)
        out = PagedContext(batch, self.pool).attend(1, q, k, v, AttentionSettings(SCALE))
        assert not out[len(tokens) :].any()
        for table, new, _ in work:
            table.commit(new)
        self.allocator.check_integrity()
        return list(out[: len(tokens)].split(counts))


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_through_blocks_equals_all_at_once_bit_for_bit(seed: int) -> None:
    """Chunks, neighbours, padding rows, forks, prefix hits: the rows are those of the training batch."""
    choose = random.Random(seed)
    lengths = [17, 5, 1, 23]
    texts = [[choose.randrange(3) for _ in range(length)] for length in lengths]
    texts.append([*texts[0][:9], 3, 3, 3, 3])  # shares two blocks and a token with the first
    texts.append(texts[3][:10] + [4] * 6)  # forked off the fourth within a block
    lengths = [len(text) for text in texts]
    packed = qkv(sum(lengths), sum(lengths), torch.float32, seed)
    parts = [list(part.split(lengths)) for part in packed]
    for part in parts:  # equal prefixes have equal rows
        part[4] = torch.cat([part[0][:9], part[4][9:]])
        part[5] = torch.cat([part[3][:10], part[5][10:]])
    q, k, v = (torch.cat(part) for part in parts)
    packing = RaggedBatch.from_sequences(texts, share=False)
    whole = DenseContext(packing).attend(0, q, k, v, AttentionSettings(SCALE)).split(lengths)

    runner = Runner(torch.float32)
    runner.allocator.free(runner.allocator.allocate(choose.randrange(20)))
    tables: dict[int, BlockTable] = {i: BlockTable(runner.allocator, PrefixKey()) for i in range(4)}
    while any(table.length < lengths[i] for i, table in tables.items()) or len(tables) < 6:
        if 4 not in tables and tables[0].length >= 8:
            tables[4] = BlockTable(runner.allocator, PrefixKey())
            assert BlockTables([tables[4]]).match_prefix(texts[4]) == 8
        if 5 not in tables and tables[3].length >= 10:
            tables[5] = tables[3].fork()
            tables[5].truncate(10)
        ready = [i for i, table in tables.items() if table.length < lengths[i]]
        if not ready:
            continue
        work, expected = [], []
        for i in choose.sample(ready, choose.randint(1, len(ready))):
            start = tables[i].length
            stop = min(lengths[i], start + choose.randint(1, 6))
            work.append((tables[i], texts[i][start:stop], tuple(part[i][start:stop] for part in parts)))
            expected.append(whole[i][start:stop])
        for got, want in zip(runner.step(work, padding=choose.randrange(3)), expected, strict=True):
            assert torch.equal(got, want)
    runner.allocator.check_integrity([table.held for table in tables.values()])
    assert not runner.pool.states[0].stores[0].isfinite().any()  # nothing was written to the other layer


def test_state_written_under_grad_mode_stays_plain() -> None:
    runner = Runner(torch.float32)
    table = BlockTable(runner.allocator, None)
    rows = tuple(part.requires_grad_() for part in qkv(3, 3, torch.float32))
    (out,) = runner.step([(table, [0, 0, 0], rows)])
    torch.testing.assert_close(out, dense(*rows, 0, 0.0))
    assert not runner.pool.states[1].stores[0].requires_grad


MASKS = {
    "full": ["1111", "1111"],
    "left": ["0011", "1111", "0001"],
    "right": ["1100", "1111", "1000"],
    "both": ["0110", "0011", "1100", "0000"],
    "one": ["1"],
    "empty rows": ["000", "111"],
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cut", [0, 1, 2, 99])
def test_padded_calls_attend_like_each_row_alone(name: str, cut: int) -> None:
    mask = torch.tensor([[mark == "1" for mark in row] for row in MASKS[name]])
    rows, width = mask.shape
    queries = max(width - cut, 0)
    batch = RaggedBatch.for_padded(mask, queries)
    inputs = [part.requires_grad_() for part in qkv(rows * queries, rows * width)]
    q, k, v = (part.unflatten(0, (rows, -1)) if len(part) else part for part in inputs)
    out = DenseContext(batch).attend(0, *inputs, AttentionSettings(SCALE))
    expected = torch.zeros_like(out).view(rows, queries, HEADS, V_DIM)
    positions = torch.zeros(rows, queries, dtype=torch.int64)
    for row in range(rows):
        kept = mask[row].nonzero().flatten()
        asked = kept[kept >= width - queries]
        if len(asked):
            own = q[row, asked - (width - queries)]
            seen = kept[kept <= asked[-1]]
            values = dense(own, k[row, seen], v[row, seen], 0, 0.0)
            expected = expected.index_put((torch.tensor(row), asked - (width - queries)), values)
            positions[row, asked - (width - queries)] = asked - kept[0]
    torch.testing.assert_close(out, expected.flatten(0, 1), rtol=1e-10, atol=1e-10)
    assert torch.equal(batch.positions, positions.flatten())
    assert len(batch.tokens) == rows * queries
    assert int(batch.query_offsets[-1]) == rows * queries
    if not expected.requires_grad:  # nobody asked anything
        return
    direction = torch.randn_like(out)
    wanted = torch.autograd.grad(expected.flatten(0, 1), inputs, direction)
    for got, want in zip(torch.autograd.grad(out, inputs, direction), wanted):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_no_padding_and_left_padding_take_one_segment_a_row() -> None:
    for name in ("full", "left"):
        mask = torch.tensor([[mark == "1" for mark in row] for row in MASKS[name]])
        batch = RaggedBatch.for_padded(mask, 4)
        assert len(batch.kv_lengths) == len(mask)
        assert torch.equal(batch.kv_lengths, mask.sum(1))
        assert torch.equal(RaggedBatch.for_padded(mask.long(), 4).kv_offsets, batch.kv_offsets)


def test_masks_that_are_not_padding_are_refused() -> None:
    with pytest.raises(ToolkitError, match="got a hole in row 1"):
        RaggedBatch.for_padded(torch.tensor([[1, 1, 1], [1, 0, 1]]), 3)
    with pytest.raises(ToolkitError, match=r"shape \[batch, length\], got \[3\]"):
        RaggedBatch.for_padded(torch.ones(3), 3)
    with pytest.raises(ToolkitError, match=r"q_len must be between 0 .* 3, got 4"):
        RaggedBatch.for_padded(torch.ones(2, 3), 4)


def test_a_plan_made_in_inference_mode_serves_a_later_backward() -> None:
    with torch.inference_mode():
        mask = torch.ones(2, 3, dtype=torch.bool)
        batch = RaggedBatch.for_padded(mask, 3)
    inputs = [part.requires_grad_() for part in qkv(6, 6)]
    DenseContext(batch).attend(0, *inputs, AttentionSettings(SCALE)).sum().backward()
    assert all(part.grad is not None for part in inputs)


def test_the_forward_context_is_scoped_nested_and_of_one_thread() -> None:
    outer, inner = (DenseContext(RaggedBatch.from_sequences([[token]])) for token in (1, 2))
    assert get_forward_context() is None
    seen = []
    with set_forward_context(outer) as given:
        assert get_forward_context() is given is outer
        assert forward_context_of({"ragged": inner}) is inner
        assert forward_context_of({}) is outer
        with set_forward_context(inner):
            assert get_forward_context() is inner
        with pytest.raises(KeyError), set_forward_context(inner):
            raise KeyError
        assert get_forward_context() is outer
        thread = threading.Thread(target=lambda: seen.append(get_forward_context()))
        thread.start()
        thread.join()
    assert get_forward_context() is None
    assert seen == [None]
