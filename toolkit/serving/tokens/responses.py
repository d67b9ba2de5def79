"""Responses of ``/inference/v1/generate``: token ids, their logprobs, and the weights that sampled them."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from toolkit.engine import Completion, Delta
from toolkit.engine.prompt_logprobs import ranked
from toolkit.serving.errors import Json, RequestError, error_body
from toolkit.serving.generation import Usage
from toolkit.serving.logprobs import finite
from toolkit.serving.openai.responses import END_OF_STREAM, event, json_parts, total_usage
from toolkit.serving.openai.schemas import ChatLogprobs
from toolkit.serving.openai.schemas import Usage as UsageSchema
from toolkit.serving.tokens.requests import GenerateRequest

_REASONS = {"cancelled": "abort"}
"""vLLM's names of reasons to finish, where they differ."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenPromptLogprob(_Schema):
    logprob: float | None
    rank: int | None


class GenerateChoice(_Schema):
    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None
    weight_versions: list[int]
    sampling_logprobs: list[float] | None = None


class GenerateObject(_Schema):
    request_id: str
    model: str
    choices: list[GenerateChoice]
    prompt_logprobs: list[dict[str, TokenPromptLogprob] | None] | None
    kv_transfer_params: None
    weight_version: int | None
    usage: UsageSchema


class GenerateResponse:
    """The writer of a response. Tokens in logprobs are written as ``token_id:5``, as vLLM does.

    Args:
        model: its public name.
        asked: the request.
    """

    def __init__(self, model: str, asked: GenerateRequest) -> None:
        self.request_id = asked.request_id or uuid.uuid4().hex
        self._head = {"request_id": self.request_id, "model": model}
        self._asked, self._top = asked, asked.sampling_params.logprobs
        self._prompt_top = asked.sampling_params.prompt_logprobs

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        """Log-probabilities in the response of these completions."""
        count = sum(len(one.token_ids) for one in finished) * (2 if self._top is None else 2 + self._top)
        prompt = 0 if self._prompt_top is None else (1 + self._prompt_top) * len(self._asked.token_ids)
        return count + prompt

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        """The response that is not streamed."""
        versions = [one.weight_version for one in finished if one.weight_version is not None]
        body = {
            **self._head,
            "choices": [self._choice(index, one) for index, one in enumerate(finished)],
            "prompt_logprobs": self._prompt_logprobs(finished[0]),
            "kv_transfer_params": None,
            "weight_version": max(versions, default=None),
            "usage": total_usage(used),
        }
        for part in json_parts(body):
            yield part.encode()

    def _choice(self, index: int, completion: Completion) -> Json:
        reason: str = completion.finish_reason
        return {
            "index": index,
            "token_ids": completion.token_ids,
            "logprobs": self._logprobs(completion),
            "finish_reason": _REASONS.get(reason, reason),
            "stop_reason": completion.stop_reason,
            "weight_versions": completion.weight_versions,
            **self._sampling_logprobs(completion),
        }

    def opening(self, used: Usage) -> Iterator[str]:
        """Nothing comes before the first token."""
        yield from ()

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        """An event of new tokens, or of the end."""
        if not delta.token_ids and delta.finished is None:
            return
        reason = (
            None if delta.finished is None else _REASONS.get(delta.finished.finish_reason, delta.finished.finish_reason)
        )
        choice: dict[str, Any] = {"index": index, "token_ids": delta.token_ids, "logprobs": self._logprobs(delta)}
        choice |= self._sampling_logprobs(delta)
        choice |= {"finish_reason": reason, "stop_reason": delta.finished.stop_reason if delta.finished else None}
        if delta.finished is not None:
            choice["weight_versions"] = delta.finished.weight_versions
        yield event({**self._head, "choices": [choice]})

    def ending(self, used: Usage) -> Iterator[str]:
        """The usage, where it is asked for, and the end of the stream."""
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            counts = total_usage(used)
            yield event({**self._head, "choices": [], "usage": counts})
        yield END_OF_STREAM

    def error(self, error: RequestError) -> str:
        """The last event of a stream that fails."""
        return event(error_body(str(error), error.status, error.param, error.code))

    def _sampling_logprobs(self, tokens: Completion | Delta) -> Json:
        if not self._asked.return_sampling_logprobs:
            return {}
        return {"sampling_logprobs": list(map(finite, tokens.sampling_logprobs))}

    def _logprobs(self, tokens: Completion | Delta) -> Json | None:
        if self._top is None:
            return None
        content = []
        for at, token in enumerate(tokens.token_ids):
            tops = list(tokens.top_logprobs[at].items())[: self._top] if tokens.top_logprobs and self._top else []
            others = [_entry(*pair) for pair in tops]
            content.append({**_entry(token, tokens.logprobs[at]), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _prompt_logprobs(self, completion: Completion) -> list[Json | None] | None:
        if self._prompt_top is None or completion.prompt_logprobs is None or completion.prompt_ranks is None:
            return None
        return [
            None
            if values is None
            else {
                str(token): {"logprob": finite(value), "rank": rank}
                for token, value, rank in ranked(values, self._prompt_top, own)
            }
            for values, own in zip(completion.prompt_logprobs, completion.prompt_ranks, strict=True)
        ]


def _entry(token: int, logprob: float) -> Json:
    return {"token": f"token_id:{token}", "logprob": finite(logprob), "bytes": None}
