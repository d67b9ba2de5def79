"""Requests that generate in any protocol: prompts and parameters to the engine, its output to a response."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from toolkit.engine import AsyncEngine, Completion, Delta, RequestHandle, SamplingParams
from toolkit.engine.prompts import fit_max_tokens, outside_vocabulary, prompt_length, truncated
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.base import CLIENT_CLOSED_REQUEST, Base, ServerConfig
from toolkit.serving.body import Body
from toolkit.serving.errors import RequestError
from toolkit.serving.field_names import named, naming
from toolkit.serving.parsing import parse
from toolkit.serving.reply_plan import ReplyPlanner
from toolkit.serving.request_log import record_of
from toolkit.serving.texts import Texts

VERSION_HEADER = "x-weight-version"
"""Of the weights that made the last tokens of a response; of a stream, of those when it began."""
SHORT_RESPONSE = 1000
"""Log-probabilities in a response that is written on the event loop."""

Given = TypeVar("Given", bound=Body)
Made = TypeVar("Made")


@dataclass
class Usage:
    """Tokens of a request so far.

    Args:
        prompt_tokens: of each prompt.
        completion_tokens: of each completion.
        cached_tokens: of each prompt, found in the prefix cache; known once a completion of it has finished.
        accepted_prediction_tokens, rejected_prediction_tokens: of all completions that have finished.
        handle: of the request, for its times.
    """

    prompt_tokens: list[int]
    completion_tokens: list[int]
    cached_tokens: list[int] = field(init=False)
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    handle: RequestHandle | None = None

    def __post_init__(self) -> None:
        self.cached_tokens = [0] * len(self.prompt_tokens)

    def add(self, finished: Completion, prompt_index: int) -> None:
        """Count what a completion says at its end."""
        self.cached_tokens[prompt_index] = finished.num_cached_tokens or 0
        self.accepted_prediction_tokens += finished.accepted_prediction_tokens or 0
        self.rejected_prediction_tokens += finished.rejected_prediction_tokens or 0


class ResponseWriter(Protocol):
    """What a protocol makes of completions."""

    def num_logprobs(self, finished: Sequence[Completion]) -> int:
        """Log-probabilities in the response of these completions."""

    def written(self, finished: Sequence[Completion], used: Usage) -> Iterator[bytes]:
        """The response that is not streamed, as JSON in parts."""

    def opening(self, used: Usage) -> Iterator[str]:
        """Events before the first token."""

    def events(self, index: int, delta: Delta, used: Usage) -> Iterator[str]:
        """Events of a delta of the completion ``index`` of the request; none while its text is held back."""

    def ending(self, used: Usage) -> Iterator[str]:
        """Events after the last token."""

    def error(self, error: RequestError) -> str:
        """The event of an error after the response has begun; nothing follows it."""


@dataclass(frozen=True)
class Asked:
    """A request that may run: what it asks for, and what writes its response.

    Args:
        prompts: token ids, or what a processor returned.
        params: of each prompt.
        stream: whether the response is events.
        writer: of the response.
        media_type: of a stream.
        ids: under which the request can be aborted, beside its ``X-Request-Id``.
        keep_cancelled: whether the response of an aborted request has its tokens; otherwise it is an error.
        field_names: of its body, for errors of the engine.
    """

    prompts: Sequence[Any]
    params: list[SamplingParams]
    stream: bool
    writer: ResponseWriter
    media_type: str = "text/event-stream"
    ids: tuple[str, ...] = ()
    keep_cancelled: bool = False
    field_names: Mapping[str, str] = field(default_factory=dict)


class Generation:
    """What the routes of a model that generates share.

    Attributes:
        base: the application without them.
        engine: of the model.
        texts: its tokenizer's part.
        replies: how replies to chats are sampled and read.
    """

    def __init__(self, base: Base, engine: AsyncEngine, config: ServerConfig) -> None:
        self.base, self.engine, self.config = base, engine, config
        self.replies = ReplyPlanner(config)
        self.texts = Texts(config.tokenizer, config.max_model_len, config.processor, config.media_folder)
        backend = getattr(engine.engine, "backend", None)
        self._numerics = str(getattr(backend, "numerics", "fast"))

    def fingerprint(self, weight_version: int | None = None) -> str:
        """``system_fingerprint`` of a response: the numerics mode and the version of the weights, None for now's."""
        version = self.engine.stats().get("weight_version", 0) if weight_version is None else weight_version
        return f"{self._numerics}-{version:.0f}"

    def check_tokens(self, prompts: Sequence[list[int]], field: str = "prompt") -> None:
        """Raise RequestError for a token id outside the vocabulary."""
        if self.config.vocab_size is None:
            return
        for prompt in prompts:
            wrong = outside_vocabulary(prompt, self.config.vocab_size)
            if wrong is not None:
                message = f"'{field}' must have token ids from 0 to {self.config.vocab_size - 1}, got {shown(wrong)}."
                raise RequestError(message, field)

    def reader(self, kind: type[Given], make: Callable[[Given], Made]) -> Callable[[bytes], Made]:
        """What reads bodies of a ``kind``, and makes a request of each; errors are about the body's own fields."""

        def read(raw: bytes) -> Made:
            asked = parse(kind, raw)
            with naming(asked.field_names):
                made = make(asked)
            return replace(made, field_names=asked.field_names) if isinstance(made, Asked) else made

        return read

    def sampling_params(
        self, given: dict[str, Any], prompts: Sequence[Any], logprobs: int | None, **defaults: Any
    ) -> tuple[Sequence[Any], list[SamplingParams]]:
        """The prompts, cut where that is asked for, and the parameters of each.

        Args:
            given: arguments of ``SamplingParams`` that the request gives.
            prompts: of the request.
            logprobs: as in ``SamplingParams``.
            defaults: of the protocol, behind those of the server.
        """
        params = SamplingParams(**{**defaults, **self.config.default_sampling_params, **given}, logprobs=logprobs)
        if params.form is not None:
            self.engine.engine.grammars.compile(params.form)  # here, where nobody else waits for it
        if params.truncate_prompt_tokens is not None:
            most = self.engine.engine.max_sequence_len
            prompts = [truncated(one, params, most) if isinstance(one, list) else one for one in prompts]
        longest = None if "max_tokens" in given else self.config.max_model_len
        fitting = [
            params if longest is None else fit_max_tokens(params, prompt_length(one), longest) for one in prompts
        ]
        return prompts, fitting

    async def respond(self, request: Request, given: Asked) -> Response:
        """Run a request, and respond. Raises what the engine refuses."""
        with naming(given.field_names):
            handle = await self.base.running.start(
                request,
                self.engine,
                lambda: self.engine.submit(given.prompts, given.params),
                sum(one.n for one in given.params),
                given.ids,
                given.keep_cancelled,
            )
            await handle.wait_accepted()
        used = Usage(list(map(prompt_length, given.prompts)), [0] * handle.num_sequences, handle=handle)
        record = record_of(request.scope)
        if record is not None:
            record.model = given.params[0].lora_name or self.base.names[0]
            record.stream, record.handle = given.stream, handle
            record.prompt_tokens = sum(used.prompt_tokens)
        self.base.metrics.prompt_tokens.add(sum(used.prompt_tokens))
        self.base.watch(request, handle)
        if given.stream:
            events = self._events(handle, given, used)
            headers = {"cache-control": "no-cache", VERSION_HEADER: str(self.base.weight_version)}
            return StreamingResponse(events, media_type=given.media_type, headers=headers)
        with naming(given.field_names):
            finished = await self._finished(handle, given, used)
        used.completion_tokens = [len(one.token_ids) for one in finished]
        known = [one.weight_version for one in finished if one.weight_version is not None]
        versions = {VERSION_HEADER: str(max(known, default=self.base.weight_version))}
        if given.writer.num_logprobs(finished) <= SHORT_RESPONSE:
            body = b"".join(given.writer.written(finished, used))
            return Response(body, media_type="application/json", headers=versions)
        # A plain iterator: its parts are made on threads.
        parts = given.writer.written(finished, used)
        background = BackgroundTask(self.base.trim_soon)
        return StreamingResponse(parts, media_type="application/json", headers=versions, background=background)

    async def _finished(self, handle: RequestHandle, given: Asked, used: Usage) -> list[Completion]:
        finished: dict[int, Completion] = {}
        async for delta in handle:
            if delta.finished is not None:
                finished[_index(delta, given)] = _without_error(delta.finished, given)
                used.add(delta.finished, delta.prompt_index)
        return [finished[index] for index in sorted(finished)]

    async def _events(self, handle: RequestHandle, given: Asked, used: Usage) -> AsyncIterator[str]:
        writer = given.writer
        try:
            for event in writer.opening(used):
                yield event
            async for delta in handle:
                if delta.finished is not None:
                    used.add(_without_error(delta.finished, given), delta.prompt_index)
                index = _index(delta, given)
                used.completion_tokens[index] += len(delta.token_ids)
                for event in writer.events(index, delta, used):
                    yield event
            for event in writer.ending(used):
                yield event
        except ToolkitError as error:
            yield writer.error(self.base.as_request_error(named(error, given.field_names)))
        finally:
            handle.cancel()


def _index(delta: Delta, given: Asked) -> int:
    return delta.prompt_index * given.params[0].n + delta.index


_FAILURES = {
    "error": (500, "it says no reason"),
    "cancelled": (CLIENT_CLOSED_REQUEST, "it was cancelled"),  # and its client is gone: a shutdown says so itself
    "timeout": (408, "it ran out of time"),
}


def _without_error(completion: Completion, given: Asked) -> Completion:
    """``completion``. Raises what the engine says went wrong with it."""
    if given.keep_cancelled and completion.finish_reason == "cancelled":
        return completion
    field = (completion.error or "").partition(" ")[0]
    if completion.finish_reason == "error" and field in SamplingParams.__dataclass_fields__:
        raise RequestError(str(completion.error), field)  # what the client asked for was not to be followed
    if completion.finish_reason in _FAILURES:
        status, reason = _FAILURES[completion.finish_reason]
        message = f"The request failed in the engine: {completion.error or reason}"
        raise RequestError(message, status=status, code=completion.finish_reason)
    return completion
