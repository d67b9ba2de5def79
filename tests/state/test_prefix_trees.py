"""Common prefixes: every shared token is one row, and the rows, keys and query ranges are those of the prefix trees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.state import DenseContext, RaggedBatch
from toolkit.state.prefix_trees import share_prefixes

# Few different tokens, so that prefixes meet; sequences that end inside of others, equal ones and empty ones too.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9)


def distinct_prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(one[: n + 1]) for one in sequences for n in range(len(one))}


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_a_row_is_a_distinct_prefix(sequences: list[list[int]]) -> None:
    trees = share_prefixes([np.array(one, dtype=np.int64) for one in sequences])
    assert trees.size == len(distinct_prefixes(sequences))
    prefix_of: dict[int, tuple[int, ...]] = {}
    for one, rows in zip(sequences, trees.rows, strict=True):
        assert len(rows) == len(one)
        for at, row in enumerate(rows.tolist()):
            assert prefix_of.setdefault(row, tuple(one[: at + 1])) == tuple(one[: at + 1])
    for index, segment in enumerate(trees.segments):
        assert segment.parent < index
        assert len(segment.tokens) > 0
        assert segment.samples == [i for i, rows in enumerate(trees.rows) if segment.row in rows.tolist()]


def batch_of(sequences: list[list[int]]) -> RaggedBatch | None:
    total = sum(map(len, sequences))
    worth = total - len(distinct_prefixes(sequences)) > total / 16
    batch = RaggedBatch.from_sequences(sequences)
    assert (batch.block_tables is not None) == (worth and len(sequences) > 1)
    return batch if batch.block_tables is not None else None


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_the_batch_of_prefix_trees(sequences: list[list[int]]) -> None:
    batch = batch_of(sequences)
    if batch is None:
        return
    assert batch.sample_rows is not None
    rows = batch.sample_rows.split([len(one) for one in sequences])
    assert batch.multiplicity is not None
    assert batch.multiplicity.tolist() == batch.sample_rows.bincount(minlength=len(batch.tokens)).tolist()
    seen_by: list[set[int]] = [set() for _ in batch.tokens]
    offsets, lengths = batch.query_offsets.tolist(), batch.kv_lengths.tolist()
    assert batch.block_tables is not None
    path_of = {}
    for one, own_rows in zip(sequences, rows):
        assert batch.tokens[own_rows].tolist() == one
        assert batch.positions[own_rows].tolist() == list(range(len(one)))
        for at, row in enumerate(own_rows.tolist()):
            path_of[row] = own_rows[: at + 1].tolist()
    for s, length in enumerate(lengths):
        own = range(offsets[s], offsets[s + 1])
        assert batch.block_tables[s, :length].tolist() == path_of[own[-1]]
        start = length - len(own)
        for width in (1, 3):
            expected = [-1] * max(0, width - start) + path_of[own[-1]][max(0, start - width) : start]
            assert DenseContext(batch).past(width)[s].tolist() == expected
        assert batch.parents is not None
        parent = int(batch.parents[s])
        assert (path_of[offsets[parent + 1] - 1] if parent >= 0 else []) == path_of[own[-1]][:start]
        for row in own:
            for key in path_of[row]:
                seen_by[key].add(row)
    assert batch.query_ranges is not None
    for row, (first, end, position) in enumerate(batch.query_ranges.tolist()):
        assert seen_by[row] == set(range(first, end))
        assert position == len(path_of[row]) - 1


def test_what_is_not_worth_sharing_is_packed() -> None:
    sequences = [[1, *range(2, 40)], [1, *range(50, 90)]]
    batch = RaggedBatch.from_sequences(sequences)
    assert batch.block_tables is None
    assert batch.tokens.tolist() == sequences[0] + sequences[1]
    assert RaggedBatch.from_sequences([[1, 2, 3]] * 2, share=False).tokens.tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("depth", [400])
def test_a_deep_chain_needs_no_recursion(depth: int) -> None:
    trees = share_prefixes([np.arange(n + 1) for n in range(depth)])
    assert trees.size == depth
    assert [rows.tolist() for rows in trees.rows] == [list(range(n + 1)) for n in range(depth)]


def test_tensors_and_lists_are_equal() -> None:
    batch = RaggedBatch.from_sequences([torch.tensor([5, 6, 7]), [5, 6, 8]])
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.sample_rows is not None
    assert batch.sample_rows.tolist() == [0, 1, 2, 0, 1, 3]
