"""Response bodies and events: Anthropic's messages, and its errors."""

import uuid
from collections.abc import Iterator, Sequence

from toolkit.chat.reply import CallArguments, CallBegin, CallEnd, ContentText, Event, OutputParser, ReasoningText
from toolkit.engine import Completion, Delta
from toolkit.serving.conversation import arguments_of
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Usage
from toolkit.strict_json import strict_json

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
DELTA_USAGE = (
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "input_tokens",
    "output_tokens",
    "output_tokens_details",
    "server_tool_use",
)
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


def error_body(error: RequestError, request_id: str) -> Json:
    """The body of a response that is not 2xx."""
    about = {"type": ERROR_TYPES.get(error.status, "invalid_request_error"), "message": str(error)}
    return {"type": "error", "error": about, "request_id": request_id}


def event(body: Json) -> str:
    """One server-sent event, named for its type; in ASCII, since clients may split lines at other characters."""
    return f"event: {body['type']}\ndata: {strict_json(body, separators=(',', ':'))}\n\n"


class MessageResponse:
    """Responses of ``/v1/messages``.

    Args:
        model: its public name.
        parser: of the model's output.
        show_thinking: False leaves the text of thoughts out.
        request_id: of the request, for the event of an error.
    """

    def __init__(self, model: str, parser: OutputParser, show_thinking: bool, request_id: str) -> None:
        self.id, self.model = f"msg_{uuid.uuid4().hex}", model
        self.parser, self.request_id = parser, request_id
        self.blocks = Blocks(show_thinking)
        self.finished: Completion | None = None

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        return 0

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        self.finished = finished[0]
        for one in [*self.parser.feed(self.finished.text), *self.parser.finish()]:
            list(self.blocks.events(one))
        list(self.blocks.close())
        yield strict_json(self._message(used), ensure_ascii=False, separators=(",", ":")).encode()

    def opening(self, used: Usage) -> Iterator[str]:
        yield event({"type": "message_start", "message": self._message(used)})
        yield event({"type": "ping"})

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        found = self.parser.feed(delta.text)
        if delta.finished is not None:
            self.finished = delta.finished
            found = [*found, *self.parser.finish()]
        for one in found:
            yield from map(event, self.blocks.events(one))

    def ending(self, used: Usage) -> Iterator[str]:
        yield from map(event, self.blocks.close())
        delta = {**self._stop(), "stop_details": None, "container": None}
        counts = {name: value for name, value in self._usage(used).items() if name in DELTA_USAGE}
        yield event({"type": "message_delta", "delta": delta, "usage": counts})
        yield event({"type": "message_stop"})

    def error(self, error: RequestError) -> str:
        return event(error_body(error, self.request_id))

    def _message(self, used: Usage) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self.blocks.made,
            **self._stop(),
            "stop_details": None,
            "container": None,
            "usage": self._usage(used),
        }

    def _stop(self) -> Json:
        """Why the message ends; nulls before it does."""
        done = self.finished
        if done is None:
            return {"stop_reason": None, "stop_sequence": None}
        if done.finish_reason == "stop" and isinstance(done.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_reason}
        calls = any(block["type"] == "tool_use" for block in self.blocks.made)
        if calls and done.finish_reason == "stop":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        return {"stop_reason": STOP_REASONS[str(done.finish_reason)], "stop_sequence": None}

    def _usage(self, used: Usage) -> Json:
        cached = sum(used.cached_tokens)
        return {
            "input_tokens": sum(used.prompt_tokens) - cached,
            "output_tokens": sum(used.completion_tokens),
            "cache_creation": None,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "inference_geo": None,
            "output_tokens_details": None,
            "server_tool_use": None,
            "service_tier": "standard",
        }


class Blocks:
    """The content of a message as it comes.

    Args:
        show_thinking: False leaves the text of thoughts out.

    Attributes:
        made: the blocks so far.
    """

    def __init__(self, show_thinking: bool = True) -> None:
        self.made: list[Json] = []
        self._show_thinking = show_thinking
        self._open: Json | None = None
        self._arguments = ""

    def events(self, event: Event) -> Iterator[Json]:
        """Events of what a part of the reply adds."""
        match event:
            case ReasoningText(text):
                if self._kind != "thinking":
                    yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
                if self._show_thinking:
                    self.made[-1]["thinking"] += text
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case ContentText(text):
                if self._kind != "text":
                    yield from self._begin({"type": "text", "text": "", "citations": None})
                self.made[-1]["text"] += text
                yield self._delta({"type": "text_delta", "text": text})
            case CallBegin(_, call_id, name):
                call = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._begin({**call, "caller": {"type": "direct"}})
            case CallArguments(_, text):
                self._arguments += text
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self.close()

    def close(self) -> Iterator[Json]:
        """Events of the end of the block that is open."""
        if self._open is None:
            return
        if self._kind == "tool_use":
            self.made[-1]["input"], self._arguments = arguments_of(self._arguments), ""
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.made) - 1}

    @property
    def _kind(self) -> str | None:
        return None if self._open is None else str(self._open["type"])

    def _begin(self, block: Json) -> Iterator[Json]:
        yield from self.close()
        self.made.append(block)
        self._open = block
        yield {"type": "content_block_start", "index": len(self.made) - 1, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self.made) - 1, "delta": delta}
