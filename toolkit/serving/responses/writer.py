"""Bodies and events of responses."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.chat.reply import ContentText, OutputParser, ReasoningText
from toolkit.engine import Completion, Delta, SamplingParams
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Usage
from toolkit.serving.logprobs import token_logprobs
from toolkit.serving.responses.output import Output
from toolkit.serving.responses.requests import ResponsesRequest
from toolkit.serving.texts import Texts
from toolkit.strict_json import strict_json


class ResponsesWriter:
    """Responses of ``/v1/responses``.

    Args:
        model: its public name.
        texts: of the tokenizer.
        asked: the request.
        params: of it.
        parser: of the model's output.
    """

    def __init__(
        self, model: str, texts: Texts, asked: ResponsesRequest, params: SamplingParams, parser: OutputParser
    ) -> None:
        self.texts, self.asked, self.parser = texts, asked, parser
        self.head = _head(model, asked, params)
        self.output = Output()
        self.finished: Completion | None = None
        self.number = -1
        self.reasoning_tokens = self._undecided = 0  # the second: tokens whose text is held back
        self._logprobs: list[Json] = []  # of tokens whose text is held back

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        top = self.asked.num_logprobs
        return 0 if top is None else (1 + top) * sum(len(one.token_ids) for one in finished)

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        self.finished = done = finished[0]
        logprobs = self._logprobs_of(done)
        ends = [*done.text_offset[1:], len(done.text)]
        at = 0
        for index, end in enumerate(ends):  # token by token: each has its log-probability, and is reasoning or not
            list(self._events(done.text[at:end], 1, logprobs[index : index + 1]))
            at = max(at, end)
        list(self._end())
        yield strict_json(self._response(used), ensure_ascii=False, separators=(",", ":")).encode()

    def opening(self, used: Usage) -> Iterator[str]:
        yield self._numbered({"type": "response.created", "response": self._response()})
        yield self._numbered({"type": "response.in_progress", "response": self._response()})

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        yield from map(self._numbered, self._events(delta.text, len(delta.token_ids), self._logprobs_of(delta)))
        if delta.finished is not None:
            self.finished = delta.finished
            yield from map(self._numbered, self._end())

    def ending(self, used: Usage) -> Iterator[str]:
        response = self._response(used)
        yield self._numbered({"type": f"response.{response['status']}", "response": response})

    def error(self, error: RequestError) -> str:
        about = {"code": "server_error", "message": str(error)}
        response = {**self._response(), "status": "failed", "error": about}
        return self._numbered({"type": "response.failed", "response": response})

    def _logprobs_of(self, tokens: Completion | Delta) -> list[Json]:
        top = self.asked.num_logprobs
        return [] if top is None else token_logprobs(self.texts, tokens, top, self.asked.return_sampling_logprobs)

    def _events(self, text: str, num_tokens: int, logprobs: Sequence[Json]) -> Iterator[Json]:
        self._logprobs += logprobs
        self._undecided += num_tokens
        found = self.parser.feed(text)
        for event in found:
            yield from self.output.events(event, self._taken() if isinstance(event, ContentText) else ())
        if any(isinstance(event, ReasoningText) for event in found) or self.output.kind == "reasoning":
            self.reasoning_tokens += self._undecided
            self._undecided = 0
        elif found:
            self._undecided = 0
        if self.output.kind in ("reasoning", "function_call"):
            self._logprobs.clear()  # those of text alone are in a response

    def _taken(self) -> list[Json]:
        taken, self._logprobs = self._logprobs, []
        return taken

    def _end(self) -> Iterator[Json]:
        for event in self.parser.finish():
            yield from self.output.events(event, self._taken() if isinstance(event, ContentText) else ())
        if self._logprobs and self.output.kind == "message":  # of tokens without text, such as a stop token
            yield from self.output.events(ContentText(""), self._taken())
        yield from self.output.close("incomplete" if self._cut else "completed")

    @property
    def _cut(self) -> bool:
        return self.finished is not None and self.finished.finish_reason == "length"

    def _response(self, used: Usage | None = None) -> Json:
        """The response so far; its end, with ``used``."""
        if used is None or self.finished is None:
            return {**self.head, "status": "in_progress", "completed_at": None, "output": list(self.output.items)}
        prompt, completion = sum(used.prompt_tokens), sum(used.completion_tokens)
        counts = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": sum(used.cached_tokens)},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": prompt + completion,
        }
        return {
            **self.head,
            "status": "incomplete" if self._cut else "completed",
            "completed_at": None if self._cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if self._cut else None,
            "output": self.output.items,
            "usage": counts,
        }

    def _numbered(self, body: Json) -> str:
        """One server-sent event, named for its type, with its number."""
        self.number += 1
        numbered = strict_json({**body, "sequence_number": self.number}, separators=(",", ":"))
        return f"event: {body['type']}\ndata: {numbered}\n\n"


def _head(model: str, asked: ResponsesRequest, params: SamplingParams) -> Json:
    """What a response says of its request, and what it is from its beginning on."""
    form = asked.text.format if asked.text is not None else None
    choice: Any = asked.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning is not None else None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"} if form is None else form.shown()},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": [tool.model_dump() for tool in asked.tools],
        "top_logprobs": asked.top_logprobs,
        "top_p": params.top_p,
        "truncation": asked.truncation,
    }
