"""Models whose forward asks for an image with any text: BLIP-2 and those like it."""

import pytest
import torch

from toolkit.patching import patch, token_logprobs
from toolkit.patching.forward import ragged_forward
from toolkit.patching.multimodal.items import Processed
from toolkit.patching.without_media import asks_for_media, placeholders_of, text_arguments
from toolkit.state.batch import RaggedBatch
from toolkit.testing.architectures import IMAGE_TEXT, small_config, small_model
from toolkit.testing.coverage.image_text import COLUMNS, NO_TEXT, measure
from toolkit.testing.coverage.measuring import next_logprobs
from toolkit.testing.image_inputs import image_batch

KINDS = ("blip-2", "instructblip", "instructblipvideo")
SOME = ["blip-2", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in KINDS[1:])]


@pytest.mark.parametrize("kind", SOME)
def test_every_column_but_those_of_text_is_measured(kind):
    row = measure(kind)
    assert row.verdict == "covered", row.reason
    assert row.values["text loss"] == row.values["text gradient"] == NO_TEXT
    measured = {name: value for name, value in row.values.items() if value != NO_TEXT}
    assert len(measured) == len(COLUMNS) - 2
    assert not any(isinstance(value, str) for value in measured.values())


def test_a_column_that_is_not_for_a_row_is_shown_and_not_wrong():
    loss = COLUMNS[0]
    assert loss.holds(NO_TEXT)
    assert loss.shown(NO_TEXT) == NO_TEXT
    assert NO_TEXT in loss.meaning
    assert not loss.holds(float("nan"))


@pytest.mark.parametrize("kind", KINDS)
def test_images_side_by_side_have_the_log_probabilities_of_each_alone(kind):
    model = small_model(kind, kind=IMAGE_TEXT)
    with torch.no_grad():
        model.query_tokens.normal_(generator=torch.Generator().manual_seed(0))
    one = image_batch(model)
    other = {**one, "pixel_values": one["pixel_values"].flip(-1) * 2}
    prompts = [one, other]
    if "qformer_input_ids" in one:  # another instruction with the same image
        prompts.append({**one, "qformer_input_ids": one["qformer_input_ids"] + 9})
    expected = [next_logprobs(model, inputs) for inputs in prompts]
    assert all(not torch.allclose(expected[0], later, atol=1e-3) for later in expected[1:])
    patch(model)
    with torch.no_grad():
        found = token_logprobs(model, [inputs["input_ids"][0].tolist() for inputs in prompts], images=prompts)
    for got, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_a_placeholder_without_an_image_is_a_token_like_others():
    model = small_model("blip-2", kind=IMAGE_TEXT)
    ids = torch.tensor([50, model.config.image_token_id, 60, 70])
    with torch.no_grad():
        expected = model.language_model(input_ids=ids[None], use_cache=False).logits[0]
        patch(model)
        found = ragged_forward(model, RaggedBatch.from_sequences([ids], "cpu", share=False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_of_an_instruction_belong_to_the_image_even_where_they_are_as_many():
    ids = torch.tensor([[1, 2, 3]])
    processed = Processed.of({"input_ids": ids, "qformer_input_ids": ids + 4, "token_type_ids": ids})
    assert set(processed.token_arguments) == {"token_type_ids"}
    assert set(processed.media["image"]) == {"qformer_input_ids"}


def test_frames_of_a_model_of_videos_alone_stand_at_its_video_tokens():
    placeholders = placeholders_of(small_config("instructblipvideo", kind=IMAGE_TEXT))
    assert placeholders["image"] == placeholders["video"]
    both = placeholders_of(small_config("qwen2_5_vl", kind=IMAGE_TEXT))
    assert both["image"] != both["video"]


def test_other_models_take_tokens_alone():
    model = small_model("llava", kind=IMAGE_TEXT)
    assert not asks_for_media(model)
    assert text_arguments(model, torch.tensor([[1, 2]])) == {}
