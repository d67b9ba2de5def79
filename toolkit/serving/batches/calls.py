"""A request to an ASGI application in the same process."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

CLIENT = ("batch", 0)
"""What the application takes for the client's address."""


@dataclass(frozen=True)
class Called:
    """A response.

    Args:
        status: of HTTP.
        request_id: in its header.
        retry_after: seconds after which the client may try again; None where it says none.
        body: of the response.
    """

    status: int
    request_id: str
    retry_after: float | None
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> Called:
    """The response to a JSON body. A caller that is cancelled leaves as a client does, and so cancels the request."""
    left = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, found, parts = 500, dict[bytes, bytes](), list[bytes]()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            found.update(message["headers"])
        elif message["type"] == "http.response.body":
            parts.append(bytes(message.get("body", b"")))

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers],
        "client": CLIENT,
        "server": CLIENT,
    }
    try:
        await app(scope, receive, send)
    finally:
        left.set()
    retry = found.get(b"retry-after", b"").decode()
    return Called(
        status,
        found.get(b"x-request-id", b"").decode(),
        float(retry) if retry.isdigit() else None,
        b"".join(parts),
    )
