"""Mistral: one marker, and behind it a JSON list, or from version 11 on the function's name and its arguments."""

from dataclasses import replace

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.json_calls import JsonCalls, NamedJsonCalls
from toolkit.chat.reply.parser import ReasoningFormat

_MARK = ("[TOOL_CALLS]",)
_ID_LENGTH = 9
"""Mistral's chat templates take no other ids of calls."""
_OBJECTS = JsonCalls(begins=_MARK, lists=True, id_length=_ID_LENGTH)
_NAMED = NamedJsonCalls(
    begins=_MARK, name_ends=("[ARGS]", "{"), id_end="[CALL_ID]", otherwise=_OBJECTS, id_length=_ID_LENGTH
)
_LIST = replace(_NAMED, writes_otherwise=True)

CALLS = {"mistral": (Variant(_NAMED, ("[TOOL_CALLS]", "[ARGS]")), Variant(_LIST, _MARK))}
REASONING = {"mistral": ReasoningFormat("[THINK]", "[/THINK]")}
