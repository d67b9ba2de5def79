"""Llama: a reply that is JSON or a list of Python calls, with or without a marker before it."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.json_calls import JsonCalls
from toolkit.chat.reply.literal_calls import PythonCalls
from toolkit.chat.reply.parser import ReasoningFormat

_KEYS = ("parameters", "arguments")
_PYTHONIC = PythonCalls()
_JSON3 = JsonCalls(begins=("<|python_tag|>",), bare="{", arguments_keys=_KEYS, separator=";")
_BEGIN4, _END4 = ("<|python_start|>",), ("<|python_end|>",)
_JSON4 = JsonCalls(begins=_BEGIN4, ends=_END4, bare="{", arguments_keys=_KEYS, separator=";")
_PYTHONIC4 = PythonCalls(begins=_BEGIN4, ends=_END4)

CALLS = {
    "llama4_json": (Variant(_JSON4, ("<|python_start|>", '"parameters": ')),),
    "llama4_pythonic": (Variant(_PYTHONIC4, ("<|python_start|>",)),),
    "llama3_json": (
        Variant(_JSON3, ("<|python_tag|>",)),
        Variant(_JSON3, ("<|start_header_id|>", '"parameters": ')),
    ),
    "pythonic": (Variant(_PYTHONIC, ("<|start_header_id|>", "[func_name1(")),),
}
REASONING: dict[str, ReasoningFormat] = {}
