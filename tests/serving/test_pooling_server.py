"""Pooling models over HTTP: embeddings by the ``openai`` client, scores, reranking, classes, and what is refused."""

import argparse
import base64
import re
import signal
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import torch
import torch.nn.functional as F
from fastapi.testclient import TestClient

from tests.helpers.app_on_port import on_a_port
from tests.helpers.pooling_models import SEQUENCES, TOKENS, bert_tokenizer, hidden_of, logits_of, pooling_model
from tests.helpers.provider_specs import check
from tests.helpers.server_process import serving
from tests.helpers.told_engine import ToldEngine, client_of
from toolkit.cli import serve
from toolkit.engine import EngineUnavailable
from toolkit.engine.pooling import PoolingEngine, PoolingInput, PoolingParams, PoolingQueue
from toolkit.errors import ToolkitError
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import random_model, tiny_tokenizer

TEXTS = ["Small random", "models of the families", "a tokenizer"]


def app_of(model, tokenizer, names="pooled", **options):
    engine = PoolingEngine(model)
    queue = PoolingQueue(engine, max_queued_seqs=options.pop("max_queued_seqs", None))
    config = ServerConfig(
        names, queue, tokenizer=tokenizer, max_model_len=engine.max_model_len, vocab_size=engine.vocab_size, **options
    )
    return TestClient(create_app(config), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def embeddings():
    with app_of(pooling_model("qwen3"), tiny_tokenizer()) as client:
        yield client


@pytest.fixture(scope="module")
def reranker():
    with app_of(pooling_model("bert", SEQUENCES, num_labels=1), bert_tokenizer()) as client:
        yield client


def cross_encoded(one, other):
    """The logit of a pair by transformers."""
    pair = bert_tokenizer()(one, other)
    types = torch.tensor([pair["token_type_ids"]])
    return logits_of(pooling_model("bert", SEQUENCES, num_labels=1), pair["input_ids"], token_type_ids=types)


def embedding_of(ids, dimensions=None):
    return F.normalize(hidden_of(pooling_model("qwen3"), ids)[-1, :dimensions], dim=0)


def check_embeddings(url):
    tokenizer = tiny_tokenizer()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=60)
    assert [one.id for one in client.models.list()] == ["embedder"]
    for options in ({}, {"encoding_format": "float"}):
        found = client.embeddings.create(model="embedder", input=TEXTS, user="x", **options)
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        assert [one.index for one in found.data] == [0, 1, 2]
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))
        for one, expected in zip(found.data, map(embedding_of, ids), strict=True):
            torch.testing.assert_close(torch.tensor(one.embedding), expected, rtol=1e-5, atol=1e-5)
    single = client.embeddings.create(model="embedder", input=[5, 6, 7], dimensions=16)
    expected = embedding_of([5, 6, 7], 16)
    torch.testing.assert_close(torch.tensor(single.data[0].embedding), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="The served model gives embeddings, scores or classes"):
        client.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.NotFoundError, match="must be 'embedder', got 'other'"):
        client.embeddings.create(model="other", input="x")
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.embeddings.create(model="embedder", input="x")


def test_the_openai_client_reads_embeddings():
    client = app_of(pooling_model("qwen3"), tiny_tokenizer(), names="embedder", api_key="key")
    with on_a_port(client.app) as url:
        check_embeddings(url)


@pytest.mark.sweep
def test_a_server_process_serves_a_pooling_model(tmp_path):
    folder = tmp_path / "embedder"
    pooling_model("qwen3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with serving(folder, "--port", "0", "--max-num-batched-tokens", "64", "--api-key", "key") as server:
        check_embeddings(server.url)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert any("pooling: embed, LAST pooling, 128 tokens a sequence" in line for line in server.errors)


@pytest.mark.sweep
def test_options_say_how_a_server_pools(tmp_path):
    folder = tmp_path / "reranker"
    pooling_model("bert", SEQUENCES, num_labels=1).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    with serving(folder, "--port", "0", "--pooler-config", '{"activation": "identity"}') as server:
        body = {"query": "play the game", "documents": ["play", "a game"], "return_documents": False}
        found = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()
    for one in found["results"]:
        expected = cross_encoded("play the game", body["documents"][one["index"]])
        assert one["relevance_score"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", "8"], "--block-size must be left out for a pooling model, got 8"),
        (["--runner", "generate"], "lack 'cls.predictions.bias'"),
        (["--pooler-config", '{"pooling": "x"}'], "PoolerConfig has no argument 'pooling'"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tmp_path, options, message):
    pooling_model("bert", SEQUENCES).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", str(tmp_path), "--port", "0", *options])
    with pytest.raises(ToolkitError, match=re.escape(message)):
        serve.run(args)


def test_a_model_that_generates_has_no_pooler(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", str(tmp_path), "--port", "0", "--pooler-config", "{}"])
    with pytest.raises(ToolkitError, match="--pooler-config must be left out for a model that generates"):
        serve.run(args)


@pytest.mark.parametrize("given", ["Small", ["Small"], [5, 6], [[5, 6], [7]]])
def test_every_form_of_input(embeddings, given):
    body = embeddings.post("/v1/embeddings", json={"input": given, "model": "pooled"}).json()
    inputs = [tiny_tokenizer()("Small")["input_ids"]] if given in ("Small", ["Small"]) else given
    inputs = [inputs] if isinstance(inputs[0], int) else inputs
    for one, ids in zip(body["data"], inputs, strict=True):
        torch.testing.assert_close(torch.tensor(one["embedding"]), embedding_of(ids), rtol=1e-5, atol=1e-5)
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}


def test_base64_is_little_endian_float32(embeddings):
    body = embeddings.post("/v1/embeddings", json={"input": [5, 6], "encoding_format": "base64"}).json()
    found = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(found, embedding_of([5, 6]).numpy(), rtol=1e-5, atol=1e-5)


def test_pooling_gives_every_task_of_the_model(embeddings):
    asked = {"input": [5, 6, 7], "task": "token_embed", "normalize": False}
    body = embeddings.post("/pooling", json=asked).json()
    expected = hidden_of(pooling_model("qwen3"), [5, 6, 7])
    torch.testing.assert_close(torch.tensor(body["data"][0]["data"]), expected, rtol=1e-5, atol=1e-5)
    with app_of(pooling_model("qwen3", TOKENS), tiny_tokenizer()) as client:
        body = client.post("/pooling", json={"input": [5, 6, 7]}).json()
    expected = logits_of(pooling_model("qwen3", TOKENS), [5, 6, 7]).softmax(-1)
    torch.testing.assert_close(torch.tensor(body["data"][0]["data"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_of_pairs(embeddings, reranker, path):
    body = embeddings.post(path, json={"text_1": "Small", "text_2": TEXTS}).json()
    a = embedding_of(tiny_tokenizer()("Small")["input_ids"])
    for one, text in zip(body["data"], TEXTS, strict=True):
        b = embedding_of(tiny_tokenizer()(text)["input_ids"])
        assert one["score"] == pytest.approx(float(a @ b), abs=1e-5)
    body = reranker.post(path, json={"text_1": ["play", "game"], "text_2": ["the play", "a game"]}).json()
    for one, texts in zip(body["data"], [("play", "the play"), ("game", "a game")], strict=True):
        assert one["score"] == pytest.approx(float(cross_encoded(*texts).sigmoid()), abs=1e-5)
    tokens = sum(len(bert_tokenizer()(*texts)["input_ids"]) for texts in (("play", "the play"), ("game", "a game")))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_back_by_their_score(reranker, path):
    documents = ["play", {"text": "a game of the players"}, "runs", "the game"]
    asked = {"query": "play the game", "documents": documents}
    whole = reranker.post(path, json=asked).json()
    scores = [one["relevance_score"] for one in whole["results"]]
    assert scores == sorted(scores, reverse=True)
    texts = ["play", "a game of the players", "runs", "the game"]
    assert [one["document"]["text"] for one in whole["results"]] == [texts[one["index"]] for one in whole["results"]]
    again = reranker.post("/v1/score", json={"text_1": "play the game", "text_2": texts}).json()
    by_index = {one["index"]: one["score"] for one in again["data"]}
    assert {one["index"]: one["relevance_score"] for one in whole["results"]} == by_index
    two = reranker.post(path, json={**asked, "top_n": 2, "return_documents": False}).json()
    assert (
        two["results"]
        == [{"index": one["index"], "relevance_score": one["relevance_score"]} for one in whole["results"]][:2]
    )


def test_classes_have_their_names():
    model = pooling_model("qwen3", SEQUENCES, num_labels=3)
    model.config.id2label = {0: "low", 1: "mid", 2: "high"}
    with app_of(model, tiny_tokenizer()) as client:
        (found,) = client.post("/classify", json={"input": "Small"}).json()["data"]
        refused = client.post("/v1/embeddings", json={"input": "Small"}).json()["error"]
    ids = tiny_tokenizer()("Small")["input_ids"]
    expected = logits_of(pooling_model("qwen3", SEQUENCES, num_labels=3), ids).softmax(-1)
    torch.testing.assert_close(torch.tensor(found["probs"]), expected, rtol=1e-5, atol=1e-5)
    assert (found["label"], found["num_classes"]) == (["low", "mid", "high"][int(expected.argmax())], 3)
    assert "task must be one of classify, got 'embed'" in refused["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/embeddings", {}, "input", "'input' is required."),
        ("/v1/embeddings", {"input": []}, "input", "'input' must be a string, a list of strings"),
        ("/v1/embeddings", {"input": [5, "x"]}, "input", "'input' must be a string, a list of strings"),
        ("/v1/embeddings", {"input": "x", "dimension": 3}, "dimension", "did you mean 'dimensions'?"),
        ("/v1/embeddings", {"input": "x", "dimensions": 65}, "dimensions", "dimensions must be >= 1 and <= 64, got 65"),
        ("/v1/embeddings", {"input": [5, 999]}, "input", "input must have token ids from 0 to 330, got 999"),
        ("/v1/embeddings", {"input": [5] * 200}, "input", "input must have >= 1 and <= 128 tokens, got 200"),
        ("/v1/embeddings", {"input": "x" * 9999}, "input", "input must have <= "),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format", "must be one of"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1", "text_1 must have 1 text, or one for each of"),
        (
            "/v1/score",
            {"text_1": "a", "text_2": ["b", "a model " * 99]},
            "text_2[1]",
            "must have >= 1 and <= 128 tokens",
        ),
        ("/v1/score", {"text_1": "a model " * 99, "text_2": ["b", "c"]}, "text_1", "must have >= 1 and <= 128 tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "b" * 99999}, "text_2", "must have <= "),
        ("/v1/rerank", {"query": "a", "documents": ["b", "a model " * 99]}, "documents[1]", "'documents[1]' must have"),
        ("/v1/rerank", {"query": "q" * 99999, "documents": ["b"]}, "query", "'query' must have <= "),
        ("/v1/score", {"text_1": [], "text_2": "c"}, "text_1", "'text_1' must be a list of at least 1, got []."),
        ("/v1/score", {"text_1": "a", "text_2": 5}, "text_2", "'text_2' must be text or a list of texts, got 5."),
        ("/v1/rerank", {"query": "x", "documents": "y"}, "documents", "'documents' must be a list of texts, got 'y'"),
        ("/v1/rerank", {"query": "x", "documents": [{"body": "y"}]}, "documents[0]", "must be text"),
        ("/classify", {"input": "x"}, "task", "task must be one of embed, token_embed, got 'classify'"),
        ("/v1/completions", {"prompt": "x"}, "model", "The served model gives embeddings, scores or classes"),
    ],
)
def test_what_is_wrong_is_one_sentence(embeddings, path, body, param, message):
    response = embeddings.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_of_a_pair_that_is_too_long_the_longer_text_is_named(reranker):
    long = "play the game " * 42
    for path, body, param, words in (
        ("/v1/score", {"text_1": "play", "text_2": ["game", long]}, "text_2[1]", "text_2[1] with text_1 must"),
        ("/v1/score", {"text_1": [long, "a"], "text_2": ["b", "c"]}, "text_1[0]", "text_1[0] with text_2 must have"),
        ("/rerank", {"query": "play", "documents": ["game", long]}, "documents[1]", "'documents[1]' with query"),
        ("/rerank", {"query": long, "documents": ["game"]}, "query", "'query' with documents must have"),
    ):  # fmt: skip
        response = reranker.post(path, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], words in error["message"]) == (param, True), error


def test_a_model_that_generates_says_so_where_embeddings_are_asked_for():
    client, _ = client_of(ToldEngine())
    with client:
        for path in ("/v1/embeddings", "/v1/score", "/v1/rerank", "/classify", "/pooling"):
            response = client.post(path, json={"input": "x"})
            assert response.status_code == 400
            assert "The served model generates; serve a pooling model" in response.json()["error"]["message"]


def test_longer_texts_are_cut_where_that_is_asked_for(embeddings):
    text = "Small random models of the families " * 30
    body = embeddings.post("/v1/embeddings", json={"input": text, "truncate_prompt_tokens": 8}).json()
    assert body["usage"]["prompt_tokens"] == 8
    assert embeddings.post("/v1/embeddings", json={"input": text}).status_code == 400


def test_the_document_describes_the_routes_and_the_metrics_count(embeddings):
    document = embeddings.get("/openapi.json").json()
    assert {"/v1/embeddings", "/v1/score", "/v1/rerank", "/classify", "/pooling"} <= set(document["paths"])
    assert "/v1/completions" not in document["paths"]
    bounded = document["components"]["schemas"]["EmbeddingRequest"]["properties"]["input"]["anyOf"][2]
    assert bounded["items"] == {"type": "integer", "minimum": 0, "maximum": 330}
    before = int(re.search(r"^toolkit:prompt_tokens_total (\d+)$", embeddings.get("/metrics").text, re.M)[1])
    check("openai", "CreateEmbeddingResponse", embeddings.post("/v1/embeddings", json={"input": [5, 6, 7]}).json())
    assert f"toolkit:prompt_tokens_total {before + 3}" in embeddings.get("/metrics").text
    assert embeddings.get("/health").json() == {"status": "ok"}


def queue_of(**options):
    return PoolingQueue(PoolingEngine(pooling_model("qwen3"), max_num_batched_tokens=32, max_num_seqs=4), **options)


def test_requests_of_many_threads_share_forwards_and_keep_their_results():
    queue = queue_of()
    expected = {ids: embedding_of(list(ids)) for ids in ((5, 6), (7,), (8, 9, 10), (5, 6, 7, 8))}
    failed = []

    def ask(seed):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
        given = [list(expected)[at] for at in order] * 3
        results = queue.submit([PoolingInput(list(ids)) for ids in given], PoolingParams()).result(60)
        for ids, one in zip(given, results, strict=True):
            if not torch.allclose(one.data, expected[ids], rtol=1e-5, atol=1e-5) or one.token_ids != list(ids):
                failed.append(ids)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert not failed
    assert queue.stats() == {"num_requests_running": 0, "num_requests_waiting": 0, "weight_version": 0}
    assert queue.shutdown(timeout=10)


def test_the_queue_has_a_bound_and_cancelled_requests_run_no_further():
    queue = queue_of(max_queued_seqs=3)
    running, go = threading.Event(), threading.Event()
    own, forwards = queue.engine.pool, []

    def held(inputs, params):
        forwards.append(len(inputs))
        running.set()
        go.wait(30)
        return own(inputs, params)

    queue.engine.pool = held
    first, seen = queue.submit([PoolingInput([5])], PoolingParams()), []
    first.add_done_callback(lambda _: seen.append(queue.stats()))
    assert running.wait(30)
    second = queue.submit([PoolingInput([6]), PoolingInput([7])], PoolingParams())
    with pytest.raises(EngineUnavailable, match="at its limit of 3 sequences"):
        queue.submit([PoolingInput([8])], PoolingParams())
    assert second.cancel()
    go.set()
    assert len(first.result(30)) == 1
    assert len(queue.submit([PoolingInput([8])], PoolingParams()).result(30)) == 1
    assert forwards == [1, 1]
    assert seen == [{"num_requests_running": 0, "num_requests_waiting": 0, "weight_version": 0}]
    queue.shutdown(timeout=10)
    with pytest.raises(EngineUnavailable, match="shutting down"):
        queue.submit([PoolingInput([8])], PoolingParams())


def test_what_fails_in_a_forward_fails_alone():
    queue = queue_of()
    own = queue.engine.pool
    queue.engine.pool = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        queue.submit([PoolingInput([5])], PoolingParams()).result(30)
    queue.engine.pool = own
    assert len(queue.submit([PoolingInput([5])], PoolingParams()).result(30)) == 1
    assert queue.failure is None
    assert queue.shutdown(timeout=10)


def test_a_shutdown_ends_what_waits():
    queue = queue_of()
    go = threading.Event()
    own = queue.engine.pool
    queue.engine.pool = lambda *given: go.wait(30) and own(*given)
    futures = [queue.submit([PoolingInput([5])] * 4, PoolingParams()) for _ in range(3)]
    while not queue.stats()["num_requests_running"]:
        time.sleep(0.005)
    assert not queue.shutdown(timeout=0.05)
    for one in futures:
        with pytest.raises(EngineUnavailable, match="shutting down"):
            one.result(10)
    go.set()
    queue.join(30)
    assert queue.shutdown(timeout=30)
