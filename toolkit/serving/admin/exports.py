"""``POST /export``: the served weights as another program opens them."""

from fastapi import Request, params

from toolkit.serving.admin import schemas
from toolkit.serving.admin.on_engine import on_engine
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.generation import Generation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse


def add_exports(generation: Generation, guarded: list[params.Depends]) -> None:
    """``/export``: written between two steps, so that the folder holds one version of the weights."""
    base, engine, write = generation.base, generation.engine, generation.config.export

    @base.app.post(
        "/export",
        dependencies=guarded,
        responses=responses(schemas.Exported),
        openapi_extra=takes(schemas.ExportRequest),
    )
    async def export(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(schemas.ExportRequest, raw))
        model = getattr(engine.engine.backend, "model", None)
        if write is None or model is None:
            raise RequestError("This server exports no weights; start it with toolkit serve.", status=501)

        def written() -> tuple[str, int]:
            path = write(model, asked.path, asked.to, generation.config.tokenizer, asked.quantise)
            return str(path), engine.engine.see_weights()

        path, version = await on_engine(engine, written, ("to", "quantise", "path"))
        return {"path": path, "to": asked.to, "weight_version": version}
