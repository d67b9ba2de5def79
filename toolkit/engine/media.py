"""Prompts with pictures: what the scheduler and the prefix index plan by, and what the runner puts into a batch."""

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.engine.config import GIB
from toolkit.errors import ToolkitError
from toolkit.state import PrefixKey, WeightKeys
from toolkit.state.media import Features, MediaRows, MediaSpan, blocks

Encode = Callable[[Any], Features]
_ROWS = 32
"""Bits of the row in the name of a token."""


@dataclass(frozen=True, eq=False)
class PromptMedia:
    """The pictures of a prompt, as numbers; what is computed of them is found by their digests.

    Args:
        tokens: of the prompt, with placeholders where pictures lie.
        spans: where each picture's tokens lie, in order.
        items: by digest, what the backend encodes.
        positions: [A, n] rotary positions of the prompt along A axes; None for 0, 1, ...
        delta: what is added to the index of a later token to get its rotary position, on each axis.
        prompt: first and end of the tokens that see each other, those of text too; None where spans say it all.
        num_bytes: of what the processor made of the pictures, which is held until the request is finished.
    """

    tokens: list[int]
    spans: tuple[MediaSpan, ...]
    items: Mapping[bytes, Any]
    positions: Tensor | None = None
    delta: int = 0
    prompt: tuple[int, int] | None = None
    num_bytes: int = 0

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First and end token of each run of tokens that see each other."""
        return blocks(self.spans) if self.prompt is None else [self.prompt]

    @cached_property
    def names(self) -> list[int]:
        """What stands for each token in the prefix index: its id, or a negative number that names a row of a picture.

        The number holds the 256 bits of the digest, so that two pictures are never confused. Tokens that see each other
        depend on every picture of their block, and on its text, and are named by all of them.
        """
        names = list(self.tokens)
        for span in self.spans:
            for at in range(span.length):
                names[span.first + at] = _name(span.digest, span.offset + at)
        for first, end in self.blocks:
            whole = hashlib.sha256(np.array(self.tokens[first:end], dtype=np.int64).tobytes())
            for span in self.spans:
                if first <= span.first < end:
                    whole.update(span.digest + span.offset.to_bytes(8, "big") + span.length.to_bytes(8, "big"))
            names[first:end] = [_name(whole.digest(), at) for at in range(end - first)]
        return names

    def block_around(self, length: int) -> tuple[int, int] | None:
        """The block that the first ``length`` tokens end inside; None where they end at a border or outside."""
        at = bisect_left(self.blocks, (length, 0)) - 1
        return self.blocks[at] if at >= 0 and length < self.blocks[at][1] else None

    def chunk(self, start: int, count: int) -> int:
        """``count`` tokens from ``start`` on, or fewer so that no block is cut: 0 where the block there is longer."""
        cut = self.block_around(start + count)
        return count if cut is None else max(cut[0] - start, 0)

    def digests(self, start: int, count: int) -> list[bytes]:
        """Of the pictures that ``count`` tokens from ``start`` on take rows of, each once."""
        taken = (span.digest for span in self.spans if span.first < start + count and start < span.first + span.length)
        return list(dict.fromkeys(taken))

    def positions_of(self, start: int, count: int) -> Tensor:
        """[A, count] positions of tokens from ``start`` on, of those behind the prompt too."""
        assert self.positions is not None
        known = self.positions.shape[-1]
        behind = torch.arange(max(start, known), max(start + count, known)) + self.delta
        return torch.cat(
            [self.positions[..., start : start + count], behind.expand(*self.positions.shape[:-1], -1)], -1
        )


def _name(digest: bytes, row: int) -> int:
    return -1 - (int.from_bytes(digest, "big") << _ROWS | row)


def num_bytes(value: Any) -> int:
    """Bytes of tensors, arrays and pictures, also inside mappings and lists; 0 of texts and numbers."""
    if isinstance(value, Mapping):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value)) if value and not isinstance(value[0], int) else 0
    if hasattr(value, "getbands"):  # Pillow's
        return int(value.width * value.height * len(value.getbands()))
    return int(getattr(value, "nbytes", 0))


def check_media_space(held: int, added: int, space: float | None, full: type[ToolkitError] = ToolkitError) -> None:
    """Raise ToolkitError where pictures of ``added`` bytes have no room, and ``full`` where none beside others.

    Args:
        held: bytes of pictures of requests that wait or run.
        space: GiB, or None for no bound.
    """
    if space is None or not added or held + added <= space * GIB:
        return
    sizes = f"pictures of prompts must have <= {space:g} GiB together (media_space), got {added / GIB:.3g}"
    if added > space * GIB:
        raise ToolkitError(f"{sizes}.")
    raise full(f"{sizes} beside {held / GIB:.3g} of requests that wait or run; try again later.")


class EncoderCache:
    """Features of pictures by content, the weights that computed them, and a request's cache salt, without which times
    would tell who else has sent a picture. The least recently used ones go first.

    Args:
        encode: computes them, each picture alone: no bit depends on the pictures beside it.
        capacity: most rows of features that are kept, those of levels included; one picture is kept in any case.
    """

    def __init__(self, encode: Encode, capacity: int) -> None:
        self.encode = encode
        self.capacity = capacity
        self.num_encoded = self.hits = 0
        self._kept: OrderedDict[tuple[bytes, PrefixKey], Features] = OrderedDict()
        self._rows = 0

    def get(self, digest: bytes, item: Any, weights: PrefixKey, salt: str | None = None) -> Features:
        """The features of an item under ``weights``, shared with requests of the same ``salt``."""
        key = digest, weights._replace(salt=salt)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        features = self.encode(item)
        self.num_encoded += 1
        self._kept[key] = features
        self._rows += _size(features)
        while self._rows > self.capacity and len(self._kept) > 1:
            self._rows -= _size(self._kept.popitem(last=False)[1])
        return features

    def drop_outdated(self, current: WeightKeys) -> None:
        """Forget what ``current`` outdates."""
        for key in [key for key in self._kept if current.outdates(key[1])]:
            self._rows -= _size(self._kept.pop(key))

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._rows = 0


def _size(features: Features) -> int:
    return len(features.rows) * (1 if features.levels is None else 1 + len(features.levels))


@dataclass(frozen=True)
class MediaChunk:
    """Tokens ``start .. start + count`` of a prompt with pictures, which are rows ``row ..`` of a batch."""

    media: PromptMedia
    row: int
    start: int
    count: int


def media_fields(
    chunks: Sequence[MediaChunk],
    rows: int,
    span_layers: frozenset[int] | None,
    features: Mapping[bytes, Features],
    device: torch.device,
) -> dict[str, Any]:
    """The fields of a ``RaggedBatch`` of ``rows`` tokens that pictures fill: embeddings and bidirectional spans."""
    named = MediaRows()
    taken = np.full((rows, 2), -1, dtype=np.int64)
    spans = np.zeros((rows, 2), dtype=np.int64)
    for chunk in chunks:
        media, end = chunk.media, chunk.start + chunk.count
        known = min(end, len(media.tokens))
        if known <= chunk.start:
            continue
        mine = named.of_sequence(media.spans, len(media.tokens))[chunk.start : known]
        taken[chunk.row : chunk.row + len(mine)] = mine
        for first, last in media.blocks:
            if chunk.start <= first and last <= end:
                spans[chunk.row + first - chunk.start : chunk.row + last - chunk.start] = first, last
    found: dict[str, Any] = {}
    embeddings = named.embeddings(taken, features, device)
    if embeddings is not None:
        found = {
            "embedding_rows": embeddings.rows,
            "embeddings": embeddings.values,
            "embedding_levels": embeddings.levels,
        }
    if spans.any():
        found |= {"spans": torch.from_numpy(spans).to(device), "span_layers": span_layers}
    return found
