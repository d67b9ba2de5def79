"""Ways in which features of images reach a text part: in several layers, by a mask of tokens, inside of it."""

import pytest
import torch

from toolkit.patching import patch, token_logprobs
from toolkit.patching.multimodal import expand
from toolkit.patching.record import report_of
from toolkit.patching.text_part import find_entry
from toolkit.patching.without_media import placed_features, text_arguments
from toolkit.testing.architectures import IMAGE_TEXT, small_model
from toolkit.testing.coverage.image_text import measure
from toolkit.testing.coverage.measuring import loss_and_gradient, next_logprobs, relative
from toolkit.testing.image_inputs import image_batch
from toolkit.testing.models import random_model

KINDS = ("granite4_vision", "chameleon", "kosmos-2", "kosmos-2.5")
ROLES = ["attention", "media"]  # what ragged batches need
SOME = ["kosmos-2", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in KINDS if kind != "kosmos-2")]
OF_IMAGES = ("pixel_values", "flattened_patches", "image_sizes")
BY_MASK = "image_embeds_position_mask"


def other_image(inputs):
    """The same text with another image in it, and other tokens behind it."""
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, -3:] = torch.tensor([50, 51, 52])
    if "pixel_values" in inputs:
        return {**changed, "pixel_values": inputs["pixel_values"].flip(-1) * 2}
    where, patches = inputs["flattened_patches"].split([2, inputs["flattened_patches"].shape[-1] - 2], -1)
    return {**changed, "flattened_patches": torch.cat([where, patches.flip(-1) * 2], -1)}


def one_behind_the_other(first, second):
    return {name: torch.cat([first[name], second[name]], 0 if name in OF_IMAGES else 1) for name in first}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_log_probabilities_and_gradients_of_each_sequence(kind):
    model = small_model(kind, kind=IMAGE_TEXT)
    one = image_batch(model)
    other = other_image(one)
    prompts = [one, other]
    if kind != "kosmos-2":  # whose processor puts one image at the beginning
        prompts.append(one_behind_the_other(other, one))
    text = torch.tensor([7, 8, 9, 50, 60])
    own = [next_logprobs(model, inputs) for inputs in prompts]
    own.append(next_logprobs(model, {"input_ids": text[None], **text_arguments(model, text[None])}))
    _, gradient = loss_and_gradient(model, one, one["input_ids"])
    patch(model, ROLES)
    tokens = [inputs["input_ids"][0].tolist() for inputs in prompts]
    with torch.no_grad():
        found = token_logprobs(model, [*tokens, text.tolist()], images=[*prompts, None])
    for got, stock in zip(found, own, strict=True):
        torch.testing.assert_close(got, stock, rtol=0, atol=1e-4)
    entry = find_entry(model)
    assert entry is not None
    hooked = [module for module in model.modules() if module is not model and module._forward_pre_hooks]
    assert hooked == [entry[1]]
    (-token_logprobs(model, tokens[:1], images=[one])[0].mean()).backward()
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert relative(torch.cat([one.flatten() for one in got]), gradient) <= 2e-5


@pytest.mark.parametrize("kind", SOME)
def test_the_engine_generates_what_the_model_does_with_the_bits_of_training(kind):
    row = measure(kind)
    assert row.verdict == "covered", row.reason
    assert row.values["greedy"] is True
    assert row.values["differing"] == 0


def test_tokens_that_a_mask_tells_from_text_keep_their_embeddings():
    model = small_model("kosmos-2.5", kind=IMAGE_TEXT)
    inputs = image_batch(model)
    before = next_logprobs(model, inputs)
    placed = inputs[BY_MASK][0].nonzero()[:, 0]
    mask = inputs[BY_MASK].clone()
    mask[0, [int(placed[0]) - 1, int(placed[-1]) + 1]] = -1  # as its processor has it
    inputs = {**inputs, BY_MASK: mask}
    own = next_logprobs(model, inputs)
    assert not torch.allclose(own, before, atol=1e-3)
    patch(model, ROLES)
    sequence = expand(model, inputs)
    assert [span.length for span in sequence.spans] == [1, len(placed), 1]
    found = token_logprobs(model, [inputs["input_ids"][0].tolist()], images=[inputs])[0]
    torch.testing.assert_close(found.detach(), own, rtol=0, atol=1e-4)


def test_a_model_that_makes_its_masks_itself_is_called_without_one():
    model = small_model("kosmos-2", kind=IMAGE_TEXT)
    patch(model, ROLES)
    token_logprobs(model, [[50, 60, 70]])
    assert report_of(model).ragged.makes_masks
    other = small_model("kosmos-2.5", kind=IMAGE_TEXT)
    patch(other, ROLES)
    token_logprobs(other, [[50, 60, 70]])
    assert not report_of(other).ragged.makes_masks


def test_what_takes_no_images_has_no_entry():
    model = random_model("llama")
    assert find_entry(model) is None
    assert placed_features(type(model).forward) is None
    chameleon = small_model("chameleon", kind=IMAGE_TEXT)
    assert find_entry(chameleon) == ("model", chameleon.model)
