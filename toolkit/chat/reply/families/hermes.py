"""Hermes, Qwen 2.5 and Qwen 3: a JSON object between tags for each call."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.json_calls import JsonCalls
from toolkit.chat.reply.parser import ReasoningFormat

_HERMES = JsonCalls(begins=("<tool_call>",), ends=("</tool_call>",), padding="\n", between="\n")

CALLS = {"hermes": (Variant(_HERMES, ("<tool_call>",)),)}
REASONING: dict[str, ReasoningFormat] = {}
