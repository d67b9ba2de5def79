"""What is served, and by which numerics."""

from dataclasses import asdict
from typing import Any

from fastapi import Request, params

import toolkit
from toolkit.engine import Engine, SamplingParams
from toolkit.engine.pooling import PoolingEngine
from toolkit.serving.admin import schemas
from toolkit.serving.base import Base
from toolkit.serving.errors import Json
from toolkit.serving.generation import Generation
from toolkit.serving.openapi import responses, takes_query
from toolkit.serving.parsing import parse_query


def vllm_config(base: Base) -> Json:
    """The parts of vLLM's configuration that clients read: dtype, adapters, parallelism, how weights are sent."""
    engine, config = base.engine.engine, base.config
    pooling = isinstance(engine, PoolingEngine)
    return {
        "model_config": {
            "model": _path(engine),
            "served_model_name": list(base.names),
            "runner_type": "pooling" if pooling else "generate",
            "dtype": str(engine.backend.dtype),
            "max_model_len": config.max_model_len,
            "logprobs_mode": "raw_logprobs",  # the others are "sampling_logprobs" of a choice
        },
        "cache_config": None if isinstance(engine, PoolingEngine) else _cache_config(engine),
        "scheduler_config": {
            "max_num_seqs": engine.config.max_num_seqs,
            "max_num_batched_tokens": engine.config.max_num_batched_tokens,
        },
        "parallel_config": {
            "tensor_parallel_size": _ranks(engine),
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "world_size": _ranks(engine),
        },
        "speculative_config": _speculative_config(engine.config.speculative_config),
        "lora_config": _lora_config(base),
        "weight_transfer_config": None,
    }


def _ranks(engine: Engine | PoolingEngine) -> int:
    """Processes that the model is split over."""
    return int(getattr(engine.backend, "ranks", 1))


def _cache_config(engine: Engine) -> Json:
    return {
        "block_size": engine.config.block_size,
        "num_gpu_blocks": int(engine.stats()["num_blocks"]),
        "enable_prefix_caching": engine.config.enable_prefix_caching,
    }


def _speculative_config(config: Json | None) -> Json | None:
    """As JSON: a draft model is the folder that it was loaded from."""
    if config is None or config.get("model") is None:
        return config
    return {**config, "model": str(getattr(getattr(config["model"], "config", None), "name_or_path", ""))}


def _lora_config(base: Base) -> Json | None:
    if not base.models.adapters:
        return None
    config = base.engine.engine.config
    return {"max_loras": config.max_loras, "max_cpu_loras": config.max_cpu_loras}


def add_info(base: Base, guarded: list[params.Depends]) -> None:
    """``/server_info``, ``/get_world_size``, and for clients ``/get_model_info``."""
    app, engine = base.app, base.engine

    @app.get(
        "/server_info",
        dependencies=guarded,
        responses=responses(schemas.ServerInfo),
        openapi_extra=takes_query(schemas.InfoQuery),
    )
    async def server_info(request: Request) -> Json:
        parse_query(schemas.InfoQuery, request)
        return {
            "vllm_config": vllm_config(base),
            "engine": asdict(engine.engine.config),
            "numerics_fingerprint": base.numerics.fingerprint,
            "version": toolkit.__version__,
            "weight_version": base.weight_version,
        }

    @app.get(
        "/get_world_size",
        dependencies=guarded,
        responses=responses(schemas.WorldSize),
        openapi_extra=takes_query(schemas.WorldQuery),
    )
    async def world_size(request: Request) -> Json:
        parse_query(schemas.WorldQuery, request)
        return {"world_size": _ranks(engine.engine)}

    @app.get("/get_model_info", dependencies=base.guarded, responses=responses(schemas.ModelInfo))
    async def model_info() -> Json:
        return {
            "model_path": _path(engine.engine),
            "is_generation": not isinstance(engine.engine, PoolingEngine),
            "weight_version": base.weight_version,
            "max_model_len": base.config.max_model_len,
            "dtype": str(engine.engine.backend.dtype).removeprefix("torch."),
        }


def add_props(generation: Generation) -> None:
    """llama.cpp's ``/props``, for clients of a model that generates."""
    base, engine = generation.base, generation.engine

    @base.app.get("/props", dependencies=base.guarded, responses=responses(schemas.Props))
    async def props() -> Json:
        params = SamplingParams(**generation.config.default_sampling_params)
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        return {
            "default_generation_settings": {
                "n_ctx": generation.config.max_model_len,
                "params": {name: getattr(params, name) for name in names},
            },
            "total_slots": engine.engine.scheduler.max_running,
            "model_path": _path(engine.engine),
            "chat_template": getattr(generation.config.tokenizer, "chat_template", None) or "",
            "modalities": {"vision": generation.config.processor is not None, "audio": False},
            "build_info": f"toolkit {toolkit.__version__}",
        }


def _path(engine: Any) -> str:
    return str(getattr(getattr(engine.backend, "model", None), "name_or_path", ""))
