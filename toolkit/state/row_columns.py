"""What the tokens of a batch's sequences are, beside their ids: numbers by which rows are shared, and that rows have.

Two sequences share the row of a token only where all of its numbers are equal, and those of all tokens before it.
Shapes: N tokens of all sequences one after the other, C columns, A axes of positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.media import MediaRows, MediaSpan

Ints = np.ndarray


@dataclass(frozen=True)
class RowColumns:
    """Numbers of each token.

    Args:
        tokens: [N] ids.
        recorded: [N, C] columns of a recorded routing or selection (``Recorded``).
        rotary_lengths: [N] by which each token's rotary tables are made.
        media: [N, 2] item and row of the item (``MediaRows``), -1 and 0 for none.
        positions: [N, A].
        prompt_lengths: [N] tokens of the prompt, -1 for the tokens in it.
        adapter_ids: [N] adapter of each token, -1 for none.
    """

    tokens: Ints
    recorded: Ints | None = None
    rotary_lengths: Ints | None = None
    media: Ints | None = None
    positions: Ints | None = None
    prompt_lengths: Ints | None = None
    adapter_ids: Ints | None = None

    @classmethod
    def of_sequences(
        cls,
        tokens: Sequence[Ints],
        recorded: Sequence[Ints] | None,
        rotary_lengths: Sequence[int] | None,
        media: Sequence[Sequence[MediaSpan]] | None,
        sequence_positions: Sequence[Tensor | None] | None,
        items: MediaRows,
        prompt_lengths: Sequence[int] | None = None,
        adapter_ids: Sequence[int] | None = None,
    ) -> "RowColumns":
        """From what ``RaggedBatch.from_sequences`` is given; ``items`` gets the names of the media.

        Raises:
            ToolkitError: arguments that do not fit the sequences.
        """
        counts = [len(one) for one in tokens]
        given = {
            "rotary_lengths": rotary_lengths,
            "media": media,
            "sequence_positions": sequence_positions,
            "prompt_lengths": prompt_lengths,
            "adapters": adapter_ids,
        }
        for name, one in given.items():
            if one is not None and len(one) != len(counts):
                raise ToolkitError(f"{name} must have one entry per sequence ({len(counts)}), got {len(one)}.")
        lengths, ids = (
            None if one is None else np.repeat(np.asarray(one, dtype=np.int64), counts)
            for one in (rotary_lengths, adapter_ids)
        )
        found = cls(_joined(tokens), _joined(recorded) if recorded else None, lengths, adapter_ids=ids)
        if prompt_lengths is not None:
            ends = zip(prompt_lengths, counts)
            behind = [np.where(np.arange(count) < prompt, -1, prompt) for prompt, count in ends]
            found = replace(found, prompt_lengths=_joined(behind))
        if sequence_positions is not None:
            found = replace(found, positions=_positions(sequence_positions, counts))
        if media is None:
            return found
        taken = [items.of_sequence(spans, count) for spans, count in zip(media, counts)]
        return replace(found, media=_joined(taken, 2))

    def take(self, rows: Ints) -> "RowColumns":
        """Those of some of the tokens."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})

    def names(self, counts: Sequence[int]) -> list[Ints]:
        """Of each sequence, which have ``counts`` tokens, one number per token, equal for equal tokens."""
        names = self.tokens
        if self.recorded is not None:
            table = np.concatenate([names[:, None], self.recorded], 1)
            names = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
        given = (self.rotary_lengths, self.media, self.positions, self.prompt_lengths, self.adapter_ids)
        for column in [column for one in given if one is not None for column in np.atleast_2d(one.T)]:
            names = _paired(names, column)
        return np.split(names, np.cumsum(counts)[:-1])


def _paired(names: Ints, column: Ints) -> Ints:
    """One number for each distinct pair of entries."""
    if not len(names) or column.min() == column.max():
        return names
    first, second = (np.unique(one, return_inverse=True)[1].reshape(-1) for one in (names, column))
    return first * (int(second.max()) + 1) + second


def _joined(parts: Sequence[Ints], width: int | None = None) -> Ints:
    shape = (0,) if width is None else (0, width)
    return np.concatenate(parts) if len(parts) else np.empty(shape, dtype=np.int64)


def _positions(given: Sequence[Tensor | None], counts: Sequence[int]) -> Ints:
    axes = max((len(one) for one in given if one is not None and one.dim() == 2), default=1)
    found = []
    for index, (one, count) in enumerate(zip(given, counts)):
        along = torch.arange(count) if one is None else one.detach().cpu()
        if along.dim() > 2 or along.shape[-1] != count or (along.dim() == 2 and len(along) != axes):
            raise ToolkitError(
                f"sequence_positions[{index}] must have shape [{count}] or [{axes}, {count}], got {list(along.shape)}."
            )
        found.append(np.asarray(along.to(torch.int64).expand(axes, count).T))
    return _joined(found, axes)
