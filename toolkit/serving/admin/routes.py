"""The admin endpoints."""

from fastapi import Depends, Request, params

from toolkit.serving.admin import schemas
from toolkit.serving.admin.adapters import add_adapters
from toolkit.serving.admin.control import Control
from toolkit.serving.admin.exports import add_exports
from toolkit.serving.admin.info import add_info, add_props
from toolkit.serving.admin.weights import add_weights
from toolkit.serving.base import Base
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Generation
from toolkit.serving.openapi import responses, takes, takes_query
from toolkit.serving.parsing import parse, parse_query

BODIES = (
    schemas.AbortRequest, schemas.InitRequest, schemas.StartRequest, schemas.UpdateRequest, schemas.LoadAdapterRequest,
    schemas.ReplaceAdapterRequest, schemas.UnloadAdapterRequest, schemas.ExportRequest,
)  # fmt: skip


POOLING_BODIES = (schemas.AbortRequest, schemas.InitRequest, schemas.StartRequest, schemas.UpdateRequest)
"""Those of a pooling model."""
ADAPTER_PATHS = ("/v1/load_lora_adapter", "/load_lora_adapter", "/v1/unload_lora_adapter")
NO_ADAPTERS = "The served model is a pooling model, which takes no adapters; merge them into its weights."
NO_EXPORT = "The served model is a pooling model, which this server does not export; use toolkit export."


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of ``generation``."""
    guarded = _add_common(generation.base)
    add_adapters(generation, guarded)
    add_exports(generation, guarded)
    add_props(generation)


def add_pooling_routes(base: Base) -> None:
    """Add those that a pooling model has to its application; the others say why there are none."""
    guarded = _add_common(base)
    base.add_refused(ADAPTER_PATHS, NO_ADAPTERS, guarded)
    base.add_refused(("/export",), NO_EXPORT, guarded)


def _add_common(base: Base) -> list[params.Depends]:
    """Those of any model; what guards admin endpoints."""
    access = base.config.admin
    guarded = [Depends(access.check)] if access.keys else [*base.guarded, Depends(access.check)]
    add_control(base, guarded)
    add_weights(base, guarded)
    add_info(base, guarded)
    return guarded


def add_control(base: Base, guarded: list[params.Depends]) -> None:
    """``/pause`` and ``/resume``, ``/sleep`` and ``/wake_up``, aborting, caches."""
    control, engine = Control(base), base.engine
    app = base.app

    @app.post(
        "/pause",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes_query(schemas.PauseQuery),
    )
    async def pause(request: Request) -> Json:
        asked = parse_query(schemas.PauseQuery, request)
        await control.pause("wait" if asked.wait_for_inflight_requests else asked.mode, asked.clear_cache)
        return {"status": "paused"}

    @app.post("/resume", dependencies=guarded, responses=responses(schemas.Status))
    async def resume() -> Json:
        control.resume()
        return {"status": "resumed"}

    @app.get("/is_paused", dependencies=guarded, responses=responses(schemas.IsPaused))
    async def is_paused() -> Json:
        return {"is_paused": engine.generation_paused}

    @app.post(
        "/sleep",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes_query(schemas.SleepQuery),
    )
    async def sleep(request: Request) -> Json:
        asked = parse_query(schemas.SleepQuery, request)
        await control.sleep(asked.level, asked.mode)
        return {"status": "sleeping" if asked.level else "paused"}

    @app.post(
        "/wake_up",
        dependencies=guarded,
        responses=responses(schemas.Status),
        openapi_extra=takes_query(schemas.WakeQuery),
    )
    async def wake_up(request: Request) -> Json:
        await control.wake(list(parse_query(schemas.WakeQuery, request).tags))
        return {"status": "sleeping" if engine.engine.is_sleeping else "awake"}

    @app.get("/is_sleeping", dependencies=guarded, responses=responses(schemas.IsSleeping))
    async def is_sleeping() -> Json:
        return {"is_sleeping": engine.engine.is_sleeping}

    @app.post("/reset_prefix_cache", dependencies=guarded, responses=responses(schemas.Success))
    @app.post("/flush_cache", dependencies=guarded, responses=responses(schemas.Success))
    async def reset_prefix_cache() -> Json:
        await control.reset_prefix_cache()
        return {"success": True}

    @app.post(
        "/abort_requests",
        dependencies=guarded,
        responses=responses(schemas.Aborted),
        openapi_extra=takes(schemas.AbortRequest),
    )
    async def abort_requests(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.AbortRequest, raw))
        if asked.abort_all == bool(asked.request_ids):
            raise RequestError("'request_ids' must be given, or 'abort_all' be true, and not both.", "request_ids")
        return {"num_aborted": control.abort(None if asked.abort_all else asked.request_ids)}
