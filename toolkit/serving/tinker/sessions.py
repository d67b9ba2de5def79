"""What Tinker's routes share, and those of sessions and promises."""

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from toolkit.files import write_atomic
from toolkit.live import LiveTraining
from toolkit.sentences import shown
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Generation
from toolkit.serving.parsing import parse, parse_query
from toolkit.serving.tinker import requests
from toolkit.serving.tinker.promises import LONGEST_POLL, Promises

ROOT = "/api/v1"
KEY = "x-api-key"
KEY_PREFIX = "tml-"
TESTED_CLIENTS = ("0.38.0", "0.36.0")
"""Versions of the tinker client that the tests of the soak level run."""
LARGEST_CHUNK = 5_000_000
"""Most bytes of a ``forward_backward``, as clients estimate them."""

Parsed = TypeVar("Parsed", bound=BaseModel)


@dataclass
class Tinker:
    """What the routes share.

    Args:
        generation: the application.
        live: training on its engine.

    Attributes:
        promises: of all clients.
        sessions: the training clients of each.
    """

    generation: Generation
    live: LiveTraining
    promises: Promises = field(default_factory=Promises)
    sessions: dict[str, list[str]] = field(default_factory=dict)

    def route(self, method: str, path: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
        """Decorates the function of a route below ``/api/v1``, which asks for a key."""
        base = self.generation.base
        dependencies = [*base.guarded, Depends(check_key)]
        return base.app.api_route(
            f"{ROOT}/{path}", methods=[method], dependencies=dependencies, include_in_schema=False, response_model=None
        )

    async def read(self, request: Request, kind: type[Parsed]) -> Parsed:
        """The body of a request."""
        return await self.generation.base.read(request, lambda raw: parse(kind, raw))

    def begin_session(self, name: str) -> None:
        """Take in a session, which is there when the server starts again if training is durable."""
        self.sessions[name] = []
        if self.live.config.durable:
            self._sessions_folder.mkdir(exist_ok=True)
            write_atomic(self._sessions_folder / name, "")

    def end_session(self, name: str) -> list[str]:
        """Forget a session; its training clients. None of a session that is not known."""
        if name in self.sessions and self.live.config.durable:
            (self._sessions_folder / name).unlink(missing_ok=True)
        return self.sessions.pop(name, [])

    def recover_sessions(self) -> None:
        """Take in the sessions of an earlier server, and their training clients."""
        if self._sessions_folder.is_dir():
            self.sessions |= {path.name: [] for path in self._sessions_folder.glob("[!.]*")}
        for name in self.live.names:
            self.sessions.setdefault(name.partition(":")[0], []).append(name)

    @property
    def _sessions_folder(self) -> Path:
        return self.live.config.root / ".sessions"

    def session(self, name: str) -> list[str]:
        """The training clients of a session. Raises RequestError (410: it has ended) for none."""
        if name not in self.sessions:
            raise RequestError(f"session_id must be a session of this server, got {shown(name)}.", status=410)
        return self.sessions[name]


async def check_key(request: Request) -> None:
    """Raise RequestError unless the request has a key of Tinker's form; ``--api-key`` says which are right."""
    if not request.headers.get(KEY, "").startswith(KEY_PREFIX):
        raise RequestError(f"X-API-Key must begin with {KEY_PREFIX}.", status=401, code="invalid_api_key")


def tinker_error(error: RequestError, request_id: str) -> Json:
    """The body of an error, as clients show it."""
    return {"detail": str(error), "message": str(error), "request_id": request_id}


def add_session_routes(tinker: Tinker, recover: Callable[[Tinker], None]) -> None:
    """The routes of sessions and promises.

    Args:
        recover: promises again what clients of an earlier server wait for.
    """
    base = tinker.generation.base

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        tinker.recover_sessions()
        recover(tinker)
        tinker.live.start()
        yield
        await base.on_thread(tinker.live.close)
        await tinker.promises.close()

    base.services.append(running)

    @tinker.route("POST", "client/config")
    async def config() -> Json:
        chunk = min(LARGEST_CHUNK, base.config.max_body_size * 3 // 4)
        # A client that waits for all of a session's samples at once does not notice that a server has forgotten one,
        # as a server does that starts again.
        together = not tinker.live.config.durable
        return {
            "pjwt_auth_enabled": False,
            "proto_compress_fwdbwd": True,
            "fwdbwd_max_chunk_bytes_count": chunk,
            "sample_use_retrieve_futures": together,
        }

    @tinker.route("POST", "client/dynamic_config")
    async def dynamic_config() -> Json:
        return {"sample_cancel_enabled": True}

    @tinker.route("GET", "healthz")
    async def health() -> Json:
        return {"status": "ok"}

    @tinker.route("POST", "telemetry")
    async def telemetry() -> Json:
        return {"status": "accepted"}

    @tinker.route("GET", "get_server_capabilities")
    async def capabilities() -> Json:
        longest = base.config.max_model_len
        names = tinker.live.config.base_models
        common = {"max_context_length": longest, "trainable": True, "sampleable": True}
        models = [{"model_name": name, **common} for name in names]
        return {"supported_models": models, "tested_client_versions": list(TESTED_CLIENTS)}

    @tinker.route("POST", "create_session")
    async def create(request: Request) -> Json:
        await tinker.read(request, requests.CreateSession)
        name = uuid.uuid4().hex
        await base.on_thread(tinker.begin_session, name)
        return {"type": "create_session", "session_id": name}

    @tinker.route("GET", "sessions")
    async def sessions(request: Request) -> Json:
        return {"sessions": parse_query(requests.Page, request).of(list(tinker.sessions))}

    @tinker.route("GET", "sessions/{session_id}")
    async def session(session_id: str) -> Json:
        if session_id not in tinker.sessions:
            raise RequestError(f"session_id must be a session of this server, got {shown(session_id)}.", status=404)
        samplers = [one for one in tinker.live.samplers if one.startswith(f"{session_id}:")]
        return {"training_run_ids": tinker.sessions[session_id], "sampler_ids": samplers}

    @tinker.route("POST", "session_heartbeat")
    async def heartbeat(request: Request) -> Json:
        tinker.session((await tinker.read(request, requests.Heartbeat)).session_id)
        return {"type": "session_heartbeat"}

    @tinker.route("POST", "sessions/{session_id}/finish")
    async def finish(session_id: str) -> Json:
        for name in tinker.end_session(session_id):
            if name in tinker.live.names:
                tinker.live.unload(name)
        return {}

    @tinker.route("POST", "retrieve_future")
    async def retrieve(request: Request) -> Response:
        return await tinker.promises.retrieve((await tinker.read(request, requests.Retrieve)).request_id)

    @tinker.route("POST", "retrieve_futures")
    async def retrieve_many(request: Request) -> Json:
        asked = await tinker.read(request, requests.RetrieveMany)
        session = (asked.target.sampling_session_id, asked.target.cloned_sampler_id)
        tinker.promises.forget(session, asked.retrieved_request_ids)
        timeout = LONGEST_POLL if asked.timeout is None else min(asked.timeout, LONGEST_POLL)
        found = await tinker.promises.completions.after(session, asked.prev_cursor, timeout)
        told: list[Json] = [
            {"state": "failed", "request_id": one.name}
            if one.num_bytes is None
            else {"state": "finished", "request_id": one.name, "response_payload_uncompressed_size": one.num_bytes}
            for one in found
        ]
        return {"completions": told, "cursor": found[-1].number if found else asked.prev_cursor}

    @tinker.route("POST", "cancel_future")
    async def cancel(request: Request) -> Json:
        name = (await tinker.read(request, requests.Retrieve)).request_id
        if name.startswith(SAMPLE):  # what trains is applied in order, and is not taken back
            tinker.promises.cancel(name)
        return {}


SAMPLE = "sample:"
"""How ids of promises begin whose work may be given up."""
