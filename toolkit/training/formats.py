"""The formats of TRL's datasets as the fields of a line, and one form for each kind of training.

A prompt and its completions are texts, or lists of messages. ``tools`` and ``chat_template_kwargs`` may stand beside
messages. ``conversations`` with ``from`` and ``value`` (ShareGPT) read as ``messages`` with ``role`` and ``content``,
``human`` and ``gpt`` as ``user`` and ``assistant``. ``instruction``, ``input`` (may be missing) and ``output``
(Alpaca), and ``system`` beside them, read as ``prompt`` and ``completion``, both messages.
"""

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
_ROLES = {"human": "user", "gpt": "assistant"}


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
    """The line with ``messages`` for ``conversations``, Alpaca's fields as messages, and those with ``role``."""
    if all(isinstance(line.get(name), str) for name in ("instruction", "output")) and "prompt" not in line:
        asked = "\n\n".join(filter(None, (line["instruction"], line.get("input"))))
        system = [{"role": "system", "content": line["system"]}] if line.get("system") else []
        completion = [{"role": "assistant", "content": line["output"]}]
        line = {**line, "prompt": [*system, {"role": "user", "content": asked}], "completion": completion}
    if isinstance(line.get("conversations"), list) and "messages" not in line:
        line = {"messages": line["conversations"], **line}
    return {
        field: [_renamed(message) if isinstance(message, dict) and "from" in message else message for message in value]
        if isinstance(value, list)
        else value
        for field, value in line.items()
    }


def _renamed(message: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {_NAMES.get(key, key): value for key, value in message.items()}
    role = renamed.get("role")
    return renamed | {"role": _ROLES.get(role, role) if isinstance(role, str) else role}


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
