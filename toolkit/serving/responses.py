"""What an answer looks like: OpenAI's objects for completions, chats, stream chunks and errors.

``choices`` carry vLLM's ``stop_reason`` beside OpenAI's fields: the stop string or token that ended them.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from toolkit.serving.texts import Texts

Json = dict[str, Any]
TopLogprobs = Sequence[dict[int, float]] | None

ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """The body of every answer that is not 2xx."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


END_OF_STREAM = "data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class CompletionAnswer:
    """Answers of ``/v1/completions``. ``logprobs``: as the request asked, None for none."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, texts: Texts, logprobs: int | None):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.texts, self.top = texts, logprobs
        self._offsets: dict[int, int] = {}

    def body(self, choices: list[Json], used: Json) -> Json:
        return {**self.head, "object": self.whole, "choices": choices, "usage": used}

    def piece(self, choices: list[Json], used: Json | None = None, show_usage: bool = False) -> Json:
        """A chunk of a stream; with ``show_usage`` every chunk has the field, null until the last."""
        return {
            **self.head,
            "object": self.chunk,
            "choices": choices,
            **({"usage": used} if show_usage else {}),
        }

    def openings(self, choices: int) -> list[Json]:
        """Chunks that go before the first token."""
        return []

    def choice(self, index: int, completion: Any) -> Json:
        """One finished choice of an answer in one piece."""
        return {
            "index": index,
            "text": completion.text,
            "logprobs": self.logprobs(index, completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def deltas(self, index: int, delta: Any) -> list[Json]:
        """What a delta adds to a choice of a stream; nothing while its text is held back."""
        done = delta.finished
        if not (delta.text or done or (self.top is not None and delta.token_ids)):
            return []
        return [
            {
                "index": index,
                "text": delta.text,
                "logprobs": self.logprobs(index, delta),
                "finish_reason": done.finish_reason if done else None,
                **({"stop_reason": done.stop_reason} if done else {}),
            }
        ]

    def logprobs(self, index: int, tokens: Any) -> Json | None:
        """Of a Completion's or a Delta's tokens: the model's own, before temperature."""
        if self.top is None:
            return None
        pieces = [self.texts.piece(token)[0] for token in tokens.token_ids]
        offsets = []
        for piece in pieces:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(piece)
        top = [
            {self.texts.piece(token)[0]: value for token, value in _top(tokens.top_logprobs, place, self.top)}
            for place in range(len(pieces))
        ]
        return {
            "tokens": pieces,
            "token_logprobs": list(map(_finite, tokens.logprobs)),
            "top_logprobs": top if self.top else None,
            "text_offset": offsets,
        }


class ChatAnswer(CompletionAnswer):
    """Answers of ``/v1/chat/completions``."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def openings(self, choices: int) -> list[Json]:
        return [_chat_delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def choice(self, index: int, completion: Any) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self.logprobs(index, completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def deltas(self, index: int, delta: Any) -> list[Json]:
        chunks = []
        if delta.text or (self.top is not None and delta.token_ids):
            chunks.append(_chat_delta(index, {"content": delta.text}, self.logprobs(index, delta)))
        if delta.finished:
            ending = {
                "finish_reason": delta.finished.finish_reason,
                "stop_reason": delta.finished.stop_reason,
            }
            chunks.append({**_chat_delta(index, {}), **ending})
        return chunks

    def logprobs(self, index: int, tokens: Any) -> Json | None:
        if self.top is None:
            return None
        content = []
        for place, token in enumerate(tokens.token_ids):
            others = [self._entry(*pair) for pair in _top(tokens.top_logprobs, place, self.top)]
            content.append({**self._entry(token, tokens.logprobs[place]), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text, raw = self.texts.piece(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _chat_delta(index: int, delta: Json, logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _top(tops: TopLogprobs, place: int, most: int) -> list[tuple[int, float]]:
    return [(token, _finite(value)) for token, value in tops[place].items()][:most] if tops and most else []


def _finite(logprob: float) -> float:
    """JSON has no infinities; the API writes the impossible as -9999."""
    return max(logprob, -9999.0)
