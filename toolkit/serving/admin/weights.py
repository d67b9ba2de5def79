"""New weights while the server generates, as vLLM's clients ask for them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import Request, params

from toolkit.engine.new_weights import check_new_weights, write_new_weights
from toolkit.engine.weight_group import TensorInfo, WeightGroup
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.admin import schemas
from toolkit.serving.base import Base
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse, parse_part

NO_NCCL = (
    'This server receives no tensors over NCCL; use init_info {"backend": "gloo"}, or write the weights to a folder '
    'that it can read, and POST /update_weights {"weight_dir": "FOLDER"}.'
)
NO_GROUP = (
    'There is no group to receive tensors from: POST /init_weight_transfer_engine with init_info {"backend": "gloo", '
    '"master_address": ..., "master_port": ...} first, or POST /update_weights {"weight_dir": "FOLDER"}.'
)


def folder_of(asked: schemas.UpdateRequest) -> tuple[str, str]:
    """(what the request calls it, the folder). Raises RequestError for none."""
    given: dict[str, Any] = {"weight_dir": asked.weight_dir, "model_path": asked.model_path}
    given = {name: value for name, value in given.items() if value is not None}
    if asked.update_info is not None:
        other = next((name for name in asked.update_info if name not in ("weight_dir", "model_path")), None)
        if other == "ipc_handles_pickled":
            raise RequestError(NO_NCCL, "update_info", status=501, code="no_weight_transfer")
        if other is not None:
            raise RequestError(f"'update_info' must have 'weight_dir' alone, got {shown(other)}.", "update_info")
        given |= {f"update_info.{name}": value for name, value in asked.update_info.items()}
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise RequestError(f"'weight_dir' must be given, and nothing else names weights, got {found}.", "weight_dir")
    ((field, folder),) = given.items()
    if not isinstance(folder, str):
        raise RequestError(f"'{field}' must be text, got {shown(folder)}.", field)
    return field, folder


class WeightUpdates:
    """Reads new weights while the engine runs, and writes them between two steps; one update at a time."""

    def __init__(self, base: Base) -> None:
        self._engine, self._read = base.engine, base.config.read_weights
        self._one = asyncio.Lock()
        self._group: WeightGroup | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """The group ends with the server, which otherwise waited for a trainer that sends nothing."""
        try:
            yield
        finally:
            self._leave()

    async def join(self, info: schemas.GroupInfo) -> None:
        """Join a trainer's group, and leave the one before. Raises ToolkitError where it does not come together."""
        async with self._one:
            self._leave()
            self._group = await asyncio.to_thread(
                WeightGroup,
                info.master_address,
                info.master_port,
                info.rank_offset,
                info.world_size,
                info.packed_buffer_size_bytes if info.packed else 0,
            )

    async def update(self, asked: schemas.UpdateRequest) -> int:
        """The weight version with new weights. Raises ToolkitError where they do not fit."""
        if asked.update_info is not None and "names" in asked.update_info:
            tensors = parse_part(schemas.TensorsInfo, asked.update_info, "update_info")
            async with self._one:
                return await asyncio.to_thread(self._receive, tensors)
        field, folder = folder_of(asked)
        async with self._one:
            return await asyncio.to_thread(self._read_folder, field, folder)

    def _read_folder(self, field: str, folder: str) -> int:
        model = self._model()
        assert self._read is not None
        return write_new_weights(self._engine, model, self._read(folder, model, field))

    def _receive(self, asked: schemas.TensorsInfo) -> int:
        model, group = self._model(), self._group
        if group is None:
            raise RequestError(NO_GROUP, "update_info", status=409, code="no_weight_transfer")
        described = [
            TensorInfo(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(asked.names, asked.dtype_names, asked.shapes, strict=True)
        ]
        try:
            check_new_weights(model, {info.name: info.like() for info in described}, partial=True)
            weights = group.receive(described)
        except ToolkitError:
            self._leave()  # the trainer sends what nobody takes
            raise
        return write_new_weights(self._engine, model, weights, partial=True)

    def _model(self) -> Any:
        model = getattr(self._engine.engine.backend, "model", None)
        if self._read is None or model is None:
            raise RequestError("This server reads no weights; start it with toolkit serve.", status=501)
        return model

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def add_weights(base: Base, guarded: list[params.Depends]) -> None:
    """``/init_weight_transfer_engine``, ``/start_weight_update``, ``/update_weights``, ``/finish_weight_update``."""
    updates = WeightUpdates(base)
    base.services.append(updates.open)
    app = base.app

    @app.post(
        "/init_weight_transfer_engine",
        dependencies=guarded,
        responses=responses(schemas.Message),
        openapi_extra=takes(schemas.InitRequest),
    )
    async def init(request: Request) -> Json:
        info = (await base.read(request, lambda raw: parse(schemas.InitRequest, raw))).init_info
        base.numerics.read_and_compare(info.get("numerics_fingerprint"), "init_info.numerics_fingerprint")
        if info.get("backend") == "gloo":
            await updates.join(parse_part(schemas.GroupInfo, info, "init_info"))
            return {"message": "Weight transfer initialized"}
        other = next((name for name in info if name not in ("backend", "numerics_fingerprint")), None)
        if other is not None or info.get("backend", "folder") != "folder":
            raise RequestError(NO_NCCL, "init_info", status=501, code="no_weight_transfer")
        return {"message": "Weight transfer initialized"}

    @app.post(
        "/start_weight_update",
        dependencies=guarded,
        responses=responses(schemas.Message),
        openapi_extra=takes(schemas.StartRequest, required=False),
    )
    async def start(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.StartRequest, raw or b"{}"))
        if not asked.is_checkpoint_format:
            message = "'is_checkpoint_format' must be true: weights are named as in checkpoints, got false."
            raise RequestError(message, "is_checkpoint_format")
        return {"message": "Weight update started"}

    @app.post(
        "/update_weights",
        dependencies=guarded,
        responses=responses(schemas.Updated),
        openapi_extra=takes(schemas.UpdateRequest),
    )
    async def update(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.UpdateRequest, raw))
        version = await updates.update(asked)
        return {"status": "ok", "message": "Weights updated", "weight_version": version}

    @app.post("/finish_weight_update", dependencies=guarded, responses=responses(schemas.Updated))
    async def finish() -> Json:
        version = await asyncio.to_thread(base.engine.call, base.engine.engine.see_weights)
        return {"status": "ok", "message": "Weight update finished", "weight_version": version}
