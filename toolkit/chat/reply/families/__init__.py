"""Syntaxes of tool calls and of reasoning by name; a file of data per family of models.

Names are vLLM's. A file has ``CALLS``, variants by name, and ``REASONING``. ``templates`` are texts of which a chat
template of the family has one, at least, for each entry; a name's first variant that fits a model's template is its.
"""

from toolkit.chat.reply.calls import CallFormat
from toolkit.chat.reply.families import deepseek, gemma, glm, gpt_oss, hermes, llama, mistral, others, qwen
from toolkit.chat.reply.families.variant import Variant
from toolkit.chat.reply.parser import ReasoningFormat

_FILES = (gpt_oss, qwen, glm, gemma, mistral, deepseek, llama, others, hermes)
"""In the order in which a model's is looked for: Hermes' marker is in templates of others too."""

CALLS: dict[str, tuple[Variant, ...]] = {name: found for file in _FILES for name, found in file.CALLS.items()}
REASONING: dict[str, ReasoningFormat] = {name: found for file in _FILES for name, found in file.REASONING.items()}


def calls_of(template: str) -> tuple[str, CallFormat] | None:
    """(name, format) that a chat template writes tool calls in; None for none that is known."""
    for name, variants in CALLS.items():
        for variant in variants:
            if variant.templates and all(text in template for text in variant.templates):
                return name, variant.format
    return None


def calls_named(name: str, template: str) -> CallFormat:
    """The format of that name, in the variant that fits a chat template, or the last."""
    variants = CALLS[name]
    fitting = (one.format for one in variants if one.templates and all(text in template for text in one.templates))
    return next(fitting, variants[-1].format)


def reasoning_of(template: str) -> ReasoningFormat | None:
    """How a chat template marks reasoning; None where it does not."""
    return next((one for one in REASONING.values() if one.begin.strip() in template or one.end in template), None)
