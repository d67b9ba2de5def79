"""The body of ``POST /inference/v1/generate``."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from toolkit.serving.body import Body
from toolkit.serving.openai.sampling import MAX_TOP_LOGPROBS, Sampling, StreamOptions

_ELSEWHERE = (
    "model", "stream", "stream_options", "prediction", "return_sampling_logprobs", "return_token_ids",
    "return_tokens_as_token_ids",
)  # fmt: skip


class TokenSampling(Sampling):
    """``sampling_params``: the fields of ``SamplingParams``.

    Args:
        logprobs: alternatives at each token; 0 for the sampled one alone, null for none.
        output_kind, detokenize: accepted and unused.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "output_kind",
        "detokenize",
        "spaces_between_special_tokens",
        "flat_logprobs",
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _of_the_request(self) -> "TokenSampling":
        wrong = next((name for name in _ELSEWHERE if name in self.model_fields_set), None)
        if wrong is not None:
            raise ValueError(f"'sampling_params' must have no '{wrong}'.")
        return self


class GenerateRequest(Body):
    """The body of ``POST /inference/v1/generate``.

    Args:
        token_ids: the prompt.
        sampling_params: how it is sampled.
        request_id: under which it can be aborted, and which the response has; one is made where none is given.
        model: its public name.
        stream: whether tokens are sent as they come.
        stream_options: token counts in the stream.
        cache_salt: as in ``SamplingParams``.
        priority: as in ``SamplingParams``.
        return_sampling_logprobs: as in ``/v1/completions``.
    """

    token_ids: Annotated[list[int], Field(min_length=1)]
    sampling_params: TokenSampling
    request_id: str | None = Field(None, min_length=1, max_length=256)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    priority: int | None = None
    return_sampling_logprobs: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is given, but 'stream' is not true.")
        if self.stream and self.sampling_params.prompt_logprobs is not None:
            raise ValueError("'sampling_params.prompt_logprobs' is given, but 'stream' is true.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        inside = {
            name: name for name in TokenSampling.model_fields if name not in _ELSEWHERE
        } | self.sampling_params.field_names
        names = {name: f"sampling_params.{own}" for name, own in inside.items()}
        own = {name: name for name in ("cache_salt", "priority") if getattr(self, name) is not None}
        return {**names, **own, "prompt": "token_ids"}

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for ``SamplingParams``."""
        given = self.sampling_params.sampling()
        for name in ("cache_salt", "priority"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return given
