"""The path of this server that a request for another one may have meant."""

from starlette.requests import Request
from starlette.routing import Match

OTHER_PATHS = {
    "/completion": "/v1/completions",
    "/generate": "/v1/completions",
    "/infill": "/v1/completions",
    "/invocations": "/v1/chat/completions",
    "/slots": "/metrics",
    "/api/embeddings": "/api/embed",
}
"""Paths of llama.cpp, SGLang, SageMaker and Ollama, each with the one of this server for the same."""


def meant_path(request: Request) -> str | None:
    """The path that offers what ``request`` asked for, or None.

    A client whose base URL lacks ``/v1``, or has it twice, is told so; so is one that was written for another server.
    """
    root = request.app.root_path
    path = request.scope["path"].removeprefix(root)
    named = OTHER_PATHS.get(path)
    candidates = [named] if named else [f"/v1{path}", path.removeprefix("/v1")]
    for candidate in candidates:
        scope = {**request.scope, "path": f"{root}{candidate}"}
        if candidate != path and any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            return candidate
    return None
