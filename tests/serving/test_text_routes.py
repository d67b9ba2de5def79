"""``/tokenize``, ``/detokenize``, ``/tokenizer_info`` and ``/apply-template``: what the tokenizer itself does."""

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.engine_tokenizers import byte_level
from tests.helpers.told_engine import ToldEngine, client_of
from toolkit import AsyncEngine, Engine
from toolkit.engine.pooling import PoolingEngine, PoolingQueue
from toolkit.serving import text_routes
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import random_model

TEXT = "naïve café, the dog 🎉"
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<pad>{{ m.role }}: {{ m.content }}{% if not loop.last or add_generation_prompt %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi <eos>"}, {"role": "assistant", "content": "Yes"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def tokenizer():
    """A beginning token in front of texts, one behind them, and a template."""
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<pad> $0 <eos>", special_tokens=[("<eos>", 0), ("<pad>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def client():
    model, words = random_model("llama", layers=1, vocabulary=300), tokenizer()
    with Engine(model, words, num_blocks=60) as engine:
        config = ServerConfig("m", AsyncEngine(engine), tokenizer=words, max_model_len=64, vocab_size=300)
        with TestClient(create_app(config)) as opened:
            yield opened


def ask(client, path, schema, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    schema.model_validate_json(response.text, strict=True)
    return response.json()


def tokens(client, **body):
    return ask(client, "/tokenize", text_routes.Tokenized, **body)


def refused(client, path="/tokenize", **body):
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def test_the_tokens_of_a_prompt_are_those_that_the_model_gets(client):
    found = tokens(client, prompt=TEXT, model="m")
    used = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 0, "return_token_ids": True}).json()
    assert found["tokens"] == used["choices"][0]["prompt_token_ids"] == [1, *byte_level()(TEXT)["input_ids"]]
    assert (found["count"], found["max_model_len"], found["token_strs"]) == (len(found["tokens"]), 64, None)
    plain = tokens(client, prompt=TEXT, add_special_tokens=False, return_token_strs=True)
    assert plain["tokens"] == byte_level()(TEXT)["input_ids"]
    assert plain["token_strs"] == byte_level().convert_ids_to_tokens(plain["tokens"])
    assert tokens(client, prompt="")["tokens"] == [1]
    assert tokens(client, prompt="the dog " * 400)["count"] > 64  # longer than what the model takes


def test_the_tokens_of_a_chat_are_those_that_the_model_gets(client):
    found = tokens(client, messages=CHAT[:1])
    used = client.post(
        "/v1/chat/completions", json={"messages": CHAT[:1], "max_tokens": 0, "return_token_ids": True}
    ).json()
    assert found["tokens"] == used["prompt_token_ids"]
    words = tokenizer()
    for options in (
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        text = words.apply_chat_template(CHAT, tokenize=False, **{"add_generation_prompt": True, **options})
        expected = words(text, add_special_tokens=False)["input_ids"]
        assert tokens(client, messages=CHAT, **options)["tokens"] == expected
        assert tokens(client, messages=CHAT, **options, add_special_tokens=True)["tokens"] == [1, *expected]
        shown = ask(client, "/apply-template", text_routes.Templated, messages=CHAT, **options)
        assert shown == {"prompt": text}
    assert tokens(client, messages=CHAT, tools=[TOOL])["count"] > tokens(client, messages=CHAT)["count"]
    whole = {"messages": CHAT, "tools": [TOOL], "temperature": 0.5, "stream": True, "max_tokens": 4}
    assert ask(client, "/apply-template", text_routes.Templated, **whole)["prompt"].startswith("[look]<pad>user: Hi")


def test_detokenize_is_the_other_way(client):
    for ids in (byte_level()(TEXT)["input_ids"], [1, 5, 0], [], tokens(client, messages=CHAT)["tokens"]):
        found = ask(client, "/detokenize", text_routes.Detokenized, tokens=ids)
        assert found == {"prompt": tokenizer().decode(ids, clean_up_tokenization_spaces=False)}
    ids = tokens(client, prompt=TEXT)["tokens"]
    assert ask(client, "/detokenize", text_routes.Detokenized, tokens=ids) == {"prompt": f"<pad>{TEXT}"}


def test_tokenizer_info_has_the_settings_and_no_paths(client, tmp_path):
    found = client.get("/tokenizer_info").json()
    text_routes.TokenizerInfo.model_validate(found)
    assert found["tokenizer_class"] == type(tokenizer()).__name__
    assert (found["eos_token"], found["chat_template"]) == ("<eos>", TEMPLATE)
    tokenizer().save_pretrained(tmp_path)
    loaded = text_routes.tokenizer_settings(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert str(tmp_path) not in str(loaded)
    assert loaded["pad_token"] == "<pad>"


def test_wrong_requests_are_one_sentence(client):
    assert refused(client) == "'prompt' is required, or 'messages'."
    assert refused(client, prompt="a", messages=CHAT) == "'prompt' is given, and so is 'messages'; give one."
    assert refused(client, content="a") == "'content' is called 'prompt' here."
    assert refused(client, messages=CHAT, add_generation_prompt=True, continue_final_message=True).endswith("give one.")
    assert "'chat_template' must be left out" in refused(client, messages=CHAT, chat_template="{{ 1 }}")
    assert refused(client, "/detokenize", tokens=[300]) == "'tokens' must have token ids from 0 to 299, got 300."
    assert refused(client, "/detokenize", tokens="a") == "'tokens' must be a list, got 'a'."
    assert refused(client, "/apply-template", messages=[{"role": "king", "content": "a"}]).startswith(
        "'role' of a message"
    )
    assert client.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404


def test_a_model_without_a_tokenizer():
    client, _ = client_of(ToldEngine())
    with client:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert "has no tokenizer" in refused(client, path, **body)
        assert "needs a chat template" in refused(client, "/apply-template", messages=CHAT)
        assert client.get("/tokenizer_info").status_code == 404


def test_a_pooling_model_gets_all_special_tokens():
    words = tokenizer()
    queue = PoolingQueue(PoolingEngine(random_model("llama", layers=1, vocabulary=300)))
    with TestClient(create_app(ServerConfig("m", queue, tokenizer=words, max_model_len=64, vocab_size=300))) as client:
        assert tokens(client, prompt=TEXT)["tokens"] == words(TEXT)["input_ids"]
        assert tokens(client, prompt=TEXT)["tokens"][-1] == 0
        used = client.post("/v1/embeddings", json={"input": TEXT}).json()["usage"]["prompt_tokens"]
        assert used == tokens(client, prompt=TEXT)["count"]
        assert ask(client, "/detokenize", text_routes.Detokenized, tokens=[1, 0]) == {"prompt": "<pad><eos>"}
        assert client.get("/tokenizer_info").json()["eos_token"] == "<eos>"


def test_the_document_describes_them(client):
    document = client.get("/openapi.json").json()
    assert {"/tokenize", "/detokenize", "/tokenizer_info", "/apply-template"} <= set(document["paths"])
    body = document["components"]["schemas"]["DetokenizeRequest"]["properties"]["tokens"]["anyOf"][0]
    assert body["items"] == {"type": "integer", "minimum": 0, "maximum": 299}
