"""Common prefixes among sequences: which tokens are the same computation, laid out depth first. Numbers only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from toolkit.state.spans import Spans, name_spans

Ints = np.ndarray
_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Segment:
    """A run of tokens that ``samples`` have in common after ``parent``'s, and no others have.

    Attributes:
        tokens: ids.
        parent: index of the segment that it continues, -1 at a root.
        row: of its first token.
        start: that token's position in the sequence.
        rows: [start] of the tokens before it.
        samples: indices of the sequences that pass through it.
    """

    tokens: Ints
    parent: int
    row: int
    start: int
    rows: Ints
    samples: list[int]


@dataclass
class SharedPrefixes:
    """Segments in depth-first order, so that the rows below any segment follow it without a gap.

    Attributes:
        segments: runs of tokens.
        rows: of each sequence, the row of each of its tokens.
        ends: of each segment, one past the last row below it.
        size: rows of all segments.
    """

    segments: list[Segment] = field(default_factory=list)
    rows: list[Ints] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    size: int = 0


def common_length(first: Ints, second: Ints, start: int) -> int:
    """Length of the common prefix of two sequences that agree up to ``start``."""
    most = min(len(first), len(second))
    differing = np.flatnonzero(first[start:most] != second[start:most])
    return start + int(differing[0]) if len(differing) else most


def share_prefixes(given: Sequence[Ints], spans: Spans | None = None) -> SharedPrefixes:
    """Merge the common prefixes of sequences (int64 arrays); every shared token has one row.

    Siblings come in the order of their first sequence. No segment begins or ends inside one of ``spans``: what a
    token sees is in the segments up to its own. Takes O(tokens of all sequences).
    """
    sequences = given if spans is None else name_spans(given, spans)
    found = SharedPrefixes(rows=[_NOTHING] * len(sequences))
    # (members, depth, parent, rows so far), the next group on top of the stack
    waiting = [(members, 0, -1, _NOTHING) for members in reversed(_split(sequences, range(len(sequences)), 0))]
    while waiting:
        members, start, parent, above = waiting.pop()
        first = sequences[members[0]]
        stop = len(first)
        for member in members[1:]:
            stop = min(stop, common_length(first[:stop], sequences[member], start))
        row, index = found.size, len(found.segments)
        found.segments.append(Segment(given[members[0]][start:stop], parent, row, start, above, members))
        found.size += stop - start
        rows = np.concatenate([above, np.arange(row, found.size)])
        for member in members:
            if len(sequences[member]) == stop:
                found.rows[member] = rows
        waiting += [(group, stop, index, rows) for group in reversed(_split(sequences, members, stop))]
    found.ends = [0] * len(found.segments)
    for index in range(len(found.segments) - 1, -1, -1):
        segment = found.segments[index]
        found.ends[index] = max(found.ends[index], segment.row + len(segment.tokens))
        if segment.parent >= 0:
            found.ends[segment.parent] = max(found.ends[segment.parent], found.ends[index])
    return found


def _split(sequences: Sequence[Ints], members: Sequence[int], depth: int) -> list[list[int]]:
    """The members that have more than ``depth`` tokens, grouped by the next one."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if len(sequences[member]) > depth:
            groups.setdefault(int(sequences[member][depth]), []).append(member)
    return list(groups.values())
