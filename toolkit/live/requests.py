"""A training client's numbered requests, and the jobs that they become. The same request gives the same job again."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from toolkit.engine import AsyncEngine
from toolkit.live.adam import AdamParams
from toolkit.live.checkpoints import Checkpoints, Saved
from toolkit.live.examples import Example
from toolkit.live.jobs import ForwardBackward, Job
from toolkit.live.journal import Journal
from toolkit.live.ordered import Ordered
from toolkit.live.samplers import SamplingTarget
from toolkit.live.tenant import Tenant

EPHEMERAL = "ephemeral"
"""How names of checkpoints begin that no client gave."""


@dataclass
class Client:
    """A training client of the server.

    Args:
        tenant: in the model.
        micro_batch_tokens: of its requests, for good.
        ordered: releases its jobs in order.
        journal: of its requests; None where nothing is to survive the server.
        created: the future of its creation.
        last_request: seconds since the epoch of the last one.
        futures: of its requests, by number.
        lock: is held while a request is taken in.
    """

    tenant: Tenant
    micro_batch_tokens: int
    ordered: Ordered[Job]
    journal: Journal | None
    created: Future[Any]
    last_request: float = field(default_factory=time.time)
    futures: dict[int, Future[Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Requests:
    """Makes jobs of requests.

    Args:
        engine: of the model.
        checkpoints: that are saved and read.
        state_interval: steps of Adam between two states in a journal.
    """

    def __init__(self, engine: AsyncEngine, checkpoints: Checkpoints, state_interval: int) -> None:
        self._engine, self._checkpoints, self._state_interval = engine, checkpoints, state_interval

    def job(self, client: Client, number: int, method: str, arguments: Mapping[str, Any], again: bool) -> Job:
        """The job of a request.

        Args:
            method: "forward_backward", "optim_step", "save", "snapshot" or "load".
            arguments: of the method of this class.
            again: whether the request may have run before the server started.
        """
        makers: dict[str, Callable[..., Job]] = {
            "forward_backward": self.forward_backward,
            "optim_step": self.optim_step,
            "save": self.save,
            "snapshot": self.snapshot,
            "load": self.load,
        }
        return makers[method](client, number, again, **arguments)

    def forward_backward(
        self,
        client: Client,
        number: int,
        again: bool,
        examples: Sequence[Example],
        loss_fn: str,
        config: Mapping[str, float | str],
        forward_only: bool,
    ) -> Job:
        """Its result is a ``ForwardBackwardResult``."""
        engine = self._engine.engine
        limits = engine.vocab_size, engine.max_sequence_len, client.micro_batch_tokens
        return ForwardBackward(client.tenant, examples, loss_fn, config, forward_only, limits)

    def optim_step(self, client: Client, number: int, again: bool, params: Mapping[str, float]) -> Job:
        """Its result is the norm of the gradient."""
        tenant, journal = client.tenant, client.journal

        def keep() -> None:
            if journal is None or tenant.optimizer.step % self._state_interval:
                return
            try:
                journal.keep(number, tenant.saved(True))
            except OSError:  # the requests are there, and more of them are run again
                traceback.print_exc(file=sys.stderr)

        return Job(lambda: tenant.step(AdamParams(**params)), on_engine=True, then=keep)

    def save(
        self,
        client: Client,
        number: int,
        again: bool,
        kind: str,
        path: str,
        overwrite: bool,
        ttl_seconds: float | None = None,
    ) -> Job:
        """Its result is the path of the checkpoint."""
        return Job(lambda: self._saved(client, again, kind, path, overwrite, ttl_seconds))

    def _saved(
        self, client: Client, again: bool, kind: str, path: str, overwrite: bool, ttl_seconds: float | None = None
    ) -> str:
        tenant, checkpoints = client.tenant, self._checkpoints
        known = checkpoints.path_of(tenant.name, kind, path) if again else None
        if known is not None:
            return known
        return checkpoints.save(tenant.name, kind, path, tenant.saved(kind == "weights"), overwrite, ttl_seconds)

    def snapshot(
        self, client: Client, number: int, again: bool, inflight: bool, ttl_seconds: float | None = None
    ) -> Job:
        """Its result is a ``SamplingTarget``."""

        def take() -> SamplingTarget:
            tenant = client.tenant
            if inflight or tenant.settings.full:
                return SamplingTarget(tenant=tenant, version=None if inflight else tenant.version)
            path = self._saved(client, again, "sampler_weights", f"{EPHEMERAL}-{number}", True, ttl_seconds)
            return SamplingTarget(self._checkpoints.folder(path), path=path)

        return Job(take)

    def load(self, client: Client, number: int, again: bool, path: str, optimizer: bool) -> Job:
        """Its result is None."""
        return Job(lambda: client.tenant.load(self.read(client.journal, number, path, optimizer)), on_engine=True)

    def read(self, journal: Journal | None, number: int, path: str, optimizer: bool) -> Saved:
        """The checkpoint that a request reads."""

        def saved() -> Saved:
            return self._checkpoints.read(path, optimizer)

        return saved() if journal is None else journal.loaded(number, saved)
