"""Training clients and samplers on the weights that an engine serves."""

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from toolkit.engine import AsyncEngine
from toolkit.errors import ToolkitError
from toolkit.files import write_atomic
from toolkit.live.catalogue import Run, runs_of
from toolkit.live.checkpoints import JOURNAL, Checkpoints, Saved
from toolkit.live.examples import Example
from toolkit.live.jobs import Job
from toolkit.live.journal import Journal
from toolkit.live.lora import LoraSettings
from toolkit.live.ordered import Ordered
from toolkit.live.requests import Client, Requests
from toolkit.live.samplers import Samplers, SamplingTarget
from toolkit.live.tenant import Tenant
from toolkit.live.worker import Worker
from toolkit.sentences import shown

REMEMBERED = 1024
"""Results of a client that a retry of their request still gets."""
LONGEST_NAME = 200
"""Characters of the name of a sampling session, which is a file's."""
SAMPLERS = ".samplers"
"""The folder of what sampling sessions sample."""
CREATE = "create"
"""The method of a client's request 0."""


@dataclass(frozen=True)
class LiveConfig:
    """How training is done.

    Args:
        base_models: public names of the model, of which clients give any; checkpoints have the first.
        root: folder of the checkpoints.
        durable: whether clients are there again, with their requests, when the server starts again.
        state_interval: steps of Adam between two states on disk; fewer are run again at a start.
        tokenizer: what clients load the tokenizer from, a folder or a name; None for the model's name.
        micro_batch_tokens: of one forward and backward of a request; several tenants' are a batch of at most twice as
            many. A tenant's numbers are a function of this too. None: 256 on a CPU, 1,024 elsewhere.
        max_samplers: saved versions that stay in the model while nobody samples them.
        max_wait: seconds between a stream's tokens within which training lets steps run; None: between batches only.
    """

    base_models: tuple[str, ...]
    root: Path
    tokenizer: str | None = None
    durable: bool = False
    state_interval: int = 8
    micro_batch_tokens: int | None = None
    max_samplers: int = 8
    max_wait: float | None = 0.05


@dataclass(frozen=True)
class Recovered:
    """A request that the journal of a client had when the server started.

    Args:
        name: of the client.
        number: of the request; 0 for its creation.
        method: "create", or as in ``Requests.job``.
        arguments: of it.
        future: of its result.
    """

    name: str
    number: int
    method: str
    arguments: Mapping[str, Any]
    future: Future[Any]


class LiveTraining:
    """Tenants of one engine's model. Methods may be called from any thread; they return at once, with a future.

    Args:
        engine: that serves the model; its adapters must be unbounded (``max_loras`` None).
        config: of the training.

    Attributes:
        recovered: requests of journals, which run again when training starts.

    Raises:
        ToolkitError: for a model that is not patched, an engine that evicts adapters, or journals of another model.
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
        # On a CPU the head over more rows would take longer than max_wait.
        self._micro_batch_tokens = config.micro_batch_tokens or (256 if model.device.type == "cpu" else 1024)
        self._worker = Worker(engine, model, self._micro_batch_tokens, config.max_wait)
        self._samplers = Samplers(engine, config.max_samplers)
        self._requests = Requests(engine, self.checkpoints, config.state_interval)
        self._clients: dict[str, Client] = {}
        self._targets: dict[str, SamplingTarget] = {}
        self._creating = threading.Lock()
        self._leaving: dict[Future[Any], bool] = {}  # by when they have left, whether clients trained all weights
        self.recovered = self._recover() if config.durable else []

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

    def runs(self) -> list[Run]:
        """The training clients that there are, and those that left checkpoints; the latest request first."""
        return runs_of(self._clients, self.checkpoints)

    @property
    def samplers(self) -> list[str]:
        """Names of the sampling sessions that this server has."""
        return list(self._targets)

    def tenant(self, name: str) -> Tenant:
        """The training client of an id. Raises ToolkitError for none."""
        return self._client(name).tenant

    def _client(self, name: str) -> Client:
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
        with self._creating:
            return self._created(name, settings, path, optimizer)

    def _created(self, name: str, settings: LoraSettings, path: str | None, optimizer: bool) -> Future[Any]:
        if name in self._clients:
            return self._clients[name].created
        self._check_alone(settings)
        journal = Journal(self.config.root / name / JOURNAL) if self.config.durable else None
        tokens = self._micro_batch_tokens
        if journal is not None:
            journal.create(self.base_model, settings, path, optimizer, tokens)
        return self._add(name, settings, path, optimizer, tokens, journal).created

    def _check_alone(self, settings: LoraSettings) -> None:
        """Raise ToolkitError for a client that trains all weights beside another one. Waits for those that leave."""
        for client in list(self._clients.values()):
            if settings.full:
                raise ToolkitError("lora_config.rank must be >= 1 while there are other training clients, got 0.")
            if client.tenant.settings.full:
                raise ToolkitError(
                    f"lora_config must wait: {client.tenant.name} trains all weights (rank 0) and is alone; unload it."
                )
        self._wait_for_leaving(settings.full)

    def _wait_for_leaving(self, all_of_them: bool = False) -> None:
        """Wait until a client that trained all weights has given the model its own back, or until any has left."""
        wait([left for left, full in list(self._leaving.items()) if full or all_of_them])

    def _add(
        self,
        name: str,
        settings: LoraSettings,
        path: str | None,
        optimizer: bool,
        micro_batch_tokens: int,
        journal: Journal | None,
        kept: tuple[int, Saved | None] = (0, None),
    ) -> Client:
        """A client, and the job that puts its adapter into the model.

        Args:
            kept: the number of the request that it continues behind, and its state then.
        """
        tenant, (number, state) = Tenant(name, self.base_model, settings), kept

        def arrive() -> None:
            saved = state
            if saved is None and path is not None:
                saved = self._requests.read(journal, 0, path, optimizer)
            tenant.arrive(self.engine.engine, self._scratch, saved)

        job = Job(arrive, on_engine=True)
        ordered = Ordered[Job](lambda one: self._worker.add(name, one), number + 1)
        client = Client(tenant, micro_batch_tokens, ordered, journal, job.future)
        self._clients[name] = client
        self._worker.add(name, job)
        return client

    def _recover(self) -> list[Recovered]:
        """The clients of all journals, with the requests behind their states."""
        found = []
        for folder in Journal.found(self.config.root):
            name, journal = folder.parent.name, Journal(folder)
            base_model, settings, path, optimizer, tokens = journal.created()
            self.check_base(base_model)
            kept = journal.state()
            client = self._add(name, settings, path, optimizer, tokens, journal, kept)
            found.append(Recovered(name, 0, CREATE, {"path": path}, client.created))
            for number, method, arguments in journal.requests():
                if number > kept[0]:
                    future = self._take(client, number, method, arguments, again=True)
                    found.append(Recovered(name, number, method, arguments, future))
        return found

    def unload(self, name: str) -> Future[Any]:
        """End a training client after the requests whose turn has come; its checkpoints stay."""
        client = self._client(name)
        forget = None if client.journal is None else client.journal.remove
        job = Job(lambda: client.tenant.leave(self.engine.engine), on_engine=True, then=forget)
        self._leaving[job.future] = client.tenant.settings.full
        job.future.add_done_callback(self._leaving.pop)
        del self._clients[name]
        self._worker.add(name, job)
        return job.future

    def _submit(self, name: str, number: int, method: str, **arguments: Any) -> Future[Any]:
        """Run a request of a client when its number's turn has come, and note it in the journal before.

        A number that has come before is a retry: its future is the first one's.
        """
        client = self._client(name)
        client.last_request = time.time()
        if number < 1:
            raise ToolkitError(f"seq_id must be >= 1, got {number}.")
        with client.lock:
            known = client.futures.get(number)
            if known is not None:
                return known
            if client.ordered.knows(number):
                raise ToolkitError(f"seq_id must be of the last {REMEMBERED} requests, got {number}.")
            if client.journal is not None:
                client.journal.write(number, method, arguments)
            return self._take(client, number, method, arguments, again=False)

    def _take(self, client: Client, number: int, method: str, arguments: Mapping[str, Any], again: bool) -> Future[Any]:
        job = self._requests.job(client, number, method, arguments, again)
        client.futures[number] = job.future
        if len(client.futures) > REMEMBERED:
            client.futures.pop(min(client.futures))
        client.ordered.add(number, job)
        return job.future

    def forward_backward(
        self,
        name: str,
        number: int,
        examples: Sequence[Example],
        loss_fn: str,
        config: Mapping[str, float | str],
        forward_only: bool = False,
    ) -> Future[Any]:
        """Add the gradients of examples to a client's; the future of a ``ForwardBackwardResult``."""
        given = {"examples": examples, "loss_fn": loss_fn, "config": config, "forward_only": forward_only}
        return self._submit(name, number, "forward_backward", **given)

    def optim_step(self, name: str, number: int, params: Mapping[str, float]) -> Future[Any]:
        """Write a step of Adam; the future of the gradient's norm."""
        return self._submit(name, number, "optim_step", params=params)

    def save(
        self,
        name: str,
        number: int,
        kind: str,
        path: str,
        overwrite: bool = False,
        ttl_seconds: float | None = None,
    ) -> Future[Any]:
        """Save a client's weights under a name; the future of the checkpoint's path.

        Args:
            kind: "weights", with the optimizer's state, "sampler_weights" or "external_weights".
            ttl_seconds: how long the checkpoint is kept; None for ever.
        """
        given = {"kind": kind, "path": path, "overwrite": overwrite, "ttl_seconds": ttl_seconds}
        return self._submit(name, number, "save", **given)

    def snapshot(self, name: str, number: int, inflight: bool, ttl_seconds: float | None = None) -> Future[Any]:
        """The future of a ``SamplingTarget``: a client's weights as they are then, or ``inflight`` as they change."""
        return self._submit(name, number, "snapshot", inflight=inflight, ttl_seconds=ttl_seconds)

    def load(self, name: str, number: int, path: str, optimizer: bool) -> Future[Any]:
        """Write a checkpoint's weights over a client's own."""
        return self._submit(name, number, "load", path=path, optimizer=optimizer)

    def name_target(self, name: str, target: SamplingTarget) -> None:
        """Remember what a sampling session samples."""
        self._targets[name] = target
        if self.config.durable:
            tenant = None if target.tenant is None else target.tenant.name
            about = {"path": target.path, "tenant": tenant, "version": target.version}
            file = self._target_file(name)
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, json.dumps(about))

    def named_target(self, name: str) -> SamplingTarget:
        """What a sampling session samples. Raises ToolkitError where nobody has named it."""
        if name not in self._targets:
            file = self._target_file(name)
            if not (self.config.durable and len(name) <= LONGEST_NAME and file.is_file()):
                raise ToolkitError(f"sampling_session_id must be a session of this server, got {shown(name)}.")
            about = json.loads(file.read_text(encoding="utf-8"))
            tenant, path = about["tenant"], about["path"]
            if tenant is None:
                self._targets[name] = self.target(path)
            else:
                self._targets[name] = SamplingTarget(tenant=self.tenant(tenant), version=about["version"])
        return self._targets[name]

    def _target_file(self, name: str) -> Path:
        return self.config.root / SAMPLERS / f"{quote(name, safe='')}.json"

    def target(self, path: str | None) -> SamplingTarget:
        """What a path names; the base model without one. Raises ToolkitError for no checkpoint of this model."""
        if path is None:
            return SamplingTarget()
        base_model, settings = self.checkpoints.about(path)
        self.check_base(base_model)
        if settings.full:
            raise ToolkitError(f"path must be of an adapter to be sampled, got all weights of a model ({shown(path)}).")
        return SamplingTarget(self.checkpoints.folder(path), path=path)

    @contextmanager
    def sampled(self, target: SamplingTarget) -> Iterator[str | None]:
        """Inside, requests may choose the adapter that is given (None for the base). Waits for the engine."""
        if target.tenant is not None:
            target.tenant.check()
            target.check()
            yield target.tenant.adapter
            target.check()  # a step meanwhile
            return
        full = next((name for name, one in list(self._clients.items()) if one.tenant.settings.full), None)
        if full is not None:
            raise ToolkitError(f"sampling_session_id must be of {full}, which trains all weights, got another one's.")
        self._wait_for_leaving()
        context = nullcontext() if target.folder is None else self._samplers.adapter(target.folder)
        with context as adapter:
            yield adapter
