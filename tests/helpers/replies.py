"""Replies in every family's syntax of tool calls, and parsers that are fed them in parts."""

import random
from dataclasses import astuple
from typing import Any

from toolkit.chat.reply import CallArguments, CallBegin, CallEnd, ContentText, OutputParser, ReasoningText, Reply
from toolkit.chat.tools import Tool

TOOLS = (
    Tool(
        "get_weather",
        "The weather of a city.",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
            "required": ["city"],
        },
    ),
    Tool("now"),
)
ARGUMENTS = {"city": 'São "Paulo"', "days": 3, "tags": ["a", {"b": None}]}

_TEXT = '{"city": "São \\"Paulo\\"", "days": 3, "tags": ["a", {"b": null}]}'
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)


def _deepseek_v3() -> str:
    first, call, separator, end, last = _DEEPSEEK
    calls = [f"{call}function{separator}{name}\n```json\n{text}\n```{end}" for name, text in _CALLS]
    return first + "\n".join(calls) + last


def _deepseek_v31() -> str:
    first, call, separator, end, last = _DEEPSEEK
    return first + "".join(f"{call}{name}{separator}{text}{end}" for name, text in _CALLS) + last


def _tags(value: str) -> str:
    return (
        f'<parameter=city>{value}São "Paulo"{value}</parameter>\n<parameter=days>{value}3{value}</parameter>\n'
        f'<parameter=tags>{value}["a", {{"b": null}}]{value}</parameter>\n'
    )


_CALLS = (("get_weather", _TEXT), ("now", "{}"))
_OBJECTS = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in _CALLS]
_PARAMETERS = [one.replace('"arguments"', '"parameters"') for one in _OBJECTS]

CALLS = {
    "hermes": "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in _OBJECTS),
    "qwen3_coder": (
        f"<tool_call>\n<function=get_weather>\n{_tags(chr(10))}</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "glm45": (
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São "Paulo"</arg_value>\n<arg_key>days</arg_key>\n'
        '<arg_value>3</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["a", {"b": null}]</arg_value>\n</tool_call>\n'
        "<tool_call>now\n</tool_call>"
    ),
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>São "Paulo"<|"|>,days:3,tags:[<|"|>a<|"|>,{b:null}]}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>"
    ),
    "functiongemma": (
        '<start_function_call>call:get_weather{city:<escape>São "Paulo"<escape>,days:3,tags:[<escape>a<escape>,{b:null}'
        "]}<end_function_call><start_function_call>call:now{}<end_function_call>"
    ),
    "mistral": f"[TOOL_CALLS][{', '.join(_OBJECTS)}]",
    "mistral, named": "".join(f"[TOOL_CALLS]{name}[ARGS]{text}" for name, text in _CALLS),
    "deepseek_v3": _deepseek_v3(),
    "deepseek_v31": _deepseek_v31(),
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">São "Paulo"</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="tags" string="false">["a", {"b": null}]</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    ),
    "llama3_json": "; ".join(_PARAMETERS),
    "llama3_json, marked": "<|python_tag|>" + "; ".join(_PARAMETERS),
    "llama4_json": "<|python_start|>" + "; ".join(_PARAMETERS) + "<|python_end|>",
    "llama4_pythonic": '[get_weather(city="São \\"Paulo\\"", days=3, tags=["a", {"b": None}]), now()]',
    "pythonic": "[get_weather(city='São \"Paulo\"', days=3, tags=['a', {'b': None}]), now()]",
    "kimi_k2": (
        "<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{text}<|tool_call_end|>"
            for at, (name, text) in enumerate(_CALLS)
        )
        + "<|tool_calls_section_end|>"
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">São "Paulo"</parameter>\n'
        '<parameter name="days">3</parameter>\n<parameter name="tags">["a", {"b": null}]</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>'
    ),
    "seed_oss": (
        f"<seed:tool_call>\n<function=get_weather>\n{_tags('')}</function>\n</seed:tool_call>\n"
        "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>"
    ),
    "phi4_mini_json": f"<|tool_call|>[{', '.join(_OBJECTS)}]<|/tool_call|>",
    "granite": f"<|tool_call|>[{', '.join(_OBJECTS)}]",
}
"""By family: a call of ``get_weather`` with ``ARGUMENTS`` and one of ``now`` with none, as the family writes them."""


def family_of(case: str) -> str:
    """The family's name in a key of ``CALLS``."""
    return case.split(",")[0]


def read_in_parts(parser: OutputParser, text: str, rng: random.Random) -> tuple[Reply, list[Any]]:
    """(the reply, its events) of a text that is fed in parts of random lengths, which are checked to be in order."""
    events: list[Any] = []
    at = 0
    while at < len(text):
        size = rng.choice((1, 1, 1, 2, 3, 7, 20))
        events += parser.feed(text[at : at + size])
        at += size
    events += parser.finish()
    begun = ended = 0
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == begun == ended
            begun += 1
        elif isinstance(event, (CallArguments, CallEnd)):
            assert event.index == begun - 1 == ended
            ended += isinstance(event, CallEnd)
        else:
            assert isinstance(event, (ContentText, ReasoningText))
            assert event.text
    assert begun == ended
    return Reply().add(events), events


def shown(reply: Reply) -> tuple[Any, ...]:
    """A reply without the ids of its calls, which are random."""
    return reply.reasoning, reply.content, [astuple(call)[1:] for call in reply.calls]
