"""Masks of every kind of grammar and tokenizer, against what is found by trying every token's text."""

import itertools
import re

import numpy as np
import pytest
import torch

from tests.helpers.engine_tokenizers import byte_level, metaspace, sentencepiece
from tests.helpers.grammar import accepts, allowed, matcher_of
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.engine.grammar.masks import GrammarMasks, masked, masked_on_device
from toolkit.engine.grammar.matcher import Matcher, mask_words
from toolkit.errors import ToolkitError

VOCAB = 450  # more than any of these tokenizers has
TOKENIZERS = {
    "byte level": byte_level,
    "Llama-2": sentencepiece,
    "Metaspace and bytes": metaspace,
    **{kind: lambda kind=kind: make_tokenizer(kind) for kind in ("byte_level", "llama", "metaspace", "unigram")},
}
LANGUAGES = {
    "choice": ({"choice": ["the", "the dog", "do", "a\nb", 'q"', "é"]}, ["the", "the dog", "do", "a\nb", 'q"', "é"]),
    "regex": (
        {"regex": "(a|the)(s| dog){0,2}"},
        [head + "".join(tail) for head in ("a", "the") for n in (0, 1, 2)
         for tail in itertools.product(("s", " dog"), repeat=n)],
    ),
    "lark": ({"grammar": 'start: "a" item ","? \nitem: "b" | "(" "c" ")"'}, ["ab", "ab,", "a(c)", "a(c),"]),
    "gbnf": ({"grammar": 'root ::= "a" item ","?\nitem ::= "b" | "(" "c" ")"\n'}, ["ab", "ab,", "a(c)", "a(c),"]),
    "json": ({"json": {"enum": ["a", 1, None]}}, ['"a"', "1", "null"]),
}  # fmt: skip


def written(tokenizer, token: int) -> bytes:
    """What a token writes behind others, by the tokenizer's own decoder, as bytes."""
    backend = tokenizer.backend_tokenizer
    raw = backend.id_to_token(token)
    if raw is None:
        return b""
    if re.fullmatch("<0x[0-9A-F]{2}>", raw):
        return bytes([int(raw[3:5], 16)])
    # Behind a letter no decoder strips a space.
    letter = next(at for at in range(VOCAB) if (backend.id_to_token(at) or "").lower() in ("a", "b", "t", "s"))
    head = backend.decode([letter])
    return backend.decode([letter, token])[len(head) :].encode()


def in_language(texts: list[str], prefix: bytes) -> bool:
    return any(text.encode().startswith(prefix) for text in texts)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_mask_allows_what_the_language_can_continue_with(kind: str, language: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    form, texts = LANGUAGES[language]
    eos = tokenizer.eos_token_id
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset([eos]))
    special = {at for at, about in tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if about.special}
    bytes_of = {at: written(tokenizer, at) for at in range(VOCAB) if at not in special | {eos}}
    whole = {at: text for at, text in bytes_of.items() if text and "\ufffd".encode() not in text}
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(12):
        matcher, so_far = matcher_of(compiler, **form), b""
        while True:
            found = set(allowed(matcher, VOCAB))
            wanted = {at for at, text in whole.items() if in_language(texts, so_far + text)}
            may_end = so_far.decode("utf-8", "ignore").encode() == so_far and so_far.decode() in texts
            # Tokens that are a part of a character cannot be decoded alone.
            assert {at for at in found if at in whole} == wanted
            assert (eos in found) == may_end == matcher.may_end
            assert not found & special - {eos}
            assert max(found) < tokenizer.backend_tokenizer.get_vocab_size()
            choices = sorted(wanted)
            if not choices:
                break
            token = choices[rng.integers(len(choices))]
            matcher.accept(token)
            so_far += whole[token]
        ended += may_end
        if may_end:
            assert matcher.is_finished == (not wanted)
    assert ended


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("byte_level")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, frozenset([2, 4]))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ends_are_allowed_where_the_grammar_may_end_and_forced_where_it_is_complete(tokenizer, compiler) -> None:
    matcher = matcher_of(compiler, regex="ab?")
    a, b = (tokenizer.convert_tokens_to_ids(one) for one in "ab")
    assert allowed(matcher, VOCAB) == [a]
    assert not matcher.may_end
    matcher.accept(a)
    assert allowed(matcher, VOCAB) == sorted([2, 4, b])
    assert matcher.may_end
    assert not matcher.is_finished
    matcher.accept(b)
    assert allowed(matcher, VOCAB) == [2, 4]
    assert matcher.is_finished
    matcher.accept(4)  # with ignore_eos an end is a token like others
    assert allowed(matcher, VOCAB) == [2, 4]


def test_stop_tokens_are_allowed_where_and_only_where_the_grammar_may_end(tokenizer, compiler) -> None:
    a, b, padding = *(tokenizer.convert_tokens_to_ids(one) for one in "ab"), VOCAB - 1
    matcher = matcher_of(compiler, [2, b, padding, VOCAB + 3], regex="ab?c")
    assert allowed(matcher, VOCAB) == [a]
    matcher.accept(a)
    assert b not in allowed(matcher, VOCAB)
    matcher.accept(tokenizer.convert_tokens_to_ids("c"))
    assert allowed(matcher, VOCAB) == sorted([2, 4, b, padding])
    assert allowed(matcher.fork(), VOCAB) == sorted([2, 4, b, padding])


def test_a_token_that_is_not_allowed_is_an_error_that_stays(tokenizer, compiler) -> None:
    matcher = matcher_of(compiler, regex="ab?")
    with pytest.raises(ToolkitError, match=r"structured_outputs cannot be followed further \(.*doesn't satisfy"):
        matcher.accept(tokenizer.convert_tokens_to_ids("c"))
    assert matcher.error is not None
    assert not matcher.is_finished
    with pytest.raises(ToolkitError, match="cannot be followed further"):
        matcher.mask(np.zeros(mask_words(VOCAB), dtype=np.int32))


def test_a_matcher_rolls_back_and_forks(tokenizer, compiler) -> None:
    text = ids(tokenizer, '{"name": "the dog", "n": [1, 22]}')
    matcher = matcher_of(compiler, json_object=True)
    masks = [allowed(matcher, VOCAB)]
    for token in text:
        matcher.accept(token)
        masks.append(allowed(matcher, VOCAB))
    rng = np.random.default_rng(0)
    at = len(text)
    for _ in range(60):
        back = int(rng.integers(0, at + 1))
        matcher.rollback(back)
        at -= back
        assert allowed(matcher, VOCAB) == masks[at]
        copy = matcher.fork()
        forward = int(rng.integers(0, len(text) - at + 1))
        for token in text[at : at + forward]:
            matcher.accept(token)
        assert allowed(copy, VOCAB) == masks[at]
        at += forward
        assert allowed(matcher, VOCAB) == masks[at]


def test_free_text_has_tags_where_triggers_are(tokenizer, compiler) -> None:
    integer = {"type": "integer"}
    tag = {
        "triggers": ["<f", "<|im_start|>"],
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "object", "additionalProperties": integer}, "end": "</f>"},
            {"begin": "<f=b>", "schema": '{"type": "integer"}', "end": "</f>"},
            {"begin": "<|im_start|>c ", "schema": integer, "end": "<s>"},
        ],
    }
    taken = {
        "": True, "hello": True, "hello <": True, "hello <f": False, "hello <f=": False, "x <f=c>": False,
        'a <f=a>{"x": 1}</f> b': True, 'a <f=a>{"x": null}</f>': False, "<f=b>12</f><f=b>3</f>": True,
        "<f=b>12": False, "<f=b>x</f>": False, "y <|im_start|>c 5<s>": True, "<|im_start|>d": False,
        "y <s>": False,
    }  # fmt: skip
    for text, expected in taken.items():
        assert accepts(compiler, tokenizer, VOCAB, text, structural_tag=tag) == expected, text


def test_special_tokens_are_text_for_no_grammar_that_does_not_name_them(tokenizer, compiler) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for form in ({"regex": "(?s:.*)"}, {"choice": ["<|im_start|>"]}, {"regex": r"<\|im_start\|>"}):
        assert start not in allowed(matcher_of(compiler, **form), VOCAB)
    assert allowed(matcher_of(compiler, grammar='start: <|im_start|> "a"'), VOCAB) == [start]


def test_a_choice_of_many_texts(tokenizer, compiler) -> None:
    words = [f"word {at}" for at in range(5000)]
    for text in ("word 0", "word 4999", "word 44"):
        assert accepts(compiler, tokenizer, VOCAB, text, choice=words)
    assert not accepts(compiler, tokenizer, VOCAB, "word 5000", choice=words)
    assert not accepts(compiler, tokenizer, VOCAB, "word ", choice=words)


def test_a_grammar_does_not_choose_between_tokenisations(tokenizer, compiler) -> None:
    texts = [tokenizer.decode([one]) for one in allowed(matcher_of(compiler, regex="the quick"), VOCAB)]
    assert {"t", "th", "the"} & set(texts) == {one for one in ("t", "th", "the") if len(ids(tokenizer, one)) == 1}
    header = '%llguidance {"no_forcing": false}\nstart: "the quick"'
    assert [tokenizer.decode([one]) for one in allowed(matcher_of(compiler, grammar=header), VOCAB)] == texts


class Rows:
    """Masks of this module's vocabulary, whose thread ends with the block."""

    def __init__(self) -> None:
        self.masks = GrammarMasks(VOCAB, torch.device("cpu"))

    def __enter__(self) -> GrammarMasks:
        return self.masks

    def __exit__(self, *_: object) -> None:
        self.masks.close()


def rows_of(matcher: Matcher, drafted: list[int]) -> list[list[int]]:
    """The allowed tokens before and after each drafted token, by a matcher that moves on and back."""
    found = [allowed(matcher, VOCAB)]
    for token in drafted:
        matcher.accept(token)
        found.append(allowed(matcher, VOCAB))
    matcher.rollback(len(drafted))
    return found


def test_rows_are_masked_and_others_are_not(tokenizer, compiler) -> None:
    drafted = ids(tokenizer, '{"a": 1}')
    json, regex, late = (
        matcher_of(compiler, **form) for form in ({"json_object": True}, {"regex": "the dog"}, {"choice": ["x"]})
    )
    expected = [None, *rows_of(json, drafted), allowed(regex, VOCAB), None, allowed(late, VOCAB)]
    rows = [(None, 0), *((json, at) for at in range(len(drafted) + 1)), (regex, 0), (None, 0), (late, 0)]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    with Rows() as masks:
        for _ in range(2):  # twice: filling a mask moves no matcher
            masks.start([(regex, []), (json, drafted)])
            scores, errors = masks.apply(logits, logits, rows)
            assert torch.equal(logits, before)
            assert errors == [None] * len(rows)
            for row, tokens in enumerate(expected):
                wanted = logits[row] if tokens is None else torch.full((VOCAB,), -torch.inf)
                if tokens is not None:
                    wanted[tokens] = logits[row][tokens]
                assert torch.equal(scores[row], wanted), row
        alone, _ = masks.apply(logits[-1:], logits[-1:], [(late, 0)])
        assert torch.equal(alone, scores[-1:])
        untouched, errors = masks.apply(logits, logits, [(None, 0)] * len(rows))
        assert untouched is logits


def test_rows_behind_a_wrong_draft_are_finite(tokenizer, compiler) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(one) for one in "ab")
    matcher = matcher_of(compiler, regex="ab")
    logits = torch.randn(4, VOCAB)
    with Rows() as masks:
        masks.start([(matcher, [a, a, b])])
        scores, _ = masks.apply(logits, logits, [(matcher, at) for at in range(4)])
    assert scores[0].isfinite().nonzero().flatten().tolist() == [a]
    assert scores[1].isfinite().nonzero().flatten().tolist() == [b]
    assert scores[2:].isfinite().all()
    assert allowed(matcher, VOCAB) == [a]


def test_a_draft_may_pass_the_end(tokenizer, compiler) -> None:
    a = tokenizer.convert_tokens_to_ids("a")
    matcher = matcher_of(compiler, regex="a")
    logits = torch.randn(4, VOCAB)
    with Rows() as masks:
        masks.start([(matcher, [a, 2, 2])])
        scores, _ = masks.apply(logits, logits, [(matcher, at) for at in range(4)])
    assert scores[1].isfinite().nonzero().flatten().tolist() == [2, 4]
    assert allowed(matcher, VOCAB) == [a]


def test_where_penalties_leave_nothing_that_is_allowed_the_logits_stand(tokenizer, compiler) -> None:
    finished, open_end = (matcher_of(compiler, regex=regex) for regex in ("a", "ab?"))
    for matcher in (finished, open_end):
        matcher.accept(tokenizer.convert_tokens_to_ids("a"))
    logits = torch.randn(2, VOCAB)
    held_back = logits - 1
    held_back[:, [2, 4]] = -torch.inf
    with Rows() as masks:
        scores, errors = masks.apply(logits, held_back, [(finished, 0), (open_end, 0)])
    assert errors == [None, None]
    assert scores[0].isfinite().nonzero().flatten().tolist() == [2, 4]
    assert torch.equal(scores[0, [2, 4]], logits[0, [2, 4]])
    assert scores[1].isfinite().nonzero().flatten().tolist() == [tokenizer.convert_tokens_to_ids("b")]


def test_a_row_whose_grammar_failed_has_an_error(tokenizer, compiler) -> None:
    good, bad = (matcher_of(compiler, regex="a") for _ in range(2))
    with pytest.raises(ToolkitError):
        bad.accept(tokenizer.convert_tokens_to_ids("b"))
    logits = torch.randn(2, VOCAB)
    with Rows() as masks:
        masks.start([(good, []), (bad, [])])
        _, errors = masks.apply(logits, logits, [(good, 0), (bad, 0)])
    assert errors[0] is None
    assert "structured_outputs cannot be followed further" in str(errors[1])


@pytest.mark.parametrize("vocab", [1, 31, 32, 450])
@pytest.mark.parametrize("where", [None, [0, 2]])
@pytest.mark.parametrize("adjusted", [False, True])
def test_devices_mask_in_the_same_way(vocab: int, where: list[int] | None, adjusted: bool) -> None:
    rng = np.random.default_rng(0)
    count = 3 if where is None else len(where)
    bits = rng.integers(-(2**31), 2**31, (count, mask_words(vocab)), dtype=np.int32).view(np.uint8)
    logits = torch.randn(3, vocab)
    scores = logits - 1 if adjusted else logits
    if adjusted:
        scores[0] = -torch.inf
    allowed = np.unpackbits(bits, axis=1, count=vocab, bitorder="little").astype(bool)
    addends = np.where(allowed, 0, -np.inf).astype(np.float32)
    found = masked(logits, scores, addends, where)
    assert torch.equal(found, masked_on_device(logits, scores, bits, where))
    expected = scores.clone()
    for at, row in enumerate(range(3) if where is None else where):
        of = logits if adjusted and row == 0 else scores
        expected[row] = torch.where(torch.from_numpy(allowed[at]), of[row], -torch.inf)
    assert torch.equal(found, expected)
