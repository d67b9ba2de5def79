"""Request bodies: those of ``/v1/completions`` and ``/v1/chat/completions``.

Field names and meanings are OpenAI's, with vLLM's sampling extras. A null is the same as a field that is not
given. Ranges of sampling values belong to ``SamplingParams`` and are checked there. Unknown fields, fields
of the API that this server does not offer and values of the wrong type each become one sentence.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.sentences import shown
from toolkit.serving.body import Body, short_together
from toolkit.serving.openai.forms import ResponseFormat, StructuredOutputs
from toolkit.serving.openai.vllm_fields import VllmFields

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = MAX_PROMPTS = 2048
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 8192
MAX_STOP_TOKEN_IDS = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of the OpenAI API that current clients send and that change no token: accepted with any value, and unused."""


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


class TextPart(Body):
    """A part of a message's content: text."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where an image is: a data URL, or a ``file://`` URL where the server allows local files.

    Args:
        url: of the image. Nothing is fetched from a network.
        detail: accepted and unused; the model's processor chooses the resolution.
    """

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """A part of a message's content: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before", json_schema_input_type=str | ImageUrl)
    @classmethod
    def _a_string_is_a_url(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One message of a chat: a role and its content, as a string or as parts of text and images."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: list[Part]
    name: str = ""

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"'role' of a message must be one of {', '.join(map(repr, ROLES))}, got {shown(role)}.")
        return role

    @field_validator("content", mode="before", json_schema_input_type=str | list[Part])
    @classmethod
    def _a_string_is_one_part(cls, content: Any) -> Any:
        if not isinstance(content, str | list):
            raise ValueError(f"'content' of a message must be text or a list of parts, got {shown(content)}.")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def num_characters(self) -> int:
        """Characters of its text parts."""
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: its text parts joined, or all parts where some are images."""
        content: Any = "".join(part.text for part in self.content if isinstance(part, TextPart))
        if self.images:
            content = [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in self.content
            ]
        return {"role": self.role, "content": content, **({"name": self.name} if self.name else {})}


class Sampling(VllmFields):
    """The fields that both endpoints share; those of ``SamplingParams`` keep its names."""

    ignored: ClassVar[tuple[str, ...]] = IGNORED
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
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

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        if not isinstance(stop, str | list):
            raise ValueError(f"'stop' must be text or a list of texts, got {shown(stop)}.")
        return [stop] if isinstance(stop, str) else stop

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

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        names = set(Sampling.model_fields) - {"model", "stream", "stream_options", "response_format"}
        values = {name: getattr(self, name) for name in names & self.model_fields_set}
        asked = self.structured_outputs or self.response_format
        form = asked.form() if asked is not None else None
        return values if form is None else {**values, "structured_outputs": form}

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        return self.usage_in_stream and self.stream_options is not None and self.stream_options.continuous_usage_stats


_Tokens = Annotated[list[int], Field(min_length=1)]
PromptKinds = str | Annotated[list[str], Field(min_length=1)] | _Tokens | Annotated[list[_Tokens], Field(min_length=1)]


def prompt_list(prompt: Any, field: str) -> list[Any]:
    """A list of texts or of token id lists, of any form that a ``field`` of prompts may have."""
    prompts = [prompt] if isinstance(prompt, str) or _token_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(_PROMPT_KINDS.format(field, shown(prompt)))
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"'{field}' must have <= {MAX_PROMPTS} prompts, got {len(prompts)}.")
    if all(isinstance(p, str) for p in prompts) or all(_token_ids(p) for p in prompts):
        return prompts
    raise ValueError(_PROMPT_KINDS.format(field, shown(prompt)))


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``; ``prompt`` is kept as a list of texts or of token id lists."""

    prompt: list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before", json_schema_input_type=PromptKinds)
    @classmethod
    def _prompts(cls, prompt: Any) -> Any:
        return prompt_list(prompt, "prompt")

    @property
    def top_logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"'top_logprobs' is {self.top_logprobs}, but 'logprobs' is not true.")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one.")
        return self

    def sampling(self) -> dict[str, Any]:
        values = super().sampling()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


_PROMPT_KINDS = (
    "'{}' must be a string, a list of strings, a list of token ids or a list of those lists, none of them empty, "
    "got {}."
)
