"""What the bodies of completions and of chats share.

Field names and meanings are OpenAI's, with vLLM's sampling extras. A null is the same as a field that is not
given. Ranges of sampling values belong to ``SamplingParams`` and are checked there. Unknown fields, fields
of the API that this server does not offer and values of the wrong type each become one sentence.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from toolkit.serving.body import Body, one_or_several, short_together
from toolkit.serving.field_names import of_form
from toolkit.serving.openai.forms import Prediction, ResponseFormat, StructuredOutputs
from toolkit.serving.openai.vllm_fields import VllmFields

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 8192
MAX_STOP_TOKEN_IDS = 1024

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "rid",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "user",
    "verbosity",
)
"""Fields of OpenAI's and vLLM's that clients send and that change no token: accepted with any value, and unused."""


OTHER_NAMES = {
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "num_return_sequences": "n",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "stream_usage": "stream_options.include_usage",
}
"""Names of llama.cpp, Ollama, TGI, Anthropic and older vLLM for fields that are offered under OpenAI's or vLLM's."""
CHAT_NAMES = {
    "enable_thinking": "chat_template_kwargs.enable_thinking",
    "reasoning": "reasoning_effort",
    "thinking": "chat_template_kwargs.enable_thinking",
}
"""The same of chats: names of OpenRouter, DashScope, DeepSeek, Z.ai and Anthropic."""


class StreamOptions(Body):
    """Token counts in a stream: in one more chunk at its end, and in every chunk.

    Args:
        include_usage: one more chunk at the end, with the counts of the whole request.
        continuous_usage_stats: with ``include_usage``, each chunk has the counts of its choice so far (vLLM).
        include_obfuscation: accepted and unused.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


NOT_SAMPLING = {
    "model", "prediction", "response_format", "return_sampling_logprobs", "return_token_ids",
    "return_tokens_as_token_ids", "stream", "stream_options",
}  # fmt: skip
"""Fields of ``Sampling`` that ``SamplingParams`` does not have."""


class Sampling(VllmFields):
    """The fields that both endpoints share; those of ``SamplingParams`` keep its names.

    Args:
        model: any of the served names; None for the first.
        stream: whether the response is events.
        stream_options: token counts in a stream.
        response_format: the form of the output, in OpenAI's words.
        structured_outputs: the form of the output, in vLLM's.
        prediction: what the output is expected to be.
        return_token_ids: token ids of prompt and completion in the response.
        return_tokens_as_token_ids: log-probabilities name tokens ``token_id:123``.
        return_sampling_logprobs: choices have ``sampling_logprobs``: one per token, under the distribution that it was
            sampled from, after penalties, masks of ``structured_outputs``, temperature and filters (0 for greedy).
    """

    ignored: ClassVar[tuple[str, ...]] = IGNORED
    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: list[str] | None = Field(None, max_length=MAX_STOPS)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prediction: Prediction | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_sampling_logprobs: bool = False

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        return one_or_several("stop", stop)

    @field_validator("stop")
    @classmethod
    def _stops_are_short(cls, stop: list[str]) -> list[str]:
        return short_together("stop", stop, MAX_STOP_CHARACTERS)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is given, but 'stream' is not true.")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_not_streamed(self) -> "Sampling":
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError(f"'prompt_logprobs' is {self.prompt_logprobs}, but 'stream' is true.")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> "Sampling":
        if self.structured_outputs is not None and self.response_format is not None and self.response_format.form():
            raise ValueError("'structured_outputs' is given, and so is 'response_format'; give one.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        if self.response_format is None:
            return {}
        schema = self.response_format.type == "json_schema"
        return of_form("response_format.json_schema.schema" if schema else "response_format")

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        names = set(Sampling.model_fields) - NOT_SAMPLING
        values = {name: getattr(self, name) for name in names & self.model_fields_set}
        asked = self.structured_outputs or self.response_format
        form = asked.form() if asked is not None else None
        return values if form is None else {**values, "structured_outputs": form}

    @property
    def prompt_count(self) -> int | None:
        """``SamplingParams.prompt_logprobs``."""
        return self.prompt_logprobs

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return self.usage_in_stream and self.stream_options is not None and self.stream_options.continuous_usage_stats
