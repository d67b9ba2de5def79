"""Prompts whose tokens all see each other, those of text too, and are continued causally: PaliGemma."""

import pytest
import torch

from toolkit import Engine, SamplingParams
from toolkit.engine.media import PromptMedia
from toolkit.errors import ToolkitError
from toolkit.patching import patch, token_logprobs, unpatch
from toolkit.patching.multimodal import expand, span_layers
from toolkit.state.media import MediaSpan
from toolkit.testing.architectures import IMAGE_TEXT, small_model
from toolkit.testing.coverage.image_text import measure
from toolkit.testing.coverage.measuring import greedy, next_logprobs
from toolkit.testing.image_inputs import image_batch

TYPES = "token_type_ids"
ROLES = ["attention", "media"]  # what ragged batches need
TEXT = torch.tensor([[50, 60, 70, 80, 90]])
GEMMA2 = {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}


def paligemma(implementation="sdpa", **text):
    settings = {"text_config": {"use_bidirectional_attention": True, **text}}
    model = small_model("paligemma", kind=IMAGE_TEXT, **settings)
    model.set_attn_implementation(implementation)
    return model


def with_suffix(inputs, count):
    types = inputs[TYPES].clone()
    types[0, -count:] = 1
    return {**inputs, TYPES: types}


def log_probabilities(model, prompts):
    with torch.no_grad():
        return token_logprobs(model, [one["input_ids"][0].tolist() for one in prompts], images=prompts)


@pytest.mark.parametrize("text", [{}, {**GEMMA2, "sliding_window": 64}], ids=["gemma", "gemma2"])
def test_prompts_suffixes_and_text_have_the_models_own_log_probabilities(text):
    model = paligemma("eager" if text else "sdpa", **text)
    prompt = image_batch(model)
    assert not prompt[TYPES].any()
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(-1)}
    prompts = [prompt, with_suffix(prompt, 5), other]
    own = [next_logprobs(model, one) for one in prompts]
    assert not torch.allclose(own[0], own[1], atol=1e-3)  # what is seen ahead matters
    causal = next_logprobs(model, {"input_ids": TEXT, TYPES: torch.ones_like(TEXT)})
    patch(model, ROLES)
    for got, expected in zip(log_probabilities(model, prompts), own, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert span_layers(model) == {0, 1}
    assert expand(model, with_suffix(prompt, 5)).blocks == [(0, prompt["input_ids"].shape[1] - 5)]
    with torch.no_grad():
        torch.testing.assert_close(token_logprobs(model, TEXT)[0], causal, rtol=0, atol=1e-4)


def test_the_engine_continues_prompts_as_the_model_does():
    model = paligemma()
    prompt = image_batch(model)
    other = {**prompt, "input_ids": prompt["input_ids"].clone()}
    other["input_ids"][0, -1] += 1  # which every token of the prompt sees
    expected = [greedy(model, one) for one in (prompt, other)]
    patch(model, ROLES)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with Engine(model, max_num_seqs=2, max_num_batched_tokens=40, block_size=4) as engine:
        found = engine.generate([prompt, other, prompt], params)
    assert [one.token_ids for one in found] == [*expected, expected[0]]
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 24}
    with Engine(model, **small) as engine, pytest.raises(ToolkitError, match="tokens that see each other"):
        engine.generate([prompt], params)


@pytest.mark.sweep
def test_every_column_holds():
    row = measure("paligemma")
    assert row.verdict == "covered", row.reason
    assert row.values["greedy"] is True
    assert row.values["differing"] == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_patch_keeps_what_a_call_without_types_sees(implementation):
    model = paligemma(implementation)
    padded = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    given = [{"input_ids": TEXT}, {"input_ids": TEXT.expand(2, -1), "attention_mask": padded}]
    with torch.no_grad():
        before = [model(**one).logits for one in given]
        patch(model, ROLES)
        after = [model(**one).logits for one in given]
        unpatch(model)
        again = [model(**one).logits for one in given]
    for own, patched, restored, one in zip(before, after, again, given, strict=True):
        seen = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
        torch.testing.assert_close(patched[seen], own[seen], rtol=1e-4, atol=1e-4)
        assert torch.equal(own, restored)


def test_what_a_sliding_window_would_cut_is_refused_and_no_verdict():
    model = paligemma("eager", **GEMMA2, sliding_window=24)
    prompt = image_batch(model)
    count = prompt["input_ids"].shape[1]
    fits, longer = with_suffix(prompt, count - 24), with_suffix(prompt, count - 25)
    own = next_logprobs(model, fits)
    patch(model, ROLES)
    for inputs, length in ((prompt, count), (longer, 25)):
        with pytest.raises(
            ToolkitError, match=f"must have <= 24 tokens, the sliding window of its layers, got {length}"
        ):
            log_probabilities(model, [inputs])
        torch.testing.assert_close(log_probabilities(model, [fits])[0], own, rtol=0, atol=1e-4)


def test_a_prompt_of_several_runs_is_refused():
    model = paligemma()
    prompt = image_batch(model)
    patch(model, ROLES)
    log_probabilities(model, [with_suffix(prompt, 5)])
    types = with_suffix(prompt, 5)[TYPES]
    types[0, -2:] = 0
    with pytest.raises(
        ToolkitError, match="token_type_ids 0, which see each other, must be one run of a sequence, got 2"
    ):
        log_probabilities(model, [{**prompt, TYPES: types}])


def test_tokens_of_text_in_a_prompt_are_named_by_all_of_it():
    spans = (MediaSpan(1, 2, b"a" * 32),)
    one, other, later = (
        PromptMedia(tokens, spans, {}, prompt=prompt).names
        for tokens, prompt in (([5, 7, 7, 6, 8], (0, 4)), ([5, 7, 7, 9, 8], (0, 4)), ([5, 7, 7, 6, 9], (0, 4)))
    )
    assert not set(one[:4]) & set(other[:4])
    assert one[:4] == later[:4]
    assert one[4] == 8
