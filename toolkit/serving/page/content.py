"""The files of the pages for browsers, and the headers that they are sent with."""

from collections.abc import Mapping
from importlib.resources import files

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    # Nothing is loaded from elsewhere, and no other page may frame this one.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_files(folder_name: str = "files") -> dict[str, bytes]:
    """The files of the pages, or of the one in another folder ("docs"), by name."""
    folder = files("toolkit.serving.page") / folder_name
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in MEDIA_TYPES}


def media_type(name: str) -> str:
    """Of a file of the pages."""
    return f"{MEDIA_TYPES[name.rpartition('.')[2]]}; charset=utf-8"


def linked(page: bytes, links: Mapping[str, str]) -> bytes:
    """A page whose header links to others of the same server.

    Args:
        page: HTML with the comment ``<!-- links -->``.
        links: address and text of each; relative addresses also work behind a proxy.
    """
    made = "".join(f'<a href="{address}">{text}</a>' for address, text in links.items())
    return page.replace(b"<!-- links -->", made.encode())
