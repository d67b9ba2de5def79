"""Prompts of ``/v1/completions`` as token ids, and what of them the response shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.texts import Texts


def read_prompts(texts: Texts, asked: CompletionRequest) -> tuple[list[list[int]], list[int]]:
    """(token ids of each prompt, further tokens that end a completion).

    Raises:
        ToolkitError: a text without a tokenizer or of too many tokens, a suffix that the tokenizer has no form for.
    """
    if asked.suffix:
        filled = [texts.infill(prompt, asked.suffix) for prompt in asked.prompt if isinstance(prompt, str)]
        return [one.token_ids for one in filled], filled[0].stop_token_ids
    cut = asked.truncate_prompt_tokens is not None
    return [
        texts.prompt(prompt, cut, asked.add_special_tokens) if isinstance(prompt, str) else prompt
        for prompt in asked.prompt
    ], []


@dataclass(frozen=True)
class Echo:
    """A prompt in front of its completions.

    Args:
        text: of the prompt: as it was given, or what its token ids decode to.
        token_ids: of the prompt.
        text_offset: where in ``text`` the characters of each token begin; empty where nobody asks.
    """

    text: str
    token_ids: Sequence[int]
    text_offset: list[int] = field(default_factory=list)


def read_echoes(texts: Texts, asked: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[Echo]:
    """Of each prompt, where the request asks for echoes.

    Args:
        texts: of the tokenizer.
        asked: the request.
        prompts: as the engine gets them; those that were cut are shown as far as they are left.
    """
    found = []
    for given, tokens in zip(asked.prompt, prompts) if asked.echo else ():
        whole = isinstance(given, str) and asked.truncate_prompt_tokens is None
        if whole and asked.logprobs is None:
            found.append(Echo(str(given), tokens))
            continue
        text, offsets = texts.decoded(tokens, asked.skip_special_tokens)
        text = str(given) if whole else text
        found.append(Echo(text, tokens, [min(offset, len(text)) for offset in offsets]))
    return found
