"""TRL's rollout worker on ``toolkit serve``: samples say which weights made them, and failures are sentences."""

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import aiohttp
from trl.experimental.async_grpo import async_rollout_worker
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, _AsyncRolloutLoop

from toolkit.errors import ToolkitError
from train_patches.trl_clients import replaced

OLDEST, NEWEST = "sample/weight_version_min", "sample/weight_version_max"
"""Metrics of a sample: the server's weight versions at the ends of its turns."""
_SEEN: ContextVar[list[int]] = ContextVar("weight versions at the ends of a conversation's turns")


class ServerRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop in the worker's process. It ends with the trainer, and a refused request ends it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._versions: dict[str, list[int]] = {}  # by conversation

    def run(self) -> None:
        """Generate and score until the trainer stops this, or ends."""
        _end_with_parent()
        super().run()

    async def _generate_one(self, *arguments: Any, **keywords: Any) -> Any:
        seen: list[int] = []
        _SEEN.set(seen)  # each conversation is a task, with its context
        found = await super()._generate_one(*arguments, **keywords)
        self._versions |= {sequence.rollout_id: seen for sequence in found[2]}
        return found

    async def _post(self, path: str, payload: dict[str, Any], timeout: float, max_retries: int = 3) -> dict[str, Any]:
        body = {name: value for name, value in payload.items() if name != "model"}  # the one that is served

        session = self.session
        assert session is not None  # while the loops run

        async def once() -> dict[str, Any]:
            limit = aiohttp.ClientTimeout(total=timeout)
            async with session.post(f"{self.vllm_server_url}{path}", json=body, timeout=limit) as response:
                if 400 <= response.status < 500 and response.status != 429:
                    raise ToolkitError(f"The server refused a request: {(await response.json())['error']['message']}")
                response.raise_for_status()
                content: dict[str, Any] = await response.json()
                return content

        content: dict[str, Any] = await self._retry(once, label=f"POST {path}", max_attempts=max_retries)
        _SEEN.get().append(int(content["system_fingerprint"].rpartition("-")[2]))
        return content

    async def _score_group(self, group: Any) -> list[Any]:
        samples: list[Any] = await super()._score_group(group)
        sequences = [one for conversation in group.completions_sequences for one in conversation]
        for sample, sequence in zip(samples, sequences, strict=True):
            seen = self._versions[sequence.rollout_id]
            sample.metrics |= {OLDEST: float(min(seen)), NEWEST: float(max(seen))}
        for sequence in sequences:
            self._versions.pop(sequence.rollout_id, None)
        return samples


class ServerRolloutWorker(AsyncRolloutWorker):
    """TRL's controller of that process, without the package vLLM, of which it uses nothing."""

    _loop_cls = ServerRolloutLoop
    check_server: Callable[[], None] | None = None
    """Raises ToolkitError for a server with which the run cannot continue."""

    def __init__(self, **arguments: Any) -> None:
        with replaced(async_rollout_worker, "is_vllm_available", lambda: True):
            super().__init__(**arguments)

    def stop(self) -> None:
        """End the process; one that has failed is not asked to, for the event that asks waits for who listens to it."""
        if self._process is not None and (self._failed_event.is_set() or not self._process.is_alive()):
            self._process.kill()
            self._process.join()
            self._process = None
        super().stop()

    def check_health(self, stale_after_s: float) -> None:
        """Raise ToolkitError where the process or the server has ended, RuntimeError where the process hangs."""
        if self._failed_event.is_set():
            try:
                _, message, _ = self._exception_info_queue.get(timeout=1)
            except queue.Empty:
                message = "it gave no reason"
            raise ToolkitError(f"The rollout worker has ended: {message}")
        if self._process is not None and not self._process.is_alive():
            raise ToolkitError(f"The rollout worker has ended with status {self._process.exitcode}.")
        super().check_health(stale_after_s)
        if self.check_server is not None:
            self.check_server()


def _end_with_parent() -> None:
    """End this process when its parent has, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        print("The trainer has ended, and so its rollout worker ends.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="trainer", daemon=True).start()
