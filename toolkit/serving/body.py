"""What the objects in request bodies share: fields that are not offered, and null for what is not given."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from toolkit.sentences import shown

MAX_FIELDS = 128

# Fields of OpenAI's, vLLM's and SGLang's that are not offered, each with the values that ask for nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "echo": (False,),
    "extra_body": ({},),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),
}


INSTEAD = {
    "extra_body": "its fields stand beside the others",
    "function_call": "use 'tool_choice'",
    "functions": "use 'tools'",
    "logprobs": "its protocol has no place for log-probabilities, use /v1/chat/completions",
    "prompt_embeds": "'prompt' is text or token ids",
    "return_sampling_logprobs": "its protocol has no place for log-probabilities, use /v1/chat/completions",
    "use_beam_search": "LLM.beam_search does it in process",
}
"""What a client does about some of these."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[tuple[str, ...]] = ()
    other_names: ClassVar[Mapping[str, str]] = {}
    """Fields of other servers' protocols, each with its name in this one."""
    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = NOT_OFFERED

    @property
    def field_names(self) -> Mapping[str, str]:
        """What this body calls fields that errors of the engine are about, where it has other names."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_FIELDS:
            raise ValueError(f"A request's object must have <= {MAX_FIELDS} fields, got {len(body)}.")
        kept = {}
        for name, value in body.items():
            if value is None or name in cls.ignored:
                continue
            if name in cls.not_offered and name not in cls.model_fields:
                if any(type(value) is type(inert) and value == inert for inert in cls.not_offered[name]):
                    continue
                instead = f"; {INSTEAD[name]}" if name in INSTEAD else ""
                raise ValueError(f"'{name}' is {shown(value)}, but this server does not offer '{name}'{instead}.")
            if name in cls.other_names and name not in cls.model_fields:
                raise ValueError(f"'{name}' is called '{cls.other_names[name]}' here.")
            kept[name] = value
        return kept


def one_or_several(field: str, given: Any) -> Any:
    """A text as a list of one; a list as it is. Raises ValueError for anything else."""
    if not isinstance(given, str | list):
        raise ValueError(f"'{field}' must be text or a list of texts, got {shown(given)}.")
    return [given] if isinstance(given, str) else given


def short_together(field: str, texts: list[str], most: int) -> list[str]:
    """``texts`` if they have at most ``most`` characters together. Raises ValueError."""
    total = sum(map(len, texts))
    if total > most:
        raise ValueError(f"'{field}' must have <= {most} characters together, got {total}.")
    return texts
