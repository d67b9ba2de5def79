"""Rows given as embeddings: which rows they are, that equal images share rows, and gradients into their features."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state import RaggedBatch
from toolkit.state.media import Features, MediaSpan, blocks

PLACEHOLDER = 9
LENGTHS = {b"a": 2, b"b": 3, b"c": 1}


def features(levels: int = 0) -> dict[bytes, Features]:
    source = torch.Generator().manual_seed(0)

    def one(count: int) -> Features:
        rows = torch.randn(count, 4, generator=source, requires_grad=True)
        return Features(rows, torch.randn(levels, count, 4, generator=source) if levels else None)

    return {digest: one(count) for digest, count in LENGTHS.items()}


def sequence(parts: list[int | bytes], bidirectional: bool = False) -> tuple[list[int], list[MediaSpan]]:
    """Tokens and spans of a sequence of tokens and items."""
    tokens: list[int] = []
    spans: list[MediaSpan] = []
    for part in parts:
        if isinstance(part, bytes):
            spans.append(MediaSpan(len(tokens), LENGTHS[part], part, 0, bidirectional))
            tokens += [PLACEHOLDER] * LENGTHS[part]
        else:
            tokens.append(part)
    return tokens, spans


def batch_of(parts: list[list[int | bytes]], share: bool, bidirectional: bool = False, **given: object) -> RaggedBatch:
    made = [sequence(one, bidirectional) for one in parts]
    tokens, spans = [one[0] for one in made], [one[1] for one in made]
    return RaggedBatch.from_sequences(tokens, share=share, media=spans, **{"features": features(), **given})  # type: ignore[arg-type]


def rows_of(batch: RaggedBatch, parts: list[list[int | bytes]]) -> list[Tensor]:
    """Of each sequence its tokens as vectors: embeddings where it has them, else the id."""
    table = batch.tokens[:, None].expand(-1, 4).float().clone()
    if batch.embedding_rows is not None:
        assert batch.embeddings is not None
        assert batch.embedding_rows.tolist() == sorted(batch.embedding_rows.tolist())
        table[batch.embedding_rows] = batch.embeddings.detach()
    rows = torch.arange(len(table)) if batch.sample_rows is None else batch.sample_rows
    return list(table[rows].split([len(sequence(one)[0]) for one in parts]))


PARTS = st.lists(st.sampled_from([0, 1, b"a", b"b", b"c"]), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=6), st.booleans())
def test_sharing_changes_no_token(parts: list[list[int | bytes]], bidirectional: bool) -> None:
    alone, shared = (batch_of(parts, share, bidirectional) for share in (False, True))
    for one, other in zip(rows_of(alone, parts), rows_of(shared, parts), strict=True):
        assert torch.equal(one, other)
    if shared.sample_rows is not None and alone.spans is not None:
        assert shared.spans is not None
        assert torch.equal(shared.spans[shared.sample_rows], alone.spans)


def test_equal_images_are_common_prefixes() -> None:
    batch = batch_of([[1, b"a", 2], [1, b"a", 3], [1, b"b", 2]], share=True)
    assert len(batch.tokens) == 1 + (2 + 1 + 1) + (3 + 1)
    assert batch.embedding_rows is not None
    assert len(batch.embedding_rows) == 2 + 3


def test_a_prefix_never_ends_inside_a_block() -> None:
    # The second sequence's block continues with another image, which the first token of the block sees too.
    parts: list[list[int | bytes]] = [[1, b"a", 2], [1, b"a", b"c", 2]]
    causal, seen = batch_of(parts, True), batch_of(parts, True, bidirectional=True)
    assert len(causal.tokens) == 4 + 2
    assert len(seen.tokens) == 4 + 4
    assert seen.spans is not None
    assert seen.spans.tolist() == [[0, 0], [1, 3], [1, 3], [0, 0], [1, 4], [1, 4], [1, 4], [0, 0]]


def test_blocks_of_adjacent_spans_are_one() -> None:
    spans = [MediaSpan(1, 2, b"a", 0, True), MediaSpan(3, 1, b"c", 0, True), MediaSpan(5, 3, b"b", 0, True)]
    assert blocks(spans) == [(1, 4), (5, 8)]
    assert blocks([one._replace(bidirectional=False) for one in spans]) == []


def test_gradients_are_summed_over_repeated_images() -> None:
    given = features()
    batch = batch_of([[1, b"a", 2], [b"a", b"b"], [3, b"a"]], share=True, features=given)
    assert batch.embeddings is not None
    weight = torch.arange(batch.embeddings.numel(), dtype=torch.float32).view_as(batch.embeddings)
    (batch.embeddings * weight).sum().backward()
    assert given[b"a"].rows.grad is not None
    assert given[b"c"].rows.grad is None  # nothing takes it
    # In the order of the rows: the second sequence's a and b lie after the first's a, then the third's a.
    assert torch.equal(given[b"a"].rows.grad, weight[:2] + weight[2:4] + weight[7:9])


def test_levels_lie_beside_their_rows() -> None:
    given = features(levels=2)
    batch = batch_of([[b"b", 1], [b"a", b"b"]], share=False, features=given)
    assert batch.embedding_levels is not None
    expected = [given[one].levels for one in (b"b", b"a", b"b")]
    assert torch.equal(batch.embedding_levels, torch.cat([one for one in expected if one is not None], 1))


def test_positions_along_axes_are_part_of_a_row() -> None:
    along = [torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([[0, 1, 2], [0, 1, 4]]), None]
    batch = RaggedBatch.from_sequences([[5, 6, 7]] * 3, sequence_positions=along)
    assert batch.sample_rows is not None
    assert len(batch.tokens) == 5
    expected = torch.cat([torch.arange(3).expand(2, 3) if one is None else one for one in along], 1)
    assert torch.equal(batch.positions[:, batch.sample_rows], expected)
    plain = RaggedBatch.from_sequences([[5, 6]] * 2, sequence_positions=[torch.tensor([0, 4]), None], share=False)
    assert plain.positions.tolist() == [0, 4, 0, 1]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([MediaSpan(1, 2, b"a"), MediaSpan(2, 1, b"c")], "in order, apart"),
        ([MediaSpan(3, 2, b"a")], "within the sequence's 4 tokens"),
        ([MediaSpan(0, 2, b"x")], "the 2 rows that its spans take, got none"),
        ([MediaSpan(0, 2, b"a", 1)], "the 3 rows that its spans take, got 2"),
    ],
)
def test_media_that_do_not_fit_are_refused(spans: list[MediaSpan], message: str) -> None:
    with pytest.raises(ToolkitError, match=message):
        RaggedBatch.from_sequences([[9, 9, 9, 9]], media=[spans], features=features())
