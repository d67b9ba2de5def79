"""A model whose experts go by the type of a token: those of an image and those around it have experts apart."""

import pytest
import torch

from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.patching import patch, token_logprobs
from toolkit.testing.architectures import IMAGE_TEXT, small_model
from toolkit.testing.coverage.image_text import measure
from toolkit.testing.coverage.measuring import next_logprobs
from toolkit.testing.image_inputs import image_batch

KIND, TYPES = "ernie4_5_vl_moe", "moe_mm_token_type_ids"


def model_and_prompts():
    """A model; an image, another image, and the first with the tokens around it taken for text."""
    model = small_model(KIND, kind=IMAGE_TEXT)
    one = image_batch(model)
    other = {**one, "pixel_values": one["pixel_values"].flip(0) * 2}
    alone = {**one, TYPES: (one["input_ids"] == model.config.image_token_id).int()}
    return model, [one, other, alone]


def ids_of(prompts):
    return [one["input_ids"][0].tolist() for one in prompts]


def test_the_tokens_around_an_image_are_of_its_type():
    model, (one, *_) = model_and_prompts()
    typed = one["input_ids"][one[TYPES] != 0].tolist()
    assert {model.config.image_start_token_id, model.config.image_end_token_id} <= set(typed)


@pytest.mark.parametrize("share", [False, True])
def test_types_of_each_sequence_of_a_batch_are_its_own(share):
    model, prompts = model_and_prompts()
    expected = [next_logprobs(model, inputs) for inputs in prompts]
    assert all(not torch.allclose(expected[0], later, atol=1e-3) for later in expected[1:])
    text = torch.arange(50, 70)[None]
    expected.append(next_logprobs(model, {"input_ids": text}))
    patch(model)
    with torch.no_grad():
        found = token_logprobs(model, [*ids_of(prompts), text[0].tolist()], share=share, images=[*prompts, None])
    for got, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_embeddings_of_the_tokens_around_an_image_have_their_gradients():
    model, (one, *_) = model_and_prompts()
    logits = model(**one, use_cache=False).logits[0, :-1]
    logits.log_softmax(-1).gather(1, one["input_ids"][0, 1:, None]).sum().backward()
    expected = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    model.zero_grad(set_to_none=True)
    patch(model)
    token_logprobs(model, ids_of([one]), images=[one])[0].sum().backward()
    embedding = next(name for name in expected if name.endswith("embed_tokens.weight"))
    assert expected[embedding][model.config.image_start_token_id].abs().max() > 0
    for name, own in model.named_parameters():
        if name in expected:
            assert (own.grad - expected[name]).norm() <= 1e-4 * expected[name].norm().clamp_min(1e-6), name


def test_a_placeholder_that_is_taken_for_text_is_refused():
    model, (one, *_) = model_and_prompts()
    patch(model)
    with pytest.raises(ToolkitError, match="take other tokens for those of an image"):
        token_logprobs(model, ids_of([one]), images=[{**one, TYPES: one[TYPES] * 0}])


def test_types_that_are_missing_are_refused_until_they_are_given():
    model, (one, *_) = model_and_prompts()
    patch(model)
    without = {name: value for name, value in one.items() if name != TYPES}
    with torch.no_grad(), pytest.raises(ToolkitError, match=f"ask for the {TYPES} of its tokens"):
        token_logprobs(model, ids_of([one]), images=[without])
    with torch.no_grad():
        assert token_logprobs(model, ids_of([one]), images=[one])[0].isfinite().all()


def test_experts_of_a_prompt_with_an_image_are_not_returned():
    model, (one, *_) = model_and_prompts()
    patch(model)
    with Engine(model, max_num_seqs=2, block_size=4, enable_return_routed_experts=True) as engine:
        pictured, text = engine.generate([one], SamplingParams(max_tokens=2)) + engine.generate([[50, 51, 52]])
    assert "set enable_return_routed_experts=False" in str(pictured.error)
    assert text.error is None
    assert text.routed_experts is not None


@pytest.mark.sweep
def test_every_column_of_its_row_holds():
    row = measure(KIND)
    assert row.verdict == "covered", row.reason
