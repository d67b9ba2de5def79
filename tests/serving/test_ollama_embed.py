"""``/api/embed`` of a real server process, asked through the ``ollama`` client."""

import httpx
import ollama
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.pooling_models import hidden_of, pooling_model
from tests.helpers.server_process import serving
from toolkit.testing.models import tiny_tokenizer

TEXTS = ["Small random", "models of the families"]


@pytest.mark.sweep
def test_embeddings_of_a_pooling_model(tmp_path):
    folder = tmp_path / "embedder"
    pooling_model("qwen3").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    with serving(folder, "--port", "0") as server:
        client = ollama.Client(server.url)
        assert client.show("embedder").capabilities == ["embedding"]
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        found = client.embed("embedder", TEXTS)
        assert found.prompt_eval_count == sum(map(len, ids))
        for dimensions in (None, 16):
            found = client.embed("embedder", TEXTS, dimensions=dimensions)
            for one, tokens in zip(found.embeddings, ids, strict=True):
                expected = F.normalize(hidden_of(pooling_model("qwen3"), tokens)[-1, :dimensions], dim=0)
                torch.testing.assert_close(torch.tensor(one), expected, rtol=1e-5, atol=1e-5)
        long = "Small random models " * 200
        assert client.embed("embedder", long).prompt_eval_count == 128
        with pytest.raises(ollama.ResponseError, match="input must have <= "):
            client.embed("embedder", long, truncate=False)
        with pytest.raises(ollama.ResponseError, match="The served model gives embeddings, scores or classes"):
            client.chat("embedder", [{"role": "user", "content": "x"}])
        refused = httpx.post(f"{server.url}/v1/messages", json={}).json()
        assert refused["error"]["message"].startswith("The served model gives embeddings")
        assert refused["type"] == "error"
