"""How far one output is within its grammar."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ToolkitError, first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

Bits = NDArray[np.int32]
"""Masks [rows, words] or one of them [words]: token t is bit t % 32 of word t // 32, and set where t is allowed."""


NO_TOKEN = "no token of the vocabulary can continue it"
TOO_DEEP = "it is nested too deep"
TOO_MANY = "it has too much that may come next in one place"


def mask_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // 32)


class Matcher:
    """A position in a grammar, which tokens move on.

    End-of-text tokens are allowed where the grammar may end, and alone where it allows nothing else. So are the
    request's stop tokens, whose text it may or may not allow. Its methods are called by one thread at a time.

    Args:
        state: llguidance's.
        eos: an end-of-text token, which its masks allow where the grammar may end.
        stop_ids: the request's other stop tokens, which the model has.
    """

    __slots__ = ("_eos", "_stop_words", "state")

    def __init__(self, state: "LLMatcher", eos: int, stop_ids: list[int]) -> None:
        self.state = state
        self._eos = eos
        self._stop_words: dict[int, int] = {}
        for token in stop_ids:
            self._stop_words[token // 32] = self._stop_words.get(token // 32, 0) | 1 << (token % 32)

    def mask(self, row: Bits) -> None:
        """Write the allowed tokens to ``row`` [words]. Raises ToolkitError where the grammar became too complex."""
        self.state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self.check()
        self.mark_stops(row[None])

    def mark_stops(self, rows: Bits) -> None:
        """Allow stop tokens in masks [rows, words] of this matcher where, and only where, the grammar may end."""
        if self._stop_words:
            may_end = (rows[:, self._eos // 32] >> (self._eos % 32)) & 1
            for word, bits in self._stop_words.items():
                bits_32 = np.array(bits, dtype=np.uint32).view(np.int32)
                rows[:, word] = (rows[:, word] & ~bits_32) | np.where(may_end == 1, bits_32, 0)

    def accept(self, token: int) -> None:
        """Move on by one token. Raises ToolkitError for one that is not allowed here."""
        if not self.state.consume_token(token):
            self.check()

    def allowed_prefix(self, tokens: list[int]) -> int:
        """How many of the first tokens may follow one after the other."""
        return self.state.validate_tokens(tokens) if tokens else 0

    def rollback(self, count: int) -> None:
        """Move back by the last ``count`` accepted tokens."""
        if count and not self.state.rollback(count):
            self.check()

    def fork(self) -> "Matcher":
        """A matcher at the same position, to move on apart."""
        copy = Matcher(self.state.deep_copy(), self._eos, [])
        copy._stop_words = self._stop_words
        return copy

    @property
    def may_end(self) -> bool:
        """Whether the output so far is complete."""
        return self.state.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end may follow."""
        return self.state.is_stopped() and not self.state.is_error()

    @property
    def error(self) -> str | None:
        """What went wrong, if anything: no mask of this matcher means anything then."""
        return explained(self.state.get_error()) if self.state.is_error() else None

    def check(self) -> None:
        """Raise ToolkitError where something went wrong."""
        if (error := self.error) is not None:
            raise ToolkitError(f"structured_outputs cannot be followed further ({error}).")


def explained(message: str) -> str:
    """The line of an llguidance message that says what is wrong, without places in a text that the user never saw."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    line = named or first_line(ValueError(message))
    for _ in range(2):
        head, _, rest = line.partition(": ")
        if rest and (head.startswith(("at ", "failed to compile")) or head[:1].isdigit()):
            line = rest
    return next((plain for found, plain in _PLAIN.items() if found in line), line.rstrip("."))


_PLAIN = {
    "NoExtensionBias": NO_TOKEN,
    "recursion limit": TOO_DEEP,
    "Current row has": TOO_MANY,
    "Too many items": TOO_MANY,
}
