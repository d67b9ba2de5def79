"""Response bodies: OpenAI's objects for completions, chats, stream chunks and errors.

``choices`` carry vLLM's ``stop_reason`` beside OpenAI's fields: the stop string or token that ended them.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.engine import Completion, Delta
from toolkit.engine.prompt_logprobs import ranked
from toolkit.serving.errors import Json, RequestError, error_body
from toolkit.serving.generation import Usage
from toolkit.serving.openai.requests import Sampling
from toolkit.serving.texts import Texts
from toolkit.strict_json import strict_json

ITEMS = 64
"""Of a long list that are written at a time."""
PART = 2**16
"""Characters of a response that are sent at a time."""


def json_parts(value: Any) -> Iterator[str]:
    """JSON of a value, long lists in it some items at a time: Python's lock is held for the time of one part."""
    if isinstance(value, dict):
        for at, (key, inner) in enumerate(value.items()):
            yield f"{',' if at else '{'}{_json(key)}:"
            yield from json_parts(inner)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > ITEMS:
        for at in range(0, len(value), ITEMS):
            yield f"{',' if at else '['}{_json(value[at : at + ITEMS])[1:-1]}"
        yield "]"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return strict_json(value, ensure_ascii=False, separators=(",", ":"))


def event(body: Json) -> str:
    """One server-sent event, in ASCII: clients that split lines as Python does would cut it at U+2028 and its like."""
    return f"data: {strict_json(body, separators=(',', ':'))}\n\n"


END_OF_STREAM = "data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class CompletionResponse:
    """Responses of ``/v1/completions``.

    Args:
        model: its public name.
        texts: of the tokenizer.
        asked: the request.
        logprobs: alternatives at each token; None for no log-probabilities.
    """

    id_prefix, object_type, chunk_type = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, texts: Texts, asked: Sampling, logprobs: int | None) -> None:
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.texts, self.asked, self.top, self.prompt_top = texts, asked, logprobs, asked.prompt_logprobs

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        """Log-probabilities in the response of these completions."""
        count = 0
        if self.top is not None:
            count += (1 + self.top) * sum(len(one.token_ids) for one in finished)
        if self.prompt_top is not None:
            count += (1 + self.prompt_top) * sum(len(one.prompt_token_ids) for one in finished)
        return count

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        """The response that is not streamed, as JSON in parts; each choice is made when its turn comes."""
        part = ""
        for text in self._texts(finished, usage(sum(used.prompt_tokens), sum(used.completion_tokens))):
            part += text
            if len(part) > PART:
                yield part.encode()
                part = ""
        yield part.encode()

    def _texts(self, finished: Sequence[Completion], used: Json) -> Iterator[str]:
        yield f'{_json({**self.head, "object": self.object_type})[:-1]},"choices":['
        for index, completion in enumerate(finished):
            yield "," * (index > 0)
            yield from json_parts(self.choice(index, completion))
        yield "]"
        for name, value in self.beside(finished).items():
            yield f",{_json(name)}:"
            yield from json_parts(value)
        yield f',"usage":{_json(used)}}}'

    def beside(self, finished: Sequence[Completion]) -> Json:
        """Further fields beside the choices."""
        return {}

    def opening(self, used: Usage) -> Iterator[str]:
        """Chunks before the first token."""
        for choice in self.role_chunks(len(used.completion_tokens)):
            yield self._event(choice, used)

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        """Chunks of a delta."""
        for choice in self.deltas(index, delta):
            yield self._event(choice, used)

    def ending(self, used: Usage) -> Iterator[str]:
        """The usage, where it is asked for, and the end of the stream."""
        if self.asked.usage_in_stream:
            total = usage(sum(used.prompt_tokens), sum(used.completion_tokens))
            yield event(self.chunk([], total, show_usage=True))
        yield END_OF_STREAM

    def error(self, error: RequestError) -> str:
        """The last event of a stream that fails."""
        return event(error_body(str(error), error.status, error.param, error.code))

    def _event(self, choice: Json, used: Usage) -> str:
        at, shown = choice["index"], None
        if self.asked.usage_in_chunks:
            shown = usage(used.prompt_tokens[at // self.asked.n], used.completion_tokens[at])
        return event(self.chunk([choice], shown, show_usage=self.asked.usage_in_stream))

    def chunk(self, choices: list[Json], used: Json | None = None, show_usage: bool = False) -> Json:
        """A chunk of a stream; with ``show_usage`` every chunk has the field, null until the last."""
        return {
            **self.head,
            "object": self.chunk_type,
            "choices": choices,
            **({"usage": used} if show_usage else {}),
        }

    def role_chunks(self, choices: int) -> list[Json]:
        """Chunks before the first token: the role of each choice."""
        return []

    def choice(self, index: int, completion: Completion) -> Json:
        """One finished choice of a response that is not streamed."""
        return {
            "index": index,
            "text": completion.text,
            "logprobs": self.logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **self.prompt_logprobs(completion),
        }

    def deltas(self, index: int, delta: Delta) -> list[Json]:
        """What a delta adds to a choice of a stream; nothing while its text is held back."""
        done = delta.finished
        if not (delta.text or done or (self.top is not None and delta.token_ids)):
            return []
        return [
            {
                "index": index,
                "text": delta.text,
                "logprobs": self.logprobs(delta),
                "finish_reason": done.finish_reason if done else None,
                **({"stop_reason": done.stop_reason} if done else {}),
            }
        ]

    def logprobs(self, tokens: Completion | Delta) -> Json | None:
        """Of a Completion's or a Delta's tokens: the model's own, before temperature.

        ``top_logprobs`` always has the sampled token, and so up to one more than was asked for.
        """
        if self.top is None:
            return None
        names = [self.texts.of_token(token)[0] for token in tokens.token_ids]
        values = list(map(_finite, tokens.logprobs))
        top = [
            # Names may collide; the sampled token's own value is the one that stays.
            {self.texts.of_token(token)[0]: value for token, value in _top(tokens.top_logprobs, at, self.top)}
            | {name: value}
            for at, (name, value) in enumerate(zip(names, values))
        ]
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": tokens.text_offset,
        }

    def prompt_logprobs(self, completion: Completion) -> Json:
        """vLLM's field of that name, where it is asked for."""
        if self.prompt_top is None or completion.prompt_logprobs is None:
            return {}
        count = self.prompt_top
        return {
            "prompt_logprobs": [
                None
                if values is None
                else {
                    str(token): {
                        "logprob": _finite(value),
                        "rank": rank,
                        "decoded_token": self.texts.of_token(token)[0],
                    }
                    for token, value, rank in ranked(values, count)
                }
                for values in completion.prompt_logprobs
            ]
        }


class ChatResponse(CompletionResponse):
    """Responses of ``/v1/chat/completions``."""

    id_prefix, object_type, chunk_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def role_chunks(self, choices: int) -> list[Json]:
        return [_chat_delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def choice(self, index: int, completion: Completion) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self.logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def deltas(self, index: int, delta: Delta) -> list[Json]:
        chunks = []
        if delta.text or (self.top is not None and delta.token_ids):
            chunks.append(_chat_delta(index, {"content": delta.text}, self.logprobs(delta)))
        if delta.finished:
            ending = {
                "finish_reason": delta.finished.finish_reason,
                "stop_reason": delta.finished.stop_reason,
            }
            chunks.append({**_chat_delta(index, {}), **ending})
        return chunks

    def beside(self, finished: Sequence[Completion]) -> Json:
        return self.prompt_logprobs(finished[0])

    def logprobs(self, tokens: Completion | Delta) -> Json | None:
        if self.top is None:
            return None
        content = []
        for at, token in enumerate(tokens.token_ids):
            others = [self._entry(*pair) for pair in _top(tokens.top_logprobs, at, self.top)]
            content.append({**self._entry(token, tokens.logprobs[at]), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text, raw = self.texts.of_token(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _chat_delta(index: int, delta: Json, logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _top(tops: Sequence[dict[int, float]] | None, at: int, most: int) -> list[tuple[int, float]]:
    return [(token, _finite(value)) for token, value in tops[at].items()][:most] if tops and most else []


def _finite(logprob: float) -> float:
    """JSON has neither infinities nor NaN; the API writes the impossible as -9999."""
    return max(-9999.0, logprob)  # in this order NaN is -9999 too
