"""What ``generate`` and ``submit`` were given, as token ids that fit."""

from collections.abc import Sequence as Collection
from numbers import Integral
from typing import Any

from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.state import BlockManager


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _plain(prompt: Any) -> Any:
    """Arrays and tensors as lists."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def split_prompts(prompts: Any) -> list[Any]:
    """A list of prompts, from one prompt or a list of them."""
    prompts = _plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ToolkitError(
            f"prompts is a {type(prompts).__name__}; allowed are a text, a list of token ids, and a list of those."
        )
    return [list(prompts)] if prompts and _is_id(prompts[0]) else list(prompts)


def check_params(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams a prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Collection) or not all(isinstance(one, SamplingParams) for one in params):
        raise ToolkitError(f"params is {params!r}; allowed are SamplingParams, a list of them, and None.")
    if len(params) != count:
        raise ToolkitError(f"params has {len(params)} entries; allowed is one a prompt, and there are {count} prompts.")
    return list(params)


def check_prompt(
    prompt: Any, params: SamplingParams, tokenizer: Any, max_model_len: int, block_manager: BlockManager
) -> tuple[list[int], int]:
    """(token ids, most tokens to generate) of one prompt, or a ToolkitError that says what is allowed."""
    prompt = _plain(prompt)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ToolkitError("prompt is a text, but the engine has no tokenizer; allowed are token ids.")
        tokens = list(tokenizer(prompt)["input_ids"])
    elif isinstance(prompt, list | tuple) and all(_is_id(token) for token in prompt):
        tokens = [int(token) for token in prompt]
    else:
        raise ToolkitError(f"prompt is {str(prompt)[:60]!r}; allowed are a text and a list of token ids.")
    if params.stop and tokenizer is None:
        raise ToolkitError(f"stop is {params.stop!r}, but the engine has no tokenizer; allowed are stop_token_ids.")
    if not tokens:
        raise ToolkitError("prompt has 0 tokens; allowed are prompts of at least one.")
    room = block_manager.max_sequence_tokens
    longest, name = max_model_len, "max_model_len"
    if room is not None and room + 1 < longest:  # the state of the last token is never needed
        longest, name = room + 1, "num_blocks * block_size + 1"
    if len(tokens) >= longest:
        raise ToolkitError(f"prompt has {len(tokens)} tokens; allowed are up to {longest - 1}, one below {name}.")
    if params.max_tokens is None:
        return tokens, longest - len(tokens)
    if len(tokens) + params.max_tokens > longest:
        raise ToolkitError(
            f"max_tokens is {params.max_tokens} after a prompt of {len(tokens)} tokens; "
            f"allowed are up to {longest - len(tokens)}, so that both fit in {name}, which is {longest}."
        )
    return tokens, params.max_tokens
