"""The proof of a layout of images runs over what lies beside them, however long the prompt is."""

import copy

import pytest
import torch

import toolkit
from tests.helpers.picture_models import IMAGE, picture_model
from toolkit.patching import multimodal
from toolkit.patching.multimodal import check
from toolkit.patching.multimodal.items import Processed
from toolkit.patching.multimodal.shortened import NEAR, shortened

LONG = [*range(20, 140), 9, "a", 10, *range(20, 140), 9, "bb", 10, *range(20, 139)]


def forwards(model):
    """A list of how many tokens each forward of the text part had, as it is filled."""
    lengths = []
    layer = next(module for name, module in model.named_modules() if name.endswith("language_model.layers.0"))

    def note(_, args, kwargs):
        lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    layer.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


def test_tokens_beside_images_and_at_both_ends_are_kept():
    made = picture_model("qwen3_vl")
    outputs = made.outputs(LONG)
    few = shortened(Processed.of(outputs), outputs, {"image": IMAGE})
    ids, all_ids = few["input_ids"][0].tolist(), outputs["input_ids"][0].tolist()
    first = all_ids.index(IMAGE)
    assert ids[:NEAR] == all_ids[:NEAR]
    assert ids[-NEAR:] == all_ids[-NEAR:]
    assert ids.count(IMAGE) == all_ids.count(IMAGE)
    at = ids.index(IMAGE)
    assert ids[at - NEAR : at] == all_ids[first - NEAR : first]
    assert len(ids) < len(all_ids) - 150
    assert few["pixel_values"] is outputs["pixel_values"]
    short = made.outputs([21, 22, "a", 23])
    assert shortened(Processed.of(short), short, {"image": IMAGE}) is None


@pytest.mark.parametrize("kind", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.sweep)])
def test_a_long_prompt_is_proven_by_few_tokens_and_has_the_values_of_stock(kind):
    made = picture_model(kind)
    patched = copy.deepcopy(made.model)
    toolkit.patch(patched)
    outputs = made.outputs(LONG)
    count, lengths = outputs["input_ids"].shape[1], forwards(patched)
    sequence = multimodal.expand(patched, outputs)
    assert lengths
    assert max(lengths) < count - 100
    assert len(sequence.tokens) == count
    with torch.no_grad():
        logits = made.model(**outputs, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, outputs["input_ids"][0, 1:, None])[:, 0]
        (got,) = toolkit.token_logprobs(patched, [outputs["input_ids"][0].tolist()], images=[outputs])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_what_cannot_be_shortened_is_proven_as_a_whole(monkeypatch):
    made = picture_model("qwen3_vl")
    toolkit.patch(made.model)
    outputs = made.outputs(LONG)
    count, lengths = outputs["input_ids"].shape[1], forwards(made.model)

    monkeypatch.setattr(check, "shortened", lambda *_: {**outputs, "image_grid_thw": torch.ones(5, 3)})
    assert len(multimodal.expand(made.model, outputs).tokens) == count
    assert max(lengths) >= count
