"""Which samples of each sampling session are there, for clients that wait for all of them at once."""

import asyncio
import contextlib
from typing import NamedTuple

Session = tuple[str, int]
"""A sampling session, and which of its clients: 0 is the first, others are its clones."""
CLONE_NUMBERS = 1_000_000_000
"""Requests of the clone c of a sampling client are numbered from c times this."""


class Completion(NamedTuple):
    """A promise that has its result.

    Args:
        number: when it came, counted over all sessions.
        name: of the promise.
        num_bytes: of the result; None for an error.
    """

    number: int
    name: str
    num_bytes: int | None


class Completions:
    """The completions of all sessions; for one event loop alone."""

    def __init__(self) -> None:
        self._count = 0
        self._of_session: dict[Session, dict[str, Completion]] = {}
        self._changed = asyncio.Condition()

    async def note(self, session: Session, name: str, num_bytes: int | None) -> None:
        """A promise of the session has its result now."""
        async with self._changed:
            self._count += 1
            self._of_session.setdefault(session, {})[name] = Completion(self._count, name, num_bytes)
            self._changed.notify_all()

    def forget(self, session: Session, name: str) -> None:
        """Tell of a promise no more."""
        known = self._of_session.get(session, {})
        known.pop(name, None)
        if not known:
            self._of_session.pop(session, None)

    async def after(self, session: Session, cursor: int, timeout: float) -> list[Completion]:
        """The session's completions whose number is greater than ``cursor``. Waits for one as long as ``timeout``."""
        found: list[Completion] = []

        def there() -> bool:
            known = self._of_session.get(session, {}).values()
            found[:] = sorted(one for one in known if one.number > cursor)
            return bool(found)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(there)
        return found
