"""gpt-oss: Harmony, in which reasoning, calls and content are separate messages."""

from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.harmony import CHANNEL, HarmonyCalls, HarmonyReasoning
from toolkit.chat.reply.parser import ReasoningFormat

CALLS = {"openai": (Variant(HarmonyCalls(), (CHANNEL, "<|start|>")),)}
REASONING: dict[str, ReasoningFormat] = {"openai_gptoss": HarmonyReasoning()}
