"""Chats with images: a real server process with a small model of images and text, asked through ``openai``."""

import re

import openai
import pytest
import torch

from tests.helpers.image_models import data_url, picture, save_qwen2_vl
from tests.helpers.server_process import serving

RED, BLUE = (200, 20, 20), (20, 20, 200)
GREEDY = {"temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_qwen2_vl(tmp_path_factory.mktemp("models") / "pictures")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder whose files requests may name; beside it lies one that they may not."""
    folder = tmp_path_factory.mktemp("files")
    allowed = folder / "allowed"
    allowed.mkdir()
    picture(RED).save(allowed / "red.png")
    picture(BLUE).save(folder / "blue.png")
    (allowed / "text.png").write_text("no picture")
    return allowed


@pytest.fixture(scope="module")
def client(folder, files):
    with serving(folder, "--port", "0", "--grace", "3", "--allowed-local-media-path", str(files)) as server:
        assert re.fullmatch(r"serving pictures on http://127\.0\.0\.1:\d+\n", server.line), server
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def chat(*images, text="what is it?"):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def expected(folder, *images):
    """The reply and the prompt's length by transformers alone."""
    from transformers import AutoModelForImageTextToText

    from toolkit.loading import find_source
    from toolkit.loading.processor import load_processor

    processor = load_processor(find_source(str(folder)))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [
        {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": "what is it?"}]}
    ]
    text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=None, pad_token_id=0
    )
    return processor.tokenizer.decode(out[0, count:], skip_special_tokens=True), count


def test_an_reply_is_that_of_transformers(client, folder, files):
    for images in ([picture(RED)], [picture(BLUE), picture(RED)]):
        reply, count = expected(folder, *images)
        found = client.chat.completions.create(model="pictures", messages=chat(*map(data_url, images)), **GREEDY)
        assert (found.choices[0].message.content, found.usage.prompt_tokens) == (reply, count)
    reply, _ = expected(folder, picture(RED))
    named = client.chat.completions.create(model="pictures", messages=chat(f"file://{files}/red.png"), **GREEDY)
    assert named.choices[0].message.content == reply


def test_an_image_changes_the_reply_and_streams(client):
    def logprobs(url):
        stream = client.chat.completions.create(
            model="pictures", messages=chat(url), stream=True, logprobs=True, **GREEDY
        )
        return [one.logprob for part in stream for one in (part.choices[0].logprobs or _none).content]

    class _none:
        content = ()

    red, blue = logprobs(data_url(picture(RED))), logprobs(data_url(picture(BLUE)))
    assert len(red) == len(blue) == 6
    assert red != blue
    assert logprobs(data_url(picture(RED))) == red


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/cat.png", "must be a data URL or a file:// URL, since nothing is fetched"),
        ("data:image/png;base64,@@@", "must be a data URL in base64"),
        ("data:image/png,abc", "must be a data URL in base64"),
        ("data:image/png;base64,AAAA", "must be images"),
        ("file:///etc/hostname", "must be a file of the folder that the server allows"),
        ("file://{files}/../blue.png", "must be a file of the folder that the server allows"),
        ("file://{files}/%2e%2e/blue.png", "must be a file of the folder that the server allows"),
        ("file://{files}/none.png", "must be a file of the folder that the server allows"),
        ("file://{files}/text.png", "must be images"),
        ("data:image/x-eps;base64,JSFQUy1BZG9iZS0zLjAgRVBTRi0zLjAKJSVCb3VuZGluZ0JveDogMCAwIDkgOQo=", "must be images"),
    ],
)
def test_what_is_no_image_is_one_sentence(client, files, url, words):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="pictures", messages=chat(url.format(files=files)), **GREEDY)
    assert words in raised.value.body["message"]
    assert raised.value.body["param"] == "messages[0].content"
