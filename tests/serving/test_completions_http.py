"""``/v1/completions`` beyond plain completions: echoes, scores, the best of several, token ids, what wholes say."""

import json

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.engine_tokenizers import byte_level, sentencepiece
from toolkit import AsyncEngine, Engine, SamplingParams
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.openai import schemas
from toolkit.testing.models import random_model

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
VOCABULARY, LONGEST = 300, 96
TEXT = "the lazy dog, naïve 🎉"
SAMPLED = {"max_tokens": 6, "seed": 3, "temperature": 0.9, "ignore_eos": True}


def engine_of(**settings):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = random_model("llama", layers=1, vocabulary=VOCABULARY)
    return Engine(model, tokenizer, max_model_len=LONGEST, num_blocks=120, block_size=4, **settings)


def client_of(engine):
    config = ServerConfig("m", AsyncEngine(engine), tokenizer=engine.tokenizer, max_model_len=LONGEST, vocab_size=300)
    return TestClient(create_app(config))


@pytest.fixture(scope="module")
def client():
    speculative = {"method": "ngram", "num_speculative_tokens": 4}
    with engine_of(speculative_config=speculative) as engine, client_of(engine) as opened:
        yield opened


def ask(client, path=COMPLETIONS, **fields):
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    schema = schemas.CompletionObject if path == COMPLETIONS else schemas.ChatCompletionObject
    schema.model_validate_json(response.text, strict=True)
    return response.json()


def chunks_of(client, path=COMPLETIONS, **fields):
    text = client.post(path, json={**fields, "stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def refused(client, path=COMPLETIONS, **fields):
    response = client.post(path, json=fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def in_process(prompt, **params):
    with engine_of() as engine:
        return engine.generate([prompt], SamplingParams(**{**SAMPLED, **params}))


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("top", [None, 0, 2])
@pytest.mark.parametrize("kind", ["text", "token ids"])
def test_an_echo_has_the_prompt_and_its_log_probabilities_in_front(client, kind, top, max_tokens):
    ids = byte_level()(TEXT)["input_ids"]
    prompt = TEXT if kind == "text" else ids
    whole = ask(client, prompt=prompt, echo=True, logprobs=top, n=2, **{**SAMPLED, "max_tokens": max_tokens})
    expected = in_process(TEXT, max_tokens=max_tokens, logprobs=top, prompt_logprobs=top, n=2)
    assert whole["usage"]["completion_tokens"] == 2 * max_tokens
    for choice, one in zip(whole["choices"], expected, strict=True):
        assert choice["text"] == TEXT + one.text
        assert choice["finish_reason"] == "length"
        assert "prompt_logprobs" not in choice
        if top is None:
            assert choice["logprobs"] is None
            continue
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
        scores = [None] + [values[token] for token, values in zip(ids[1:], one.prompt_logprobs[1:])]
        assert logprobs["token_logprobs"] == scores + one.logprobs
        assert logprobs["top_logprobs"][0] is None
        for token, values, shown in zip(ids[1:], one.prompt_logprobs[1:], logprobs["top_logprobs"][1:]):
            assert set(shown.values()) == set(values.values())
            assert values[token] in shown.values()
        for name, offset in zip(logprobs["tokens"][: len(ids)], logprobs["text_offset"]):
            assert name.startswith("bytes:") or TEXT.startswith(name, offset)
        assert logprobs["text_offset"][len(ids) :] == [len(TEXT) + offset for offset in one.text_offset]


def test_scores_are_those_of_the_model_in_float64(client):
    ids = byte_level()(TEXT)["input_ids"]
    with torch.no_grad():
        logits = random_model("llama", layers=1, vocabulary=VOCABULARY).double()(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = ask(client, prompt=TEXT, echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]).double(), expected, rtol=0, atol=1e-4)
    best = logits.log_softmax(-1)[:-1].max(-1).values
    most = torch.tensor([max(values.values()) for values in found["top_logprobs"][1:]]).double()
    torch.testing.assert_close(most, best, rtol=0, atol=1e-4)


def test_nothing_is_generated_without_an_echo_either(client):
    whole = ask(client, prompt=[TEXT, "quick brown"], max_tokens=0, logprobs=1, prompt_logprobs=1)
    for choice in whole["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "length", [])
        assert choice["prompt_logprobs"][0] is None
        assert len(choice["prompt_logprobs"]) > 1
    chat = ask(client, CHATS, messages=[{"role": "user", "content": TEXT}], max_tokens=0)
    assert chat["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("top", [None, 1])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_stream_says_what_the_whole_response_says(client, max_tokens, top):
    fields = {"prompt": [TEXT, "dog"], "echo": True, "logprobs": top, "n": 2, "return_token_ids": True, **SAMPLED}
    fields["max_tokens"] = max_tokens
    whole = ask(client, **fields)
    found = [{"index": at, "text": "", "token_ids": []} for at in range(4)]
    for chunk in chunks_of(client, **fields):
        assert chunk["system_fingerprint"] == whole["system_fingerprint"]
        (choice,) = chunk["choices"]
        one = found[choice["index"]]
        one["text"] += choice["text"]
        one["token_ids"] += choice["token_ids"]
        assert ("prompt_token_ids" in choice) == ("prompt_token_ids" not in one)
        one.setdefault("prompt_token_ids", choice.get("prompt_token_ids"))
        if top is not None:
            logprobs = one.setdefault("logprobs", {name: [] for name in choice["logprobs"]})
            for name, values in choice["logprobs"].items():
                logprobs[name] += values
        one["finish_reason"], one["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
    assert found == [{**choice} if top is not None else _without(choice, "logprobs") for choice in whole["choices"]]


def _without(choice, name):
    return {key: value for key, value in choice.items() if key != name}


def test_an_echo_and_prompt_logprobs_have_as_many_alternatives_as_each_asks_for(client):
    (both,) = ask(client, prompt=TEXT, echo=True, logprobs=1, prompt_logprobs=3, max_tokens=0)["choices"]
    (echo,) = ask(client, prompt=TEXT, echo=True, logprobs=1, max_tokens=0)["choices"]
    (scores,) = ask(client, prompt=TEXT, prompt_logprobs=3, max_tokens=0)["choices"]
    assert both == {**echo, "prompt_logprobs": scores["prompt_logprobs"]}


def test_an_echo_of_what_is_left_of_a_prompt_that_was_cut(client):
    (choice,) = ask(client, prompt=TEXT, echo=True, truncate_prompt_tokens=6, max_tokens=0)["choices"]
    assert TEXT.endswith(choice["text"])
    assert 0 < len(choice["text"]) < len(TEXT)


def test_the_text_of_a_beginning_token_is_not_echoed():
    backend = Tokenizer.from_str(sentencepiece().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = random_model("llama", layers=1, vocabulary=len(tokenizer))
    with Engine(model, tokenizer, num_blocks=60) as engine:
        config = ServerConfig("m", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=64)
        with TestClient(create_app(config)) as client:
            text = "Hello a 本é!"
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            for prompt in (text, ids):
                (choice,) = ask(client, prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"]
                assert choice["text"] == text
                assert len(choice["logprobs"]["tokens"]) == len(ids)
                assert choice["logprobs"]["text_offset"][:3] == [0, 0, 5]
            plain = ask(client, prompt=text, echo=True, max_tokens=0, add_special_tokens=False, return_token_ids=True)
            assert plain["choices"][0]["prompt_token_ids"] == ids[1:]


def test_the_best_of_several_by_their_mean_log_probability(client):
    expected = in_process(TEXT, n=6, max_tokens=8, ignore_eos=False)
    expected.sort(key=lambda one: -sum(one.logprobs) / len(one.logprobs))
    fields = {**SAMPLED, "max_tokens": 8, "ignore_eos": False}
    whole = ask(client, prompt=[TEXT, TEXT], n=2, best_of=6, logprobs=0, return_token_ids=True, **fields)
    ids = [choice["token_ids"] for choice in whole["choices"]]
    assert ids == [one.token_ids for one in expected[:2]] * 2
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["completion_tokens"] == 2 * sum(len(one.token_ids) for one in expected[:2])
    same = [ask(client, prompt=TEXT, n=2, **more, **SAMPLED)["choices"] for more in ({}, {"best_of": 2})]
    assert same[0] == same[1]


def test_tokens_of_the_prompt_that_were_cached_are_counted(client):
    prompt = [at % 200 + 5 for at in range(40)]
    fields = {"prompt": [prompt, prompt[::-1]], "max_tokens": 1, "cache_salt": "mine"}
    first, second = ask(client, **fields), ask(client, **fields)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 72}
    chunks = chunks_of(client, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == second["usage"]
    chat = {"messages": [{"role": "user", "content": "a" * 30}], "max_tokens": 1}
    ask(client, CHATS, **chat)
    assert ask(client, CHATS, **chat)["usage"]["prompt_tokens_details"]["cached_tokens"] == 28


def test_the_fingerprint_names_the_numerics_and_the_weights():
    with engine_of() as engine, client_of(engine) as client:
        before = ask(client, prompt=TEXT, **SAMPLED)["system_fingerprint"]
        assert before == ask(client, prompt="other", **SAMPLED)["system_fingerprint"]
        with torch.no_grad():
            engine.backend.model.lm_head.weight.mul_(1.5)
        after = ask(client, prompt=TEXT, **SAMPLED)["system_fingerprint"]
        assert before.startswith("bitwise-")
        assert after.startswith("bitwise-")
        assert after != before
        streamed = chunks_of(client, CHATS, messages=[{"role": "user", "content": "a"}], max_tokens=2)
        assert {chunk["system_fingerprint"] for chunk in streamed} == {after}


def test_token_ids_of_chats(client):
    messages = [{"role": "user", "content": TEXT}]
    whole = ask(client, CHATS, messages=messages, return_token_ids=True, **SAMPLED)
    ids = byte_level()(TEXT)["input_ids"]
    assert whole["prompt_token_ids"] == ids
    chunks = chunks_of(client, CHATS, messages=messages, return_token_ids=True, n=2, **SAMPLED)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [ids] + [None] * (len(chunks) - 1)
    of_first = [one for chunk in chunks for one in chunk["choices"] if one["index"] == 0]
    assert [token for one in of_first for token in one.get("token_ids", [])] == whole["choices"][0]["token_ids"]
    assert len(whole["choices"][0]["token_ids"]) == 6
    plain = ask(client, CHATS, messages=messages, **SAMPLED)
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


def test_tokens_named_by_their_ids(client):
    fields = {"return_tokens_as_token_ids": True, "return_token_ids": True, **SAMPLED}
    (choice,) = ask(client, prompt=TEXT, echo=True, logprobs=2, **fields)["choices"]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert all(
        name in top for name, top in zip(choice["logprobs"]["tokens"][1:], choice["logprobs"]["top_logprobs"][1:])
    )
    chat = ask(client, CHATS, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=1, **fields)
    content = chat["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == [f"token_id:{token}" for token in chat["choices"][0]["token_ids"]]
    assert content[0]["top_logprobs"][0]["token"].startswith("token_id:")


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_prediction_changes_nothing_and_is_counted(client, path):
    asked = {"prompt": TEXT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": TEXT}]}
    fields = {**asked, **SAMPLED, "max_tokens": 12, "return_token_ids": True}
    plain = ask(client, path, **fields)
    text = plain["choices"][0]["text"] if path == COMPLETIONS else plain["choices"][0]["message"]["content"]
    parts = [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]
    for content in (text, parts):
        found = ask(client, path, **fields, prediction={"type": "content", "content": content})
        assert found["choices"] == plain["choices"]
        counts = found["usage"]["completion_tokens_details"]
        assert set(counts) == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
        assert sum(counts.values()) == len(byte_level()(text)["input_ids"])
    ids = ask(client, path, **fields, prediction={"type": "content", "content": "zzz" * 5})
    assert ids["choices"] == plain["choices"]
    assert ids["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] > 0
    assert "completion_tokens_details" not in plain["usage"]
    assert (
        refused(client, path, **fields, prediction={"type": "content", "content": "z" * 5000})["param"] == "prediction"
    )


def test_fields_of_other_servers_and_how_it_was_served(client):
    messages = [{"role": "user", "content": "a"}]
    assert "service_tier" not in ask(client, CHATS, messages=messages, max_tokens=1)
    for asked in ("auto", "flex"):
        assert ask(client, CHATS, messages=messages, max_tokens=1, service_tier=asked)["service_tier"] == "default"
        ask(client, prompt="a", max_tokens=1, service_tier=asked, request_id="r", rid="r")
    error = refused(client, prompt="a", n_predict=4)
    assert (error["param"], error["message"]) == ("n_predict", "'n_predict' is called 'max_tokens' here.")
    assert "'add_special_tokens'" in refused(client, CHATS, messages=messages, add_special_tokens=True)["message"]


def test_a_suffix_needs_tokens_for_it(client):
    error = refused(client, prompt="def f(", suffix="return x")
    assert error["param"] == "suffix"
    assert error["message"].startswith(
        "suffix must not be given, since the model's tokenizer has no fill-in-the-middle"
    )


def test_a_suffix_is_what_the_tokenizer_has_tokens_for():
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    model = random_model("llama", layers=1, vocabulary=len(tokenizer))
    with Engine(model, tokenizer, num_blocks=60) as engine:
        config = ServerConfig("m", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=96)
        with TestClient(create_app(config)) as client:
            fields = {"prompt": ["def f(", "a"], "suffix": "return x", "return_token_ids": True, **SAMPLED}
            whole = ask(client, **fields)
            for choice, before in zip(whole["choices"], fields["prompt"], strict=True):
                written = f"<|fim_prefix|>{before}<|fim_suffix|>return x<|fim_middle|>"
                assert tokenizer.decode(choice["prompt_token_ids"]) == written
                assert len(choice["token_ids"]) == 6
            end = tokenizer.convert_tokens_to_ids("<|file_sep|>")
            ended = ask(client, **fields, logit_bias={str(end): 100})["choices"][0]
            assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("", "stop", end)
            assert refused(client, **{**fields, "suffix": "x" * 5000})["param"] == "prompt"
