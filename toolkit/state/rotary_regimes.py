"""Which rotary tables a sequence of which length has, where a model's tables depend on the length.

LongRoPE has one set of frequencies up to the original length and another beyond it; dynamic NTK has other frequencies
for every length beyond it. transformers takes the longest sequence of a batch. Here every sequence has the tables of
its own length: the declared one in an engine (prompt + max_tokens), so that they stay while it grows, and the length of
the whole sequence in training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch


@dataclass(frozen=True)
class RotaryRegimes:
    """Lengths that have the same rotary tables.

    Args:
        borders: last lengths before the tables change, ascending. All lengths between two borders have the same.
        varies_after: beyond this length every length has other tables; None for none.
    """

    borders: tuple[int, ...] = ()
    varies_after: int | None = None

    @classmethod
    def merged(cls, parts: Iterable["RotaryRegimes"]) -> "RotaryRegimes | None":
        """Of a model whose modules have ``parts``; None for no parts."""
        parts = list(parts)
        if not parts:
            return None
        varying = [part.varies_after for part in parts if part.varies_after is not None]
        borders = sorted({border for part in parts for border in part.borders})
        return cls(tuple(borders), min(varying, default=None))

    def canonical(self, length: int) -> int:
        """The shortest length with the rotary tables of ``length``: equal numbers mean equal tables."""
        if self.varies_after is not None and length > self.varies_after:
            return length
        return max((border + 1 for border in self.borders if border < length), default=1)

    def of_lengths(self, lengths: Iterable[int | None], own: Sequence[int]) -> list[int]:
        """``canonical`` of each of ``lengths``, or of the sequence's own length where that is None.

        Raises:
            ToolkitError: a length below that of the sequence, with other tables.
        """
        found = []
        for at, (given, length) in enumerate(zip(lengths, own, strict=True)):
            if given is not None and given < self.canonical(length):
                raise ToolkitError(
                    f"rotary_lengths[{at}] must be >= {self.canonical(length)} for a sequence of {length} tokens, "
                    f"got {given}."
                )
            found.append(self.canonical(length if given is None else given))
        return found

    def of_batch(self, batch: RaggedBatch) -> Tensor:
        """[T] ``canonical`` of the length of each row's own sequence, in a batch of whole sequences.

        Raises:
            ToolkitError: sequences with different tables share a row.
        """
        if batch.sample_rows is None or batch.query_ranges is None:
            lengths = self._canonical(batch.kv_lengths)
            return torch.cat([lengths, lengths.new_ones(1)])[batch.sequence_ids]
        firsts = batch.query_ranges[batch.sample_rows, 2] == 0
        sample = firsts.cumsum(0) - 1
        of_token = self._canonical(sample.bincount())[sample]
        found = torch.zeros_like(batch.tokens).scatter_reduce(0, batch.sample_rows, of_token, "amax")
        if not torch.equal(found[batch.sample_rows], of_token):
            raise ToolkitError(
                "sequences of a batch must share prefixes only where their lengths have the same rotary tables; "
                "make the batch with RaggedBatch.from_sequences(..., rotary_lengths=...)."
            )
        return found

    def _canonical(self, lengths: Tensor) -> Tensor:
        found = torch.ones_like(lengths)
        for border in self.borders:
            found = torch.where(lengths > border, border + 1, found)
        return found if self.varies_after is None else torch.where(lengths > self.varies_after, lengths, found)
