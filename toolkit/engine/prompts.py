"""What ``generate`` and ``submit`` were given, as token ids that fit."""

import sys
from collections import abc
from dataclasses import replace
from numbers import Integral
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor

from toolkit.chat import prompt_token_ids, rust_encoding, special_tokens_around
from toolkit.engine.media import PromptMedia, num_bytes
from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown
from toolkit.state import BlockManager

Prompt: TypeAlias = str | abc.Sequence[int] | Tensor | abc.Mapping[str, Any]
"""One prompt: a text, token ids, or a mapping.

A mapping is what the model's processor returned for one prompt (``input_ids``, ``pixel_values``, ...), or has
``prompt`` or ``prompt_token_ids``, as vLLM's have. With ``prompt`` may come ``multi_modal_data``:
``{"image": ..., "video": ...}``, one or a list of what the engine's processor reads.
"""
Prompts: TypeAlias = Prompt | abc.Sequence[Prompt]
"""One prompt or several; a tensor of token ids has one or two dimensions."""
Params: TypeAlias = SamplingParams | abc.Sequence[SamplingParams] | None
"""One for all prompts, one per prompt, or the defaults."""


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _plain(prompt: Any) -> Any:
    """Arrays and tensors as lists."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def split_prompts(prompts: Prompts) -> list[Prompt]:
    """A list of prompts, from one prompt or a list of them."""
    given: Any = _plain(prompts)
    if isinstance(given, str | abc.Mapping):
        return [given]
    if not isinstance(given, list | tuple):
        raise ToolkitError(
            f"prompts must be a text, a list of token ids or a list of those, got {type(given).__name__}."
        )
    return [list(given)] if given and _is_id(given[0]) else list(given)


MEDIA = "multi_modal_data"
_MAPPING = ("prompt", "prompt_token_ids", MEDIA)
_KINDS = {"image": "images", "video": "videos"}


def read_media(
    prompt: Prompt, backend: Any, processor: Any, longest: tuple[int, str]
) -> tuple[Prompt, PromptMedia | None]:
    """The prompt as a text or token ids, and its pictures.

    Args:
        prompt: of any form.
        backend: the model.
        processor: of pictures that none has read; None for none.
        longest: as ``longest_sequence`` returns it.

    Raises:
        ToolkitError: a mapping of another form, one with pictures for a model that takes none or without a processor.
    """
    if not isinstance(prompt, abc.Mapping):
        return prompt, None
    if "input_ids" not in prompt:
        unknown = sorted(set(prompt) - set(_MAPPING))
        texts = [prompt[name] for name in _MAPPING[:2] if prompt.get(name) is not None]
        if unknown or len(texts) != 1:
            raise ToolkitError(
                "prompt must have 'input_ids', 'prompt' or 'prompt_token_ids', one of them, and of other fields "
                f"'{MEDIA}' alone, got {', '.join(map(repr, sorted(map(str, prompt)))) or 'none'}."
            )
        data = prompt.get(MEDIA)
        if not data:
            return texts[0], None
        prompt = processed(processor, texts[0], data)
    if not hasattr(backend, "expand"):
        raise ToolkitError(f"prompt must be a text or token ids, since {type(backend).__name__} takes no pictures.")
    check_token_count(prompt_length(prompt), *longest)  # before the model sees it
    media: PromptMedia = backend.expand(prompt)
    return media.tokens, replace(media, num_bytes=num_bytes(prompt)) if media.spans else None


def processed(processor: Any, text: Any, data: Any, **options: Any) -> abc.Mapping[str, Any]:
    """What the model's processor returns for a text with placeholders and its pictures, as tensors.

    Args:
        processor: of transformers.
        text: the prompt.
        data: ``{"image": ..., "video": ...}``, one or a list of each.
        options: for the processor.

    Raises:
        ToolkitError: there is no processor, the prompt is no text, a kind of data is unknown, or the processor fails.
    """
    if processor is None:
        raise ToolkitError(f"{MEDIA} needs the model's processor: Engine(model, processor=...).")
    if not isinstance(text, str):
        raise ToolkitError(
            f"prompt must be a text with {MEDIA}, got {type(text).__name__}; or give what the processor returned."
        )
    if not isinstance(data, abc.Mapping) or set(data) - set(_KINDS):
        got = ", ".join(map(repr, data)) if isinstance(data, abc.Mapping) else type(data).__name__
        raise ToolkitError(f"{MEDIA} must have {' or '.join(map(repr, _KINDS))}, got {got}.")
    lists = {
        _KINDS[kind]: [list(given) if isinstance(given, list | tuple) else [given]] for kind, given in data.items()
    }
    try:
        found: abc.Mapping[str, Any] = processor(text=[text], return_tensors="pt", **lists, **options)
    except Exception as error:  # processors raise anything
        raise ToolkitError(f"{MEDIA} must be what {type(processor).__name__} reads ({first_line(error)}).") from None
    return found


def check_params(params: Params, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, abc.Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise ToolkitError(f"params must be SamplingParams, a list of them or None, got {shown(params)}.")
    if len(params) != count:
        raise ToolkitError(f"params must have one entry per prompt ({count}), got {len(params)}.")
    return list(params)


def longest_sequence(max_model_len: int, block_manager: BlockManager) -> tuple[int, str]:
    """(most tokens of prompt and completion together, what bounds them)."""
    room = block_manager.max_sequence_tokens
    if room is not None and room + 1 < max_model_len:  # the state of the last token is never needed
        return room + 1, "num_blocks * block_size + 1"
    return max_model_len, "max_model_len"


def truncated(tokens: list[int], params: SamplingParams, longest: int) -> list[int]:
    """The last tokens of a prompt, as many as ``truncate_prompt_tokens`` keeps; ``longest``: of both together."""
    most = params.truncate_prompt_tokens
    if most == -1:
        most = max(1, longest - (params.max_tokens or 1))
    return tokens if most is None else tokens[-most:]


def prompt_length(prompt: abc.Sequence[int] | abc.Mapping[str, Any]) -> int:
    """Tokens of a prompt that is token ids, or what a processor returned."""
    return len(prompt["input_ids"][0]) if isinstance(prompt, abc.Mapping) else len(prompt)


def fit_max_tokens(params: SamplingParams, prompt_tokens: int, longest: int) -> SamplingParams:
    """``params`` with at most as many tokens as fit behind the prompt: for a ``max_tokens`` that is a default.

    Args:
        params: as a request's defaults make them.
        prompt_tokens: of the prompt.
        longest: most tokens of prompt and completion together, ``Engine.max_sequence_len``.
    """
    room = max(longest - prompt_tokens, params.min_tokens, 1)
    return params if params.max_tokens is None or params.max_tokens <= room else replace(params, max_tokens=room)


def check_characters(field: str, count: int, tokenizer: Any, longest: int) -> None:
    """Raise a ToolkitError for a text that has too many characters for its tokens to fit, before it is tokenised.

    Args:
        field: what the text is.
        count: its characters.
        tokenizer: whose longest token bounds the characters that a token stands for.
        longest: most tokens of prompt and completion together.
    """
    most = longest * longest_token(tokenizer)
    if count > most:
        raise ToolkitError(f"{field} must have <= {most} characters, which is all that fits, got {count}.")


def check_num_sequences(count: int, most: int | None) -> None:
    """Raise a ToolkitError for a request of more sequences than ``max_queued_seqs``."""
    if most is not None and count > most:
        raise ToolkitError(f"The request must have <= {most} sequences, got {count}.")


def check_token_count(count: int, longest: int, name: str = "max_model_len") -> None:
    """Raise a ToolkitError for a prompt behind which no token fits; ``name`` is what bounds them."""
    if count >= longest:
        raise ToolkitError(f"prompt must have <= {longest - 1} tokens, one below {name}, got {count}.")


def outside_vocabulary(tokens: list[int], vocab_size: int) -> int | None:
    """The first token id that no embedding has, if there is one."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return None
    return next(token for token in tokens if not 0 <= token < vocab_size)


def longest_token(tokenizer: Any) -> int:
    """Characters of the vocabulary's longest token. The first call lists the vocabulary; the result is kept."""
    if not hasattr(tokenizer, "get_vocab"):
        return sys.maxsize
    if tokenizer not in _LONGEST_TOKEN:
        _LONGEST_TOKEN[tokenizer] = max(map(len, tokenizer.get_vocab()), default=1)
    return _LONGEST_TOKEN[tokenizer]


_LONGEST_TOKEN: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()


def check_request(prompts: Prompts, params: Params, most: int | None) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompts and the parameters of each; ``most`` bounds the sequences of a request."""
    given = split_prompts(prompts)
    chosen = check_params(params, len(given))
    check_num_sequences(sum(one.num_candidates for one in chosen), most)
    return given, chosen


def check_streamed(params: Params) -> None:
    """Raise a ToolkitError for parameters whose completions are chosen at the end, so that nothing can be streamed."""
    for one in params if isinstance(params, list | tuple) else [params]:
        if isinstance(one, SamplingParams) and one.chooses:
            raise ToolkitError(f"best_of must be {one.n} (n) or None in a stream, got {one.best_of}; use generate().")


def prepare_early(prompts: list[Prompt], params: list[SamplingParams], engine: Any) -> list[Prompt]:
    """Texts as token ids, if they fit and the engine's tokenizer may run on any thread; other prompts as they are.

    Grammars of structured outputs are compiled. The engine's thread, which all of its streams wait for, tokenises what
    remains, or says what is wrong with it.

    Raises:
        ToolkitError: a structured output that cannot be enforced.
    """
    for form in {one.form for one in params}:
        if form is not None:
            engine.grammars.compile(form)

    def ids(prompt: Prompt, cut: bool) -> Prompt:
        if not isinstance(prompt, str) or engine.tokenizer is None:
            return prompt
        longest = engine.max_sequence_len
        if not cut and len(prompt) > longest * longest_token(engine.tokenizer):
            return prompt
        encoding = rust_encoding(engine.tokenizer, prompt, add_special_tokens=True)
        if encoding is None or (len(encoding) >= longest and not cut):
            return prompt
        return list(encoding.ids[: len(encoding) - len(special_tokens_around(engine.tokenizer)[1])])

    return [ids(prompt, one.truncate_prompt_tokens is not None) for prompt, one in zip(prompts, params)]


def check_prompt(
    prompt: Prompt, params: SamplingParams, tokenizer: Any, max_model_len: int, block_manager: BlockManager
) -> tuple[list[int], int]:
    """(token ids, most tokens to generate) of one prompt. Raises ToolkitError where it cannot run."""
    prompt = _plain(prompt)
    longest, name = longest_sequence(max_model_len, block_manager)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ToolkitError("prompt must be token ids, since the engine has no tokenizer, got a text.")
        if params.truncate_prompt_tokens is None:
            check_characters("prompt", len(prompt), tokenizer, longest)
        tokens = truncated(prompt_token_ids(tokenizer, prompt), params, longest)
    elif isinstance(prompt, list | tuple):
        prompt = truncated(list(prompt), params, longest)
        check_token_count(len(prompt), longest, name)
        if not set(map(type, prompt)) <= {int} and not all(map(_is_id, prompt)):
            raise ToolkitError(f"prompt must be a text or a list of token ids, got {str(prompt)[:60]!r}.")
        tokens = [int(token) for token in prompt]
    else:
        raise ToolkitError(f"prompt must be a text or a list of token ids, got {str(prompt)[:60]!r}.")
    if params.stop and tokenizer is None:
        raise ToolkitError(
            f"stop must be None, since the engine has no tokenizer, got {params.stop!r}; use stop_token_ids."
        )
    if not tokens:
        raise ToolkitError("prompt must have >= 1 tokens, got 0.")
    check_token_count(len(tokens), longest, name)
    if params.max_tokens is None:
        return tokens, longest - len(tokens)
    if len(tokens) + params.max_tokens > longest:
        raise ToolkitError(
            f"max_tokens must be <= {longest - len(tokens)} after a prompt of {len(tokens)} tokens, so that both fit "
            f"in {name} ({longest}), got {params.max_tokens}."
        )
    return tokens, params.max_tokens
