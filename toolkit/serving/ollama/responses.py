"""Response bodies, lines of streams, and errors."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from toolkit.chat.reply import CallArguments, CallBegin, CallEnd, ContentText, Event, OutputParser, ReasoningText
from toolkit.engine import Completion, Delta
from toolkit.serving.conversation import arguments_of
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Usage
from toolkit.serving.logprobs import token_logprobs
from toolkit.serving.texts import Texts
from toolkit.strict_json import strict_json

DONE_REASONS = {"stop": "stop", "length": "length"}


def error_body(error: RequestError, request_id: str) -> Json:
    """The body of a response that is not 2xx."""
    return {"error": str(error)}


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


class GenerateResponse:
    """Responses of ``/api/generate``.

    Args:
        model: as the request names it.
        texts: of the tokenizer.
        parser: of the model's output.
        logprobs: alternatives at each token; None for no log-probabilities.
        sampling_logprobs: whether entries of log-probabilities have ``sampling_logprob``.
    """

    def __init__(
        self, model: str, texts: Texts, parser: OutputParser, logprobs: int | None, sampling_logprobs: bool = False
    ) -> None:
        self.model, self.texts, self.parser, self.top = model, texts, parser, logprobs
        self._sampling_logprobs = sampling_logprobs
        self.finished: Completion | None = None
        self._calls: list[Json] = []
        self._arguments = ""
        self._logprobs: list[Json] = []  # of tokens whose text is held back

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        return 0 if self.top is None else (1 + self.top) * sum(len(one.token_ids) for one in finished)

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        self.finished = finished[0]
        found = [*self.parser.feed(self.finished.text), *self.parser.finish()]
        parts = _Parts()
        for event in found:
            self._add(parts, event)
        body = {**self._line(parts, True), **self._end(used)}
        if self.top is not None:
            body["logprobs"] = self._entries(self.finished, self.top)
        yield strict_json(body, ensure_ascii=False, separators=(",", ":")).encode()

    def opening(self, used: Usage) -> Iterator[str]:
        return iter(())

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        if self.top is not None:
            self._logprobs += self._entries(delta, self.top)
        found = self.parser.feed(delta.text)
        if delta.finished is not None:
            self.finished = delta.finished
            found = [*found, *self.parser.finish()]
        parts = _Parts()
        for event in found:
            self._add(parts, event)
        if not parts.empty:
            yield self._written(self._line(parts, False))

    def ending(self, used: Usage) -> Iterator[str]:
        yield self._written({**self._line(_Parts(), True), **self._end(used)})

    def error(self, error: RequestError) -> str:
        return _line(error_body(error, ""))

    def content(self, parts: "_Parts") -> Json:
        """Fields of a response with what the model said."""
        thinking = {"thinking": parts.thinking} if parts.thinking else {}
        return {"response": parts.content, **thinking}

    def _entries(self, tokens: Completion | Delta, top: int) -> list[Json]:
        return token_logprobs(self.texts, tokens, top, self._sampling_logprobs)

    def _add(self, parts: "_Parts", event: Event) -> None:
        match event:
            case ReasoningText(text):
                parts.thinking += text
            case ContentText(text):
                parts.content += text
            case CallBegin(index, call_id, name):
                self._calls.append({"id": call_id, "function": {"index": index, "name": name, "arguments": {}}})
                self._arguments = ""
            case CallArguments(_, text):
                self._arguments += text
            case CallEnd():
                call = self._calls[-1]
                call["function"]["arguments"] = arguments_of(self._arguments)
                parts.calls.append(call)

    def _line(self, parts: "_Parts", done: bool) -> Json:
        return {"model": self.model, "created_at": now(), **self.content(parts), "done": done}

    def _written(self, body: Json) -> str:
        if self._logprobs:
            body, self._logprobs = {**body, "logprobs": self._logprobs}, []
        return _line(body)

    def _end(self, used: Usage) -> Json:
        """What a response says at its end; times are in nanoseconds."""
        done, ended = self.finished, time.perf_counter()
        begun = used.handle.arrival_time if used.handle is not None else ended
        first = (used.handle.first_token_time if used.handle is not None else None) or ended
        return {
            "done_reason": DONE_REASONS.get(str(done.finish_reason) if done is not None else "", "stop"),
            "total_duration": nanoseconds(ended - begun),
            "load_duration": 0,
            "prompt_eval_count": sum(used.prompt_tokens),
            "prompt_eval_duration": nanoseconds(first - begun),
            "eval_count": sum(used.completion_tokens),
            "eval_duration": nanoseconds(ended - first),
        }


class OllamaChatResponse(GenerateResponse):
    """Responses of ``/api/chat``."""

    def content(self, parts: "_Parts") -> Json:
        message: Json = {"role": "assistant", "content": parts.content}
        if parts.thinking:
            message["thinking"] = parts.thinking
        if parts.calls:
            message["tool_calls"] = parts.calls
        return {"message": message}


class _Parts:
    """What one line says."""

    def __init__(self) -> None:
        self.content = self.thinking = ""
        self.calls: list[Any] = []

    @property
    def empty(self) -> bool:
        return not (self.content or self.thinking or self.calls)


def loaded(model: str, content: Json) -> Json:
    """The response to a request that only asks for the model to be loaded."""
    return {"model": model, "created_at": now(), **content, "done": True, "done_reason": "load"}


def _line(body: Json) -> str:
    return strict_json(body, separators=(",", ":")) + "\n"
