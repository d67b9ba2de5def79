"""Messages and tools to text, by a tokenizer's chat template.

Templates disagree on what a message looks like. ``render`` hands each one the form that it reads:

- Content is a string, or a list of parts (``{"type": "text", "text": ...}``). Text is given as parts only to a template
  that shows nothing of a string.
- The role ``developer`` becomes ``system`` where the template knows the second one only.
- The arguments of tool calls are mappings; JSON text where the template puts them into a string as they are.
- A call without content has none, as the messages say, or an empty one where the template takes no other.
- No tools is None, never an empty list, for which some templates write their preamble.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from toolkit.errors import ToolkitError, first_line

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Zq7xProbe"
Span = tuple[int, int]


class ChatTemplateError(ToolkitError):
    """A chat template is missing, or raises for these messages.

    Attributes:
        reason: what is wrong, as a part of a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"The chat template must take the messages, but it does not: {reason}.")
        self.reason = reason


class TemplateVariableError(ChatTemplateError):
    """A variable is given under the name of something that every template gets, such as ``messages``."""


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | str | None = None,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation. Tokenise it with ``encode(tokenizer, text)``: it has its special tokens already.

    Args:
        tokenizer: of transformers, fast or slow.
        messages: each with ``role``, and ``content`` (string, parts or None) or ``tool_calls``; the template gets
            other keys too.
        tools: JSON schemas, or JSON text of a list of them.
        add_generation_prompt: end with what opens the assistant's turn.
        continue_final_message: leave the last message open, for the model to continue.
        chat_template: Jinja text or the name of one of the tokenizer's templates; None is the tokenizer's own.
        chat_template_kwargs: variables of the template, e.g. ``{"enable_thinking": False}``.

    Raises:
        ChatTemplateError: there is no template, it raises, or ``tools`` are not what they must be.
    """
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    return _rendered(tokenizer, messages, tools, chat_template, chat_template_kwargs, options)


def render_spans(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | str | None = None,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span] | None]:
    """``render``, and the ranges of characters that ``{% generation %}`` marks; None for a template without markers."""
    if not marks_generation(tokenizer, tools, chat_template):
        text = render(
            tokenizer, messages, tools, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs
        )
        return text, None
    spans: list[Span] = []
    text = _rendered(tokenizer, messages, tools, chat_template, chat_template_kwargs, {}, spans)
    return text, spans


def marks_generation(tokenizer: Any, tools: Any = None, chat_template: str | None = None) -> bool:
    """Whether the template has ``{% generation %}`` markers."""
    return _GENERATION.search(template_of(tokenizer, chat_template, parsed_tools(tools))) is not None


def template_of(tokenizer: Any, chat_template: str | None = None, tools: Any = None) -> str:
    """The Jinja text that renders. Raises ChatTemplateError where there is none."""
    try:
        return str(tokenizer.get_chat_template(chat_template, tools))
    except Exception as error:
        if getattr(tokenizer, "chat_template", None):
            raise ChatTemplateError(first_line(error)) from None
        raise ChatTemplateError("the tokenizer has none") from None


def parsed_tools(tools: Any) -> list[Any] | None:
    """Tools as templates take them: a list of mappings, or None for no tools. Raises ChatTemplateError for others."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ChatTemplateError("'tools' is a string that is not JSON") from None
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise ChatTemplateError("'tools' is not a list of mappings")
    return list(tools)


def _rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    options: dict[str, Any],
    spans: list[Span] | None = None,
) -> str:
    tools = parsed_tools(tools)
    template = template_of(tokenizer, chat_template, tools)
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise ChatTemplateError("'messages' is not a list of mappings")
    given = [dict(message) for message in messages]
    if not given:
        raise ChatTemplateError("there are no messages")
    for message in given:
        _shape(_form_of(tokenizer, template), message)
    called = _parse_arguments(given)
    variables = {**_variables(tokenizer, chat_template_kwargs), **options}

    def attempt(keep_none: bool = False) -> str:
        return _with_arguments(called, lambda: _apply(tokenizer, template, given, tools, variables, spans, keep_none))

    try:
        return _without_python(attempt(), given)
    except ChatTemplateError as error:
        problem = error
    # transformers leaves fields of None out; some templates ask for a content of none beside calls, others for text.
    bare = [one for one in given if one.get("tool_calls") and one.get("content", "") is None]
    if not bare:
        raise problem
    try:
        kept = attempt(keep_none=True)
    except ChatTemplateError:
        kept = None
    for message in bare:
        message["content"] = ""
    try:
        empty = attempt()
    except ChatTemplateError:
        empty = None
    if kept is not None and (empty is None or kept.count("None") <= empty.count("None")):
        return kept
    if empty is None:
        raise problem
    return empty


def _with_arguments(called: Sequence[dict[str, Any]], apply: Callable[[], str]) -> str:
    """What ``apply`` renders, with the arguments of calls as JSON text where a template takes them so only."""
    mappings = [function["arguments"] for function in called]
    try:
        return apply()
    except TypeError as error:
        problem: Exception = error
    except RecursionError:
        raise ChatTemplateError("they are nested too deep") from None
    except Exception as error:  # Jinja, and templates themselves, raise anything
        raise ChatTemplateError(first_line(error)) from None
    try:
        for function in called:  # a template that joins strings
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        if called:
            return apply()
    except Exception:
        pass  # the first one says what is wrong
    finally:
        for function, arguments in zip(called, mappings):
            function["arguments"] = arguments
    raise ChatTemplateError(first_line(problem)) from None


def _apply(
    tokenizer: Any,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    variables: Mapping[str, Any],
    spans: list[Span] | None = None,
    keep_none: bool = False,
) -> str:
    if spans is None and not keep_none:
        return str(
            tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **variables)
        )
    from transformers.utils.chat_template_utils import render_jinja_template

    # ``apply_chat_template`` gives the ranges as a mask of tokens, with a fast tokenizer only.
    shown = [{key: value for key, value in m.items() if value is not None or keep_none} for m in messages]
    result: Any = render_jinja_template(
        conversations=[shown],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=spans is not None,
        **{**tokenizer.special_tokens_map, **variables},
    )
    (text,), (found,) = result[0], result[1] if spans is not None else ([],)
    if spans is not None:
        spans[:] = [(begin, end) for begin, end in found if end > begin]
    return str(text)


def _without_python(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text. Raises ChatTemplateError where it has the parts of a message as Python writes a list."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)) and content and str(content) in text:
            kinds = {str(part.get("type") if isinstance(part, Mapping) else part)[:40] for part in content}
            raise ChatTemplateError(f"it takes text only, and a message has parts of type {', '.join(sorted(kinds))}")
    return text


def _variables(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a template; none may be an argument of the method that renders it."""
    variables = dict(chat_template_kwargs or {})
    if not variables:
        return variables
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "self", "messages"} - {"documents", "kwargs"}
    for name in variables:
        if name in taken:
            raise TemplateVariableError(f"'{name}' is not a variable of a template")
    return variables


class _Form(NamedTuple):
    """What a template reads."""

    parts_only: bool
    """Content as a list of parts; it shows nothing of a string."""
    system_only: bool
    """The role ``system``; it shows nothing of ``developer``."""


_FORMS: "WeakKeyDictionary[Any, dict[str, _Form]]" = WeakKeyDictionary()


def _form_of(tokenizer: Any, template: str) -> _Form:
    """What the template reads, found by rendering a marked message in each form."""
    forms = _FORMS.setdefault(tokenizer, {})
    if template not in forms:

        def shows(role: str, as_parts: bool) -> bool:
            texts = (_PROBE, "u") if role != "user" else (_PROBE,)
            contents = [[{"type": "text", "text": text}] if as_parts else text for text in texts]
            messages = [{"role": name, "content": content} for name, content in zip((role, "user"), contents)]
            try:
                return _PROBE in _apply(tokenizer, template, messages, None, {})
            except Exception:  # it does not take them
                return False

        parts_only = not shows("user", False) and shows("user", True)
        forms[template] = _Form(parts_only, shows("system", parts_only) and not shows("developer", parts_only))
    return forms[template]


def _shape(form: _Form, message: dict[str, Any]) -> None:
    """Role and text as the template reads them; content with anything but text stays as it is."""
    content = message.get("content")
    if form.system_only and message.get("role") == "developer":
        message["role"] = "system"
    if form.parts_only and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    elif not form.parts_only and isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            message["content"] = "".join(map(str, texts))


def _parse_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments of tool calls from JSON text to mappings; the functions called, as copies that may be written to."""
    called = []
    for message in messages:
        if not isinstance(message.get("tool_calls"), (list, tuple)):
            continue
        calls = [dict(call) if isinstance(call, Mapping) else call for call in message["tool_calls"]]
        message["tool_calls"] = calls
        for call in calls:
            if not isinstance(call, dict):
                continue
            function = call
            if isinstance(call.get("function"), Mapping):
                function = call["function"] = dict(call["function"])
            if "arguments" not in function:
                continue
            called.append(function)
            if isinstance(function["arguments"], str):
                try:
                    parsed = json.loads(function["arguments"] or "{}")
                except ValueError:
                    continue
                if isinstance(parsed, dict):
                    function["arguments"] = parsed
    return called
