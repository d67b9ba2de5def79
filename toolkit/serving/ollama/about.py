"""Routes that say what is served: ``/api/tags``, ``/api/ps``, ``/api/show`` and ``/api/version``."""

from collections.abc import Sequence
from typing import Any

from fastapi import Request

import toolkit
from toolkit.serving.base import Base
from toolkit.serving.errors import Json
from toolkit.serving.ollama import schemas
from toolkit.serving.ollama.requests import OllamaShowRequest
from toolkit.serving.ollama.responses import error_body, now
from toolkit.serving.ollama.weights import WeightsInMemory
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse
from toolkit.serving.served_models import ServedModel

API = "/api"
TAG = ":latest"
"""What Ollama's clients write behind the name of a model."""
NO_EXPIRY = "9999-12-31T23:59:59Z"
MANAGES = ("/api/blobs/{digest:path}", "/api/copy", "/api/create", "/api/pull", "/api/push")
ONE_MODEL = "This server serves the model that it was started with; none is pulled, made or copied over HTTP."


def check_name(base: Base, asked: str) -> ServedModel:
    """What a name stands for, with or without ``:latest``. Raises RequestError for one that nothing has."""
    return base.models.find(asked if asked in base.models.all else asked.removesuffix(TAG))


def add_about(base: Base, capabilities: Sequence[str]) -> None:
    """Add the routes to the application of ``base``, and give all below ``/api`` Ollama's errors."""
    base.add_error_style(API, error_body)
    started = now()
    config = base.config
    tokenizer = config.tokenizer
    template = getattr(config.processor, "chat_template", None) or getattr(tokenizer, "chat_template", None) or ""
    weights = WeightsInMemory.of(config.engine)
    family = weights.family
    details = {
        "parent_model": "", "format": "safetensors", "family": family, "families": [family] if family else [],
        "parameter_size": weights.parameter_size, "quantization_level": "",
    }  # fmt: skip

    def card(name: str) -> Json:
        digest = weights.digest(base.weight_version, config.lora_modules.get(name, ""))
        about = {"name": name, "model": name, "modified_at": started, "size": weights.size, "digest": digest}
        return {**about, "details": details}

    errors: dict[str, Any] = {"error": schemas.OllamaError}

    @base.app.get("/api/tags", dependencies=base.guarded, responses=responses(schemas.OllamaModels, **errors))
    async def tags() -> Json:
        return {"models": [card(name) for name in base.models.all]}

    @base.app.get("/api/ps", dependencies=base.guarded, responses=responses(schemas.OllamaModels, **errors))
    async def running() -> Json:
        loaded = {"expires_at": NO_EXPIRY, "size_vram": weights.on_device, "context_length": config.max_model_len}
        return {"models": [{**card(name), **loaded} for name in base.models.all]}

    @base.app.get("/api/version", responses=responses(schemas.OllamaVersion, **errors))
    async def ollama_version() -> Json:
        return {"version": toolkit.__version__}

    @base.app.post(
        "/api/show",
        dependencies=base.guarded,
        responses=responses(schemas.ShownModel, **errors),
        openapi_extra=takes(OllamaShowRequest),
    )
    async def show(request: Request) -> Json:
        asked = await base.read(request, lambda raw: parse(OllamaShowRequest, raw))
        check_name(base, asked.model)
        info: Json = {"general.architecture": family}
        if config.max_model_len is not None:
            info[f"{family}.context_length"] = config.max_model_len
        return {
            "modelfile": "",
            "parameters": "\n".join(f"{name} {value}" for name, value in config.default_sampling_params.items()),
            "template": template if isinstance(template, str) else "\n".join(map(str, template.values())),
            "modified_at": started,
            "details": details,
            "model_info": info,
            "capabilities": list(capabilities),
        }

    base.add_refused(MANAGES, ONE_MODEL)
