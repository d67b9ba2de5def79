"""The routes of training clients."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from fastapi import Request

from toolkit.live import Example
from toolkit.live.lora import LoraSettings
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.tinker import requests
from toolkit.serving.tinker.messages import ForwardBackward, inflated
from toolkit.serving.tinker.promises import json_result
from toolkit.serving.tinker.results import promised
from toolkit.serving.tinker.sessions import Tinker


def add_training_routes(tinker: Tinker) -> None:
    """Add them."""
    base, live = tinker.generation.base, tinker.live

    async def submit(name: str, number: int, method: str, **arguments: Any) -> Json:
        """Hand a numbered request over, on a thread: it may be written to disk first."""
        call: Callable[..., Future[Any]] = getattr(live, method)
        future = await base.on_thread(lambda: call(name, number, **arguments))
        return promised(tinker, name, number, method, arguments, future)

    def remember(session_id: str, model_seq_id: int) -> str:
        """The id of a session's training client."""
        name, clients = f"{session_id}:train:{model_seq_id}", tinker.session(session_id)
        if name not in clients:
            clients.append(name)
        return name

    @tinker.route("POST", "create_model")
    async def create(request: Request) -> Json:
        asked = await tinker.read(request, requests.CreateModel)
        name = remember(asked.session_id, asked.model_seq_id)
        lora = {"rank": 0} if asked.lora_config is None else asked.lora_config.model_dump()
        future = await base.on_thread(live.create, name, asked.base_model, lora)
        return promised(tinker, name, 0, "create", {}, future)

    @tinker.route("POST", "get_info")
    async def info(request: Request) -> Json:
        name = (await tinker.read(request, requests.OfModel)).model_id
        settings = live.tenant(name).settings
        about = {"arch": live.architecture, "model_name": live.base_model, "tokenizer_id": live.config.tokenizer}
        named = {"model_id": name, "model_data": about, "model_name": live.base_model}
        return {"type": "get_info", **named, **lora_fields(settings)}

    @tinker.route("POST", "unload_model")
    async def unload(request: Request) -> Json:
        name = (await tinker.read(request, requests.OfModel)).model_id
        promise = f"{name}:unload"
        if promise not in tinker.promises:
            tinker.promises.add_future(
                promise, live.unload(name), lambda _: json_result({"type": "unload_model", "model_id": name})
            )
        return {"request_id": promise, "model_id": name}

    @tinker.route("POST", "forward_backward")
    async def forward_backward(request: Request) -> Json:
        def read(raw: bytes) -> tuple[ForwardBackward, Sequence[Example]]:
            asked = ForwardBackward(raw)
            return asked, asked.examples()

        asked, examples = await base.read(request, read, inflated)
        given = {"loss_fn": asked.loss_fn, "config": asked.config, "forward_only": asked.forward_only}
        return await submit(asked.model_id, asked.seq_id, "forward_backward", examples=examples, **given)

    @tinker.route("POST", "optim_step")
    async def optim_step(request: Request) -> Json:
        asked = await tinker.read(request, requests.OptimStep)
        return await submit(asked.model_id, asked.seq_id, "optim_step", params=asked.adam_params.model_dump())

    @tinker.route("POST", "save_weights")
    async def save(request: Request) -> Json:
        asked = await tinker.read(request, requests.SaveWeights)
        given = {"kind": "weights", "path": asked.path or f"step-{asked.seq_id:06d}", "overwrite": asked.overwrite}
        return await submit(asked.model_id, asked.seq_id, "save", **given, ttl_seconds=asked.ttl_seconds)

    @tinker.route("POST", "save_weights_external")
    async def save_external(request: Request) -> Json:
        asked = await tinker.read(request, requests.SaveExternal)
        given = {"kind": "external_weights", "path": asked.path, "ttl_seconds": asked.ttl_seconds}
        return await submit(asked.model_id, asked.seq_id, "save", **given)

    @tinker.route("POST", "load_weights")
    async def load(request: Request) -> Json:
        asked = await tinker.read(request, requests.LoadWeights)
        if asked.model_id is not None:
            if asked.seq_id is None:
                raise RequestError("'seq_id' must be given with 'model_id'.", "seq_id")
            return await submit(asked.model_id, asked.seq_id, "load", path=asked.path, optimizer=asked.optimizer)
        if asked.session_id is None or asked.model_seq_id is None:
            raise RequestError("'model_id' must be given, or session_id and model_seq_id.", "model_id")
        name = remember(asked.session_id, asked.model_seq_id)
        future = await base.on_thread(live.create_from, name, asked.path, asked.optimizer)
        return promised(tinker, name, 0, "create", {"path": asked.path}, future)

    @tinker.route("POST", "save_weights_for_sampler")
    async def save_for_sampler(request: Request) -> Json:
        asked = await tinker.read(request, requests.SaveForSampler)
        if asked.path is None:
            snapshot = {"inflight": asked.kind == "inflight", "ttl_seconds": asked.ttl_seconds}
            return await submit(asked.model_id, asked.seq_id, "snapshot", **snapshot)
        given = {"kind": "sampler_weights", "path": asked.path, "ttl_seconds": asked.ttl_seconds}
        return await submit(asked.model_id, asked.seq_id, "save", **given)

    @tinker.route("POST", "weights_info")
    async def weights_info(request: Request) -> Json:
        asked = await tinker.read(request, requests.WeightsInfo)
        base_model, settings = live.checkpoints.about(asked.tinker_path)
        return {"base_model": base_model, **lora_fields(settings), **_trained(settings)}


def lora_fields(settings: LoraSettings) -> Json:
    """Whether a training client has a LoRA, and its rank."""
    return {"is_lora": not settings.full, "lora_rank": settings.rank or None}


def _trained(settings: LoraSettings) -> Json:
    return {name: getattr(settings, name) for name in ("train_attn", "train_mlp", "train_unembed")}
