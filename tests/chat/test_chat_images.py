"""Images in messages: how they are given, and the tokens that the model's own processor makes of a conversation."""

import pytest

from tests.helpers.image_models import IMAGE, data_url, picture, save_qwen2_vl
from toolkit.chat import ChatTokenizer, has_images, pictured, read_image, take_images
from toolkit.chat.images import carried
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_processor, load_tokenizer

RED, BLUE = (200, 30, 30), (30, 30, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    picture(RED).save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(find_source(folder))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "red.png"}},
        {"type": "image_url", "image_url": data_url(picture(RED))},
        {"type": "image", "path": "red.png"},
        {"type": "image", "url": "file://red.png"},
        {"type": "image", "image": picture(RED)},
        {"type": "image", "base64": data_url(picture(RED)).partition(",")[2]},
        {"type": "image"},
    ],
    ids=lambda part: next((name for name in part if name != "type"), "beside"),
)
def test_every_form_is_the_same_image(part, folder):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}]
    assert has_images(messages)
    beside = ["red.png"] if len(part) == 1 else None
    taken, images = take_images(messages, folder, beside)
    assert taken[0]["content"][0] == {"type": "image"}
    assert [image.tobytes() for image in images] == [picture(RED).tobytes()]


@pytest.mark.parametrize(
    ("part", "beside", "told"),
    [
        ({"type": "image", "url": "https://a.b/c.png"}, None, "must have images as paths or data URLs in messages[0]"),
        (
            {"type": "image", "path": "none.png"},
            None,
            "must have images that Pillow reads in messages[0], got 'none.png'",
        ),
        ({"type": "image_url", "image_url": "data:image/png;base64,??"}, None, "must have images that Pillow reads"),
        ({"type": "image"}, None, "must have an image for each image part, got none for one in messages[0]."),
        ({"type": "text", "text": "a"}, ["red.png"], "for each entry of 'images', got 1 more entries than parts."),
    ],
)
def test_what_is_no_image_is_named(part, beside, told, folder):
    with pytest.raises(ToolkitError) as raised:
        take_images([{"role": "user", "content": [part]}], folder, beside)
    assert told in str(raised.value)


def test_the_processor_expands_placeholders_and_the_assistants_turns_count(folder, processor):
    tokenizer = load_tokenizer(find_source(folder))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "yes. four"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image"}]},
        {"role": "assistant", "content": "no. two"},
    ]
    (tokens,) = ChatTokenizer(tokenizer).messages(messages)
    made = pictured(processor, tokens, [picture(RED), picture(BLUE, 112)])
    ids = made.inputs["input_ids"][0].tolist()
    assert made.tokens.ids == ids
    assert ids.count(tokenizer.convert_tokens_to_ids(IMAGE)) == 4 + 16
    counted = [token for token, counts in zip(ids, made.tokens.mask) if counts]
    assert tokenizer.decode(counted) == "yes. four<|im_end|>\nno. two<|im_end|>\n"
    assert IMAGE not in tokenizer.decode(ids[made.images_end :])
    assert made.inputs["pixel_values"].shape[0] == 4 * (4 + 16)
    everything = ChatTokenizer(tokenizer, assistant_only_loss=False).messages(messages)[0]
    mask = pictured(processor, everything, [picture(RED), picture(BLUE, 112)]).tokens.mask
    assert mask.count(False) == 4 + 16


def test_the_processor_needs_no_torchvision_and_says_that_videos_do(processor):
    with pytest.raises(ToolkitError, match="Videos need the package 'torchvision'"):
        processor(videos=[[picture(RED)] * 2], text=["<|video_pad|>"])


def test_an_image_is_turned_as_its_camera_was(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image("turned.jpg", tmp_path).size == (4, 8)


@pytest.mark.parametrize(
    ("ids", "mask", "expanded", "expected"),
    [
        ([1, 9, 2, 5, 6], "00011", [1, 9, 9, 9, 2, 5, 6], "0000011"),
        ([1, 9, 2, 5, 1, 9, 2, 5], "00010001", [1, 9, 9, 2, 5, 1, 9, 9, 2, 5], "0000100001"),
        ([1, 9, 2, 5], "0001", [1, 9, 9, 2, 7], None),  # the turn is not there
        ([9, 5], "01", [5, 9, 5], "001"),  # by the token before it
    ],
)
def test_what_counts_is_found_again(ids, mask, expanded, expected):
    found = carried(ids, [one == "1" for one in mask], expanded)
    assert found == (None if expected is None else [one == "1" for one in expected])
