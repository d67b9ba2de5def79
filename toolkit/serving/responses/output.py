"""Output items as they come, and their events."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.chat.reply import CallArguments, CallBegin, CallEnd, ContentText, Event, ReasoningText
from toolkit.serving.errors import Json


class Output:
    """The items of a response.

    Attributes:
        items: so far.
    """

    def __init__(self) -> None:
        self.items: list[Json] = []
        self._open = False

    @property
    def kind(self) -> str | None:
        """The type of the item that is open."""
        return str(self.items[-1]["type"]) if self._open else None

    def events(self, event: Event, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Events of what a part of the reply adds; ``logprobs`` are those of the tokens of a text."""
        match event:
            case ReasoningText(text):
                if self.kind != "reasoning":
                    item = {"id": _new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}
                    yield from self._begin({**item, "content": []})
                    yield from self._begin_part({"type": "reasoning_text", "text": ""})
                self._part["text"] += text
                yield self._event("response.reasoning_text.delta", content_index=0, delta=text)
            case ContentText(text):
                if self.kind != "message":
                    item = {"id": _new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
                    yield from self._begin({**item, "content": []})
                    yield from self._begin_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
                self._part["text"] += text
                self._part["logprobs"] += logprobs
                delta = {"delta": text, "logprobs": list(logprobs)}
                yield self._event("response.output_text.delta", content_index=0, **delta)
            case CallBegin(_, call_id, name):
                item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "arguments": ""}
                yield from self._begin({**item, "call_id": call_id, "name": name})
            case CallArguments(_, text):
                self.items[-1]["arguments"] += text
                yield self._event("response.function_call_arguments.delta", delta=text)
            case CallEnd(_, complete):
                yield from self.close("completed" if complete else "incomplete")

    def close(self, status: str) -> Iterator[Json]:
        """Events of the end of the item that is open; ``status`` is what becomes of it."""
        if not self._open:
            return
        item = self.items[-1]
        match item["type"]:
            case "reasoning":
                yield self._event("response.reasoning_text.done", content_index=0, text=self._part["text"])
                yield self._event("response.content_part.done", content_index=0, part=dict(self._part))
            case "message":
                done = {"text": self._part["text"], "logprobs": list(self._part["logprobs"])}
                yield self._event("response.output_text.done", content_index=0, **done)
                yield self._event("response.content_part.done", content_index=0, part=dict(self._part))
            case _:
                done = {"arguments": item["arguments"], "name": item["name"]}
                yield self._event("response.function_call_arguments.done", **done)
        item["status"], self._open = status, False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": dict(item)}

    @property
    def _part(self) -> Any:
        return self.items[-1]["content"][0]

    def _begin(self, item: Json) -> Iterator[Json]:
        yield from self.close("completed")
        self.items.append(item)
        self._open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _begin_part(self, part: Json) -> Iterator[Json]:
        self.items[-1]["content"] = [part]
        yield self._event("response.content_part.added", content_index=0, part=dict(part))

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
