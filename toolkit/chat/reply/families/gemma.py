"""Gemma 4 and FunctionGemma. Gemma 3 was trained on no syntax; users let it write Python (``pythonic``)."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.literal_calls import GemmaCalls
from toolkit.chat.reply.parser import ReasoningFormat

_GEMMA4 = GemmaCalls(begins=("<|tool_call>",), ends=("<tool_call|>",), quote='<|"|>')
_FUNCTION = GemmaCalls(begins=("<start_function_call>",), ends=("<end_function_call>",), quote="<escape>")

CALLS = {
    "gemma4": (Variant(_GEMMA4, ("<|tool_call>",)),),
    "functiongemma": (Variant(_FUNCTION, ("<start_function_call>",)),),
}
REASONING = {"gemma4": ReasoningFormat("<|channel>thought\n", "<channel|>")}
