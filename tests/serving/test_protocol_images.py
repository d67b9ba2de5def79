"""Images in Messages, Responses and Ollama are those of a chat: the same reply to the same prompt."""

import anthropic
import ollama
import openai
import pytest

from tests.helpers.image_models import data_url, picture, save_qwen2_vl
from tests.helpers.server_process import serving


@pytest.mark.sweep
def test_every_protocol_shows_the_model_the_same_image(tmp_path):
    folder = save_qwen2_vl(tmp_path / "pictures")
    url, other = (data_url(picture(color)) for color in ((200, 20, 20), (20, 20, 200)))
    data = url.partition(",")[2]
    with serving(folder, "--port", "0") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        text = {"type": "text", "text": "what is it?"}
        ask = {"model": "pictures", "temperature": 0}

        def chat(image):
            content = [{"type": "image_url", "image_url": {"url": image}}, text]
            found = client.chat.completions.create(
                messages=[{"role": "user", "content": content}], max_tokens=6, logprobs=True, **ask
            )
            return found, [one.logprob for one in found.choices[0].logprobs.content]

        (expected, logprobs), (_, others) = chat(url), chat(other)
        assert logprobs != others  # the image matters
        prompt, reply = expected.usage.prompt_tokens, expected.choices[0].message.content

        parts = [
            {"type": "input_image", "image_url": url, "detail": "auto"},
            {"type": "input_text", "text": text["text"]},
        ]
        found = client.responses.create(
            input=[{"role": "user", "content": parts}], include=["message.output_text.logprobs"],
            max_output_tokens=6, **ask,
        )  # fmt: skip
        assert (found.usage.input_tokens, found.output_text) == (prompt, reply)
        assert [one.logprob for one in found.output[0].content[0].logprobs] == logprobs

        source = {"type": "base64", "media_type": "image/png", "data": data}
        message = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0).messages.create(
            model="pictures", max_tokens=6, extra_body={"temperature": 0},
            messages=[{"role": "user", "content": [{"type": "image", "source": source}, text]}],
        )  # fmt: skip
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == prompt
        assert "".join(block.text for block in message.content) == reply

        # Its images stand behind the text of a message.
        content = [text, {"type": "image_url", "image_url": {"url": url}}]
        behind = client.chat.completions.create(messages=[{"role": "user", "content": content}], max_tokens=6, **ask)
        local = ollama.Client(server.url)
        options = {"temperature": 0, "num_predict": 6}
        for found in (
            local.chat("pictures", [{"role": "user", "content": text["text"], "images": [data]}], options=options),
            local.generate("pictures", text["text"], images=[data], options=options),
        ):
            assert found.prompt_eval_count == behind.usage.prompt_tokens
        assert found.response == behind.choices[0].message.content
        assert "vision" in local.show("pictures").capabilities
