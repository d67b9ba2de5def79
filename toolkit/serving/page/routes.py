"""``GET /`` and ``GET /docs``, and the files of both pages."""

from importlib.resources import files

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

import toolkit
from toolkit.serving.base import Base
from toolkit.serving.page.blocks import add_blocks

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    # Nothing is loaded from elsewhere, and no other page may frame this one.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_files(folder_name: str = "files") -> dict[str, bytes]:
    """The files of the page, or of the one in another folder ("docs"), by name."""
    folder = files("toolkit.serving.page") / folder_name
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in MEDIA_TYPES}


def add_page(base: Base, shown: bool) -> None:
    """Add the routes to an application.

    Args:
        base: the application.
        shown: whether there is a page; otherwise ``/`` says in a line of text what is served, as it does to clients
            that are no browsers (Ollama's command line asks whether a server is there).
    """
    kept = page_files() if shown else {}

    @base.app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        if kept and "text/html" in request.headers.get("accept", ""):
            return _response("index.html", kept)
        return PlainTextResponse(f"toolkit {toolkit.__version__} serves {base.names[0]}.\n")

    _add_files(base, "page", kept)
    if shown:
        add_blocks(base)


def add_docs(base: Base) -> None:
    """Add ``/docs``, which shows ``/openapi.json`` and calls its endpoints, where the application has that document."""
    if base.app.openapi_url is None:
        return
    kept = page_files("docs")

    @base.app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _response("index.html", kept)

    _add_files(base, "docs", kept)


def _response(name: str, kept: dict[str, bytes]) -> Response:
    kind = MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(kept[name], media_type=f"{kind}; charset=utf-8", headers=HEADERS)


def _add_files(base: Base, path: str, kept: dict[str, bytes]) -> None:
    def add(name: str) -> None:
        @base.app.get(f"/{path}/{name}", include_in_schema=False)
        async def file() -> Response:
            return _response(name, kept)

    for name in kept:
        add(name)
