"""Sleeping, pausing, aborting and caches."""

import asyncio
from typing import Any

from toolkit.engine import EngineUnavailable
from toolkit.engine.pooling import PoolingEngine
from toolkit.serving.base import Base
from toolkit.serving.errors import RequestError

LOOK = 0.01
"""Seconds between looks at whether running requests have finished."""


class Control:
    """Starts and stops what a server generates. Its methods belong to the event loop of the server."""

    def __init__(self, base: Base) -> None:
        self._engine, self._running = base.engine, base.running
        self._turn = 0  # of the last pause or resume: an earlier one that still waits gives up

    async def pause(self, mode: str, clear_cache: bool = True) -> None:
        """Run no step until ``resume``; requests that come meanwhile wait.

        Args:
            mode: "abort" ends running requests, "wait" lets them finish first, "keep" freezes them.
            clear_cache: forget cached prefixes; not with "keep".
        """
        self._turn += 1
        if mode == "wait":
            await self._drain(self._turn)
        await asyncio.to_thread(self._engine.pause_generation)
        if mode == "abort":
            error = RequestError("The request was aborted: the server was paused.", status=503, code="aborted")
            self._running.abort(self._engine, error)
        if mode != "keep" and clear_cache:
            await self.reset_prefix_cache()

    async def _drain(self, turn: int) -> None:
        """Wait until running requests have finished, and let no new ones in."""
        if self._engine.has_requests and (self._engine.generation_paused or self._engine.engine.is_sleeping):
            state = "paused" if self._engine.generation_paused else "asleep"
            raise RequestError(
                f"mode must be 'abort' or 'keep' while the server is {state}, got 'wait': no request would finish.",
                "mode",
                status=409,
            )
        self._running.close()
        try:
            while self._engine.has_requests:
                if self._engine.failure is not None:
                    raise EngineUnavailable(f"The engine has stopped: {self._engine.failure}")
                if self._turn != turn:
                    raise RequestError("The pause was given up: another pause or resume came.", status=409)
                await asyncio.sleep(LOOK)
            await asyncio.to_thread(self._engine.pause_generation)
        finally:
            if self._turn == turn:
                self._running.open()

    def resume(self) -> None:
        """Continue after ``pause``."""
        self._turn += 1
        self._running.open()
        self._engine.resume_generation()

    async def sleep(self, level: int, mode: str) -> None:
        """Give the memory of state back until ``wake``."""
        if mode != "keep" or level == 0:
            await self.pause(mode)
        if level > 0:
            await asyncio.to_thread(self._engine.sleep)

    async def wake(self, tags: list[str]) -> None:
        """Take back what ``tags`` name, or all."""
        if not tags or "kv_cache" in tags:
            await asyncio.to_thread(self._engine.wake)
        if not tags or "scheduling" in tags:
            self.resume()

    def abort(self, ids: list[str] | None) -> int:
        """End the requests of these ids, or all; how many were under way."""
        error = RequestError("The request was aborted.", status=499, code="aborted")
        return self._running.abort(self._engine, error, ids)

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes that no sequence holds; a pooling model has none."""
        await asyncio.to_thread(self._engine.call, self._forget)

    def _forget(self) -> None:
        engine: Any = self._engine.engine
        if not isinstance(engine, PoolingEngine):
            engine.reset_prefix_cache()
            engine.encoder_cache.clear()
