"""Lines as users of other trainers write them read as one of TRL's formats; turns that are not chosen do not count."""

from typing import Any

import pytest

from tests.helpers.tokenizers import CHATML, make_tokenizer
from toolkit.chat import ChatTokenizer
from toolkit.training.formats import PREFERENCE_FORMATS, SFT_FORMATS, preference, read


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
SFT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"conversations": SHARED}, {"messages": [user("q"), assistant("r")]}),
    ({"conversations": SHARED, "system": "s"}, {"messages": [SYSTEM, user("q"), assistant("r")]}),
    ({"conversations": [{"from": "system", "value": "s"}, *SHARED], "system": "other"},
     {"messages": [SYSTEM, user("q"), assistant("r")]}),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "r"}]},
     {"messages": [user("q"), assistant("r")]}),
    ({"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "5"}, {"from": "function_call", "value": "no call"}]},
     {"messages": [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "5"}, assistant("no call")]}),
    ({"instruction": "i", "input": "", "output": "o"}, {"prompt": [user("i")], "completion": [assistant("o")]}),
    ({"instruction": "i", "input": "c", "output": "o", "system": "s"},
     {"prompt": [SYSTEM, user("i\n\nc")], "completion": [assistant("o")]}),
    ({"prompt": "q", "completion": [assistant("r")]}, {"prompt": [user("q")], "completion": [assistant("r")]}),
    ({"prompt": "q", "completion": assistant("r")}, {"prompt": [user("q")], "completion": [assistant("r")]}),
    ({"prompt": "q", "completion": " r"}, {"prompt": "q", "completion": " r"}),
    ({"text": "all of it"}, {"text": "all of it"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fields"), SFT)
def test_supervised_lines(line: dict[str, Any], fields: dict[str, Any]) -> None:
    before = repr(line)
    assert read(line, SFT_FORMATS) == fields
    assert repr(line) == before


PAIR = ([user("q")], [assistant("r")], [assistant("x")])


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [user("q")], "chosen": [assistant("r")], "rejected": [assistant("x")]},
        {"prompt": "q", "chosen": [assistant("r")], "rejected": [assistant("x")]},
        {"prompt": "q", "chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("x")]},
        {"chosen": [user("q"), assistant("r")], "rejected": [user("q"), assistant("x")]},
        {"messages": [user("q")], "chosen": assistant("r"), "rejected": assistant("x")},
        {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "x"}},
    ],
)
def test_preferences(line: dict[str, Any]) -> None:
    assert preference(read(line, PREFERENCE_FORMATS)) == PAIR


@pytest.mark.parametrize("off", [{"train": False}, {"weight": 0}])
def test_loss_on_chosen_turns(off: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    chat = ChatTokenizer(tokenizer)
    turns = [user("a"), assistant("one", **off), user("b"), assistant("two", train=True, weight=1), user("c")]
    (tokens,) = chat.messages([*turns, assistant("three", **off)])
    counted = str(tokenizer.decode([token for token, counts in zip(tokens.ids, tokens.mask) if counts]))
    assert counted.replace(" ", "").strip() == "two<|im_end|>"
    assert "one" in tokenizer.decode(tokens.ids)
    assert chat.messages([user("a"), assistant("one", **off)]) == []
    (everything,) = ChatTokenizer(tokenizer, assistant_only_loss=False).messages(turns[:2])
    assert all(everything.mask)
