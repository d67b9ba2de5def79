"""vLLM's sampling extras over HTTP: what the engine returns for the same parameters in process."""

import json

import pytest
from fastapi.testclient import TestClient

from tests.helpers.engine_tokenizers import byte_level
from toolkit import LLM, AsyncEngine, Engine, SamplingParams
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import random_model

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
VOCABULARY, LONGEST = 300, 64
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    model = random_model("llama", layers=1, vocabulary=VOCABULARY)
    with Engine(model, tokenizer, max_model_len=LONGEST, num_blocks=60) as made:
        yield made


@pytest.fixture(scope="module")
def client(engine):
    serving = AsyncEngine(engine)
    app = create_app(
        ServerConfig("m", serving, tokenizer=engine.tokenizer, max_model_len=LONGEST, vocab_size=VOCABULARY)
    )
    with TestClient(app) as opened:
        yield opened


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"7": 4, "9": -2.5}},
        {"logit_bias": {"7": 1000}},
        {"allowed_token_ids": [5, 6, 7]},
        {"bad_words": ["t", "the"]},
        {"priority": -3},
        {"truncate_prompt_tokens": 2},
    ],
)
def test_fields_mean_what_they_mean_in_process(client, fields):
    common = {"max_tokens": 8, "seed": 3, "temperature": 0.9, "ignore_eos": True}
    found = client.post(COMPLETIONS, json={"prompt": "the dog", "logprobs": 0, **common, **fields}).json()
    bias = {int(token): value for token, value in fields.get("logit_bias", {}).items()}
    params = SamplingParams(**{**common, **fields, **({"logit_bias": bias} if bias else {})})
    with Engine(random_model("llama", layers=1, vocabulary=VOCABULARY), byte_level(), num_blocks=60) as plain:
        (expected,) = plain.generate(["the dog"], params)
    (choice,) = found["choices"]
    assert (choice["text"], choice["logprobs"]["token_logprobs"]) == (expected.text, expected.logprobs)
    assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def as_text(values):
    """Without what a token that is no whole character reads: its bytes over HTTP."""
    return [
        one and {token: {**of, "decoded_token": cut(of["decoded_token"])} for token, of in one.items()}
        for one in values
    ]


def cut(text):
    return None if "\ufffd" in text or text.startswith("bytes:") else text


def test_prompt_logprobs_have_vllms_form(client):
    text, params = "the lazy dog", SamplingParams(max_tokens=1, prompt_logprobs=2)
    with LLM(random_model("llama", layers=1, vocabulary=VOCABULARY), byte_level(), num_blocks=60) as llm:
        (expected,) = llm.generate([text], params)
    shown = [
        None
        if values is None
        else {
            str(token): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in values.items()
        }
        for values in expected.prompt_logprobs
    ]
    body = {"max_tokens": 1, "prompt_logprobs": 2}
    found = client.post(COMPLETIONS, json={"prompt": [text, text], "n": 2, **body}).json()
    assert [as_text(one["prompt_logprobs"]) for one in found["choices"]] == [as_text(shown)] * 4
    chat = client.post(CHATS, json={"messages": [{"role": "user", "content": text}], **body}).json()
    assert as_text(chat["prompt_logprobs"]) == as_text(shown)
    assert "prompt_logprobs" not in chat["choices"][0]
    assert list(chat)[-1] == "usage"
    plain = client.post(COMPLETIONS, json={"prompt": text, "max_tokens": 1}).json()
    assert "prompt_logprobs" not in plain["choices"][0]


def test_longer_prompts_are_truncated_and_refused_without(client):
    text = "the quick brown fox " * 300
    messages = [{"role": "user", "content": text}]
    cut = {"truncate_prompt_tokens": -1, "max_tokens": 5}
    for path, body in ((COMPLETIONS, {"prompt": text}), (CHATS, {"messages": messages})):
        assert client.post(path, json={**body, "max_tokens": 5}).status_code == 400
        used = client.post(path, json={**body, **cut}).json()["usage"]
        assert used["prompt_tokens"] == LONGEST - 5
    few = client.post(COMPLETIONS, json={"prompt": text, "truncate_prompt_tokens": 60}).json()["usage"]
    assert (few["prompt_tokens"], few["total_tokens"] <= LONGEST) == (60, True)


WRONG = [
    ({"logit_bias": {"x": 1}}, "logit_bias", "'logit_bias' must have token ids as keys, got 'x'."),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'logit_bias' must have token ids as keys, got '-1'."),
    ({"logit_bias": [5]}, "logit_bias", "'logit_bias' must be an object of token ids and numbers, got [5]."),
    ({"logit_bias": {"5": "a"}}, "logit_bias[5]", "'logit_bias[5]' must be a number, got 'a'."),
    ({"logit_bias": {"300": 1}}, "logit_bias", "logit_bias must have token ids from 0 to 299, got 300."),
    (
        {"logit_bias": {str(at): 1 for at in range(1025)}},
        "logit_bias",
        "'logit_bias' must have <= 1024 token ids, got 1025.",
    ),
    ({"allowed_token_ids": []}, "allowed_token_ids", "a list of at least 1"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids", "must have token ids from 0 to 299, got 300."),
    ({"bad_words": [""]}, "bad_words", "bad_words must be a list of strings that are not empty or None"),
    ({"bad_words": ["a"] * 65}, "bad_words", "a list of at most 64"),
    ({"bad_words": ["a" * 9000]}, "bad_words", "'bad_words' must have <= 8192 characters together, got 9000."),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "'prompt_logprobs' must be >= 0, got -1."),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "'prompt_logprobs' is 1, but 'stream' is true."),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens must be an integer >= 1, -1 or"),
    ({"priority": 2**70}, "priority", "priority must be an integer >= "),
    ({"logits_processors": ["x"]}, "logits_processors", "does not offer 'logits_processors'."),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG)
def test_wrong_values_are_one_sentence_about_their_field(client, fields, param, message):
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHATS, {"messages": [{"role": "user", "content": "a"}]})):
        response = client.post(path, content=json.dumps({**body, **fields}))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert message in error["message"]
