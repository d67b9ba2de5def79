"""``logprobs`` of completions as OpenAI defines them, on a model that writes a chosen text."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from fastapi.testclient import TestClient

from toolkit.engine import AsyncEngine, Engine
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.openai.responses import ITEMS, json_parts
from toolkit.state import PrefixKey, StateSpec
from toolkit.testing.models import tiny_tokenizer

EMOJI = ("😀", "👩‍👧", "é")


def writes(tokenizer, text):
    """A backend whose most probable next token spells ``text``, after any prompt, then ends it."""
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def forward(context, rows):
        logits = torch.zeros(len(rows), len(tokenizer))
        for row, at in enumerate(context.batch.positions[rows].tolist()):
            logits[row, ids[at % len(ids)]] = 9.0
        return logits

    return SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        eos=frozenset([tokenizer.eos_token_id]),
        max_model_len=256,
        layers=lambda: [StateSpec(0, "full", ((1, 1), (1, 1)))],
        version=lambda: 0,
        prefix_key=lambda: PrefixKey(0),
        decode_size=lambda sequences: sequences,
        forward=forward,
    )


def ask(tokenizer, text, **fields):
    with Engine(writes(tokenizer, text), tokenizer) as engine:
        app = create_app(ServerConfig("written", AsyncEngine(engine), tokenizer=tokenizer))
        with TestClient(app) as client:
            body = {"prompt": [1], "max_tokens": 60, "temperature": 0, "logprobs": 1, **fields}
            return client.post("/v1/completions", json=body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["ab 😀 cd", "".join(EMOJI) * 2])
def test_text_offsets_are_positions_in_the_text(text, stream):
    tokenizer = tiny_tokenizer()
    response = ask(tokenizer, text, stream=stream)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
    else:
        choices = response.json()["choices"]
    written = "".join(choice["text"] for choice in choices)
    names = [name for choice in choices for name in choice["logprobs"]["tokens"]]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert written == text
    assert len(offsets) == len(names) == len(ids) + 1  # the token that ends the text
    # The whole characters that the tokens before it decode to.
    assert offsets == [len(tokenizer.decode(ids[:at]).rstrip("�")) for at in range(len(ids) + 1)]
    for name, offset in zip(names, offsets):
        assert name.startswith(("bytes:", "<")) or text.startswith(name, offset)


def test_offsets_stay_within_a_text_that_a_stop_string_cut():
    choice = ask(tiny_tokenizer(), "ab END cd", stop="END").json()["choices"][0]
    assert choice["text"] == "ab "
    assert max(choice["logprobs"]["text_offset"]) <= len(choice["text"])


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_the_sampled_token_is_among_its_top_logprobs(asked):
    logprobs = ask(tiny_tokenizer(), "a page", logprobs=asked, temperature=3.0, seed=1).json()["choices"][0]["logprobs"]
    assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"]) > 20
    sampled_most_probable = 0
    for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert top[token] == logprob
        assert max(asked, 1) <= len(top) <= asked + 1
        sampled_most_probable += len(top) == max(asked, 1)
    assert asked == 0 or sampled_most_probable < len(logprobs["tokens"])  # some are not the most probable


def test_long_responses_are_written_in_parts_and_say_the_same():
    fields = {"n": 8, "temperature": 2.0, "seed": 3, "max_tokens": 40, "ignore_eos": True}
    tokenizer = tiny_tokenizer()
    long, short = (ask(tokenizer, "a page", **fields, logprobs=logprobs) for logprobs in (5, None))
    assert "content-length" not in long.headers  # it comes in parts
    assert [{**choice, "logprobs": None} for choice in long.json()["choices"]] == short.json()["choices"]
    assert long.json()["usage"] == short.json()["usage"]
    assert all(len(choice["logprobs"]["top_logprobs"]) == 40 for choice in long.json()["choices"])


def test_parts_of_json_are_json():
    rng = random.Random(0)

    def value(depth):
        kind = rng.randrange(6 if depth < 4 else 4)
        if kind < 4:
            return [rng.choice(['é\u2028"[]', "", "a" * 99]), rng.random(), None, True][kind]
        if kind == 4:
            return [rng.randrange(9)] * rng.randrange(3 * ITEMS) + [value(depth + 1) for _ in range(rng.randrange(5))]
        return {str(at): value(depth + 1) for at in range(rng.randrange(5))}

    for _ in range(300):
        given = {"choices": value(0), "x": value(0)}
        assert json.loads("".join(json_parts(given))) == given
