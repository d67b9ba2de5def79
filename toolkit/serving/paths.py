"""The path of this server that a request for another one may have meant."""

import re

from starlette.requests import Request
from starlette.routing import Match

OTHER_PATHS = {
    "/completion": "/v1/completions",
    "/generate": "/v1/completions",
    "/generate_stream": "/v1/completions",
    "/get_server_info": "/server_info",
    "/infill": "/v1/completions",
    "/invocations": "/v1/chat/completions",
    "/slots": "/metrics",
    "/api/embeddings": "/api/embed",
}
"""Paths of llama.cpp, SGLang, TGI, SageMaker and Ollama, each with the one of this server for the same."""


def meant_path(request: Request) -> str | None:
    """The path that offers what ``request`` asked for, or None.

    A client whose base URL lacks ``/v1``, has it twice or ends with a slash is told so; so is one that was written for
    another server.
    """
    root = request.app.root_path
    path = request.scope["path"].removeprefix(root)
    named = OTHER_PATHS.get(path)
    single = re.sub("/{2,}", "/", path)
    candidates = [named] if named else [f"/v1{path}", path.removeprefix("/v1"), single, f"/v1{single}"]
    for candidate in candidates:
        scope = {**request.scope, "path": f"{root}{candidate}"}
        if candidate != path and any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            return candidate
    return None
