"""Adapters that come and go while the server runs, under vLLM's endpoints."""

import asyncio
import os
from pathlib import Path

from fastapi import Request, params

from toolkit.sentences import shown
from toolkit.serving.admin import schemas
from toolkit.serving.admin.on_engine import on_engine
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Generation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def add_adapters(generation: Generation, guarded: list[params.Depends]) -> None:
    """``/v1/load_lora_adapter``, ``/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""
    base, models, engine = generation.base, generation.base.models, generation.engine
    app = base.app
    changing = asyncio.Lock()

    @app.post(
        "/v1/load_lora_adapter",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes(schemas.LoadAdapterRequest),
    )
    async def load_lora_adapter(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.LoadAdapterRequest, raw))
        return await load(asked, asked.load_inplace)

    @app.post(
        "/load_lora_adapter",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes(schemas.ReplaceAdapterRequest),
    )
    async def replace_lora_adapter(request: Request) -> Json:
        return await load(await base.read(request, lambda raw: parse(schemas.ReplaceAdapterRequest, raw)), True)

    async def load(asked: schemas.ReplaceAdapterRequest, in_place: bool) -> Json:
        """Take in an adapter; ``in_place`` of the one of its name, where there is one."""
        if asked.lora_name in models.names:
            message = f"'lora_name' must not be a name of the served model, got {shown(asked.lora_name)}."
            raise RequestError(message, "lora_name")
        async with changing:
            try:
                await on_engine(
                    engine,
                    lambda: engine.engine.load_adapter(asked.lora_name, asked.lora_path, in_place),
                    ("lora_name", "lora_path"),
                )
            except RequestError as error:
                # As vLLM says it; a trainer asks again for what a shared disk does not show yet.
                if error.param == "lora_path" and not await asyncio.to_thread(_has_files, asked.lora_path):
                    error.status = 404
                raise
            models.adapters[asked.lora_name] = asked.lora_path
        return {"status": "loaded"}

    @app.post(
        "/v1/unload_lora_adapter",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes(schemas.UnloadAdapterRequest),
    )
    async def unload_lora_adapter(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.UnloadAdapterRequest, raw))
        async with changing:
            if asked.lora_name not in models.adapters:
                message = f"There is no adapter {shown(asked.lora_name)}."
                raise RequestError(message, "lora_name", status=404, code="model_not_found")
            del models.adapters[asked.lora_name]  # first, so that no request is read that finds it no more
            await asyncio.to_thread(engine.call, lambda: engine.engine.unload_adapter(asked.lora_name))
        return {"status": "unloaded"}


def _has_files(folder: str) -> bool:
    return all(os.path.isfile(Path(folder, name)) for name in ADAPTER_FILES)
