"""Conversations as prompts of the engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.chat import encode, has_images, render, take_images
from toolkit.engine.prompts import MEDIA, Prompt, processed
from toolkit.errors import ToolkitError
from toolkit.sentences import shown


def conversations(messages: Any) -> list[Any]:
    """A list of conversations, from one conversation or a list of them. Raises ToolkitError for anything else."""
    if not isinstance(messages, list | tuple):
        raise ToolkitError(f"messages must be a conversation or a list of them, got {shown(messages)}.")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def chat_prompt(
    tokenizer: Any, processor: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[str, Prompt]:
    """The text of a conversation by the model's chat template, and the prompt: token ids, or what a processor returned.

    Args:
        tokenizer: of the model.
        processor: of images; None takes none. Its template is the one of conversations with images.
        messages: with ``content`` as text or parts.
        options: of ``toolkit.chat.render``.

    Raises:
        ToolkitError: there is no tokenizer, template or processor, or one of them does not take the messages.
    """
    if tokenizer is None:
        raise ToolkitError("tokenizer must be given for chats, got None.")
    if not isinstance(messages, list | tuple):
        raise ToolkitError(f"messages of a conversation must be a list of mappings, got {shown(messages)}.")
    if not has_images(messages):
        text = render(tokenizer, messages, **options)
        return text, encode(tokenizer, text)
    if processor is None:
        raise ToolkitError(f"messages must be text for a model without a processor of images ({MEDIA}), got an image.")
    try:
        bare, images = take_images(messages, Path.cwd())
    except ToolkitError as error:
        raise ToolkitError(f"messages {error}") from None
    template = options.get("chat_template") or getattr(processor, "chat_template", None)
    text = render(tokenizer, bare, **{**options, "chat_template": template if isinstance(template, str) else None})
    return text, processed(processor, text, {"image": images}, add_special_tokens=False)
