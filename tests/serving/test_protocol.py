"""Request bodies: what passes, and the one sentence of each that does not."""

import json

import pytest

from toolkit.serving.errors import RequestError
from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.openai.requests import ChatRequest
from toolkit.serving.parsing import parse

HELLO = [{"role": "user", "content": "Hello"}]


def completion(**fields):
    return parse(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


def chat(**fields):
    return parse(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_kind_of_prompt_becomes_a_list(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


def test_only_given_fields_are_in_the_sampling_parameters():
    assert completion().sampling() == {}
    given = {"temperature": 0, "stop": "x", "top_k": 3, "n": 2, "logprobs": 1, "stream": True, "user": "u"}
    assert completion(**given).sampling() == {"temperature": 0, "stop": ["x"], "top_k": 3, "n": 2}
    assert chat(max_completion_tokens=7).sampling() == {"max_tokens": 7}


def test_null_and_requests_for_nothing_are_as_good_as_absent():
    assert completion(suffix=None, stop=None, best_of=1, echo=False, temperature=None).sampling() == {}
    assert chat(tools=[], tool_choice="none", response_format={"type": "text"}, logits_processors=[]).sampling() == {}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    (message,) = chat(messages=[{"role": "user", "content": parts}]).messages
    assert message.for_template() == HELLO[0]


def test_what_an_assistant_declined_is_its_text():
    part = {"type": "refusal", "refusal": "I will not."}
    for given in (
        {"content": [part]},
        {"content": [{"type": "text", "text": "I "}, {**part, "refusal": "will not."}]},
        {"content": None, "refusal": "I will not."},
        {"content": "", "refusal": "I will not."},
        {"content": "I ", "refusal": "will not."},
    ):
        message = chat(messages=[*HELLO, {"role": "assistant", **given}, *HELLO]).messages[1]
        assert message.for_template() == {"role": "assistant", "content": "I will not."}
        assert message.num_characters == len("I will not.")


WRONG = [
    (completion, {"tempature": 1}, "tempature", "did you mean 'temperature'?"),
    (completion, {"messages": HELLO}, "messages", "Unknown field 'messages'."),
    (completion, {"prompt": None}, "prompt", "'prompt' is required."),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]},
        "messages[0]",
        "must be in a message of the role 'assistant', got 'user'.",
    ),
    (completion, {"prompt": []}, "prompt", "none of them empty"),
    (completion, {"prompt": [1, 2.5]}, "prompt", "must be a string"),
    (completion, {"prompt": [1, True]}, "prompt", "must be a string"),
    (completion, {"prompt": ["a", [1]]}, "prompt", "must be a string"),
    (completion, {"prompt": [[1], []]}, "prompt", "none of them empty"),
    (completion, {"n": 0}, "n", "'n' must be >= 1, got 0."),
    (completion, {"n": 100_000}, "n", "<= 128"),
    (completion, {"n": True}, "n", "'n' must be an integer, got True."),
    (
        completion,
        {"temperature": "hot"},
        "temperature",
        "'temperature' must be a number, got 'hot'.",
    ),
    (completion, {"temperature": float("nan")}, "temperature", "finite"),
    (completion, {"stop": ["a", 3]}, "stop[1]", "'stop[1]' must be text, got 3."),
    (completion, {"logprobs": 21}, "logprobs", "<= 20"),
    (completion, {"stop": [f"s{at}" for at in range(100_000)]}, "stop", "a list of at most 64"),
    (completion, {"stop": "x" * 10_000}, "stop", "<= 8192 characters together, got 10000."),
    (completion, {"stop_token_ids": list(range(2000))}, "stop_token_ids", "a list of at most 1024"),
    (completion, {"prompt": ["a"] * 3000}, "prompt", "<= 2048 prompts, got 3000."),
    (completion, {"cache_salt": "x" * 2000}, "cache_salt", "text of at most 1024 characters"),
    (completion, {str(at): 1 for at in range(10_000)}, None, "must have <= 128 fields, got 10001."),
    (completion, {"k" * 10_000: 1}, "k" * 200, "Unknown field 'kkk"),
    (completion, {"best_of": 2, "n": 3}, "best_of", "'best_of' must be >= n (3), got 2."),
    (completion, {"best_of": 4, "stream": True}, "best_of", "'best_of' must be n (1) where 'stream' is true, got 4."),
    (chat, {"best_of": 4}, "best_of", "does not offer 'best_of'"),
    (completion, {"echo": 0}, "echo", "'echo' must be true or false, got 0."),
    (chat, {"echo": True}, "echo", "does not offer 'echo'"),
    (completion, {"suffix": "b", "prompt": [1]}, "suffix", "'suffix' is given, but 'prompt' is token ids"),
    (completion, {"suffix": "b", "echo": True}, "suffix", "'suffix' is given, and so is 'echo'; give one."),
    (completion, {"n_predict": 4}, "n_predict", "'n_predict' is called 'max_tokens' here."),
    (completion, {"max_new_tokens": 4}, "max_new_tokens", "'max_new_tokens' is called 'max_tokens' here."),
    (chat, {"repeat_penalty": 1.1}, "repeat_penalty", "'repeat_penalty' is called 'repetition_penalty' here."),
    (chat, {"guided_json": {}}, "guided_json", "'guided_json' is called 'structured_outputs.json' here."),
    (chat, {"reasoning": {"effort": "low"}}, "reasoning", "'reasoning' is called 'reasoning_effort' here."),
    (chat, {"functions": [{"name": "f"}]}, "functions", "does not offer 'functions'; use 'tools'."),
    (chat, {"length_penalty": 2.0}, "length_penalty", "does not offer 'length_penalty'."),
    (chat, {"extra_body": {"top_k": 1}}, "extra_body", "'extra_body'; its fields stand beside the others."),
    (lambda **body: completion(prompt=None, **body), {"prompt_embeds": "a"}, "prompt_embeds", "is text or token ids."),
    (completion, {"use_beam_search": True}, "use_beam_search", "does not offer 'use_beam_search'"),
    (completion, {"detokenize": False}, "detokenize", "does not offer 'detokenize'"),
    (chat, {"prediction": {"type": "tokens", "content": ""}}, "prediction.type", "must be one of 'content'"),
    (chat, {"prediction": {"type": "content", "content": 3}}, "prediction.content", "must be a list"),
    (completion, {"stream_options": {}}, "stream_options", "'stream' is not true"),
    (
        completion,
        {"stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag",
        "usage",
    ),
    (chat, {"messages": []}, "messages", "a list of at least 1"),
    (chat, {"messages": HELLO * 3000}, "messages", "a list of at most 2048"),
    (chat, {"messages": "hi"}, "messages", "'messages' must be a list, got 'hi'."),
    (
        chat,
        {"messages": [{"role": "user", "content": 5}]},
        "messages[0].content",
        "must be text or a list of parts",
    ),
    (chat, {"messages": HELLO, "stop": 5}, "stop", "'stop' must be text or a list of texts, got 5."),
    (chat, {"messages": [{"role": "usr", "content": ""}]}, "messages[0].role", "'user'"),
    (chat, {"messages": [{"role": "user", "contnt": ""}]}, None, "content"),
    (chat, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is required"),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
        "must be one of 'text', 'image_url', ",
    ),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        "messages[0].content[0].type",
        "is required",
    ),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].image_url",
        "is required",
    ),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
        "messages[0].content[0].image_url.url",
        "must be text, got 3",
    ),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", "ulr": 3}}]}]},
        "messages[0].content[0].image_url.ulr",
        "'url'",
    ),
    (chat, {"top_logprobs": 2}, "top_logprobs", "'logprobs' is not true"),
    (chat, {"logprobs": 3}, "logprobs", "true or false"),
    (chat, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "give one"),
    (chat, {"tools": [{"type": "function"}]}, "tools[0].function", "is required"),
    (chat, {"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate"),
]


@pytest.mark.parametrize(("endpoint", "fields", "param", "words"), WRONG, ids=lambda value: None)
def test_a_wrong_request_is_one_sentence_that_names_the_field(endpoint, fields, param, words):
    with pytest.raises(RequestError) as raised:
        endpoint(**fields)
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert raised.value.status == 400
    if param is not None:
        assert raised.value.param == param


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null", b'"text"'])
def test_a_body_that_is_no_json_object_is_refused(raw):
    with pytest.raises(RequestError, match="request body"):
        parse(CompletionRequest, raw)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "The request body has lists or objects nested too deep."),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "The request body has a number of too many digits."),
        (
            b'{"prompt": "\xff"}',
            "The request body is not valid JSON ('utf-8' codec can't decode byte 0xff in position 12",
        ),
    ],
)
def test_json_that_cannot_be_read_is_one_sentence(body, message):
    with pytest.raises(RequestError) as raised:
        parse(CompletionRequest, body)
    assert str(raised.value).startswith(message)


def test_an_error_shows_the_beginning_of_a_deep_value():
    with pytest.raises(RequestError, match=r"got \[\[\[\["):
        parse(CompletionRequest, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}")
