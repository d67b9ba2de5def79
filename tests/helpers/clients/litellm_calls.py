"""Calls of litellm, by each of its providers that a server answers: URL, URL of a pooling server. Prints JSON."""

import asyncio
import json
import sys

import litellm

url, pooling = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
TURN = {
    "type": "function",
    "function": {
        "name": "turn",
        "parameters": {
            "type": "object",
            "properties": {"side": {"enum": ["left", "right"]}},
            "required": ["side"],
            "additionalProperties": False,
        },
    },
}
GREEDY = {"temperature": 0, "max_tokens": 8, "num_retries": 0, "api_key": "-"}
PROVIDERS = {
    "openai": f"{url}/v1", "hosted_vllm": f"{url}/v1", "text-completion-openai": f"{url}/v1", "anthropic": url,
    "ollama_chat": url,
}  # fmt: skip
found: dict[str, object] = {}


def chat(provider: str, **more):
    return litellm.completion(
        model=f"{provider}/tiny", api_base=PROVIDERS[provider], messages=MESSAGES, **{**GREEDY, **more}
    )


def called(message) -> list[object]:
    return [[one.function.name, one.function.arguments] for one in message.tool_calls or ()]


for provider in ("openai", "hosted_vllm", "anthropic", "ollama_chat"):
    reply = chat(provider)
    chunks = list(chat(provider, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    found[provider] = {
        "text": reply.choices[0].message.content,
        "streamed": "".join(one.choices[0].delta.content or "" for one in chunks),
        "built": whole.choices[0].message.content,
        "finish_reason": reply.choices[0].finish_reason,
        "usage": [reply.usage.prompt_tokens, reply.usage.completion_tokens],
    }
for provider in ("openai", "hosted_vllm", "anthropic"):
    asked = {"tools": [TURN], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    reply = chat(provider, **asked)
    whole = litellm.stream_chunk_builder(list(chat(provider, stream=True, **asked)), messages=MESSAGES)
    message = reply.choices[0].message
    calls = called(message)
    for call in message.tool_calls or ():  # templates want an object, and a call that was cut is none
        call.function.arguments = call.function.arguments if reply.choices[0].finish_reason == "tool_calls" else "{}"
    results = [{"role": "tool", "tool_call_id": one.id, "content": "turned"} for one in message.tool_calls or ()]
    answered = litellm.completion(
        model=f"{provider}/tiny", api_base=PROVIDERS[provider], tools=[TURN],
        messages=[*MESSAGES, message.model_dump(exclude_none=True), *results], **GREEDY,
    )  # fmt: skip
    found[f"{provider} tools"] = {
        "calls": calls,
        "streamed": called(whole.choices[0].message),
        "finish_reason": reply.choices[0].finish_reason,
        "answered": answered.usage.completion_tokens,
    }
schema = {"type": "json_schema", "json_schema": {"name": "side", "schema": TURN["function"]["parameters"]}}
found["schema"] = json.loads(chat("openai", response_format=schema, max_tokens=200).choices[0].message.content)
text = {"model": "text-completion-openai/tiny", "api_base": f"{url}/v1", "prompt": "the lazy dog", **GREEDY}
found["completion"] = {
    "text": litellm.text_completion(**text).choices[0].text,
    "streamed": "".join(one.choices[0].text or "" for one in litellm.text_completion(**text, stream=True)),
}
embedding = {"api_base": f"{pooling}/v1", "api_key": "-", "input": ["Small random", "a tokenizer"]}
found["embedding"] = {
    provider: [one["embedding"] for one in litellm.embedding(model=f"{provider}/pooled", **embedding).data]
    for provider in ("openai", "hosted_vllm")
}
responded = litellm.responses(
    model="openai/tiny", api_base=f"{url}/v1", api_key="-", input=MESSAGES, temperature=0, max_output_tokens=16
)
found["responses"] = responded.output[0].content[0].text


async def many() -> list[str]:
    asked = {"model": "openai/tiny", "api_base": f"{url}/v1", "messages": MESSAGES, **GREEDY}
    replies = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(8)))
    return [one.choices[0].message.content for one in replies]


found["at once"] = asyncio.run(many())
print(json.dumps(found))
