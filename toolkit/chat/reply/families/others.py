"""Families of one syntax each: Kimi K2, MiniMax M2, Phi 4 mini, Granite, Seed-OSS."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.json_calls import JsonCalls, NamedJsonCalls
from toolkit.chat.reply.parser import ReasoningFormat
from toolkit.chat.reply.tagged_calls import TaggedCalls

_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI = NamedJsonCalls(
    begins=(_KIMI_SECTION[0], "<|tool_call_begin|>"),
    ends=("<|tool_call_end|>",),
    section=_KIMI_SECTION,
    name_ends=("<|tool_call_argument_begin|>",),
    prefix="functions.",
    suffix=":[0-9]{1,3}",
    id_of="functions.{name}:{index}",
)
_MINIMAX = TaggedCalls(
    begins=("<minimax:tool_call>",),
    ends=("</minimax:tool_call>",),
    name_begin='<invoke name="',
    name_ends=('">',),
    key_begin='<parameter name="',
    key_ends=('">',),
    value_end="</parameter>",
    close="</invoke>",
    many=True,
)
_SEED = TaggedCalls(
    begins=("<seed:tool_call>",),
    ends=("</seed:tool_call>",),
    name_begin="<function=",
    name_ends=(">",),
    key_begin="<parameter=",
    key_ends=(">",),
    value_end="</parameter>",
    close="</function>",
)
_PHI = JsonCalls(begins=("<|tool_call|>",), ends=("<|/tool_call|>",), lists=True)
_GRANITE = JsonCalls(begins=("<|tool_call|>",), lists=True)

CALLS = {
    "kimi_k2": (Variant(_KIMI, (_KIMI_SECTION[0],)),),
    "minimax_m2": (Variant(_MINIMAX, ("<minimax:tool_call>",)),),
    "seed_oss": (Variant(_SEED, ("<seed:tool_call>",)),),
    "phi4_mini_json": (Variant(_PHI, ("<|tool_call|>", "<|/tool_call|>")),),
    "granite": (Variant(_GRANITE, ("<|tool_call|>",)),),
}
REASONING = {"seed_oss": ReasoningFormat("<seed:think>", "</seed:think>")}
