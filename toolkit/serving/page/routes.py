"""``GET /`` and ``GET /docs``, the page of a watched run, and the files of all of them."""

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

import toolkit
from toolkit.serving.base import Base
from toolkit.serving.page.blocks import add_blocks
from toolkit.serving.page.content import HEADERS, linked, media_type, page_files
from toolkit.serving.watch.routes import add_watch


def add_page(base: Base, shown: bool) -> None:
    """Add the routes to an application.

    Args:
        base: the application.
        shown: whether there is a page; otherwise ``/`` says in a line of text what is served, as it does to clients
            that are no browsers (Ollama's command line asks whether a server is there).
    """
    kept = page_files() if shown else {}
    watched = base.config.watch if shown else None

    @base.app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        if kept and "text/html" in request.headers.get("accept", ""):
            return _response("index.html", kept)
        return PlainTextResponse(f"toolkit {toolkit.__version__} serves {base.names[0]}.\n")

    if watched is not None:
        kept["index.html"] = linked(kept["index.html"], {"watch": "Training"})
        kept["watch.html"] = linked(kept["watch.html"], {"./": "Chat"})

        @base.app.get("/watch", include_in_schema=False)
        async def watch() -> Response:
            return _response("watch.html", kept)

        add_watch(base, watched)
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
    return Response(kept[name], media_type=media_type(name), headers=HEADERS)


def _add_files(base: Base, path: str, kept: dict[str, bytes]) -> None:
    def add(name: str) -> None:
        @base.app.get(f"/{path}/{name}", include_in_schema=False)
        async def file() -> Response:
            return _response(name, kept)

    for name in kept:
        add(name)
