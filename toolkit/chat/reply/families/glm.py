"""GLM 4.5 and later: the function's name behind a tag, and pairs of tags for each argument."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.parser import ReasoningFormat
from toolkit.chat.reply.tagged_calls import TaggedCalls

_GLM = TaggedCalls(
    begins=("<tool_call>",),
    ends=("</tool_call>",),
    name_ends=("\n", "<arg_key>", "</tool_call>"),
    key_begin="<arg_key>",
    key_ends=("</arg_key>",),
    value_begin="<arg_value>",
    value_end="</arg_value>",
)

CALLS = {"glm45": (Variant(_GLM, ("<arg_key>",)),), "glm47": (Variant(_GLM),)}
REASONING = {"glm45": ReasoningFormat("<think>", "</think>")}
