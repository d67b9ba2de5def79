"""The allowed tokens of the rows that a step samples. Shapes: R rows, V vocabulary, W words of a mask."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.grammar.library import library
from toolkit.engine.grammar.matcher import Matcher, mask_words

if TYPE_CHECKING:
    from llguidance import LLExecutor

MaskRow = tuple[Matcher | None, int]
"""A sampled row: the matcher of its sequence, None without a grammar, and how many drafted tokens stand between the
matcher's position and the row."""


class GrammarMasks:
    """Fills the masks of a step's rows on another thread while the model runs, and applies them to logits.

    A row's mask depends on its own matcher alone. ``start`` before the forward, ``apply`` after it.

    Args:
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._job: Future[_Masks] | None = None

    def start(self, wanted: Iterable[tuple[Matcher, Sequence[int]]]) -> None:
        """Begin to fill the masks of a step.

        Args:
            wanted: each matcher with the tokens drafted behind its position. Its rows are the one before the first of
                them and the one after each. Nothing else may use a matcher until ``apply`` or ``finish``.
        """
        found = [(matcher, list(drafted)) for matcher, drafted in wanted]
        self.finish()
        if found:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            self._job = self._thread.submit(self._filled, found)

    def finish(self) -> None:
        """Wait for masks that nobody will apply."""
        self._take()

    def apply(self, logits: Tensor, scores: Tensor, rows: Sequence[MaskRow]) -> tuple[Tensor, list[str | None]]:
        """``scores`` with -inf at the tokens that the rows' grammars forbid, and what went wrong with each row.

        Where ``scores`` leave nothing that may follow, because ``min_tokens`` holds back an end that must come,
        the model's own logits of the allowed tokens stand.

        Args:
            logits: [R, V], the model's own.
            scores: [R, V], what the sampler made of them.
            rows: what each row is. Those of a matcher that ``start`` was not given are filled now.
        """
        masks = self._take()
        if all(matcher is None for matcher, _ in rows):
            return scores, [None] * len(rows)
        late = dict.fromkeys(one for one, _ in rows if one is not None and (masks is None or one not in masks.first))
        if late:
            masks = self._filled([(one, []) for one in late], masks)
        assert masks is not None
        ours = [(at, one, depth) for at, (one, depth) in enumerate(rows) if one is not None]
        errors = [None if one is None else masks.errors.get(one) for one, _ in rows]
        forbidden = masks.forbidden(
            [masks.first[one] + depth for _, one, depth in ours], self._vocab_size, self._device
        )
        if len(ours) == len(rows):
            return _masked(logits, scores, forbidden), errors
        index = torch.tensor([at for at, _, _ in ours], device=self._device)
        return scores.index_copy(0, index, _masked(logits[index], scores[index], forbidden)), errors

    def close(self) -> None:
        """End the thread."""
        self.finish()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _take(self) -> "_Masks | None":
        job, self._job = self._job, None
        return None if job is None else job.result()

    def _filled(self, wanted: list[tuple[Matcher, list[int]]], before: "_Masks | None" = None) -> "_Masks":
        """The masks of these matchers, behind those that were filled ``before``."""
        if self._executor is None:
            self._executor = library().LLExecutor(num_threads=max(1, (os.cpu_count() or 1) // 4))
        first, count = {}, 0
        for matcher, drafted in wanted:
            first[matcher] = count
            count += 1 + len(drafted)
        # Rows behind a drafted token that its grammar forbids are never used, and all tokens stay allowed there.
        bits = np.full((count, mask_words(self._vocab_size)), -1, dtype=np.int32)
        memory = bits.ctypes.data, bits.strides[0], count
        plain = [(matcher.state, first[matcher]) for matcher, drafted in wanted if not drafted]
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *memory)
        ahead = [(matcher.state, first[matcher], drafted) for matcher, drafted in wanted if drafted]
        if ahead:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(ahead, *memory)
        errors = {}
        for matcher, drafted in wanted:
            matcher.mark_stops(bits[first[matcher] : first[matcher] + 1 + len(drafted)])
            if (error := matcher.error) is not None:
                errors[matcher] = f"structured_outputs cannot be followed further ({error})."
        as_bytes = bits.view(np.uint8)
        if self._device.type == "cpu":  # here nobody waits for it
            as_bytes = np.unpackbits(np.invert(as_bytes), axis=1, count=self._vocab_size, bitorder="little")
        made = _Masks(as_bytes, first, errors)
        return made if before is None else before.joined(made)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Masks of several rows.

    Args:
        rows: uint8; for a CPU [R, V], 1 where a token is forbidden, else [R, 4 W], a bit set for each allowed token.
        first: the first row of each matcher.
        errors: what went wrong with a matcher.
    """

    rows: NDArray[np.uint8]
    first: dict[Matcher, int]
    errors: dict[Matcher, str]

    def joined(self, other: "_Masks") -> "_Masks":
        count = len(self.rows)
        first = self.first | {matcher: count + row for matcher, row in other.first.items()}
        return _Masks(np.concatenate([self.rows, other.rows]), first, self.errors | other.errors)

    def forbidden(self, index: list[int], vocab_size: int, device: torch.device) -> Tensor:
        """[len(index), V] bool: the tokens that are forbidden in the rows ``index``."""
        rows = self.rows if index == list(range(len(self.rows))) else self.rows[index]
        if device.type == "cpu":
            return torch.from_numpy(rows.view(np.bool_))
        return forbidden_of(torch.from_numpy(rows).to(device), vocab_size)


def forbidden_of(allowed: Tensor, vocab_size: int) -> Tensor:
    """[R, V] bool: the tokens whose bits in ``allowed`` [R, 4 W] uint8 are not set."""
    offsets = torch.arange(8, device=allowed.device, dtype=torch.uint8)
    return ((allowed[..., None] >> offsets) & 1 == 0).flatten(1)[:, :vocab_size]


def _masked(logits: Tensor, scores: Tensor, forbidden: Tensor) -> Tensor:
    result = scores.masked_fill(forbidden, -torch.inf)
    if scores is logits:
        return result
    nothing_left = result.amax(-1, keepdim=True) == -torch.inf
    return torch.where(nothing_left, logits.masked_fill(forbidden, -torch.inf), result)
