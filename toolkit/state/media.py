"""Pictures, videos and sounds in sequences: rows that are given as embeddings.

Where they lie are numbers, so that batches are planned and prefixes compared without a tower. Shapes: T rows of a
batch, M of them given as embeddings, H width of the model, L levels, n rows of an item.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.take_rows import take_rows

Ints = np.ndarray


class MediaSpan(NamedTuple):
    """A run of tokens of a sequence that take consecutive rows of one item (an image, a tile of one, a video).

    Args:
        first: index of its first token in the sequence.
        length: tokens.
        digest: 32 bytes that stand for the item's content; equal digests mean equal features.
        offset: row of the item at the first token. Items whose rows are interrupted by tokens are several spans.
        bidirectional: its tokens see each other. Adjacent bidirectional spans are one block.
    """

    first: int
    length: int
    digest: bytes
    offset: int = 0
    bidirectional: bool = False


class Features(NamedTuple):
    """What a model computes of one item.

    Args:
        rows: [n, H] in the place of embeddings.
        levels: [L, n, H] what is added to the rows in L of the layers (DeepStack, 2024), which are the model's choice;
            None for none.
    """

    rows: Tensor
    levels: Tensor | None = None


class Embeddings(NamedTuple):
    """The rows of a batch that are given as embeddings.

    Args:
        rows: [M] int64, ascending.
        values: [M, H].
        levels: [L, M, H] or None.
    """

    rows: Tensor
    values: Tensor
    levels: Tensor | None


def blocks(spans: Sequence[MediaSpan]) -> list[tuple[int, int]]:
    """First and end token of each run of tokens that see each other: bidirectional spans without a gap are one run."""
    found: list[tuple[int, int]] = []
    for span in spans:
        if not span.bidirectional or not span.length:
            continue
        if found and found[-1][1] == span.first:
            found[-1] = (found[-1][0], span.first + span.length)
        else:
            found.append((span.first, span.first + span.length))
    return found


class MediaRows:
    """Which row of which item each token takes, for the sequences of one batch: the item is its index in ``digests``.

    Attributes:
        digests: of the items that were named so far.
    """

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self._index: dict[bytes, int] = {}

    def of_sequence(self, spans: Sequence[MediaSpan], count: int) -> Ints:
        """[count, 2] item and row of the item of each token of a sequence; -1, 0 for a token that is an embedding's.

        Raises:
            ToolkitError: spans that overlap, are not in order, or do not lie within the sequence.
        """
        found = np.zeros((count, 2), dtype=np.int64)
        found[:, 0] = -1
        free = 0
        for span in spans:
            if span.first < free or span.length < 0 or span.offset < 0 or span.first + span.length > count:
                raise ToolkitError(
                    f"media must be spans in order, apart, and within the sequence's {count} tokens, got one of "
                    f"{span.length} tokens at {span.first}."
                )
            free = span.first + span.length
            if span.digest not in self._index:
                self._index[span.digest] = len(self.digests)
                self.digests.append(span.digest)
            found[span.first : free, 0] = self._index[span.digest]
            found[span.first : free, 1] = np.arange(span.offset, span.offset + span.length)
        return found

    def embeddings(
        self, taken: Ints, features: Mapping[bytes, Features], device: torch.device | str | None = None
    ) -> Embeddings | None:
        """The rows of a batch whose tokens take ``taken`` [T, 2]; None where no token takes a row of an item.

        A row of an item that several rows of the batch take gets the sum of their gradients, in a fixed order.

        Raises:
            ToolkitError: an item without features, with too few rows, or with other levels than another item.
        """
        rows = np.flatnonzero(taken[:, 0] >= 0)
        if not len(rows):
            return None
        used = np.unique(taken[rows, 0]).tolist()
        given: list[Features] = []
        starts = np.zeros(len(self.digests), dtype=np.int64)
        total = 0
        for item in used:
            one = features.get(self.digests[item])
            wanted = int(taken[taken[:, 0] == item, 1].max()) + 1
            if one is None or len(one.rows) < wanted:
                got = "none" if one is None else str(len(one.rows))
                raise ToolkitError(f"features of an item must have the {wanted} rows that its spans take, got {got}.")
            starts[item] = total
            total += len(one.rows)
            given.append(one)
        index = torch.from_numpy(starts[taken[rows, 0]] + taken[rows, 1]).to(given[0].rows.device)
        values = take_rows(torch.cat([one.rows for one in given]), index)
        depths = {0 if one.levels is None else len(one.levels) for one in given}
        if len(depths) > 1:
            raise ToolkitError(f"features must have the same number of levels for every item, got {sorted(depths)}.")
        levels = None
        if depths != {0}:
            stacked = torch.cat([one.levels for one in given if one.levels is not None], 1)
            levels = take_rows(stacked.transpose(0, 1), index).transpose(0, 1)
        device = values.device if device is None else device
        return Embeddings(
            torch.from_numpy(rows).to(device), values.to(device), None if levels is None else levels.to(device)
        )
