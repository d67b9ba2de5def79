"""Tokens to text, one at a time, without ever showing text that may still change."""

from collections.abc import Mapping
from typing import Any, Protocol

REPLACEMENT = "�"
CONTEXT = 6
"""Prompt tokens that are decoded along, so that the first new token keeps its leading space."""
HOLD = 16
"""Tokens after which a run without a character boundary is taken for bytes that are not text."""


class Tokenizer(Protocol):
    """What the engine needs of a Hugging Face tokenizer. Its ``eos_token_id``, if it has one, ends a text."""

    def __call__(self, text: Any, /) -> Mapping[str, Any]:
        """{"input_ids": token ids} of a text."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = ...) -> Any:
        """The text of token ids."""


class Decoder:
    """A tokenizer's decoding, with the text of single tokens remembered."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        # The Rust tokenizer under a fast one, where there is one: the wrapper costs as much as the decoding.
        self._tokenizer: Tokenizer = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        self._skip = skip_special_tokens
        self._texts: dict[int, str] = {}

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 give U+FFFD."""
        if len(ids) != 1:
            return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip)) if ids else ""
        text = self._texts.get(ids[0])
        if text is None:
            text = self._texts[ids[0]] = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text


class Detokenizer:
    """The text of one completion as it grows.

    ``push`` a token, then ``take`` what may be shown; ``finish`` once at the end. ``text`` is everything so
    far, truncated at the stop string when one was found.
    """

    def __init__(
        self, decoder: Decoder, prompt: list[int], stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._include_stop = include_stop
        # Tokens from the last character boundary but one; the first ``_known`` of them read ``_base``.
        self._window = prompt[-CONTEXT:]
        self._known = len(self._window)
        # A prompt may end inside a character: what completes it is new text.
        self._base = decoder.decode(self._window).rstrip(REPLACEMENT)
        self._search_from = 0
        self._shown = 0
        self.text = ""

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Add a token; the stop string that it completed, if any.

        may_stop: False while ``min_tokens`` is not reached; stop strings in the text so far never count then.
        """
        self._window.append(token)
        full = self._decoder.decode(self._window)
        if full == self._base:  # a special token that is left out
            self._window.pop()
        elif not full.endswith(REPLACEMENT) or len(self._window) - self._known > HOLD:
            self._accept(full)
        if not may_stop:
            self._search_from = len(self.text)
        return self._find_stop() if self._stop else None

    def finish(self) -> None:
        """No more tokens: what was held back becomes text, an incomplete character as U+FFFD."""
        if len(self._window) > self._known:
            self._accept(self._decoder.decode(self._window))
        self._stop = ()

    def take(self) -> str:
        """Text not taken before, less an end that could be the beginning of a stop string."""
        end = len(self.text) - self._held()
        new, self._shown = self.text[self._shown : end], max(end, self._shown)
        return new

    def _accept(self, full: str) -> None:
        self.text += full[len(self._base) :]
        del self._window[: self._known]
        self._known = len(self._window)
        self._base = self._decoder.decode(self._window)

    def _find_stop(self) -> str | None:
        """Cut the text at the stop string that is complete first; of several that are, at the longest."""
        found: tuple[int, int, str] | None = None
        for stop in self._stop:
            at = self.text.find(stop, self._search_from)
            if at >= 0 and (found is None or (at + len(stop), at) < found[:2]):
                found = (at + len(stop), at, stop)
        if found is None:
            self._search_from = max(self._search_from, len(self.text) - self._longest + 1)
            return None
        end, start, stop = found
        self.text = self.text[: end if self._include_stop else start]
        self._window, self._known, self._stop = [], 0, ()
        return stop

    def _held(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        most = min(self._longest - 1, len(self.text) - self._search_from) if self._stop else 0
        for length in range(most, 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
