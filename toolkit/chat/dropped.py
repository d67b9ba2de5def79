"""What a chat template does not show of a conversation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.chat.template import ChatTemplateError, parsed_tools, render


def dropped_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | str | None = None, **options: Any
) -> list[int]:
    """Which messages ``render`` leaves out although they have text: most often a role that the template does not know.

    Every text is replaced by a mark and looked for in what is rendered; so a template that takes a part out of a text
    (thoughts of earlier turns) drops nothing. Empty where the template does not render the marks.

    Args:
        tokenizer: of transformers.
        messages: as for ``render``.
        tools: as for ``render``.
        options: other arguments of ``render``.
    """
    marks = {at: f"zq{at}qz" for at, message in enumerate(messages) if _has_text(message.get("content"))}
    marked = [
        {**message, "content": marks[at]} if at in marks else dict(message) for at, message in enumerate(messages)
    ]
    try:
        text = render(tokenizer, marked, tools, **options).lower()
    except ChatTemplateError:
        return []
    return [at for at, mark in marks.items() if mark not in text]


def hidden_tools(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | str | None = None, **options: Any
) -> list[str]:
    """The names of tools, and of functions that messages call, of which ``render`` shows nothing.

    Args:
        tokenizer: of transformers.
        messages: as for ``render``.
        tools: as for ``render``.
        options: other arguments of ``render``.
    """
    names = [name for tool in parsed_tools(tools) or [] if (name := _name(tool))]
    called: list[str] = []

    def marked(call: Any) -> Any:
        """The call of a function of another name: the list of tools may show the function's own."""
        name = _name(call)
        if name is None:
            return call
        called.append(name)
        mark = {"name": f"zq{len(called)}qz"}
        return {**call, "function": call["function"] | mark} if "function" in call else {**call, **mark}

    marks = [
        {**message, "tool_calls": [marked(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), (list, tuple))
        else message
        for message in messages
    ]
    hidden = []
    if names:
        text = render(tokenizer, messages, tools, **options)
        hidden += [name for name in names if name not in text]
    if called:
        text = render(tokenizer, marks, tools, **options)
        hidden += [name for at, name in enumerate(called, 1) if f"zq{at}qz" not in text]
    return list(dict.fromkeys(hidden))


def hidden_documents(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | str | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[int]:
    """Which of ``chat_template_kwargs["documents"]`` ``render`` shows nothing of.

    Every text of a document is replaced by a mark, and the marks are looked for in what is rendered. Empty where the
    template does not render them.

    Args:
        tokenizer: of transformers.
        messages: as for ``render``.
        tools: as for ``render``.
        chat_template_kwargs: as for ``render``.
        options: other arguments of ``render``.
    """
    variables = dict(chat_template_kwargs or {})
    documents = variables.get("documents")
    if not isinstance(documents, (list, tuple)):
        return []
    variables["documents"] = [_marked(one, f"zq{at}qz") for at, one in enumerate(documents)]
    try:
        text = render(tokenizer, messages, tools, chat_template_kwargs=variables, **options)
    except ChatTemplateError:
        return []
    return [at for at in range(len(documents)) if f"zq{at}qz" not in text]


def _marked(value: Any, mark: str) -> Any:
    """``value`` with ``mark`` in the place of its texts."""
    if isinstance(value, Mapping):
        return {key: _marked(inner, mark) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(inner, mark) for inner in value]
    return mark if isinstance(value, str) else value


def _name(one: Any) -> str | None:
    """Of a tool or a call, where it has one."""
    function = one.get("function", one) if isinstance(one, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def hidden_parts(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | str | None = None, **options: Any
) -> list[int]:
    """The turns of the assistant that ``render`` shows only in part, even as the last message: most often no thoughts.

    Whitespace and tags do not matter. Turns that cannot be rendered are not in the list.

    Args:
        tokenizer: of transformers.
        messages: as for ``render``.
        tools: as for ``render``.
        options: other arguments of ``render``.
    """
    found = []
    for at, message in enumerate(messages):
        parts = [part for field in _WRITTEN for part in _TAG.split(_text_of(message.get(field)))]
        if message.get("role") != "assistant" or not any(parts):
            continue
        try:
            shown = _bare(render(tokenizer, messages[: at + 1], tools, **options))
        except ChatTemplateError:
            continue
        if any(_bare(part) not in shown for part in parts):
            found.append(at)
    return found


_WRITTEN = ("content", "reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message that hold what it has written."""
_TAG = re.compile(r"<[^<>\s]{1,40}>")


def _bare(text: str) -> str:
    return "".join(text.split())


def _text_of(content: Any) -> str:
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _has_text(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return isinstance(content, (list, tuple)) and any(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) and part["text"].strip() for part in content
    )
