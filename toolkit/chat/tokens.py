"""Text to tokens as a whole, with the characters that each token stands for."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from toolkit.chat.rust import rust_encoding
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


def encode(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens, special tokens in it recognised and none added: for what ``render`` returned.

    Raises:
        ToolkitError: the text has a lone surrogate, which no encoding of Unicode can hold.
    """
    check_text(text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_token_ids(tokenizer: Any, text: str, check_count: Callable[[int], None] | None = None) -> list[int]:
    """The tokens of a prompt: those that the tokenizer puts before any text, and the text's.

    Those that it puts behind a text (an end of text, with ``add_eos_token``) would end the prompt before its completion
    and are left out.

    Args:
        tokenizer: of transformers, or any whose call has ``input_ids``.
        text: the prompt.
        check_count: is given how many tokens there are before they are made a list, and may raise.

    Raises:
        ToolkitError: the text has a lone surrogate.
    """
    check_text(text)
    if not hasattr(tokenizer, "special_tokens_map"):  # not one of transformers
        return list(tokenizer(text)["input_ids"])
    encoding = rust_encoding(tokenizer, text, add_special_tokens=True)
    ids = tokenizer(text, verbose=False)["input_ids"] if encoding is None else encoding
    kept = len(ids) - len(special_tokens_around(tokenizer)[1])
    if check_count is not None:
        check_count(kept)
    return list(ids if encoding is None else encoding.ids)[:kept]


def sequence_inputs(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None
) -> list[tuple[list[int], list[int] | None]]:
    """Of each text, or of each text with its pair, the tokens and their types: what a model reads as a whole.

    All tokens that the tokenizer puts before and behind a text are there, unlike in a prompt, which is to be continued.
    Types are None where all are 0, or where the tokenizer has none.

    Args:
        tokenizer: of transformers.
        texts: the texts.
        pairs: the second text of each.
        max_length: longer sequences are cut to it, on the tokenizer's side (``truncation_side``); None cuts none.

    Raises:
        ToolkitError: a text has a lone surrogate.
    """
    if not texts:
        return []
    for text in (*texts, *(pairs or ())):
        check_text(text)
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    given = (list(texts),) if pairs is None else (list(texts), list(pairs))
    found = tokenizer(*given, verbose=False, **cut)
    types = found.get("token_type_ids") or [[]] * len(texts)
    return [(list(ids), list(own) if any(own) else None) for ids, own in zip(found["input_ids"], types)]


def encode_with_offsets(tokenizer: Any, text: str) -> Encoding:
    """``encode`` with the range of characters of every token.

    A slow tokenizer has no offsets; ``token_ranges`` takes it too.

    Raises:
        ToolkitError: the text has a lone surrogate.
    """
    check_text(text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    begins, ends = [begin for begin, _ in offsets], [end for _, end in offsets]
    _untrim(tokenizer, text, ids, begins, ends)
    _unstrip(tokenizer, text, ids, begins, ends)
    return Encoding(ids, begins, ends)


class TokenRange(NamedTuple):
    """Tokens ``first`` to ``last - 1``; ``straddles`` where the first one has characters before the range, too."""

    first: int
    last: int
    straddles: bool


def token_ranges(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[TokenRange]]:
    """The text's tokens, and the tokens of each of its ranges of characters; a token with a character of one is in it.

    Without offsets (a slow tokenizer) a range begins where the tokens of the text before it and those of the whole
    text part.
    """
    if getattr(tokenizer, "is_fast", False):
        encoding = encode_with_offsets(tokenizer, text)
        ranges = []
        for begin, end in spans:
            first = bisect_right(encoding.ends, begin)
            last = max(first, bisect_left(encoding.begins, end))
            ranges.append(TokenRange(first, last, first < last and encoding.begins[first] < begin))
        return encoding.ids, ranges
    ids = encode(tokenizer, text)

    def common(end: int) -> tuple[int, int]:
        """Tokens that the text to ``end`` and the whole text begin with, and those that it has."""
        before = encode(tokenizer, text[:end])
        return common_prefix(before, ids), len(before)

    ranges = []
    for begin, end in spans:
        first, before = common(begin)
        last, whole = (len(ids), len(ids)) if end >= len(text) else common(end)
        ranges.append(TokenRange(first, last if last == whole else last + 1, first < before))
    return ids, ranges


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with together."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


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
        if at + 1 < len(ids):  # a space that the tokenizer put in is said to be behind the character that it precedes
            begins[at] = min(begins[at], begins[at + 1])
        leading = len(token) - len(token.lstrip(_SPACE))
        before = ends[at - 1] if at else 0
        while begins[at] > before:
            missing = text[begins[at] - 1]
            if missing.isspace() and not (missing == " " and leading):
                break
            # No space is missing where one that the tokenizer put in was trimmed off as if it were the text's.
            begins[at], leading = begins[at] - 1, leading - (missing == " ")
        trailing = leading if token.strip(_SPACE) == "" else len(token) - len(token.rstrip(_SPACE))
        after = begins[at + 1] if at + 1 < len(ids) else len(text)
        while trailing and ends[at] < after and text[ends[at]] == " ":
            ends[at], trailing = ends[at] + 1, trailing - 1


def _unstrip(tokenizer: Any, text: str, ids: list[int], begins: list[int], ends: list[int]) -> None:
    """Take from added tokens the whitespace that they swallow: it may be another message's."""
    swallowing = _swallowing(tokenizer)
    for at in (at for at, number in enumerate(ids) if number in swallowing) if swallowing else ():
        content = swallowing[ids[at]]
        found = text.find(content, begins[at], ends[at])
        if found >= 0:
            begins[at], ends[at] = found, found + len(content)


def _swallowing(tokenizer: Any) -> dict[int, str]:
    """The text of each added token that swallows the whitespace beside it (``lstrip``, ``rstrip``)."""
    size, found = _SWALLOWING.get(tokenizer, (-1, {}))
    if size != len(tokenizer):  # tokens may be added at any time
        added = tokenizer.added_tokens_decoder.items()
        found = {number: token.content for number, token in added if token.lstrip or token.rstrip}
        _SWALLOWING[tokenizer] = len(tokenizer), found
    return found


_SWALLOWING: "WeakKeyDictionary[Any, tuple[int, dict[int, str]]]" = WeakKeyDictionary()
