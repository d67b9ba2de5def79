"""Triton Inference Server serves the model repository: ``generate`` and ``generate_stream`` have the engine's text."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.exported_models import exported_model
from tests.helpers.smollm2 import load_smollm2
from tests.helpers.triton_environment import put_on_path
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.exporting.triton_server import MODEL
from toolkit.exporting.triton_server.consumer import TritonServer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
TEXTS = ["the quick brown fox", "two plus two", "hello world", "say the question"] * 2


FAMILIES = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "lfm2", "smollm2")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_serves_generate_and_generate_stream(family, tmp_path, monkeypatch):
    put_on_path(tmp_path / "environment", monkeypatch)
    model, tokenizer = load_smollm2() if family == "smollm2" else exported_model(family)
    with Engine(model, tokenizer) as engine:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        expected = engine.generate([*TEXTS, [5, 6, 7], [9, 3]], params)
    path = export(model, tmp_path / "out", "triton-server", tokenizer, prompts=[[5, 6, 7], [9, 3]], max_tokens=12)
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    assert proof["consumer"].startswith("tritonserver ")
    assert proof["outputs"] == [one.token_ids for one in expected[-2:]]
    with TritonServer(path) as server:
        with ThreadPoolExecutor(len(TEXTS)) as pool:
            asked = [pool.submit(server.generate, MODEL, text_input=text, parameters=GREEDY) for text in TEXTS]
            streams = [
                pool.submit(
                    lambda text=text: list(
                        server.generate_stream(MODEL, text_input=text, stream=True, parameters=GREEDY)
                    )
                )
                for text in TEXTS
            ]
            responses, parts = [one.result() for one in asked], [one.result() for one in streams]
        for one, response, events in zip(expected, responses, parts):
            assert (response["text_output"], response["token_ids"]) == (one.text, one.token_ids)
            assert len(events) > 1
            assert "".join(event["text_output"] for event in events) == one.text
            assert events[-1]["finish_reason"] == "length"
        with pytest.raises(ToolkitError, match="max_tokens"):
            server.generate(MODEL, text_input="a", parameters={"max_tokens": -1})
