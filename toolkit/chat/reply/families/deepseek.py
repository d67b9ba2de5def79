"""DeepSeek: V3 and R1 fence the arguments, V3.1 does not, V3.2 writes tags."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.json_calls import NamedJsonCalls
from toolkit.chat.reply.parser import ReasoningFormat
from toolkit.chat.reply.tagged_calls import TaggedCalls

_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_CALL, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_V3 = NamedJsonCalls(
    begins=(_SECTION[0], _CALL),
    ends=(_END,),
    section=_SECTION,
    before_name=f"function{_SEPARATOR}",
    name_ends=("\n",),
    fence=("```json\n", "\n```"),
    between="\n",
)
_V31 = NamedJsonCalls(begins=(_SECTION[0], _CALL), ends=(_END,), section=_SECTION, name_ends=(_SEPARATOR,))
_V32 = TaggedCalls(
    begins=("<｜DSML｜function_calls>",),
    ends=("</｜DSML｜function_calls>",),
    name_begin='<｜DSML｜invoke name="',
    name_ends=('">',),
    key_begin='<｜DSML｜parameter name="',
    key_ends=('" string="true">', '" string="false">'),
    json_after=('" string="false">',),
    value_end="</｜DSML｜parameter>",
    close="</｜DSML｜invoke>",
    many=True,
)

CALLS = {
    "deepseek_v32": (Variant(_V32, ("｜DSML｜",)),),
    "deepseek_v3": (Variant(_V3, (_SECTION[0], "```json")),),
    "deepseek_v31": (Variant(_V31, (_SECTION[0],)),),
}
REASONING = {"deepseek_r1": ReasoningFormat("<think>", "</think>")}
