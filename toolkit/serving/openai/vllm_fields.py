"""vLLM's sampling extras of request bodies; ``SamplingParams`` documents them and checks their ranges."""

from typing import Any

from pydantic import Field, field_validator

from toolkit.sentences import shown
from toolkit.serving.body import Body, short_together

MAX_BIASES = 1024
MAX_TOKEN_IDS = 65536
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARACTERS = 8192
MAX_PROMPT_LOGPROBS = 20


class VllmFields(Body):
    """Fields of ``SamplingParams`` under its names; ``logit_bias``, whose keys are text in JSON, is OpenAI's too.

    Args:
        prompt_logprobs: also return the log-probability of each token of the prompt and this many of the most probable
            ones, under the model's own distribution; the prompt is computed whole, with no cached prefix. Not with
            ``stream``.
    """

    logit_bias: dict[int, float] = Field({})
    allowed_token_ids: list[int] | None = Field(None, min_length=1, max_length=MAX_TOKEN_IDS)
    bad_words: list[str] = Field([], max_length=MAX_BAD_WORDS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_PROMPT_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, json_schema_extra={"not": {"const": 0}})
    priority: int = 0

    @field_validator("logit_bias", mode="before", json_schema_input_type=dict[str, float])
    @classmethod
    def _keys_are_token_ids(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError(f"'logit_bias' must be an object of token ids and numbers, got {shown(given)}.")
        if len(given) > MAX_BIASES:
            raise ValueError(f"'logit_bias' must have <= {MAX_BIASES} token ids, got {len(given)}.")
        wrong = next((key for key in given if not (key.isascii() and key.isdigit() and len(key) < 20)), None)
        if wrong is not None:
            raise ValueError(f"'logit_bias' must have token ids as keys, got {shown(wrong)}.")
        return {int(key): value for key, value in given.items()}

    @field_validator("bad_words")
    @classmethod
    def _bad_words_are_short(cls, words: list[str]) -> list[str]:
        return short_together("bad_words", words, MAX_BAD_WORD_CHARACTERS)
