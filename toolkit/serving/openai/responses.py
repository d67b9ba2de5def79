"""Response bodies: OpenAI's objects for completions, chats, stream chunks and errors.

``choices`` carry vLLM's ``stop_reason`` beside OpenAI's fields: the stop string or token that ended them.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toolkit.engine import Completion, Delta
from toolkit.engine.prompt_logprobs import ranked
from toolkit.serving.errors import Json, RequestError, error_body
from toolkit.serving.generation import Usage
from toolkit.serving.logprobs import finite
from toolkit.serving.openai.completion_prompts import Echo
from toolkit.serving.openai.sampling import Sampling
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


def total_usage(used: Usage) -> Json:
    """``usage`` of a whole request."""
    details = {"prompt_tokens_details": {"cached_tokens": sum(used.cached_tokens)}}
    return {**usage(sum(used.prompt_tokens), sum(used.completion_tokens)), **details}


class CompletionResponse:
    """Responses of ``/v1/completions``.

    Args:
        model: its public name.
        texts: of the tokenizer.
        asked: the request.
        logprobs: alternatives at each token; None for no log-probabilities.
        prompts: of the request, as the engine gets them.
        fingerprint: makes ``system_fingerprint`` of a version of the weights, None for now's.
        echoes: of the prompts, where they are asked for.
    """

    id_prefix, object_type, chunk_type = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        texts: Texts,
        asked: Sampling,
        logprobs: int | None,
        prompts: Sequence[Any],
        fingerprint: Callable[[int | None], str],
        echoes: Sequence[Echo] = (),
    ) -> None:
        self.head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.texts, self.asked, self.top = texts, asked, logprobs
        self.prompts, self.echoes = prompts, echoes
        self._fingerprint = fingerprint
        self._version: int | None = None  # of the weights that made the last token
        self._begun: set[int] = set()  # choices of a stream with a chunk

    def total(self, used: Usage) -> Json:
        """``usage`` of the whole request."""
        details: Json = {"prompt_tokens_details": {"cached_tokens": sum(used.cached_tokens)}}
        if self.asked.prediction is not None:
            details["completion_tokens_details"] = {
                "accepted_prediction_tokens": used.accepted_prediction_tokens,
                "rejected_prediction_tokens": used.rejected_prediction_tokens,
            }
        return {**usage(sum(used.prompt_tokens), sum(used.completion_tokens)), **details}

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        """Log-probabilities in the response of these completions."""
        count = 0
        if self.top is not None:
            count += (1 + self.top) * sum(len(one.token_ids) for one in finished)
        if self.asked.return_sampling_logprobs:
            count += sum(len(one.token_ids) for one in finished)
        if self.asked.prompt_count is not None:
            count += (1 + self.asked.prompt_count) * sum(len(one.prompt_token_ids) for one in finished)
        return count

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        """The response that is not streamed, as JSON in parts; each choice is made when its turn comes."""
        part = ""
        self._version = finished[-1].weight_version
        for text in self._texts(finished, self.total(used)):
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
        yield f'],"system_fingerprint":{_json(self._fingerprint(self._version))}'
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
            self._begun.add(choice["index"])

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        """Chunks of a delta."""
        self._version = delta.weight_version if delta.weight_version is not None else self._version
        for choice in self.deltas(index, delta):
            yield self._event(choice, used)

    def ending(self, used: Usage) -> Iterator[str]:
        """The usage, where it is asked for, and the end of the stream."""
        if self.asked.usage_in_stream:
            yield event(self.chunk([], self.total(used), show_usage=True))
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
            "system_fingerprint": self._fingerprint(self._version),
            **({"usage": used} if show_usage else {}),
        }

    def role_chunks(self, choices: int) -> list[Json]:
        """Chunks before the first token: the role of each choice."""
        return []

    def choice(self, index: int, completion: Completion) -> Json:
        """One finished choice of a response that is not streamed."""
        echo = self._echo(index)
        return {
            "index": index,
            "text": completion.text if echo is None else echo.text + completion.text,
            "logprobs": self._with_echo(echo, self.logprobs(completion), completion.prompt_logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **self.prompt_logprobs(completion),
            **self.token_ids(completion, completion.prompt_token_ids),
            **self.sampling_logprobs(completion),
        }

    def deltas(self, index: int, delta: Delta) -> list[Json]:
        """What a delta adds to a choice of a stream; nothing while its text is held back."""
        done, echo = delta.finished, self._echo(index)
        begins = index not in self._begun
        if not (delta.text or done or (self.shows_tokens and delta.token_ids) or (begins and echo is not None)):
            return []
        self._begun.add(index)
        logprobs = self.logprobs(delta)
        if echo is not None and not begins:
            logprobs = _shifted(logprobs, len(echo.text))
        return [
            {
                "index": index,
                "text": echo.text + delta.text if echo is not None and begins else delta.text,
                "logprobs": self._with_echo(echo, logprobs, delta.prompt_logprobs) if begins else logprobs,
                "finish_reason": done.finish_reason if done else None,
                **({"stop_reason": done.stop_reason} if done else {}),
                **self.token_ids(delta, self.prompts[index // self.asked.n] if begins else None),
                **self.sampling_logprobs(delta),
            }
        ]

    def token_ids(self, tokens: Completion | Delta, prompt: Sequence[int] | None) -> Json:
        """vLLM's fields for token ids, where they are asked for."""
        if not self.asked.return_token_ids:
            return {}
        return {**({} if prompt is None else {"prompt_token_ids": list(prompt)}), "token_ids": tokens.token_ids}

    @property
    def shows_tokens(self) -> bool:
        """Whether a chunk says something of tokens whose text is held back."""
        return self.top is not None or self.asked.return_token_ids or self.asked.return_sampling_logprobs

    def sampling_logprobs(self, tokens: Completion | Delta) -> Json:
        """Log-probabilities under what the tokens were sampled from, where they are asked for."""
        if not self.asked.return_sampling_logprobs:
            return {}
        return {"sampling_logprobs": list(map(finite, tokens.sampling_logprobs))}

    def name(self, token: int) -> str:
        """A token as log-probabilities name it."""
        return f"token_id:{token}" if self.asked.return_tokens_as_token_ids else self.texts.of_token(token)[0]

    def logprobs(self, tokens: Completion | Delta) -> Json | None:
        """Of a Completion's or a Delta's tokens: the model's own, before temperature.

        ``top_logprobs`` always has the sampled token, and so up to one more than was asked for.
        """
        if self.top is None:
            return None
        names = list(map(self.name, tokens.token_ids))
        values = list(map(finite, tokens.logprobs))
        top = [
            # Names may collide; the sampled token's own value is the one that stays.
            {self.name(token): value for token, value in top_of(tokens.top_logprobs, at, self.top)} | {name: value}
            for at, (name, value) in enumerate(zip(names, values))
        ]
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": tokens.text_offset,
        }

    def _echo(self, index: int) -> Echo | None:
        return self.echoes[index // self.asked.n] if self.echoes else None

    def _with_echo(
        self, echo: Echo | None, logprobs: Json | None, found: list[dict[int, float] | None] | None
    ) -> Json | None:
        """``logprobs`` behind those of the prompt, whose first token has none."""
        if echo is None or logprobs is None:
            return logprobs
        names, values = list(map(self.name, echo.token_ids)), list[float | None]()
        top = list[dict[str, float] | None]()
        for own, name, every in zip(echo.token_ids, names, found or ()):
            shown = self._shown(every, own, self.top)
            if shown is None:
                values.append(None)
                top.append(None)
                continue
            value = next(value for token, value, _ in shown if token == own)
            values.append(value)
            top.append({self.name(token): value for token, value, _ in shown} | {name: value})
        return {
            "tokens": names + logprobs["tokens"],
            "token_logprobs": values + logprobs["token_logprobs"],
            "top_logprobs": top + logprobs["top_logprobs"],
            "text_offset": echo.text_offset + [len(echo.text) + offset for offset in logprobs["text_offset"]],
        }

    def _shown(
        self, values: dict[int, float] | None, own: int, count: int | None, own_rank: int | None = None
    ) -> list[tuple[int, float, int | None]] | None:
        """In the place of a token of the prompt: it and the ``count`` most probable ones, with their ranks."""
        made = self.asked.prompt_count
        if values is None or count is None or made is None:
            return None
        of_all = ranked(values, made, own_rank)
        return [
            (token, finite(value), rank)
            for token, value, rank in of_all
            if token == own or (rank is not None and rank <= count)
        ]

    def prompt_logprobs(self, completion: Completion) -> Json:
        """vLLM's field of that name, where it is asked for."""
        ranks = completion.prompt_ranks
        if self.asked.prompt_logprobs is None or completion.prompt_logprobs is None or ranks is None:
            return {}
        count = self.asked.prompt_logprobs
        shown = [
            self._shown(values, own, count, rank)
            for values, own, rank in zip(completion.prompt_logprobs, completion.prompt_token_ids, ranks)
        ]
        return {
            "prompt_logprobs": [
                None
                if one is None
                else {
                    str(token): {"logprob": value, "rank": rank, "decoded_token": self.texts.of_token(token)[0]}
                    for token, value, rank in one
                }
                for one in shown
            ]
        }


def _shifted(logprobs: Json | None, by: int) -> Json | None:
    """``logprobs`` of a choice with so many characters in front."""
    return logprobs and {**logprobs, "text_offset": [by + offset for offset in logprobs["text_offset"]]}


def top_of(tops: Sequence[dict[int, float]] | None, at: int, most: int) -> list[tuple[int, float]]:
    return [(token, finite(value)) for token, value in tops[at].items()][:most] if tops and most else []
