"""``GET /`` and the files of the page."""

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


def page_files() -> dict[str, bytes]:
    """The files of the page, by name."""
    folder = files("toolkit.serving.page") / "files"
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.name.rpartition(".")[2] in MEDIA_TYPES}


def add_page(base: Base, shown: bool) -> None:
    """Add the routes to an application.

    Args:
        base: the application.
        shown: whether there is a page; otherwise ``/`` says in a line of text what is served, as it does to clients
            that are no browsers (Ollama's command line asks whether a server is there).
    """
    kept = page_files() if shown else {}

    def response_of(name: str) -> Response:
        kind = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(kept[name], media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    @base.app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        if kept and "text/html" in request.headers.get("accept", ""):
            return response_of("index.html")
        return PlainTextResponse(f"toolkit {toolkit.__version__} serves {base.names[0]}.\n")

    for name in kept:

        async def file(name: str = name) -> Response:
            return response_of(name)

        base.app.get(f"/page/{name}", include_in_schema=False)(file)
    if shown:
        add_blocks(base)
