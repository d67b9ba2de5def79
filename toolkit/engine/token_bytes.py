"""The bytes that tokens stand for, in vocabularies whose tokens are bytes and not characters."""

import json
from functools import lru_cache
from typing import Any, Literal

REPLACEMENT = "�"
Kind = Literal["every token", "some tokens", "none"]


class TokenBytes:
    """Which bytes a token writes, by the decoder of a fast tokenizer; None for tokens that are text.

    Attributes:
        kind: "every token" of a byte-level vocabulary (GPT-2, Llama-3, Qwen) is bytes, "some tokens" such as
            ``<0xF0>`` are with byte fallback (Llama-2, Gemma), "none" elsewhere and where the decoder is not known.
        a_letter: a token of byte fallback that reads "A".
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        steps = [step["type"] for step in decoder_steps(self._backend)]
        self.a_letter: int | None = None
        self.kind: Kind = "every token" if steps == ["ByteLevel"] else "none"
        if "ByteFallback" in steps:
            self.a_letter = self._backend.token_to_id("<0x41>")
            self.kind = "none" if self.a_letter is None else "some tokens"
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> bytes | None:
        if self.kind == "none":
            return None
        raw = self._backend.id_to_token(token)
        if raw is None:  # of a model with more embeddings than the tokenizer has tokens: it writes nothing
            return b""
        if self.kind == "every token":
            return _alphabet_bytes(raw)
        return bytes([int(raw[3:5], 16)]) if len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">") else None


def _alphabet_bytes(raw: str) -> bytes:
    """The bytes of a byte-level token; an added token with other characters is text, and so its UTF-8."""
    found = [_ALPHABET.get(character) for character in raw]
    return raw.encode() if None in found else bytes(byte for byte in found if byte is not None)


def decode_characters(data: bytes, per_byte: bool, final: bool = False) -> tuple[str, bytes]:
    """(the text of ``data``, the start of a character at its end that is still incomplete).

    Args:
        data: UTF-8, or what is not.
        per_byte: write U+FFFD for every byte that belongs to no character, as byte fallback does, instead of for
            every start of a character that is not completed, as UTF-8 decoders do.
        final: nothing follows, so that an incomplete character is no character.
    """
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            if error.reason == "unexpected end of data" and not final:
                return text, data[error.start :]
            text += REPLACEMENT * (error.end - error.start if per_byte else 1)
            data = data[error.end :]
    return text, b""


def incomplete_end(data: bytes) -> bytes:
    """The start of a character that ``data`` ends in, if it ends inside of one."""
    for length in (1, 2, 3):
        tail = data[-length:]
        if len(tail) == length and decode_characters(tail, per_byte=False) == ("", tail):
            return tail
    return b""


def decoder_steps(backend: Any) -> list[dict[str, Any]]:
    """The steps of a ``tokenizers`` decoder, in order, each with its ``type``; none where there is no such decoder."""
    try:
        decoder = json.loads(backend.decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return []
    return list(decoder.get("decoders", [decoder]))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: itself where Latin-1 shows it, else 256 and up in order."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()
