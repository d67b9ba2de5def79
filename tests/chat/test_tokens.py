"""Tokens of a whole text, and which characters each stands for: against stock tokenizers of every sort."""

import random
import unicodedata

import pytest
from tokenizers import AddedToken

from tests.helpers.tokenizers import BACKENDS, SlowTokenizer, make_tokenizer
from toolkit.chat import encode, prompt_token_ids, special_tokens_around
from toolkit.chat.tokens import encode_with_offsets, token_ranges
from toolkit.errors import ToolkitError

TEXTS = [
    "the  quick   brown\n\n fox <|im_end|>\n  jumps over  ",
    "  two plus two<|im_start|>is four. hello   world</s> yes",
    "é🙂 漢 the\tdog\r\n.\n\nno",
]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ranges_cover_the_text_and_say_what_a_token_holds(kind: str, text: str) -> None:
    tokenizer = make_tokenizer(kind)
    found = encode_with_offsets(tokenizer, text)
    assert found.ids == tokenizer(text, add_special_tokens=False)["input_ids"] == encode(tokenizer, text)
    covered = {at for begin, end in zip(found.begins, found.ends) for at in range(begin, end)}
    assert all(text[at].isspace() for at in set(range(len(text))) - covered)
    if kind == "byte_level":
        assert covered == set(range(len(text)))
        for token, begin, end in zip(found.ids, found.begins, found.ends):
            decoded = tokenizer.decode([token])
            assert text[begin:end] == decoded or "\ufffd" in decoded


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_slow_tokenizer_finds_the_same_ranges(kind: str) -> None:
    """Independent of offsets: where the tokens of the beginning and of the whole part."""
    tokenizer = make_tokenizer(kind)
    slow = SlowTokenizer(tokenizer)
    chance = random.Random(kind)
    for text in TEXTS:
        text = unicodedata.normalize("NFKC", text)
        words = [at for at in range(1, len(text)) if text[at] in " <" and text[at - 1] not in " <\r"]
        begin, end = sorted(chance.sample(words, 2))
        ids, (fast_range, rest) = token_ranges(tokenizer, text, [(begin, end), (end, len(text))])
        slow_ids, (slow_range, slow_rest) = token_ranges(slow, text, [(begin, end), (end, len(text))])
        assert ids == slow_ids
        assert rest.last == slow_rest.last == len(ids)
        if kind not in ("llama", "metaspace"):  # whose tokens cross the borders of words, and merge otherwise elsewhere
            assert (fast_range, rest) == (slow_range, slow_rest)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(
    ("around", "before", "behind"), [("$A", [], []), ("<s> $A", [1], []), ("<s> $A </s>", [1], [2])]
)
def test_a_prompt_is_not_ended(kind: str, around: str, before: list[int], behind: list[int]) -> None:
    tokenizer = make_tokenizer(kind, around=around)
    names = {1: "<s>", 2: "</s>"}
    before, behind = ([tokenizer.convert_tokens_to_ids(names[at]) for at in side] for side in (before, behind))
    assert special_tokens_around(tokenizer) == (before, behind)
    for text in ("two plus", "two <|im_end|>"):
        stock = tokenizer(text)["input_ids"]
        assert prompt_token_ids(tokenizer, text) == stock[: len(stock) - len(behind)]
    assert prompt_token_ids(tokenizer, "") == before


def test_a_lone_surrogate_is_one_sentence() -> None:
    with pytest.raises(ToolkitError, match=r"must be Unicode without lone surrogates, got U\+D83D at character 3\."):
        encode(make_tokenizer(), "abc\ud83d")


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
@pytest.mark.parametrize("swallows", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_whitespace_that_an_added_token_swallows_is_not_its_own(kind: str, swallows: dict[str, bool]) -> None:
    """Phi-3's tokenizer is such a one: its ``<|assistant|>`` takes the beginning of what the assistant writes."""
    tokenizer = make_tokenizer(kind)
    encode_with_offsets(tokenizer, "before the token is known")
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, normalized=False, **swallows)], special_tokens=True)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    prompt, completion, after = "hello<|turn|>\n", " world  ", "<|turn|>"
    ends = len(prompt), len(prompt + completion)
    ids, ((first, last, straddles),) = token_ranges(tokenizer, prompt + completion + after, [ends])
    assert turn in ids[:first]
    assert turn not in ids[first:last]
    assert turn in ids[last:]
    assert not straddles


@pytest.mark.parametrize("blank", ["\n", "\t", "\u00a0", "\n\n"])
def test_a_space_that_the_tokenizer_puts_in_hides_no_whitespace(blank: str) -> None:
    """After a special token, and before whitespace, whose offsets then go backwards."""
    tokenizer = make_tokenizer("prefix_space")
    text = f"hello<|im_end|>{blank}two"
    found = encode_with_offsets(tokenizer, text)
    assert found.begins == sorted(found.begins)
    assert found.ends == sorted(found.ends)
    end = text.index(blank)
    _, (counts,) = token_ranges(tokenizer, text, [(end, end + len(blank))])
    assert tokenizer.decode(found.ids[counts.first : counts.last]).endswith(blank)
