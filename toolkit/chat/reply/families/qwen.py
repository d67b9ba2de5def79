"""Qwen 3 Coder and Qwen 3.5: a tag for the function and one for each argument. Reasoning of all Qwen 3 models."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.parser import ReasoningFormat
from toolkit.chat.reply.tagged_calls import TaggedCalls

_CODER = TaggedCalls(
    begins=("<tool_call>", "<function="),
    ends=("</tool_call>",),
    name_begin="<function=",
    name_ends=(">",),
    key_begin="<parameter=",
    key_ends=(">",),
    value_end="</parameter>",
    close="</function>",
    inside="\n",
)

CALLS = {
    "qwen3_coder": (Variant(_CODER, ("<function=", "<parameter=")),),
    "qwen3_xml": (Variant(_CODER),),
}
REASONING = {"qwen3": ReasoningFormat("<think>", "</think>")}
