"""``transformers.pipeline`` on a model whose ``generate`` is routed: nothing else is needed."""

import copy

import pytest
from transformers import TextIteratorStreamer, pipeline

import toolkit
from infer_patches.generate import route_generate
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model, tiny_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a page?"}]


@pytest.fixture(scope="module")
def pair():
    """(transformers' pipeline of the model, that of the same weights on the engine), and the engine."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    model = random_model("llama")
    own = pipeline("text-generation", model=copy.deepcopy(model), tokenizer=tokenizer)
    toolkit.patch(model)
    with route_generate(model, num_blocks=128) as route:
        yield own, pipeline("text-generation", model=model, tokenizer=tokenizer), route.engine


@pytest.mark.parametrize(
    ("inputs", "settings"),
    [
        ("small random models", {}),
        ("small random models", {"return_full_text": False, "repetition_penalty": 1.3}),
        (["small", "a byte-level tokenizer made on the spot", "the key is"], {"batch_size": 3}),
        (["small", "a byte-level tokenizer made on the spot", "the key is"], {"batch_size": 2, "stop_strings": "e"}),
        (CHAT, {}),
        ([CHAT, CHAT[1:]], {"batch_size": 2, "return_full_text": False}),
        ("small random", {"return_tensors": True}),
    ],
)
def test_texts_are_transformers_own(pair, inputs, settings):
    own, ours, engine = pair
    settings = {"max_new_tokens": 12, "do_sample": False} | settings
    if "stop_strings" in settings:
        settings["tokenizer"] = own.tokenizer
    before = engine.stats()["generation_tokens"]
    assert ours(inputs, **settings) == own(inputs, **settings)
    assert engine.stats()["generation_tokens"] > before


def test_sampled_texts_and_streamers(pair):
    own, ours, _ = pair
    sampled = ours("small random", max_new_tokens=8, do_sample=True, num_return_sequences=4, top_p=0.9)
    assert len({one["generated_text"] for one in sampled}) > 1
    assert all(one["generated_text"].startswith("small random") for one in sampled)
    streamer = TextIteratorStreamer(own.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (whole,) = ours("small random", max_new_tokens=8, do_sample=False, return_full_text=False, streamer=streamer)
    assert "".join(streamer) == whole["generated_text"]


def test_errors_come_through(pair):
    _, ours, _ = pair
    with pytest.raises(ToolkitError, match=r"num_beams must be None or 1 on the engine, got 3"):
        ours("small", num_beams=3, max_new_tokens=2)
