"""What every response has, around the routes: its id, its count, and an answer to HEAD wherever GET has one."""

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.serving.metrics import Counter

MAX_REQUEST_ID = 256
REQUEST_ID_HEADERS = ("x-request-id", "request-id")
"""The first is OpenAI's, and requests may give it; the second is what Anthropic's clients read."""
_ID = REQUEST_ID_HEADERS[0].encode()


class CountRequests:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter
        self._paths: frozenset[str] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._paths and "app" in scope:  # all routes are there when the first request is
            self._paths = frozenset(getattr(route, "path", "") for route in scope["app"].routes)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                self.counter.add(path=path if path in self._paths else "other", status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


class RequestIds:
    """Gives each response the ``X-Request-Id`` of its request, or a new one; routes read it in the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == _ID), b"")
        identity = given if 0 < len(given) <= MAX_REQUEST_ID else uuid.uuid4().hex.encode()
        scope["toolkit.request_id"] = identity.decode("latin-1")

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = [(name.encode(), identity) for name in REQUEST_ID_HEADERS]
                message["headers"] = [*message.get("headers", ()), *ids]
            await send(message)

        await self.app(scope, receive, named if scope["type"] == "http" else send)


class HeadAsGet:
    """Answers HEAD as GET, without the body (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, bodiless)
        else:
            await self.app(scope, receive, send)
