"""Spans of tokens that see each other: rows of a batch, trees that share whole spans, and what contexts hand on."""

import random
from dataclasses import replace

import pytest
import torch

from tests.helpers.prefix_trees import error
from tests.helpers.rowwise import seeded
from toolkit.errors import ToolkitError
from toolkit.state import DenseContext, RaggedBatch
from toolkit.state.context import AttentionSettings

PICTURE = [9, 9, 9, 9]
Q = [1, 2, *PICTURE, 3, 4]  # a prompt with a picture


def attend(batch: RaggedBatch, x: torch.Tensor, layer: int = 0, window: int = 0) -> torch.Tensor:
    """[T, 2, 8] of rows whose queries, keys and values are ``x`` [T, 4, 8]."""
    return DenseContext(batch).attend(layer, x[:, :2], x[:, 2:3], x[:, 3:], AttentionSettings(0.4, window))


def test_rows_have_their_spans_and_layers_their_own() -> None:
    batch = RaggedBatch.from_sequences([Q, [5], [9, 9, 7]], spans=[[(2, 6)], [], [(0, 2)]], share=False)
    assert batch.spans is not None
    assert batch.spans.tolist() == [[0, 0]] * 2 + [[2, 6]] * 4 + [[0, 0]] * 3 + [[0, 2]] * 2 + [[0, 0]]
    context = DenseContext(replace(batch, span_layers=frozenset({1})))
    ahead = context.seen_ahead(1)
    assert ahead is not None
    assert ahead[2:6].tolist() == [[2, 6], [3, 6], [4, 6], [5, 6]]
    assert context.seen_ahead(0) is None
    assert RaggedBatch.from_sequences([Q], spans=[[]]).spans is None
    x = seeded(12, 4, 8)
    plain = attend(replace(batch, spans=None), x)
    assert torch.equal(attend(replace(batch, span_layers=frozenset({1})), x), plain)
    differs = (attend(batch, x) != plain).flatten(1).any(1)
    assert differs.nonzero()[:, 0].tolist() == [2, 3, 4, 9]  # the last token of a span sees nothing new


def test_a_shared_prefix_does_not_end_inside_a_span() -> None:
    """Spans of equal beginnings, of unequal length, at equal places with other neighbours, and none."""
    sequences = [[1, 2, *PICTURE, 3], [1, 2, *PICTURE, 4], [1, 2, 9, 9, 9, 8, 3], [1, 2, *PICTURE, 3], [1, 2, 9, 9, 5]]
    spans = [[(2, 6)], [(2, 6)], [(2, 5)], [], [(2, 3), (3, 4)]]
    batch = RaggedBatch.from_sequences(sequences, spans=spans)
    assert batch.sample_rows is not None
    assert batch.spans is not None
    rows = batch.sample_rows.split([len(one) for one in sequences])
    shared = [len({*rows[0].tolist()} & {*other.tolist()}) for other in rows]
    assert shared == [7, 6, 2, 2, 2]
    for own, one, given in zip(rows, sequences, spans):
        assert batch.tokens[own].tolist() == one
        for at, row in enumerate(own.tolist()):
            wanted = next(([first, end] for first, end in given if first <= at < end), [0, 0])
            assert batch.spans[row].tolist() == wanted


@pytest.mark.parametrize("window", [0, 3])
def test_prefix_trees_are_their_sequences_with_gradients(window: int) -> None:
    rng = random.Random(window)
    prompt = [1, 2, *PICTURE, *PICTURE, 3]
    spans = [(2, 6), (6, 10)]
    ends = [[rng.randint(1, 3) for _ in range(rng.randint(1, 4))] for _ in range(5)]
    sequences = [prompt + one + PICTURE + [n % 2] for n, one in enumerate(ends)]
    own = [[*spans, (len(prompt + one), len(prompt + one) + 4)] for one in ends]
    trees, packed = (RaggedBatch.from_sequences(sequences, spans=own, share=share) for share in (True, False))
    assert trees.block_tables is not None
    assert trees.sample_rows is not None
    x = seeded(len(trees.tokens), 4, 8).requires_grad_()
    spread = x[trees.sample_rows]
    out, want = attend(trees, x, 0, window)[trees.sample_rows], attend(packed, spread, 0, window)
    assert error(out, want) < 1e-12
    grad = seeded(*out.shape, seed=3)
    wanted = torch.autograd.grad(want, x, grad)[0]
    assert error(torch.autograd.grad(out, x, grad)[0], wanted) < 1e-12
    rows = trees.query_ranges
    assert rows is not None
    assert trees.spans is not None
    inside = trees.spans[:, 0] < trees.spans[:, 1]
    assert ((rows[:, 2] - (torch.arange(len(rows)) - rows[:, 0]) == trees.spans[:, 0]) | ~inside).all()


@pytest.mark.parametrize("spans", [[[(0, 4)]], [[(1, 1)]], [[(1, 3), (2, 3)]], [[(-1, 2)]], [[], []]])
def test_bad_spans_are_one_sentence(spans: list[list[tuple[int, int]]]) -> None:
    with pytest.raises(ToolkitError, match="spans"):
        RaggedBatch.from_sequences([[1, 2, 3]], spans=spans)
