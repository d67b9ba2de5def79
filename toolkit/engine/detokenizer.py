"""Tokens to text, one at a time, without ever showing text that may still change."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from toolkit.engine.stop_strings import stop_strings
from toolkit.engine.token_bytes import REPLACEMENT, TokenBytes, decode_characters, incomplete_end

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
    """A tokenizer's decoding, with the text of single tokens remembered.

    Args:
        tokenizer: of the model.
        skip_special_tokens: leave special tokens out of texts.
        kept: special tokens that are not left out.

    Attributes:
        bytes: of the tokens that stand for bytes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, kept: Iterable[int] = ()) -> None:
        # The Rust tokenizer under a fast one, where there is one: the wrapper costs as much as the decoding.
        self._tokenizer: Any = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        self._special = _special_ids(self._tokenizer) - set(kept) if skip_special_tokens else frozenset()
        # With some of them kept, none of the others gets as far as decoding.
        self._skip = skip_special_tokens and not set(kept)
        self._texts: dict[int, str] = {}
        self.bytes = TokenBytes(tokenizer)

    def skips(self, token: int) -> bool:
        """Whether a token is left out of the text, as if it were not there."""
        return token in self._special

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 give U+FFFD."""
        if len(ids) != 1:
            return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip)) if ids else ""
        text = self._texts.get(ids[0])
        if text is None:
            text = self._texts[ids[0]] = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text


class Detokenizer:
    """The text of one completion as it grows: all of its deltas together are what prompt and completion decode to,
    without the prompt's text.

    ``push`` a token, then ``take`` what may be shown; ``finish`` once at the end. ``text`` is everything so
    far, truncated at the stop string when one was found.

    Tokens that stand for bytes are put together to characters here, since a tokenizer that is given a part of a run
    of them may read all of the run as U+FFFD. Byte fallback does that for one bad byte in a run, too; here the
    characters around it stay, because they may have been shown.
    """

    def __init__(
        self, decoder: Decoder, prompt: list[int], stop: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self._decoder = decoder
        self._stops = stop_strings(stop) if stop else None
        self._stop_state = 0
        self._include_stop = include_stop
        self._per_byte = decoder.bytes.kind == "some tokens"
        self._pending, self._window = self._end_of(prompt)
        # A prompt may end inside a character: what completes it is new text, and what it decodes to without is not.
        self._known_replacements = decode_characters(self._pending, self._per_byte, final=True)[0]
        # Tokens that are text from the last boundary but one; the first ``_known`` of them read ``_base``.
        self._known = len(self._window)
        self._base = decoder.decode(self._window)
        self._shown = 0
        self.text = ""

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Add a token; the stop string that it completed, if any.

        may_stop: False while ``min_tokens`` is not reached; stop strings in the text so far never count then.
        """
        if self._decoder.skips(token):
            return None
        before = len(self.text)
        written = self._decoder.bytes.of(token)
        if written is not None:
            self._push_bytes(written)
        else:
            self._end_bytes()
            self._window.append(token)
            full = self._decoder.decode(self._window)
            if not full.endswith(REPLACEMENT) or len(self._window) - self._known > HOLD:
                self._accept(full)
        return self._find_stop(before, may_stop) if self._stops else None

    def finish(self) -> None:
        """No more tokens: what was held back becomes text, an incomplete character as U+FFFD."""
        self._end_bytes()
        if len(self._window) > self._known:
            self._accept(self._decoder.decode(self._window))
        self._stops = None

    def take(self) -> str:
        """Text not taken before, less an end that could be the beginning of a stop string."""
        held = self._stops.depth[self._stop_state] if self._stops else 0
        end = max(len(self.text) - held, self._shown)
        new, self._shown = self.text[self._shown : end], end
        return new

    def _end_of(self, prompt: list[int]) -> tuple[bytes, list[int]]:
        """(the incomplete character that ``prompt`` ends in, tokens before it that decide how the next one reads)."""
        written, context = b"", []
        for token in reversed(prompt):
            if self._decoder.skips(token):
                continue
            found = self._decoder.bytes.of(token)
            if found is None:
                context.append(token)
            elif not context and len(written) < 4:
                written = found + written
            if len(context) == CONTEXT or (found is not None and (context or len(written) >= 4)):
                break
        return incomplete_end(written), context[::-1] or self._after_bytes(written)

    def _after_bytes(self, written: bytes) -> list[int]:
        """The context after bytes: a letter, for a run of bytes may change its reading when more of them follow."""
        letter = self._decoder.bytes.a_letter
        return [letter] if written and letter is not None else []

    def _push_bytes(self, written: bytes) -> None:
        text, self._pending = decode_characters(self._pending + written, self._per_byte)
        self._write_bytes(text, written)

    def _end_bytes(self) -> None:
        if self._pending:
            text, _ = decode_characters(self._pending, self._per_byte, final=True)
            self._pending = b""
            self._write_bytes(text, b"\0")

    def _write_bytes(self, text: str, written: bytes) -> None:
        if text:
            self.text += text.removeprefix(self._known_replacements)
            self._known_replacements = ""
            self._window = self._after_bytes(written)
            self._known, self._base = len(self._window), self._decoder.decode(self._window)

    def _accept(self, full: str) -> None:
        self.text += after_common_prefix(self._base, full)
        del self._window[: self._known]
        self._known = len(self._window)
        self._base = self._decoder.decode(self._window)

    def _find_stop(self, before: int, may_stop: bool) -> str | None:
        """Cut the text at the stop string that is complete first; of several that are, at the longest."""
        assert self._stops is not None
        if not may_stop:
            self._stop_state = 0
            return None
        for at in range(before, len(self.text)):
            self._stop_state = self._stops.step(self._stop_state, self.text[at])
            found = self._stops.found[self._stop_state]
            if found is not None:
                end = at + 1
                self.text = self.text[: end if self._include_stop else end - len(found)]
                self._window, self._known, self._pending, self._stops = [], 0, b"", None
                return found
        return None


def after_common_prefix(old: str, new: str) -> str:
    """What ``new`` has after the characters that both begin with."""
    if new.startswith(old):
        return new[len(old) :]
    same = next((at for at, (one, other) in enumerate(zip(old, new)) if one != other), min(len(old), len(new)))
    return new[same:]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "get_added_tokens_decoder", None)
    if added is not None:
        return frozenset(token for token, about in added().items() if about.special)
    return frozenset(getattr(tokenizer, "all_special_ids", ()))
