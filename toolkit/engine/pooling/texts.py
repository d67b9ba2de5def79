"""Texts, token ids and pairs of texts as inputs of a ``PoolingEngine``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from toolkit.chat import sequence_inputs
from toolkit.engine.pooling.engine import Pooled, PoolingEngine, PoolingInput
from toolkit.engine.pooling.params import PoolingParams
from toolkit.engine.prompts import Prompts, check_characters, split_prompts
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

_FIELDS = ("prompt", "prompt_token_ids")


def read_inputs(
    prompts: Prompts, tokenizer: Any, longest: int, truncate: int | None = None, name: str = "prompt"
) -> list[tuple[str | None, PoolingInput]]:
    """The text of each prompt, None where it has none, and its tokens.

    Args:
        prompts: a text, token ids, a mapping with ``prompt`` or ``prompt_token_ids``, or a list of those.
        tokenizer: of texts; None for token ids alone.
        longest: tokens of a sequence (``PoolingEngine.max_model_len``).
        truncate: ``truncate_prompt_tokens``. Of token ids the last are kept.
        name: of a prompt, for errors.

    Raises:
        ToolkitError: a prompt of another form, or a text without a tokenizer.
    """
    most = None if truncate is None else min(longest, longest if truncate == -1 else truncate)
    plain = [plain_prompt(prompt) for prompt in split_prompts(prompts)]
    texts = [prompt for prompt in plain if isinstance(prompt, str)]
    tokens = iter(_inputs(tokenizer, texts, None, most, longest, name))
    return [
        (prompt, next(tokens)) if isinstance(prompt, str)
        else (None, PoolingInput(prompt if most is None else prompt[-most:]))
        for prompt in plain
    ]  # fmt: skip


def plain_prompt(prompt: Any) -> str | list[int]:
    """A prompt of any form as a text or token ids. Raises ToolkitError for another, or one with images."""
    if isinstance(prompt, Mapping):
        given = [prompt[name] for name in _FIELDS if prompt.get(name) is not None]
        if len(given) != 1 or set(prompt) - set(_FIELDS):
            raise ToolkitError(
                f"prompt must have 'prompt' or 'prompt_token_ids' alone, got {', '.join(map(repr, prompt)) or 'none'}."
            )
        prompt = given[0]
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list | tuple) and set(map(type, prompt)) <= {int}:
        return list(prompt)
    raise ToolkitError(f"prompt must be a text or a list of token ids, got {str(prompt)[:60]!r}.")


def _inputs(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, most: int | None, longest: int, name: str
) -> list[PoolingInput]:
    if not texts:
        return []
    if tokenizer is None:
        raise ToolkitError(f"{name} must be token ids, since the model has no tokenizer, got a text.")
    if most is None:
        check_characters(name, max(map(len, (*texts, *(pairs or ())))), tokenizer, longest)
    return [PoolingInput(*one) for one in sequence_inputs(tokenizer, texts, pairs, most)]


def _numbered(name: str, at: int, texts: Sequence[str]) -> str:
    """What errors call one of the ``texts`` of a field."""
    return name if len(texts) == 1 else f"{name}[{at}]"


@dataclass(frozen=True)
class ScorePlan:
    """What is pooled for the scores of pairs of texts, and how a score is made of it.

    Args:
        inputs: for the engine.
        params: of each.
        pairs: of embeddings, the two inputs of each score; None where each input is a pair.
    """

    inputs: list[PoolingInput]
    params: PoolingParams
    pairs: list[tuple[int, int]] | None

    @classmethod
    def of(
        cls, engine: PoolingEngine, tokenizer: Any, text_1: str | Sequence[str], text_2: str | Sequence[str],
        params: PoolingParams | None = None,
    ) -> "ScorePlan":  # fmt: skip
        """A cross-encoder reads each pair; of embeddings a score is their cosine.

        Args:
            engine: whose model is a classifier with one label, or one of embeddings.
            tokenizer: of its texts.
            text_1: one text, or one for each of ``text_2``.
            text_2: the others.
            params: of all.

        Raises:
            ToolkitError: numbers of texts that do not fit, a text that is too long, or a model without scores. Of a
                pair that is too long together the longer text is named.
        """
        for one in (text_1, text_2):
            if not isinstance(one, str | Sequence):
                raise ToolkitError(f"text_1 and text_2 must be texts or lists of texts, got {shown(one)}.")
        first, second = ([one] if isinstance(one, str) else list(one) for one in (text_1, text_2))
        if not second or len(first) not in (1, len(second)):
            raise ToolkitError(
                f"text_1 must have 1 text, or one for each of text_2, got {len(first)} and {len(second)}."
            )
        wrong = next((one for one in (*first, *second) if not isinstance(one, str)), None)
        if wrong is not None:
            raise ToolkitError(f"text_1 and text_2 must be texts or lists of texts, got {str(wrong)[:60]!r}.")
        params = params or PoolingParams()
        cut = params.truncate_prompt_tokens
        longest = engine.max_model_len
        most = None if cut is None else min(longest, longest if cut == -1 else cut)
        names = {text: _numbered("text_2", at, second) for at, text in reversed(list(enumerate(second)))}
        names |= {text: _numbered("text_1", at, first) for at, text in reversed(list(enumerate(first)))}
        if most is None:
            for text, name in names.items():
                check_characters(name, len(text), tokenizer, longest)
        given = first * len(second) if len(first) == 1 else first
        if engine.tasks[0] == "embed" and engine.pooling_type != "ALL":
            engine.check(params)
            texts = list(dict.fromkeys((*first, *second)))
            at = {text: index for index, text in enumerate(texts)}
            pairs = [(at[a], at[b]) for a, b in zip(given, second)]
            inputs = _inputs(tokenizer, texts, None, most, longest, "text_1")
            for text, read in zip(texts, inputs):
                engine.check_input(read, names[text])
            return cls(inputs, params, pairs)
        if engine.tasks[0] != "classify" or len(engine.labels) != 1:
            got = f"{engine.tasks[0]} with {len(engine.labels)} labels"
            raise ToolkitError(
                f"model must have one label, or give one embedding for each text, for scores, got {got}."
            )
        inputs = _inputs(tokenizer, given, second, most, longest, "text_1")
        for a, b, pair in zip(given, second, inputs):
            longer, other = (names[a], "text_2") if len(a) > len(b) else (names[b], "text_1")
            engine.check_input(pair, f"{longer} with {other}")
        return cls(inputs, params, None)

    def scores(self, results: Sequence[Pooled]) -> list[float]:
        """One for each pair, of the engine's ``results`` for ``inputs``."""
        if self.pairs is None:
            return [float(one.data[0]) for one in results]
        return [float(F.cosine_similarity(results[a].data, results[b].data, dim=0)) for a, b in self.pairs]

    def token_ids(self, at: int) -> list[int]:
        """The tokens of a pair: of embeddings both texts', one behind the other."""
        inputs = (at,) if self.pairs is None else self.pairs[at]
        return [token for index in inputs for token in self.inputs[index].token_ids]
