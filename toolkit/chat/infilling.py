"""Prompts whose completion stands between two texts, for tokenizers with fill-in-the-middle tokens."""

from typing import Any, NamedTuple

from toolkit.chat.tokens import encode, special_tokens_around
from toolkit.errors import ToolkitError


class Family(NamedTuple):
    """How models of a family were trained to fill in.

    Args:
        prefix: the token before the text before.
        suffix: the token before the text behind.
        middle: the token before what is filled in; "" where none is.
        ends: tokens besides the end of a text that a middle ends with, where the tokenizer has them.
        suffix_first: whether the text behind comes first.
        joined: whether the text behind continues another, with no space that the tokenizer puts before any text.
    """

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    suffix_first: bool = False
    joined: bool = False


_CODE_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>")
FAMILIES = {
    "Qwen2.5-Coder, CodeGemma, Granite 4": Family("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", _CODE_ENDS),
    "StarCoder, SantaCoder, Granite Code": Family(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<file_sep>", "<repo_name>")
    ),
    "SantaCoder (hyphens)": Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>",)),
    "Code Llama": Family("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",), joined=True),
    "DeepSeek-Coder": Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    "Codestral": Family("[PREFIX]", "[SUFFIX]", "", suffix_first=True, joined=True),
    "Seed-Coder": Family("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
}
"""Tokens of each family. Models of one family use one set."""
MARK = "☺"
"""Before a text that continues another: what the tokenizer puts before any text comes before this."""


class Infill(NamedTuple):
    """token_ids: of the prompt. stop_token_ids: that end what is filled in, besides the end of a text."""

    token_ids: list[int]
    stop_token_ids: list[int]


def infill(tokenizer: Any, before: str, behind: str) -> Infill:
    """The prompt whose completion stands between two texts.

    Args:
        tokenizer: of transformers.
        before: the text before the completion.
        behind: the text behind it.

    Raises:
        ToolkitError: the tokenizer has the tokens of no family.
    """
    family = _family(tokenizer)
    prefix, suffix, middle = (_id(tokenizer, token) for token in family[:3])
    first = [prefix, *encode(tokenizer, before)]
    last = [suffix, *(_continuing(tokenizer, behind) if family.joined else encode(tokenizer, behind))]
    parts = [*last, *first] if family.suffix_first else [*first, *last]
    marks = [*special_tokens_around(tokenizer)[0], *parts, middle]
    ends = [_id(tokenizer, token) for token in family.ends]
    return Infill([token for token in marks if token is not None], [token for token in ends if token is not None])


def _family(tokenizer: Any) -> Family:
    for family in FAMILIES.values():
        if all(_id(tokenizer, token) is not None for token in family[:3] if token):
            return family
    raise ToolkitError(
        "suffix must not be given, since the model's tokenizer has no fill-in-the-middle tokens, such as those of "
        f"{', '.join(FAMILIES)}."
    )


def _id(tokenizer: Any, token: str) -> int | None:
    """The id of a token that the vocabulary has as a whole."""
    found = tokenizer.convert_tokens_to_ids(token) if token else None
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def _continuing(tokenizer: Any, text: str) -> list[int]:
    mark, whole = encode(tokenizer, MARK), encode(tokenizer, MARK + text)
    return whole[len(mark) :] if whole[: len(mark)] == mark else encode(tokenizer, text)
