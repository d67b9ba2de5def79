"""Images in messages: the forms in which they are given, and what a model's processor makes of a conversation.

A part of a message's content is an image as OpenAI writes it (``{"type": "image_url", "image_url": {"url": ...}}``) or
as transformers does (``{"type": "image"}`` with ``path``, ``url``, ``base64`` or ``image``). It is a data URL, or a
path relative to the data's folder; nothing is fetched from a network. A part that says nothing more takes the next
entry of the list ``images`` beside the messages, as in TRL's datasets.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.chat.training import TrainingTokens
from toolkit.errors import ToolkitError, first_line

_SOURCES = ("image", "path", "url", "base64", "image_url")
_CONTEXTS = (8, 4, 2, 1, 0)
"""Tokens before a run that are looked for with it, from many to none."""


class PicturedTokens(NamedTuple):
    """Tokens of a conversation with its images, and all that the processor made of them.

    Attributes:
        inputs: ``input_ids`` [1, n], pixels, and the others that the model takes.
        images_end: index behind the last token that stands for an image.
    """

    tokens: TrainingTokens
    inputs: Mapping[str, Any]
    images_end: int


def has_images(messages: Any) -> bool:
    """Whether any message has an image among its parts."""
    return any(_is_image(part) for message in messages for part in _parts(message))


def take_images(
    messages: Sequence[Mapping[str, Any]], folder: Path, beside: Sequence[Any] | None = None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """(messages whose image parts are ``{"type": "image"}``, the images in order as RGB of Pillow).

    Args:
        messages: with ``content`` as text or parts.
        folder: what paths are relative to.
        beside: images of the parts that have none themselves.

    Raises:
        ToolkitError: an image that is not there or cannot be read, or ``beside`` with another number of images than
            parts take; ``must be ..., got ...``, without a subject.
    """
    waiting = iter(beside or ())
    images: list[Any] = []
    taken: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_bare(part, waiting, folder, images, f"messages[{at}]") for part in content]
        taken.append({**message, "content": content})
    left = len(list(waiting))
    if left:
        raise ToolkitError(f"must have an image part for each entry of 'images', got {left} more entries than parts.")
    return taken, images


def _parts(message: Any) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, (list, tuple)) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _bare(part: Any, waiting: Iterator[Any], folder: Path, images: list[Any], where: str) -> Any:
    """The part as a template takes it; its image goes to ``images``."""
    if not _is_image(part):
        return part
    given = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
    if part.get("base64") is not None and given == part["base64"]:
        given = f"data:;base64,{given}"
    if given is None:
        given = next(waiting, None)
    if given is None:
        raise ToolkitError(f"must have an image for each image part, got none for one in {where}.")
    images.append(read_image(given, folder, where))
    return {"type": "image"}


def read_image(given: Any, folder: Path, where: str = "it") -> Any:
    """An image as RGB of Pillow, turned as its EXIF data says.

    Args:
        given: a path, a data URL, bytes, a mapping with ``url``, ``bytes`` or ``path``, or an image of Pillow.
        folder: what paths are relative to.
        where: where it was given, for the error.

    Raises:
        ToolkitError: as ``take_images`` does.
    """
    from PIL import Image, ImageOps

    if isinstance(given, Mapping):
        given = next((given[name] for name in ("url", "bytes", "path") if given.get(name) is not None), None)
    try:
        if isinstance(given, Image.Image):
            image = given
        elif isinstance(given, bytes):
            image = Image.open(io.BytesIO(given))
        elif isinstance(given, str) and given.startswith("data:"):
            image = Image.open(io.BytesIO(_decoded(given)))
        elif isinstance(given, str) and "://" not in given.removeprefix("file://"):
            image = Image.open(folder / given.removeprefix("file://"))
        else:
            raise ToolkitError(f"must have images as paths or data URLs in {where}, got {given!r:.100}.")
        return ImageOps.exif_transpose(image).convert("RGB")
    except ToolkitError:
        raise
    except Exception as error:  # Pillow raises many kinds
        shown = f"{given!r:.60}"
        raise ToolkitError(
            f"must have images that Pillow reads in {where}, got {shown} ({first_line(error)})."
        ) from None


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URL holds base64")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def pictured(processor: Any, tokens: TrainingTokens, images: Sequence[Any]) -> PicturedTokens:
    """The tokens of ``tokens.text`` as the processor expands them, with the same text counted.

    Args:
        processor: the model's own.
        tokens: of a text in which a placeholder stands for each image.
        images: of Pillow, in order.

    Raises:
        ToolkitError: the processor does not take the text, or the text that counts is not among its tokens.
    """
    try:
        made = processor(text=[tokens.text], images=[list(images)], add_special_tokens=False, return_tensors="pt")
    except Exception as error:  # processors raise many kinds
        raise ToolkitError(
            f"must have images and text that the model's processor takes, got {first_line(error)}."
        ) from None
    inputs = dict(made)
    ids: list[int] = inputs["input_ids"][0].tolist()
    media = _media(processor, inputs, ids)
    counted = [not one for one in media] if all(tokens.mask) else carried(tokens.ids, tokens.mask, ids)
    if counted is None:
        raise ToolkitError("must have the text that counts between its images, got one that the processor rewrites.")
    mask = [one and not of_image for one, of_image in zip(counted, media)]
    end = max((at + 1 for at, of_image in enumerate(media) if of_image), default=0)
    return PicturedTokens(tokens._replace(ids=ids, mask=mask), inputs, end)


def _media(processor: Any, inputs: Mapping[str, Any], ids: Sequence[int]) -> list[bool]:
    """Which tokens stand for images: nothing is predicted there."""
    kinds = inputs.get("mm_token_type_ids")
    if kinds is not None:
        return [bool(kind) for kind in kinds[0].tolist()]
    token = getattr(processor, "image_token_id", None)
    if token is None and isinstance(getattr(processor, "image_token", None), str):
        token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return [one == token for one in ids]


def carried(ids: Sequence[int], mask: Sequence[bool], expanded: Sequence[int]) -> list[bool] | None:
    """``mask`` of ``ids`` on ``expanded``, which has other tokens in some parts where nothing counts.

    Runs of counted tokens are looked for in order, each with tokens before it. None where they are not found, or found
    in more than one way.
    """
    runs: list[tuple[int, int]] = []
    for at, counts in enumerate(mask):
        if counts and (at == 0 or not mask[at - 1]):
            runs.append((at, at + 1))
        elif counts:
            runs[-1] = runs[-1][0], at + 1
    for context in _CONTEXTS:
        starts = [max(begin - context, 0 if not at else runs[at - 1][1]) for at, (begin, _) in enumerate(runs)]
        wanted = [list(ids[start:end]) for start, (_, end) in zip(starts, runs)]
        first, last = _found(wanted, list(expanded)), _found_last(wanted, list(expanded))
        if first is not None and first == last:
            result = [False] * len(expanded)
            for offset, start, (begin, end) in zip(first, starts, runs):
                low = offset + begin - start
                result[low : low + end - begin] = [True] * (end - begin)
            return result
    return None


def _found(wanted: Sequence[list[int]], tokens: list[int]) -> list[int] | None:
    """Where each run is first, in order."""
    offsets: list[int] = []
    low = 0
    for run in wanted:
        offset = next((at for at in range(low, len(tokens) - len(run) + 1) if tokens[at : at + len(run)] == run), None)
        if offset is None:
            return None
        offsets.append(offset)
        low = offset + len(run)
    return offsets


def _found_last(wanted: Sequence[list[int]], tokens: list[int]) -> list[int] | None:
    """Where each run is last, in order."""
    found = _found([run[::-1] for run in wanted[::-1]], tokens[::-1])
    return None if found is None else [len(tokens) - at - len(run) for at, run in zip(found[::-1], wanted)]
