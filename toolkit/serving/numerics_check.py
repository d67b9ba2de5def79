"""Clients that compute by other numerics than the server, which would train on logprobs that are not theirs."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request

from toolkit.engine.fingerprint import differing_part, read_fingerprint
from toolkit.sentences import shown
from toolkit.serving.errors import RequestError

HEADER = "x-numerics-fingerprint"


class NumericsCheck:
    """Refuses fingerprints that differ from the server's, in bitwise mode.

    Args:
        fingerprint: of the server, see ``numerics_fingerprint``; None refuses none.
    """

    def __init__(self, fingerprint: dict[str, str] | None) -> None:
        self.fingerprint = fingerprint

    async def check(self, request: Request) -> None:
        """Raises RequestError for a header with another fingerprint."""
        given = request.headers.get(HEADER)
        if given is None:
            return
        self.read_and_compare(given, HEADER)

    def read_and_compare(self, given: Any, field: str) -> None:
        """Raises RequestError for what is no fingerprint, as text or by name, or another one; None is fine."""
        if given is None:
            return
        try:
            found = read_fingerprint(given) if isinstance(given, str) else given
            if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
                raise ValueError(field)
        except ValueError:
            message = f"{field} must be such as 'dtype=float32; device=cpu', got {shown(given)}."
            raise RequestError(message, field) from None
        self.compare(found, field)

    def compare(self, given: Mapping[str, str], field: str) -> None:
        """Raises RequestError where ``given`` differs, with the part that does."""
        ours = self.fingerprint
        if ours is None or ours.get("numerics") != "bitwise":
            return
        part = differing_part(ours, dict(given))
        if part is not None:
            here = f"{part} {shown(ours[part])}" if part in ours else f"no {part}"
            there = shown(given[part]) if part in given else "none"
            raise RequestError(
                f"{field} must have {here}, as this server has in bitwise mode, got {there}.",
                field,
                status=412,
                code="numerics_mismatch",
            )
