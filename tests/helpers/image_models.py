"""A small checkpoint of an image-text model with all that it comes with: tokenizer, chat template, processor."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from tests.helpers.tokenizers import make_tokenizer
from toolkit.testing.architectures import IMAGE_TEXT, small_model

IMAGE, START, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 56
"""Pixels along an image: 4 tokens."""


def save_qwen2_vl(folder: Path) -> Path:
    """Qwen 2 VL with random weights; a picture of SIDE by SIDE pixels is 4 tokens."""
    tokenizer: Any = make_tokenizer(chat_template=TEMPLATE, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, "<|video_pad|>", START, END]})
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", IMAGE), ("video_token_id", "<|video_pad|>"), ("vision_start_token_id", START),
        ("vision_end_token_id", END),
    )}  # fmt: skip
    model = small_model("qwen2_vl", kind=IMAGE_TEXT, text_config={"vocab_size": 512}, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"processor_class": "Qwen2VLProcessor"}
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": 784, "max_pixels": 78400, **processor,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


def picture(colour: tuple[int, int, int], side: int = SIDE) -> Any:
    """An image of Pillow: a square on a ground of one colour."""
    from PIL import Image

    image = Image.new("RGB", (side, side), colour)
    image.paste((255, 255, 255), (0, 0, side // 2, side // 2))
    return image


def data_url(image: Any) -> str:
    """An image as OpenAI's clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
