"""Spans of tokens that see each other in both directions (the tokens of a picture), as numbers. Numbers only."""

from collections.abc import Sequence

import numpy as np

from toolkit.errors import ToolkitError

Spans = Sequence[Sequence[tuple[int, int]]]
"""Of each sequence the (first, end) positions of its spans."""


def check_spans(spans: Spans, counts: Sequence[int]) -> None:
    """ToolkitError unless each sequence of ``counts`` tokens has spans within it, in order and not overlapping."""
    if len(spans) != len(counts):
        raise ToolkitError(f"spans must have one entry per sequence ({len(counts)}), got {len(spans)}.")
    for index, (own, count) in enumerate(zip(spans, counts)):
        before = 0
        for first, end in own:
            if not before <= first < end <= count:
                raise ToolkitError(
                    f"spans[{index}] must be (first, end) pairs in order that do not overlap, within the sequence's "
                    f"{count} tokens, got ({first}, {end}) after token {before}."
                )
            before = end


def spans_of_rows(spans: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """[count, 2] the (first, end) of the span of each of a sequence's tokens; (0, 0) where it is in none."""
    rows = np.zeros((count, 2), dtype=np.int64)
    for first, end in spans:
        rows[first:end] = first, end
    return rows


def name_spans(sequences: Sequence[np.ndarray], spans: Spans) -> list[np.ndarray]:
    """Sequences whose tokens in a span have a name of the whole span, so that no common prefix ends inside of one."""
    unused = 1 + max((int(one.max()) for one in sequences if len(one)), default=0)
    names: dict[bytes, int] = {}
    renamed = []
    for one, own in zip(sequences, spans, strict=True):
        copy = one.copy() if own else one
        for first, end in own:
            copy[first:end] = names.setdefault(one[first:end].tobytes(), unused + len(names))
        renamed.append(copy)
    return renamed
