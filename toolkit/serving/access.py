"""Who may use the server: API keys (RFC 6750) and the origins of web pages (CORS)."""

import contextlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import Request

from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.errors import RequestError

OPENED_BY = "toolkit.api_key"
"""In the scope of a request: the key that opened the server to it, among all that it sent."""
_ORIGIN = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#]+")


class ApiKeys:
    """The keys that open the API; none of them, and it is open.

    Args:
        keys: as text. Clients send other characters than ASCII as UTF-8 or as Latin-1; both are the key.

    Raises:
        ToolkitError: for an empty key, which would let in whoever sends none.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys: list[bytes] = []
        for key in keys:
            if not key.strip():
                raise ToolkitError("api_key must be text that is not empty, got ''; leave it out for none.")
            # Surrogates stand for the bytes of a command line or an environment that is not UTF-8.
            self._keys.append(key.strip().encode("utf-8", "surrogateescape"))
            with contextlib.suppress(UnicodeEncodeError):
                self._keys.append(key.strip().encode("latin-1"))

    def __bool__(self) -> bool:
        return bool(self._keys)

    async def check(self, request: Request) -> None:
        """Raises RequestError unless the request has one of the keys: as ``Authorization: Bearer``, or as
        ``X-Api-Key``, where Anthropic's clients put it.
        """
        if not self._keys:
            return
        given = [b""]
        for name, value in request.scope["headers"]:
            scheme, _, key = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":
                given.append(key.strip())
            elif name == b"x-api-key":
                given.append(value.strip())
        # Every key is compared, in constant time, so that the time says nothing about any.
        right = [key for key in given for one in self._keys if hmac.compare_digest(key, one)]
        if not right:
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
        request.scope[OPENED_BY] = right[0]


@dataclass(frozen=True)
class AdminAccess:
    """Who may use the admin endpoints: who has a key, or where ``enabled`` whoever reaches the server.

    Args:
        keys: that open them; the server's other keys do not.
        enabled: open them without an admin key, for a server that nobody else reaches. Web pages are kept out.

    Raises:
        ToolkitError: for an empty key.
    """

    keys: tuple[str, ...] = ()
    enabled: bool = False

    def __post_init__(self) -> None:
        ApiKeys(self.keys)

    async def check(self, request: Request) -> None:
        """Raises RequestError for who may not."""
        if self.keys:
            await ApiKeys(self.keys).check(request)
        elif not self.enabled:
            message = (
                "The admin endpoints are off; start the server with --admin-api-key KEY, or with "
                "--enable-admin-endpoints on 127.0.0.1."
            )
            raise RequestError(message, status=403, code="admin_endpoints_off")
        elif "origin" in request.headers:
            message = "The admin endpoints are closed to web pages; start the server with --admin-api-key KEY."
            raise RequestError(message, status=403, code="admin_endpoints_off")


@dataclass(frozen=True)
class Cors:
    """Which web pages may use the server from a browser (the options of ``CORSMiddleware``).

    Args:
        allow_origins: such as "https://chat.example.org"; "*" is any.
        allow_methods: "*" is any.
        allow_headers: "*" is any.
        allow_credentials: whether pages may send cookies and HTTP authentication.

    Raises:
        ToolkitError: for an origin that no browser sends.
    """

    allow_origins: tuple[str, ...]
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False

    def __post_init__(self) -> None:
        for origin in self.allow_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ToolkitError(
                    f"allowed_origins must be '*' or such as 'https://host:port', without a path, got {shown(origin)}."
                )
