"""The formats of TRL's datasets as the fields of a line, and one form for each kind of training.

A prompt and its completions are texts, or lists of messages. ``tools`` and ``chat_template_kwargs`` may stand beside
messages. ``conversations`` with ``from`` and ``value`` (ShareGPT) read as ``messages`` with ``role`` and ``content``:
``human`` and ``gpt`` are ``user`` and ``assistant``, ``function_call`` the assistant's ``tool_calls``, ``observation``
is ``tool``. ``instruction``, ``input`` (may be missing) and ``output`` (Alpaca) read as ``prompt`` and ``completion``,
both messages. ``system`` beside either comes first. A text ``prompt`` beside replies that are messages is the user's
message, unless the replies begin with it; a reply may lack the list around it; ``messages`` beside ``chosen`` and
``rejected`` are their prompt.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.chat.tokens import common_prefix
from toolkit.errors import ToolkitError
from toolkit.training.jsonl import kind_of

Format = tuple[str, ...]
SFT_FORMATS: tuple[Format, ...] = (("messages",), ("prompt", "completion"), ("text",))
PREFERENCE_FORMATS: tuple[Format, ...] = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
_ONLY: dict[str, type] = {"messages": list, "text": str}
"""Fields that are not texts or messages, whichever they like."""
_NAMES = {"from": "role", "value": "content"}
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_SIDES = ("completion", "chosen", "rejected")


HINT = "privileged_context"


class Stepwise(NamedTuple):
    """A prompt, the steps of its completion, and whether each step is right (TRL's stepwise supervision)."""

    prompt: str
    completions: list[str]
    labels: list[bool]


class Options(NamedTuple):
    """What a line gives to its chat template."""

    tools: Any
    chat_template_kwargs: Mapping[str, Any] | None


def read(line: Mapping[str, Any], formats: Sequence[Format]) -> dict[str, Any]:
    """The fields of the first format that a line has.

    Raises:
        ToolkitError: there is none, or a field is malformed; ``must be ..., got ...``, without a subject.
    """
    line = _role_and_content(line)
    for fields in formats:
        if all(_fits(name, line.get(name)) for name in fields):
            found = {name: line[name] for name in fields}
            if len({type(value) for value in found.values()}) == 1:
                _check_messages(found)
                _check_options(line)
                return found
    wanted = ", or ".join(" and ".join(f"'{name}'" for name in fields) for fields in formats)
    known = dict.fromkeys(name for fields in formats for name in fields)
    given = [f"'{name}' as {kind_of(line[name])}" for name in known if name in line]
    if not given:
        given = [f"'{name}'" for name in list(line)[:8]]
    raise ToolkitError(f"must be a JSON object with {wanted}, got {' and '.join(given) or 'no fields'}.")


def check(line: Mapping[str, Any], formats: Sequence[Format]) -> None:
    """Raise as ``read`` does."""
    read(line, formats)


def prompt_of(line: Mapping[str, Any]) -> Any:
    """The prompt of a line: ``prompt``, or ``messages`` without a last one of the assistant. Raises as ``read``."""
    fields = read(line, (("prompt",), ("messages",)))
    if "prompt" in fields:
        return fields["prompt"]
    messages = fields["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def prompt_and_completion(line: Mapping[str, Any]) -> tuple[Any, Any]:
    """``prompt`` and ``completion`` of a line, or ``messages`` up to the last one, and that. Raises as ``read``."""
    fields = read(line, (("prompt", "completion"), ("messages",)))
    if "prompt" in fields:
        return fields["prompt"], fields["completion"]
    *before, last = fields["messages"]
    if last["role"] != "assistant" or not before:
        raise ToolkitError(
            f"must have a last message of role 'assistant' in 'messages', behind others, got {last['role']!r} as the "
            f"last of {len(before) + 1}."
        )
    return before, [last]


def hint_of(line: Mapping[str, Any]) -> str:
    """``privileged_context`` of a line as text: what a teacher alone sees. Raises ToolkitError where it has none."""
    value = line.get(HINT)
    if value is None:
        raise ToolkitError(f"must have '{HINT}' as a string or messages, got none.")
    return text_of_messages(value) if isinstance(value, list) else str(value)


def text_of_messages(messages: Sequence[Any]) -> str:
    """The texts of messages, a line each; of parts that are texts, one behind the other."""
    texts = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else message
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
        texts.append(str(content or ""))
    return "\n".join(filter(None, texts))


def stepwise(line: Mapping[str, Any]) -> Stepwise:
    """``prompt``, ``completions`` and ``labels`` (true or false, 1 or 0) of a line. Raises ToolkitError as ``read``."""
    prompt, steps, labels = (line.get(name) for name in Stepwise._fields)
    if not isinstance(prompt, str) or not isinstance(steps, list) or not isinstance(labels, list):
        given = [f"'{name}' as {kind_of(line[name])}" for name in Stepwise._fields if name in line]
        raise ToolkitError(
            "must be a JSON object with 'prompt' as a string, 'completions' as a list and 'labels' as a list, got "
            f"{' and '.join(given) or 'none of them'}."
        )
    if not steps or len(steps) != len(labels):
        raise ToolkitError(
            f"must have a label for each of its 'completions', at least one, got {len(steps)} completions and "
            f"{len(labels)} labels."
        )
    for at, (step, label) in enumerate(zip(steps, labels)):
        if not isinstance(step, str):
            raise ToolkitError(f"must have a string in completions[{at}], got {step!r:.100}.")
        if not isinstance(label, int) or label not in (0, 1):
            raise ToolkitError(f"must have true or false in labels[{at}], got {label!r:.100}.")
    return Stepwise(prompt, steps, [bool(label) for label in labels])


def conversations(fields: Mapping[str, Any]) -> list[list[Any]]:
    """The lists of messages of what ``read`` returned, each with its prompt in front."""
    if not all(isinstance(value, list) for value in fields.values()):
        return []
    prompt = fields.get("prompt", [])
    return [prompt + messages for name, messages in fields.items() if name != "prompt"]


def options(line: Mapping[str, Any]) -> Options:
    """``tools`` and ``chat_template_kwargs`` of a line."""
    return Options(line.get("tools"), line.get("chat_template_kwargs"))


def text_of(fields: Mapping[str, Any]) -> str:
    """All text of what ``read`` returned."""
    return "".join(
        value if isinstance(value, str) else "\n".join(str(message.get("content") or "") for message in value) + "\n"
        for value in fields.values()
    )


def preference(fields: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected); without a prompt it is what both completions begin with."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields:
        return fields["prompt"], chosen, rejected
    shared = common_prefix(chosen, rejected)
    if isinstance(chosen, str):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        while shared > 0 and chosen[shared - 1] == " ":
            shared -= 1  # a space belongs to the word behind it
    shared = max(shared, 0)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _fits(name: str, value: Any) -> bool:
    return isinstance(value, _ONLY.get(name, (str, list)))


def _role_and_content(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The line with one spelling of what has several: messages with ``role`` in lists, under TRL's names."""
    line = {**line}
    if all(isinstance(line.get(name), str) for name in ("instruction", "output")) and "prompt" not in line:
        line["prompt"] = "\n\n".join(filter(None, (line["instruction"], line.get("input"))))
        line["completion"] = [{"role": "assistant", "content": line["output"]}]
    if isinstance(line.get("conversations"), list) and "messages" not in line:
        line["messages"] = _with_system(line["conversations"], line.get("system"))
    for field in _SIDES:  # a reply without a list around it
        if isinstance(line.get(field), dict):
            line[field] = [line[field]]
    if "chosen" in line and "prompt" not in line and isinstance(line.get("messages"), list):
        line["prompt"] = line["messages"]
    for field, value in line.items():
        if isinstance(value, list):
            line[field] = [_renamed(message) if isinstance(message, dict) else message for message in value]
    sides = [line[field] for field in _SIDES if isinstance(line.get(field), list)]
    if isinstance(line.get("prompt"), str) and sides:
        if all(side and isinstance(side[0], dict) and side[0].get("role") != "assistant" for side in sides):
            line.pop("prompt")  # the conversations begin with it
        else:
            line["prompt"] = _with_system([{"role": "user", "content": line["prompt"]}], line.get("system"))
    return line


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """The messages behind that of a column ``system``, unless they begin with one."""
    if not isinstance(system, str) or not system:
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if "system" in (first.get("role"), first.get("from")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _renamed(message: Mapping[str, Any]) -> dict[str, Any]:
    if "from" not in message:
        return dict(message)
    renamed = {_NAMES.get(key, key): value for key, value in message.items()}
    role = renamed.get("role")
    if role == "function_call":
        return renamed | {"role": "assistant"} | _calls(renamed.get("content"))
    return renamed | {"role": _ROLES.get(role, role) if isinstance(role, str) else role}


def _calls(content: Any) -> dict[str, Any]:
    """The tool calls that a text of JSON is; none where it is another text."""
    try:
        found = json.loads(content)
    except (TypeError, ValueError):
        return {}
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
        return {}
    functions = [{"name": one["name"], "arguments": one.get("arguments", {})} for one in calls]
    return {"content": "", "tool_calls": [{"type": "function", "function": one} for one in functions]}


def _check_messages(fields: Mapping[str, Any]) -> None:
    for name, messages in fields.items():
        if isinstance(messages, str):
            continue
        if not messages and name != "prompt":
            raise ToolkitError(f"must have messages in '{name}', got none.")
        for at, message in enumerate(messages):
            where = f"{name}[{at}]"
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ToolkitError(f"must have an object with 'role' in {where}, got {message!r:.100}.")
            if not isinstance(message.get("tool_calls"), (list, type(None))):
                raise ToolkitError(
                    f"must have 'tool_calls' as a list in {where}, got {kind_of(message['tool_calls'])}."
                )
            content = message.get("content")
            if not (isinstance(content, (str, list)) or (content is None and message.get("tool_calls"))):
                raise ToolkitError(
                    f"must have 'content' as a string or parts in {where}, unless it has 'tool_calls', got "
                    f"{kind_of(content)}."
                )


def _check_options(line: Mapping[str, Any]) -> None:
    if not isinstance(line.get("tools"), (list, str, type(None))):
        raise ToolkitError(f"must have 'tools' as a list, or its JSON text, got {kind_of(line['tools'])}.")
    if not isinstance(line.get("chat_template_kwargs"), (dict, type(None))):
        raise ToolkitError(
            f"must have 'chat_template_kwargs' as an object, got {kind_of(line['chat_template_kwargs'])}."
        )
