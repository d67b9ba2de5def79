"""Tools of a real server process, whose model writes random tokens: what it must call, it calls."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.helpers.docs_pages import run_examples
from tests.helpers.json_schemas import violation
from tests.helpers.server_process import serving
from tests.helpers.tool_templates import HERMES
from toolkit.cli import main

HELLO = [{"role": "user", "content": "hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"side": {"enum": ["left", "right"]}, "fast": {"type": "boolean"}},
    "required": ["side", "fast"],
    "additionalProperties": False,
}
TURN = {"type": "function", "function": {"name": "turn", "parameters": PARAMETERS}}
STOP = {"type": "function", "function": {"name": "halt"}}
MARKS = ["<tool_call>", "</tool_call>"]


@pytest.fixture(scope="module")
def server(chat_model, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = HERMES
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    model.resize_token_embeddings(len(tokenizer))
    folder = tmp_path_factory.mktemp("calling") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving(folder, "--port", "0", "--max-model-len", "1024", "--reasoning-parser", "none") as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def arguments_of(call) -> dict:
    assert call.function.name == "turn"
    assert violation(PARAMETERS, call.function.arguments) is None
    return json.loads(call.function.arguments)


NAMED = {"type": "function", "function": {"name": "turn"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_is_required_is_made(client, choice):
    tools = [TURN] if choice == "required" else [STOP, TURN]
    found = {}
    for seed in range(3):
        asked = {"model": "tiny", "messages": HELLO, "tools": tools, "tool_choice": choice, "seed": seed}
        asked |= {"max_tokens": 200, "parallel_tool_calls": False}
        reply = client.chat.completions.create(**asked)
        (choice_made,) = reply.choices
        assert choice_made.finish_reason == "tool_calls"
        assert choice_made.message.content is None
        (call,) = choice_made.message.tool_calls
        found[seed] = arguments_of(call)
        text = "".join(
            (one.function.arguments or "")
            for chunk in client.chat.completions.create(**asked, stream=True)
            for one in chunk.choices[0].delta.tool_calls or ()
        )
        assert json.loads(text) == found[seed]


def test_a_reply_goes_back_into_the_chat(client):
    asked = {"model": "tiny", "tools": [TURN], "tool_choice": "required", "max_tokens": 200, "seed": 0}
    message = client.chat.completions.create(messages=HELLO, **asked).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls]
    last = client.chat.completions.create(messages=[*HELLO, message, *results], **asked | {"tool_choice": "none"})
    assert last.choices[0].message.tool_calls is None
    assert last.choices[0].message.content


class Turn(BaseModel):
    """Turn to a side."""

    side: Literal["left", "right"]
    fast: bool


class Side(BaseModel):
    side: Literal["left", "right"]


def test_pydantic_tools_and_responses(client):
    asked = {"model": "tiny", "messages": HELLO, "seed": 1, "max_tokens": 300}
    tool = openai.pydantic_function_tool(Turn)
    found = client.chat.completions.parse(
        **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False, response_format=Side
    )
    (call,) = found.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Turn)
    found = client.chat.completions.parse(**asked, response_format=Side)
    assert isinstance(found.choices[0].message.parsed, Side)
    either = client.chat.completions.parse(**asked, tools=[tool], parallel_tool_calls=False, response_format=Side)
    message = either.choices[0].message
    assert isinstance(message.parsed, Side) or isinstance(message.tool_calls[0].function.parsed_arguments, Turn)


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--tool-call-parser", "tool_call_parser"), ("--tool-parser", "tool_call_parser"),
        ("--reasoning-parser", "reasoning_parser"), ("--reasoning", "reasoning_parser"),
    ],
)  # fmt: skip
def test_unknown_parsers_end_the_start(chat_model, capsys, option, field):
    assert main(["serve", str(chat_model), "--port", "0", option, "x"]) != 0
    assert f"{field} must be one of 'auto', 'none', " in capsys.readouterr().err


def test_the_examples_of_the_page_run_as_written(server, capsys):
    names = run_examples("tools.md", 3, server.url, MODEL="tiny")
    assert names["forced"].choices[0].finish_reason in ("tool_calls", "length")
    assert capsys.readouterr().out
