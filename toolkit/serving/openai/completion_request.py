"""The body of ``/v1/completions``, and prompts of any form."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from toolkit.sentences import shown
from toolkit.serving.openai.sampling import MAX_CHOICES, MAX_TOP_LOGPROBS, Sampling

MAX_PROMPTS = 2048

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
    """The body of ``POST /v1/completions``; ``prompt`` is kept as a list of texts or of token id lists.

    Args:
        prompt: texts or token ids.
        suffix: what the completion stands before, for tokenizers with fill-in-the-middle tokens.
        logprobs: alternatives at each token beside its log-probability; those of the prompt too with ``echo``.
        echo: the prompt in front of each completion.
        best_of: candidates, of which the ``n`` with the highest mean log-probability are returned; not with ``stream``.
        add_special_tokens: whether the tokenizer's are put before a text.
    """

    prompt: list[str] | list[list[int]]
    suffix: str = ""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before", json_schema_input_type=PromptKinds)
    @classmethod
    def _prompts(cls, prompt: Any) -> Any:
        return prompt_list(prompt, "prompt")

    @model_validator(mode="after")
    def _best_of_more(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"'best_of' must be >= n ({self.n}), got {self.best_of}.")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError(f"'best_of' must be n ({self.n}) where 'stream' is true, got {self.best_of}.")
        return self

    @model_validator(mode="after")
    def _suffix_of_a_text(self) -> "CompletionRequest":
        if self.suffix and not isinstance(self.prompt[0], str):
            raise ValueError("'suffix' is given, but 'prompt' is token ids; give the text before the suffix.")
        for name, asked in (("echo", self.echo), ("truncate_prompt_tokens", self.truncate_prompt_tokens is not None)):
            if self.suffix and asked:
                raise ValueError(f"'suffix' is given, and so is '{name}'; give one.")
        return self

    @property
    def candidates(self) -> int:
        """Sequences of each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def prompt_count(self) -> int | None:
        """``SamplingParams.prompt_logprobs``: what the field of that name asks for and ``logprobs`` of an echo."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)

    def sampling(self) -> dict[str, Any]:
        own = {"prompt_logprobs": self.prompt_count} if self.prompt_count is not None else {}
        best = {"best_of": self.best_of} if self.candidates > self.n else {}
        return {**super().sampling(), **own, **best}


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


_PROMPT_KINDS = (
    "'{}' must be a string, a list of strings, a list of token ids or a list of those lists, none of them empty, "
    "got {}."
)
