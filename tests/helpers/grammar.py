"""Texts that grammars lead to, token by token, without a model."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.engine.grammar.matcher import Matcher, mask_words
from toolkit.engine.grammar.params import StructuredOutputsParams


def allowed(matcher: Matcher, vocab_size: int) -> list[int]:
    """The tokens that a matcher's mask allows, ascending."""
    row = np.zeros(mask_words(vocab_size), dtype=np.int32)
    matcher.mask(row)
    return [token for token in range(32 * len(row)) if row[token // 32] >> (token % 32) & 1]


def matcher_of(compiler: GrammarCompiler, stop_ids: Iterable[int] = (), **form: Any) -> Matcher:
    """A matcher at the beginning of a form."""
    return compiler.compile(StructuredOutputsParams(**form)).matcher(list(stop_ids))


def accepts(compiler: GrammarCompiler, tokenizer: Any, vocab_size: int, text: str, **form: Any) -> bool:
    """Whether a form allows a text as the whole output, written with the tokenizer's own tokens."""
    matcher = matcher_of(compiler, **form)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token not in allowed(matcher, vocab_size):
            return False
        matcher.accept(token)
    return matcher.may_end


def random_text(
    matcher: Matcher, tokenizer: Any, vocab_size: int, eos: int, rng: np.random.Generator, most: int
) -> str | None:
    """A text of random allowed tokens, ended where it may end half of the times; None for one that is cut."""
    quote = tokenizer.convert_tokens_to_ids('"')
    tokens: list[int] = []
    while len(tokens) < most:
        choices = allowed(matcher, vocab_size)
        assert choices, tokenizer.decode(tokens)
        if eos in choices and rng.random() < 0.5:
            return str(tokenizer.decode(tokens))
        choices = [one for one in choices if one != eos] or [eos]
        token = quote if quote in choices and rng.random() < 0.2 else choices[rng.integers(len(choices))]
        if token == eos:
            return str(tokenizer.decode(tokens))
        matcher.accept(token)
        tokens.append(token)
    return None
