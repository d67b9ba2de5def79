"""The routes of training clients and checkpoints, past and present: lists, lifetimes, removal, downloads."""

import hmac
import os
import secrets
import tarfile
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from starlette.background import BackgroundTask

from toolkit.errors import ToolkitError
from toolkit.live import Entry, Run
from toolkit.live.checkpoints import SCHEME, path_to
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.parsing import parse_query
from toolkit.serving.tinker import requests
from toolkit.serving.tinker.sessions import ROOT, Tinker
from toolkit.serving.tinker.training import lora_fields

TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""Kinds of checkpoints by the names of the wire."""
CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"
LINK_SECONDS = 3600
"""How long a link to a file is good."""
ARCHIVE = "archive.tar"
"""The name of all files of a checkpoint together."""


class Links:
    """Links to the files of checkpoints, which need no key: they have a signature, and are good for an hour."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def url(self, base: str, path: str, file: str) -> tuple[str, int]:
        """(address, seconds since the epoch when it is good no more) of a file of a checkpoint.

        Args:
            base: address of the server.
            path: of the checkpoint.
            file: its name.
        """
        expires = int(time.time()) + LINK_SECONDS
        inside = quote(f"{path.removeprefix(SCHEME)}/{file}")
        signature = self._signature(path, file, expires)
        return f"{base.rstrip('/')}{ROOT}/files/{inside}?expires={expires}&signature={signature}", expires

    def check(self, path: str, file: str, expires: int, signature: str) -> None:
        """Raise RequestError unless the link is one of this server's, and good."""
        right = hmac.compare_digest(signature, self._signature(path, file, expires))
        if not right or expires < time.time():
            raise RequestError("The link must be one that this server gave less than an hour ago.", status=403)

    def _signature(self, path: str, file: str, expires: int) -> str:
        return hmac.new(self._secret, f"{path}\n{file}\n{expires}".encode(), sha256).hexdigest()


def add_archive_routes(tinker: Tinker) -> None:
    """Add them."""
    base, live, links = tinker.generation.base, tinker.live, Links()
    checkpoints = live.checkpoints

    async def on_disk(function: Any, *arguments: Any) -> Any:
        """What a function of a checkpoint returns; 404 where there is no such checkpoint."""
        try:
            return await base.on_thread(function, *arguments)
        except ToolkitError as error:
            raise RequestError(str(error), status=404) from None

    @tinker.route("GET", "training_runs")
    async def runs(request: Request) -> Json:
        page, found = parse_query(requests.Page, request), await base.on_thread(live.runs)
        return {"training_runs": [_run(one) for one in page.of(found)], "cursor": _cursor(page, found)}

    @tinker.route("GET", "training_runs/{run}")
    async def run_of(run: str) -> Json:
        for one in await base.on_thread(live.runs):
            if one.name == run:
                return _run(one)
        raise RequestError("training_run_id must be of a training client that left something here.", status=404)

    @tinker.route("GET", "training_runs/{run}/checkpoints")
    async def of_run(run: str) -> Json:
        found: list[Entry] = await base.on_thread(checkpoints.entries, run)
        return {"checkpoints": [_checkpoint(one) for one in found]}

    @tinker.route("GET", "checkpoints")
    async def all_of_them(request: Request) -> Json:
        page, found = parse_query(requests.Page, request), await base.on_thread(checkpoints.entries)
        return {"checkpoints": [_checkpoint(one) for one in page.of(found)], "cursor": _cursor(page, found)}

    @tinker.route("DELETE", CHECKPOINT)
    async def remove(run: str, kind: str, name: str) -> Response:
        await on_disk(checkpoints.remove, path_to(run, kind, name))
        return Response(status_code=204)

    @tinker.route("PUT", f"{CHECKPOINT}/ttl")
    async def set_ttl(request: Request, run: str, kind: str, name: str) -> Response:
        asked = await tinker.read(request, requests.Ttl)
        await on_disk(checkpoints.set_ttl, path_to(run, kind, name), asked.ttl_seconds)
        return Response(status_code=204)

    @tinker.route("GET", f"{CHECKPOINT}/external_weights_urls")
    async def urls(request: Request, run: str, kind: str, name: str) -> Json:
        path = path_to(run, kind, name)
        files: list[Path] = await on_disk(checkpoints.files, path)
        found = {one.name: links.url(str(request.base_url), path, one.name) for one in files}
        expires = min(until for _, until in found.values())
        return {"urls": {file: url for file, (url, _) in found.items()}, "expires": _time(expires)}

    @tinker.route("GET", f"{CHECKPOINT}/archive")
    async def archive(request: Request, run: str, kind: str, name: str) -> Response:
        path = path_to(run, kind, name)
        await on_disk(checkpoints.folder, path)
        url, expires = links.url(str(request.base_url), path, ARCHIVE)
        expires_on = datetime.fromtimestamp(expires, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        return RedirectResponse(url, status_code=302, headers={"expires": expires_on})

    @base.app.get(f"{ROOT}/files/{{run}}/{{kind}}/{{name}}/{{file}}", include_in_schema=False)
    async def download(request: Request, run: str, kind: str, name: str, file: str) -> Response:
        path, given = path_to(run, kind, name), parse_query(requests.Link, request)
        links.check(path, file, given.expires, given.signature)
        files = {one.name: one for one in await on_disk(checkpoints.files, path)}
        if file == ARCHIVE:
            packed = await base.on_thread(_packed, list(files.values()))
            return FileResponse(packed, filename=f"{name}.tar", background=BackgroundTask(packed.unlink))
        if file not in files:
            raise RequestError(f"{path} must have the file that is asked for.", status=404)
        return FileResponse(files[file], filename=file)


def _packed(files: Sequence[Path]) -> Path:
    """A temporary archive of files."""
    handle, name = tempfile.mkstemp(prefix="toolkit-archive-", suffix=".tar")
    with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for one in files:
            tar.add(one, one.name)
    return Path(name)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _cursor(page: requests.Page, found: Sequence[Any]) -> Json:
    return {"offset": page.offset, "limit": page.limit, "total_count": len(found)}


def _checkpoint(entry: Entry) -> Json:
    return {
        "checkpoint_id": f"{entry.kind}/{entry.name}",
        "checkpoint_type": TYPES[entry.kind],
        "time": _time(entry.saved_at),
        "tinker_path": entry.path,
        "size_bytes": entry.num_bytes,
        "public": False,
        "expires_at": None if entry.expires_at is None else _time(entry.expires_at),
    }


def _run(run: Run) -> Json:
    last = {kind: _checkpoint(entry) for kind, entry in run.last.items()}
    return {
        "training_run_id": run.name,
        "base_model": run.base_model,
        "model_owner": "local",
        **lora_fields(run.settings),
        "corrupted": False,
        "last_request_time": _time(run.last_request),
        "last_checkpoint": last.get("weights"),
        "last_sampler_checkpoint": last.get("sampler_weights"),
    }
