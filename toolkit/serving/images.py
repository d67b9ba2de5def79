"""Images of requests: data URLs, and files of one folder where the server allows it. Nothing is fetched."""

import base64
import io
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from toolkit.chat.images import read_image
from toolkit.serving.errors import RequestError

MAX_PIXELS = 64 * 2**20
"""Of the images of a request together. A small file may hold a large one."""
MAX_FILE = 64 * 2**20
"""Bytes of a file."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Others run programs, or have another size than they say."""


def read_url(url: str, folder: Path | None, where: str, pixels: int = MAX_PIXELS) -> Any:
    """An image as RGB of Pillow.

    Args:
        url: ``data:...;base64,...`` or ``file://...``.
        folder: that files must lie in; None allows no files.
        where: the field, for errors.
        pixels: most of them.

    Raises:
        RequestError: another kind of URL, a file that is not allowed, or what is no image.
    """
    from PIL import Image

    if url.startswith("data:"):
        raw = _data(url, where)
    elif url.startswith("file://"):
        raw = _file(url, folder, where)
    else:
        kinds = "a data URL" if folder is None else "a data URL or a file:// URL"
        raise RequestError(f"'{where}' must be {kinds}, since nothing is fetched, got {url!r:.60}.", where)
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height <= pixels:
            return read_image(image, Path())
        found = f"one of {image.width} x {image.height}"
    except Exception as error:  # Pillow raises many kinds
        found = f"what Pillow does not read ({type(error).__name__})"
    raise RequestError(
        f"'{where}' must be images ({', '.join(FORMATS)}) of <= {MAX_PIXELS} pixels together, got {found}.", where
    )


def _data(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if comma and head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except ValueError:
        pass
    raise RequestError(f"'{where}' must be a data URL in base64, got {url!r:.60}.", where)


def _file(url: str, folder: Path | None, where: str) -> bytes:
    if folder is None:
        raise RequestError(
            f"'{where}' must be a data URL, since the server allows no local files (--allowed-local-media-path).", where
        )
    try:
        path = (folder / unquote(url.removeprefix("file://").removeprefix("localhost"))).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file() and path.stat().st_size <= MAX_FILE:
            return path.read_bytes()
    except (OSError, ValueError, RuntimeError):
        pass
    # One sentence for all: a client learns nothing of files elsewhere.
    raise RequestError(f"'{where}' must be a file of the folder that the server allows.", where)
