"""Text to tokens as a whole, with the characters that each token stands for."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from toolkit.errors import ToolkitError

_SPACE = "\u0120"
"""A space in the tokens of a byte-level vocabulary."""


class Encoding(NamedTuple):
    """Tokens of a text; token ``i`` stands for ``text[begins[i]:ends[i]]``.

    Tokens that are bytes of one character have the same range.
    """

    ids: list[int]
    begins: list[int]
    ends: list[int]

    def token_range(self, begin: int, end: int) -> range:
        """Tokens with a character of ``text[begin:end]``; one that straddles a border is among them."""
        first, last = bisect_right(self.ends, begin), bisect_left(self.begins, end)
        return range(first, max(first, last))


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, special tokens in it recognised and none added: for what ``render`` returned.

    Raises:
        ToolkitError: the text has a lone surrogate, which no encoding of Unicode can hold.
    """
    check_text(text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt: those that the tokenizer puts before any text, and the text's; at least one.

    Those that it puts behind a text (an end of text, with ``add_eos_token``) would end the prompt before its completion
    and are left out. A prompt without tokens is the end-of-text token.

    Raises:
        ToolkitError: the text has a lone surrogate.
    """
    ids = [*special_tokens_around(tokenizer)[0], *encode(tokenizer, text)]
    return ids or [tokenizer.eos_token_id]


def encode_with_offsets(tokenizer: Any, text: str) -> Encoding:
    """``encode`` with the range of characters of every token.

    A slow tokenizer has no offsets; ``spans_to_tokens`` finds ranges for it too.

    Raises:
        ToolkitError: the text has a lone surrogate.
    """
    check_text(text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    _untrim(tokenizer, text, ids, begins, ends)
    return Encoding(ids, begins, ends)


def token_ranges(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[range]]:
    """The text's tokens, and the tokens of each of its character ranges; a token with a character of a range is in it.

    Without offsets (a slow tokenizer) a range begins where the tokens of the text before it and those of the whole
    text part.
    """
    if getattr(tokenizer, "is_fast", False):
        encoding = encode_with_offsets(tokenizer, text)
        return encoding.ids, [encoding.token_range(begin, end) for begin, end in spans]
    ids = encode(tokenizer, text)

    def common(end: int) -> tuple[int, int]:
        before = encode(tokenizer, text[:end])
        length = 0
        while length < min(len(before), len(ids)) and before[length] == ids[length]:
            length += 1
        return length, len(before)

    ranges = []
    for begin, end in spans:
        first = common(begin)[0]
        last, whole = (len(ids), len(ids)) if end >= len(text) else common(end)
        ranges.append(range(first, last if last == whole else last + 1))
    return ids, ranges


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and behind any text."""
    if tokenizer not in _AROUND:
        text = "a"
        inner = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        whole = list(tokenizer(text, verbose=False)["input_ids"])
        before = next(
            (at for at in range(len(whole) - len(inner) + 1) if whole[at : at + len(inner)] == inner), len(whole)
        )
        _AROUND[tokenizer] = whole[:before], whole[before + len(inner) :]
    return _AROUND[tokenizer]


_AROUND: "WeakKeyDictionary[Any, tuple[list[int], list[int]]]" = WeakKeyDictionary()


def check_text(text: str) -> None:
    """Raise ToolkitError for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ToolkitError(
            f"text must be Unicode without lone surrogates, got {code} at character {error.start}."
        ) from None


def _untrim(tokenizer: Any, text: str, ids: list[int], begins: list[int], ends: list[int]) -> None:
    """Give tokens of a byte-level vocabulary the spaces that its post-processor leaves out of their offsets."""
    gaps = [at for at in range(len(ids)) if begins[at] > (ends[at - 1] if at else 0)]
    gaps = sorted({*gaps, *(at - 1 for at in gaps if at), *([len(ids) - 1] if ids and ends[-1] < len(text) else [])})
    tokens = tokenizer.convert_ids_to_tokens([ids[at] for at in gaps])
    for at, token in zip(gaps, tokens):
        leading = len(token) - len(token.lstrip(_SPACE))
        before = ends[at - 1] if at else 0
        while begins[at] > before:
            space = text[begins[at] - 1] == " "
            if space and not leading:
                break
            # A space that the tokenizer put in before the token was trimmed off as if it were the text's.
            begins[at], leading = begins[at] - 1, leading - space
        trailing = leading if token.strip(_SPACE) == "" else len(token) - len(token.rstrip(_SPACE))
        after = begins[at + 1] if at + 1 < len(ids) else len(text)
        while trailing and ends[at] < after and text[ends[at]] == " ":
            ends[at], trailing = ends[at] + 1, trailing - 1
