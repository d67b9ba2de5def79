"""What requests change in the logits of their rows before penalties and grammars.

A row is a place in a sequence, behind its tokens and the first ones of its draft. A change is a function of the
sequence cut there: neither the other rows of a step nor what is drafted behind a row matter to it.
Shapes: R rows, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.chat import encode
from toolkit.engine.params import SamplingParams
from toolkit.engine.prompts import outside_vocabulary
from toolkit.errors import ToolkitError, described

if TYPE_CHECKING:
    from toolkit.engine import request

Ids = NDArray[np.int64]
DRY_BREAKERS = ("\n", ":", '"', "*")


class Adjustments:
    """What a request asks for by ``logits_processors``, ``logit_bias``, ``allowed_token_ids`` and ``bad_words``.

    Args:
        params: of the request.
        bad_words: the tokens of each.
        dry_breakers: tokens of ``dry_sequence_breakers``.
    """

    def __init__(
        self,
        params: SamplingParams,
        bad_words: Iterable[Sequence[int]] = (),
        dry_breakers: frozenset[int] = frozenset(),
    ) -> None:
        self.dry_breakers = dry_breakers
        bias = params.logit_bias or {}
        self.bias_ids: Ids = np.array(list(bias), dtype=np.int64)
        self.bias = np.array(list(bias.values()), dtype=np.float64)
        self.allowed_ids: Ids | None = None
        if params.allowed_token_ids is not None:
            self.allowed_ids = np.array(params.allowed_token_ids, dtype=np.int64)
        self.processors = [(one, _takes_prompt(one)) for one in params.logits_processors or ()]
        self._bad_words = [(list(word[:-1]), word[-1]) for word in bad_words]
        self._longest = max((len(before) for before, _ in self._bad_words), default=0)

    @property
    def has_bad_words(self) -> bool:
        """Whether the tokens so far decide what it changes."""
        return bool(self._bad_words)

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Any, vocab_size: int) -> "Adjustments | None":
        """Those of a request; None where it changes nothing.

        Args:
            params: of the request.
            tokenizer: of ``bad_words``; None for token ids only.
            vocab_size: V.

        Raises:
            ToolkitError: a token id that the model does not have; bad words without a tokenizer, or without tokens.
        """
        for field in ("logit_bias", "allowed_token_ids", "predicted_token_ids"):
            ids = getattr(params, field)
            wrong = outside_vocabulary(list(ids or ()), vocab_size)
            if wrong is not None:
                raise ToolkitError(f"{field} must have token ids from 0 to {vocab_size - 1}, got {wrong}.")
        words = bad_word_tokens(tokenizer, params.bad_words or ())
        dry = params.dry_multiplier > 0
        if not (params.logit_bias or params.allowed_token_ids or params.logits_processors or words or dry):
            return None
        breakers = dry_breakers(tokenizer, params.dry_sequence_breakers) if dry else frozenset()
        return cls(params, [word for word in words if word[-1] < vocab_size], breakers)

    def processed(self, sequence: "request.Sequence", drafted: int, row: Tensor) -> Tensor:
        """What the logits processors make of a row [V], which they may write to."""
        size = row.shape
        for processor, takes_prompt in self.processors:
            output = sequence.tokens[sequence.prompt_length :] + sequence.draft[:drafted]
            row = processor(list(sequence.request.prompt), output, row) if takes_prompt else processor(output, row)
            if not isinstance(row, Tensor) or row.shape != size:
                got = f"shape {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                raise ToolkitError(f"logits_processors must return a tensor of shape {list(size)}, got {got}.")
        return row

    def addends(self, row: Tensor, last: list[int]) -> Tensor:
        """What ``adjusted_logits`` adds to a row, without the processors.

        Args:
            row: [1, V] zeros, which are written to.
            last: the tokens that would complete bad words.
        """
        row[0, self.bias_ids] = torch.from_numpy(self.bias).to(row.dtype)
        if self.allowed_ids is not None:
            kept = row[0, self.allowed_ids]
            row.fill_(-torch.inf)
            row[0, self.allowed_ids] = kept
        row[0, last] = -torch.inf
        return row

    def completing(self, sequence: "request.Sequence", drafted: int) -> list[int]:
        """The tokens that would be the last ones of bad words."""
        if not self._bad_words:
            return []
        first = max(sequence.prompt_length, len(sequence.tokens) - self._longest)
        output = sequence.tokens[first:] + sequence.draft[:drafted]
        return [last for before, last in self._bad_words if output[len(output) - len(before) :] == before]


def bad_word_tokens(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word as it begins a text and, where they are others, behind a space."""
    if words and tokenizer is None:
        raise ToolkitError(f"bad_words must be None, since the engine has no tokenizer, got {list(words)!r}.")
    found: list[list[int]] = []
    for word in words:
        forms = [encode(tokenizer, before + word.lstrip()) for before in ("", " ")]
        if not all(forms):
            raise ToolkitError(f"bad_words must have strings that the tokenizer has tokens of, got {word!r}.")
        found += [form for form in forms if form not in found]
    return found


def dry_breakers(tokenizer: Any, strings: Sequence[str] | None) -> frozenset[int]:
    """The last token of each string where it ends a text."""
    if tokenizer is None and strings:
        raise ToolkitError(
            f"dry_sequence_breakers must be None, since the engine has no tokenizer, got {list(strings)!r}."
        )
    if tokenizer is None:
        return frozenset()
    found = [encode(tokenizer, "a" + one) for one in (DRY_BREAKERS if strings is None else strings)]
    return frozenset(tokens[-1] for tokens in found if tokens)


def adjusted_logits(logits: Tensor, rows: Sequence[tuple["request.Sequence", int]]) -> tuple[Tensor, list[str | None]]:
    """New logits after the changes of the rows' requests, and what went wrong with each row.

    In this order: processors; ``y = x + bias``; -inf where a token is not allowed; -inf where it would complete a bad
    word. ``logits`` themselves where nothing is changed.

    Args:
        logits: [R, V], the model's own; not modified.
        rows: the sequence of each, and how many drafted tokens stand before it.
    """
    errors: list[str | None] = [None] * len(rows)
    ours = [
        (at, sequence, drafted, sequence.request.adjustments)
        for at, (sequence, drafted) in enumerate(rows)
        if sequence.request.adjustments is not None
    ]
    if not ours:
        return logits, errors
    result = logits.clone()
    for at, sequence, drafted, one in ours:
        if one.processors:
            try:
                result[at] = one.processed(sequence, drafted, result[at].clone())
            except Exception as error:  # of the caller's code
                failed = "" if isinstance(error, ToolkitError) else "logits_processors failed: "
                errors[at] = f"{failed}{described(error)}"
    if indices := _indices(logits.device, [(at, one.bias_ids) for at, _, _, one in ours]):
        bias = np.concatenate([one.bias for _, _, _, one in ours])
        result[indices] += torch.from_numpy(bias).to(logits.device, logits.dtype)
    allowed = [(at, one.allowed_ids) for at, _, _, one in ours if one.allowed_ids is not None]
    if indices := _indices(logits.device, allowed):
        kept = result[indices]
        result[torch.tensor([at for at, _ in allowed], device=logits.device)] = -torch.inf
        result[indices] = kept
    last = [(at, np.array(one.completing(sequence, drafted), dtype=np.int64)) for at, sequence, drafted, one in ours]
    if indices := _indices(logits.device, last):
        result[indices] = -torch.inf
    return result, errors


def _indices(device: torch.device, ids: Sequence[tuple[int, Ids]]) -> tuple[Tensor, Tensor] | None:
    """Rows and columns, as an index, of some tokens of some rows; None of none."""
    if not any(len(tokens) for _, tokens in ids):
        return None
    rows = np.repeat([at for at, _ in ids], [len(tokens) for _, tokens in ids])
    columns = np.concatenate([tokens for _, tokens in ids])
    both = torch.from_numpy(np.stack([rows, columns])).to(device)
    return both[0], both[1]


def _takes_prompt(processor: Callable[..., Any]) -> bool:
    """Whether a processor is called with the prompt's tokens, too."""
    try:
        return len(inspect.signature(processor).parameters) == 3
    except ValueError:  # it has none
        return False
