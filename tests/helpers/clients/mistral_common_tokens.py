"""Tokens of texts and chats by mistral-common and by toolkit, of the tokenizer in the folder that is the argument."""

import json
import sys
from pathlib import Path

import mistral_common
from transformers.tokenization_mistral_common import MistralCommonBackend

from toolkit.loading import find_tokenizer, load_tokenizer

folder = Path(sys.argv[1])
data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
(folder / "tekken.json").write_bytes(data.read_bytes())
theirs, ours = MistralCommonBackend.from_pretrained(folder), load_tokenizer(find_tokenizer(folder))
TOOL = {"name": "turn", "description": "Turn.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "turn", "arguments": "{}"}}
ASK = {"role": "user", "content": "Turn left, please."}
CHATS = [
    [ASK],
    [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": "No."}, ASK],
    [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "tool", "tool_call_id": "abcdefghi", "name": "turn", "content": "42"}],
]  # fmt: skip
TEXTS = ["hello world é😀", " x", "\n\n a  b", "def f(x):\n\treturn x\n", "東京 123456"]
found = [[list(one(text)["input_ids"]) for one in (theirs, ours)] for text in TEXTS]
for chat in CHATS:
    for tools in (None, TOOLS):
        text = ours.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
        whole = theirs.apply_chat_template(chat, tools=tools, tokenize=True, return_dict=False)
        found.append([list(whole), list(ours(text, add_special_tokens=False)["input_ids"])])
print(json.dumps(found))
