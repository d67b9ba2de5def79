"""How the replies of a model are read: by name, by its tokenizer's response template, or by its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply.calls import CallFormat
from toolkit.chat.reply.families import CALLS, REASONING, calls_named, calls_of, reasoning_of
from toolkit.chat.reply.harmony import MARKERS as HARMONY_MARKERS
from toolkit.chat.reply.harmony import HarmonyCalls, HarmonyParser, HarmonyReasoning
from toolkit.chat.reply.parser import OutputParser, ReasoningFormat, ReplyParser
from toolkit.chat.reply.shipped import ShippedParser, texts_of
from toolkit.chat.tools import Tool, ToolChoice, new_call_id
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class ReplyReading:
    """How replies of a model are read.

    Args:
        calls: syntax of tool calls; None where no call is read.
        reasoning: how reasoning is marked; None where none is read.
        shipped: a tokenizer whose response template reads replies in the place of these.
    """

    calls: CallFormat | None = None
    reasoning: ReasoningFormat | None = None
    shipped: Any = None

    @property
    def reads_calls(self) -> bool:
        """Whether tool calls are read."""
        return self.calls is not None or self.shipped is not None

    @property
    def reads_reasoning(self) -> bool:
        """Whether reasoning is read."""
        return self.reasoning is not None or self.shipped is not None

    @property
    def is_harmony(self) -> bool:
        """Whether a reply is messages with headers, as gpt-oss writes them."""
        return isinstance(self.calls, HarmonyCalls) or isinstance(self.reasoning, HarmonyReasoning)

    def kept_tokens(self, tokenizer: Any) -> tuple[int, ...]:
        """Ids of the special tokens that are markers, or parts of them: the text of a reply must have them."""
        texts = [] if self.shipped is None else texts_of(self.shipped.response_template)
        if self.calls is not None:
            texts += _strings(vars(self.calls))
        if self.reasoning is not None:
            texts += [self.reasoning.begin, self.reasoning.end]
        if self.is_harmony:
            texts += HARMONY_MARKERS
        backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        added = backend.get_added_tokens_decoder() if hasattr(backend, "get_added_tokens_decoder") else {}
        return tuple(
            token for token, about in added.items() if about.special and any(about.content in text for text in texts)
        )

    def parser(
        self,
        prompt: str,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        reasoning: bool = True,
    ) -> OutputParser:
        """A parser of one reply.

        Args:
            prompt: its end at least: the chat template may have begun the reasoning.
            tools: of the request; without any no call is read.
            choice: which of them may be called; None is "auto".
            reasoning: whether reasoning is apart; False leaves it, and its markers, in the content.
        """
        choice = choice or ToolChoice()
        called = bool(tools) and choice.mode != "none"
        most = None if choice.parallel else 1
        if self.shipped is not None and (called or reasoning):
            length = self.calls.id_length if self.calls is not None else None
            return ShippedParser(
                self.shipped, prompt, tools, reasoning, called, most, new_id=lambda: new_call_id(length)
            )
        if self.is_harmony:
            apart = reasoning and self.reasoning is not None
            return HarmonyParser(prompt, tools, apart, called and self.calls is not None, most)
        marked = self.reasoning if reasoning else None
        begun = marked is not None and marked.begun_by(prompt)
        return ReplyParser(self.calls if called else None, marked, tools, begun, most)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    found = [text for one in inner for text in _strings(one)]
    return found + (_strings(vars(value)) if isinstance(value, CallFormat) else [])


def reading_of(
    tokenizer: Any,
    chat_template: str | None,
    tool_call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
) -> ReplyReading:
    """How replies of a model are read.

    Args:
        tokenizer: of transformers, or None.
        chat_template: the text that renders chats, or None.
        tool_call_parser: a name of ``families.CALLS``; "auto" recognises it by the chat template; "none" reads none.
        reasoning_parser: a name of ``families.REASONING``, "auto" or "none".

    Raises:
        ToolkitError: for an unknown name.
    """
    _check("tool_call_parser", tool_call_parser, CALLS)
    _check("reasoning_parser", reasoning_parser, REASONING)
    template = chat_template or ""
    known = calls_of(template)
    calls = known[1] if known is not None else None
    reasoning = reasoning_of(template)
    shipped = tokenizer if getattr(tokenizer, "response_template", None) is not None else None
    if shipped is not None and (tool_call_parser, reasoning_parser) == (AUTO, AUTO):
        described = " ".join(texts_of(shipped.response_template))
        # A family's own reader streams arguments; it reads what the response template describes in the same markers.
        same = calls is not None and all(one in described for one in (*calls.begins[:1], *calls.ends))
        if not same or (reasoning is not None and reasoning.end not in described):
            return ReplyReading(calls, reasoning, shipped)
    if tool_call_parser != AUTO:
        calls = None if tool_call_parser == NONE else calls_named(tool_call_parser, template)
    if reasoning_parser != AUTO:
        reasoning = REASONING.get(reasoning_parser)
    return ReplyReading(calls, reasoning)


def _check(field: str, name: str, known: dict[str, Any]) -> None:
    allowed = (AUTO, NONE, *sorted(known))
    if name not in allowed:
        raise ToolkitError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {shown(name)}.")
