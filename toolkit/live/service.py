"""Training clients and samplers on the weights that an engine serves."""

import itertools
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.engine import AsyncEngine
from toolkit.errors import ToolkitError
from toolkit.live.adam import AdamParams
from toolkit.live.checkpoints import Checkpoints
from toolkit.live.examples import Example
from toolkit.live.jobs import ForwardBackward, Job
from toolkit.live.lora import LoraSettings
from toolkit.live.ordered import Ordered
from toolkit.live.samplers import Samplers
from toolkit.live.tenant import Tenant
from toolkit.live.worker import Worker
from toolkit.sentences import shown

EPHEMERAL = "ephemeral"
REMEMBERED = 1024
"""Results of a client that a retry of their request still gets."""


@dataclass(frozen=True)
class LiveConfig:
    """How training is done.

    Args:
        base_models: public names of the model, of which clients give any; checkpoints have the first.
        root: folder of the checkpoints.
        tokenizer: what clients load the tokenizer from, a folder or a name; None for the model's name.
        micro_batch_tokens: of one forward and backward of a request; several tenants' are a batch of at most twice as
            many. A tenant's numbers are a function of this too.
        max_samplers: saved versions that stay in the model while nobody samples them.
    """

    base_models: tuple[str, ...]
    root: Path
    tokenizer: str | None = None
    micro_batch_tokens: int = 1024
    max_samplers: int = 8


@dataclass(frozen=True)
class SamplingTarget:
    """What a sampling session samples.

    Args:
        folder: of saved weights.
        tenant: whose weights of now are sampled, where ``folder`` is None; None for the base model.
        path: of saved weights, as clients name it.
    """

    folder: Path | None = None
    tenant: Tenant | None = None
    path: str | None = None


@dataclass
class _Client:
    tenant: Tenant
    created: Future[Any]
    ordered: Ordered[Job]
    futures: dict[int, Future[Any]] = field(default_factory=dict)  # by the number of the request
    lock: threading.Lock = field(default_factory=threading.Lock)


class LiveTraining:
    """Tenants of one engine's model. Methods may be called from any thread; they return at once, with a future.

    Args:
        engine: that serves the model; its adapters must be unbounded (``max_loras`` None).
        config: of the training.

    Raises:
        ToolkitError: for a model that is not patched, or an engine that evicts adapters.
    """

    def __init__(self, engine: AsyncEngine, config: LiveConfig) -> None:
        model = getattr(getattr(engine.engine, "backend", None), "model", None)
        if model is None or engine.engine.adapters is None:
            raise ToolkitError("engine must be of a patched model to train, got another one.")
        if engine.engine.config.max_loras is not None:
            raise ToolkitError(f"max_loras must be None with training, got {engine.engine.config.max_loras}.")
        self.engine, self.config = engine, config
        self.checkpoints = Checkpoints(config.root)
        self._scratch = config.root / ".scratch"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        self._worker = Worker(engine, model, 2 * config.micro_batch_tokens)
        self._samplers = Samplers(engine, config.max_samplers)
        self._clients: dict[str, _Client] = {}
        self._ephemeral = itertools.count()

    def start(self) -> None:
        """Start the thread of training."""
        self._worker.start()

    def close(self) -> None:
        """End the thread of training, and take saved versions out of the model. What is left is cancelled."""
        self._worker.close()
        self._samplers.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def architecture(self) -> str:
        """The type of the model, as transformers names it."""
        config = getattr(getattr(self.engine.engine.backend, "model", None), "config", None)
        return str(getattr(config, "model_type", ""))

    @property
    def names(self) -> list[str]:
        """Ids of the training clients."""
        return list(self._clients)

    def tenant(self, name: str) -> Tenant:
        """The training client of an id. Raises ToolkitError for none."""
        return self._client(name).tenant

    def _client(self, name: str) -> _Client:
        if name not in self._clients:
            raise ToolkitError(f"model_id must be a training client of this server, got {shown(name)}.")
        return self._clients[name]

    @property
    def base_model(self) -> str:
        """The name of the model in checkpoints and responses."""
        return self.config.base_models[0]

    def check_base(self, name: str) -> None:
        """Raise ToolkitError for another base model than the one that is served."""
        if name not in self.config.base_models:
            allowed = " or ".join(map(shown, self.config.base_models))
            raise ToolkitError(f"base_model must be {allowed}, got {shown(name)}.")

    def create(self, name: str, base_model: str, lora: Mapping[str, Any]) -> Future[Any]:
        """A new training client; the future of its creation. One that is known is not created again.

        Args:
            name: its id.
            base_model: that the client asks for.
            lora: fields of ``LoraSettings``; a seed that is None is a fresh one.
        """
        self.check_base(base_model)
        given = {key: value for key, value in lora.items() if value is not None}
        settings = LoraSettings(**{"seed": secrets.randbits(62), **given})
        return self._create(name, settings, None, False)

    def create_from(self, name: str, path: str, optimizer: bool) -> Future[Any]:
        """``create`` with the weights of a checkpoint, and with its optimizer's state where that is asked for."""
        base_model, settings = self.checkpoints.about(path)
        self.check_base(base_model)
        return self._create(name, settings, path, optimizer)

    def _create(self, name: str, settings: LoraSettings, path: str | None, optimizer: bool) -> Future[Any]:
        if name in self._clients:
            return self._clients[name].created
        tenant = Tenant(name, self.base_model, settings)

        def arrive() -> None:
            saved = None if path is None else self.checkpoints.read(path, optimizer)
            tenant.arrive(self.engine.engine, self._scratch, saved)

        job = Job(arrive, on_engine=True)
        self._clients[name] = _Client(tenant, job.future, Ordered(lambda one: self._worker.add(name, one)))
        self._worker.add(name, job)
        return job.future

    def unload(self, name: str) -> Future[Any]:
        """End a training client after the requests whose turn has come; its checkpoints stay."""
        client = self._client(name)
        del self._clients[name]
        job = Job(lambda: client.tenant.leave(self.engine.engine), on_engine=True)
        self._worker.add(name, job)
        return job.future

    def _submit(self, name: str, seq_id: int | None, job: Job) -> Future[Any]:
        """Run a job of a client when its number's turn has come; without a number, when it arrives.

        A number that has come before is a retry: its future is the first one's, and the job is dropped.
        """
        client = self._client(name)
        if seq_id is None:
            self._worker.add(name, job)
            return job.future
        if seq_id < 1:
            raise ToolkitError(f"seq_id must be >= 1, got {seq_id}.")
        with client.lock:
            known = client.futures.get(seq_id)
            if known is not None:
                return known
            if client.ordered.knows(seq_id):
                raise ToolkitError(f"seq_id must be of the last {REMEMBERED} requests, got {seq_id}.")
            client.futures[seq_id] = job.future
            if len(client.futures) > REMEMBERED:
                client.futures.pop(min(client.futures))
            client.ordered.add(seq_id, job)
        return job.future

    def forward_backward(
        self,
        name: str,
        seq_id: int | None,
        examples: Sequence[Example],
        loss_fn: str,
        config: Mapping[str, float | str],
        forward_only: bool = False,
    ) -> Future[Any]:
        """Add the gradients of examples to a client's; the future of a ``ForwardBackwardResult``."""
        engine = self.engine.engine
        limits = engine.vocab_size, engine.max_sequence_len, self.config.micro_batch_tokens
        job = ForwardBackward(self.tenant(name), examples, loss_fn, config, forward_only, limits)
        return self._submit(name, seq_id, job)

    def optim_step(self, name: str, seq_id: int | None, params: Mapping[str, float]) -> Future[Any]:
        """Write a step of Adam; the future of the gradient's norm."""
        tenant = self.tenant(name)
        return self._submit(name, seq_id, Job(lambda: tenant.step(AdamParams(**params)), on_engine=True))

    def save(self, name: str, seq_id: int | None, kind: str, path: str, replace: bool = False) -> Future[Any]:
        """Save a client's weights under a name; the future of the checkpoint's path.

        Args:
            kind: "weights", with the optimizer's state, or "sampler_weights".
        """
        tenant = self.tenant(name)

        def save() -> str:
            return self.checkpoints.save(name, kind, path, tenant.saved(kind == "weights"), replace)

        return self._submit(name, seq_id, Job(save))

    def snapshot(self, name: str, seq_id: int | None, inflight: bool) -> Future[Any]:
        """The future of a ``SamplingTarget``: a client's weights as they are then, or ``inflight`` as they change."""
        tenant = self.tenant(name)

        def take() -> SamplingTarget:
            if inflight:
                return SamplingTarget(tenant=tenant)
            path = self.checkpoints.save(
                name, "sampler_weights", f"{EPHEMERAL}-{next(self._ephemeral)}", tenant.saved(False), replace=True
            )
            return SamplingTarget(self.checkpoints.folder(path), path=path)

        return self._submit(name, seq_id, Job(take))

    def load(self, name: str, seq_id: int | None, path: str, optimizer: bool) -> Future[Any]:
        """Write a checkpoint's weights over a client's own."""
        tenant = self.tenant(name)
        job = Job(lambda: tenant.load(self.checkpoints.read(path, optimizer)), on_engine=True)
        return self._submit(name, seq_id, job)

    def target(self, path: str | None) -> SamplingTarget:
        """What a path names; the base model without one. Raises ToolkitError for no checkpoint of this model."""
        if path is None:
            return SamplingTarget()
        self.check_base(self.checkpoints.about(path)[0])
        return SamplingTarget(self.checkpoints.folder(path), path=path)

    @contextmanager
    def sampled(self, target: SamplingTarget) -> Iterator[str | None]:
        """Inside, requests may choose the adapter that is given (None for the base). Waits for the engine."""
        if target.folder is not None:
            with self._samplers.adapter(target.folder) as adapter:
                yield adapter
        elif target.tenant is not None:
            target.tenant.check()
            yield target.tenant.adapter
        else:
            yield None
