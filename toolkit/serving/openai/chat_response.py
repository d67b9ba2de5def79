"""Responses of ``/v1/chat/completions``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toolkit.chat.reply import CallArguments, CallBegin, ContentText, Event, OutputParser, ReasoningText, parse_reply
from toolkit.engine import Completion, Delta
from toolkit.serving.errors import Json
from toolkit.serving.logprobs import finite
from toolkit.serving.openai.responses import CompletionResponse, top_of
from toolkit.serving.reply_plan import ReplyPlan


class ChatResponse(CompletionResponse):
    """Responses of ``/v1/chat/completions``.

    Args:
        plan: of the replies.
        shows_reasoning: whether reasoning is in the response.
    """

    id_prefix, object_type, chunk_type = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *of_every_response: Any, plan: ReplyPlan, shows_reasoning: bool = True) -> None:
        super().__init__(*of_every_response)
        self._plan, self._shows_reasoning = plan, shows_reasoning
        self._parsers: dict[int, OutputParser] = {}
        self._called: set[int] = set()  # choices of a stream with a tool call

    def role_chunks(self, choices: int) -> list[Json]:
        return [_chat_delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def choice(self, index: int, completion: Completion) -> Json:
        reply = parse_reply(self._plan.parser(), completion.text)
        message: Json = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.calls:
            message["content"] = reply.content or None
            message["tool_calls"] = [call.for_template() for call in reply.calls]
        if reply.reasoning is not None and self._shows_reasoning:
            message |= _reasoning(reply.reasoning)
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(completion),
            "finish_reason": _finish_reason(completion, bool(reply.calls)),
            "stop_reason": completion.stop_reason,
            **self.token_ids(completion, None),
            **self.sampling_logprobs(completion),
        }

    def deltas(self, index: int, delta: Delta) -> list[Json]:
        parser = self._parsers.setdefault(index, self._plan.parser())
        events = parser.feed(delta.text) if delta.text else []
        if delta.finished:
            events = [*events, *parser.finish()]
            del self._parsers[index]
        changes = list(self._changes(index, events))
        if not changes and self.shows_tokens and delta.token_ids:
            changes = [{"content": ""}]
        chunks = [_chat_delta(index, change) for change in changes]
        if chunks:  # tokens stand beside the first of what they changed
            chunks[0] |= {
                "logprobs": self.logprobs(delta),
                **self.token_ids(delta, None),
                **self.sampling_logprobs(delta),
            }
        if delta.finished:
            ending = {
                "finish_reason": _finish_reason(delta.finished, index in self._called),
                "stop_reason": delta.finished.stop_reason,
            }
            chunks.append({**_chat_delta(index, {}), **ending})
        return chunks

    def _changes(self, index: int, events: Iterable[Event]) -> Iterable[Json]:
        """Deltas of a message."""
        for event in events:
            if isinstance(event, ContentText):
                yield {"content": event.text}
            elif isinstance(event, ReasoningText):
                if self._shows_reasoning:
                    yield _reasoning(event.text)
            elif isinstance(event, CallBegin):
                self._called.add(index)
                function = {"name": event.name, "arguments": ""}
                yield {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
            elif isinstance(event, CallArguments):
                yield {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}

    def beside(self, finished: Sequence[Completion]) -> Json:
        return {**self.prompt_logprobs(finished[0]), **self._prompt_token_ids(finished[0].prompt_token_ids)}

    def _prompt_token_ids(self, tokens: Sequence[int]) -> Json:
        return {"prompt_token_ids": list(tokens)} if self.asked.return_token_ids else {}

    def chunk(self, choices: list[Json], used: Json | None = None, show_usage: bool = False) -> Json:
        chunk = super().chunk(choices, used, show_usage)
        if self._begun:
            return chunk
        prompt = self.prompts[0]
        return {
            **chunk,
            **self._prompt_token_ids(prompt["input_ids"][0].tolist() if isinstance(prompt, Mapping) else prompt),
        }

    def logprobs(self, tokens: Completion | Delta) -> Json | None:
        if self.top is None:
            return None
        content = []
        for at, token in enumerate(tokens.token_ids):
            others = [self._entry(*pair) for pair in top_of(tokens.top_logprobs, at, self.top)]
            content.append({**self._entry(token, tokens.logprobs[at]), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text, raw = self.texts.of_token(token)
        name = self.name(token) if self.asked.return_tokens_as_token_ids else text
        return {"token": name, "logprob": finite(logprob), "bytes": raw}


def _reasoning(text: str) -> Json:
    """Under the names of DeepSeek's API and of vLLM's."""
    return {"reasoning_content": text, "reasoning": text}


def _finish_reason(completion: Completion, called: bool) -> str:
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def _chat_delta(index: int, delta: Json, logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
