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

Rows = NDArray[np.float32] | NDArray[np.uint8]
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
        ``logits`` of the allowed tokens stand.

        Args:
            logits: [R, V], before penalties and ``min_tokens``.
            scores: [R, V], behind them.
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
        index = [masks.first[one] + depth for _, one, depth in ours]
        found = masks.rows if index == list(range(len(masks.rows))) else masks.rows[index]
        where = None if len(ours) == len(rows) else [at for at, _, _ in ours]
        of_device = masked if self._device.type == "cpu" else masked_on_device
        return of_device(logits, scores, found, where), errors

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
        rows: Rows = bits.view(np.uint8)
        if self._device.type == "cpu":  # here nobody waits for it
            rows = _ADDENDS[bits.view(np.uint8)].reshape(count, -1)[:, : self._vocab_size]
        made = _Masks(rows, first, errors)
        return made if before is None else before.joined(made)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Masks of several rows.

    Args:
        rows: for a CPU [R, V] float32, 0 where a token is allowed and -inf where not; else [R, 4 W] uint8, a bit set
            for each allowed token.
        first: the first row of each matcher.
        errors: what went wrong with a matcher.
    """

    rows: Rows
    first: dict[Matcher, int]
    errors: dict[Matcher, str]

    def joined(self, other: "_Masks") -> "_Masks":
        count = len(self.rows)
        first = self.first | {matcher: count + row for matcher, row in other.first.items()}
        return _Masks(np.concatenate([self.rows, other.rows]), first, self.errors | other.errors)


_ADDENDS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)
"""For each byte of a mask what is added to the logits of its eight tokens. To add has no branches, and takes as long
wherever the bits are set."""


def masked(logits: Tensor, scores: Tensor, addends: Rows, where: list[int] | None) -> Tensor:
    """``GrammarMasks.apply`` on a CPU: ``addends`` [len(where), V] belong to the rows ``where`` (None: to all).

    By NumPy: torch's ops would wake OpenMP's threads, which the next step would wait for.
    """
    of_model, of_sampler = logits.numpy(), scores.numpy()
    part = of_sampler if where is None else of_sampler[where]
    result = part + addends
    if scores is not logits:
        for row in np.flatnonzero(result.max(-1) == -np.inf):
            result[row] = of_model[row if where is None else where[row]] + addends[row]
    if where is None:
        return torch.from_numpy(result)
    whole = of_sampler.copy()
    whole[where] = result
    return torch.from_numpy(whole)


def masked_on_device(logits: Tensor, scores: Tensor, allowed: Rows, where: list[int] | None) -> Tensor:
    """The same from ``allowed`` [len(where), 4 W], bits."""
    packed = torch.from_numpy(allowed).to(scores.device)
    offsets = torch.arange(8, device=scores.device, dtype=torch.uint8)
    forbidden = ((packed[..., None] >> offsets) & 1 == 0).flatten(1)[:, : scores.shape[-1]]
    index = torch.arange(len(scores)) if where is None else torch.tensor(where)
    index = index.to(scores.device)
    result = scores[index].masked_fill(forbidden, -torch.inf)
    if scores is not logits:
        nothing_left = result.amax(-1, keepdim=True) == -torch.inf
        result = torch.where(nothing_left, logits[index].masked_fill(forbidden, -torch.inf), result)
    return scores.index_copy(0, index, result)
