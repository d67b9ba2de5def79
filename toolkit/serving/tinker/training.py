"""The routes of training clients."""

import asyncio
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fastapi import Request

from toolkit.live import ForwardBackwardResult, SamplingTarget
from toolkit.live.lora import LoraSettings
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.tinker import requests
from toolkit.serving.tinker.messages import ForwardBackward, forward_backward_output, inflated
from toolkit.serving.tinker.promises import Result, json_result, protobuf_result
from toolkit.serving.tinker.sessions import Tinker


def add_training_routes(tinker: Tinker) -> None:
    """Add them."""
    base, live = tinker.generation.base, tinker.live

    def promised(name: str, future: Future[Any], result: Callable[[Any], Result], **also: Any) -> Json:
        """The response to a request whose result is ``result`` of what ``future`` gives. A retry has the same."""

        async def work() -> Result:
            return result(await asyncio.shield(asyncio.wrap_future(future)))

        if name not in tinker.promises:
            tinker.promises.add(name, work())
        return {"request_id": name, **also}

    def of_request(asked: Any) -> str:
        return (
            f"{asked.model_id}:{asked.seq_id}" if asked.seq_id is not None else f"{asked.model_id}:{uuid.uuid4().hex}"
        )

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
        if asked.lora_config is None:
            raise RequestError("'lora_config' must be given: full fine-tuning is not served.", "lora_config")
        future = live.create(name, asked.base_model, asked.lora_config.model_dump())
        return promised(
            f"{name}:0", future, lambda _: json_result({"type": "create_model", "model_id": name}), model_id=name
        )

    @tinker.route("POST", "get_info")
    async def info(request: Request) -> Json:
        name = (await tinker.read(request, requests.OfModel)).model_id
        settings = live.tenant(name).settings
        about = {"arch": live.architecture, "model_name": live.base_model, "tokenizer_id": live.config.tokenizer}
        lora = {"is_lora": True, "lora_rank": settings.rank}
        return {"type": "get_info", "model_id": name, "model_data": about, "model_name": live.base_model, **lora}

    @tinker.route("POST", "unload_model")
    async def unload(request: Request) -> Json:
        name = (await tinker.read(request, requests.OfModel)).model_id
        result = json_result({"type": "unload_model", "model_id": name})
        return promised(f"{name}:unload", live.unload(name), lambda _: result, model_id=name)

    @tinker.route("POST", "forward_backward")
    async def forward_backward(request: Request) -> Json:
        encoding = request.headers.get("content-encoding", "").strip().lower()

        def read(raw: bytes) -> tuple[ForwardBackward, Any]:
            asked = ForwardBackward(inflated(raw, encoding))
            return asked, asked.examples()

        asked, examples = await base.read(request, read)
        given = (asked.model_id, asked.seq_id, examples, asked.loss_fn, asked.config, asked.forward_only)

        def result(found: ForwardBackwardResult) -> Result:
            return protobuf_result(forward_backward_output(found))

        return promised(of_request(asked), live.forward_backward(*given), result, model_id=asked.model_id)

    @tinker.route("POST", "optim_step")
    async def optim_step(request: Request) -> Json:
        asked = await tinker.read(request, requests.OptimStep)
        future = live.optim_step(asked.model_id, asked.seq_id, asked.adam_params.model_dump())
        return promised(of_request(asked), future, lambda norm: json_result({"metrics": {"grad_norm": norm}}))

    @tinker.route("POST", "save_weights")
    async def save(request: Request) -> Json:
        asked = await tinker.read(request, requests.SaveWeights)
        name = asked.path or f"step-{asked.seq_id or 0:06d}"
        future = live.save(asked.model_id, asked.seq_id, "weights", name, asked.overwrite)
        return promised(of_request(asked), future, lambda path: json_result({"type": "save_weights", "path": path}))

    @tinker.route("POST", "load_weights")
    async def load(request: Request) -> Json:
        asked = await tinker.read(request, requests.LoadWeights)
        if asked.model_id is None:
            if asked.session_id is None or asked.model_seq_id is None:
                raise RequestError("'model_id' must be given, or session_id and model_seq_id.", "model_id")
            name = remember(asked.session_id, asked.model_seq_id)
            promise, future = f"{name}:0", live.create_from(name, asked.path, asked.optimizer)
        else:
            name, promise = asked.model_id, of_request(asked)
            future = live.load(name, asked.seq_id, asked.path, asked.optimizer)
        result = json_result({"type": "load_weights", "path": asked.path, "model_id": name})
        return promised(promise, future, lambda _: result, model_id=name)

    @tinker.route("POST", "save_weights_for_sampler")
    async def save_for_sampler(request: Request) -> Json:
        asked = await tinker.read(request, requests.SaveForSampler)
        name, kind = asked.model_id, "save_weights_for_sampler"
        if asked.path is not None:
            saved = live.save(name, asked.seq_id, "sampler_weights", asked.path)
            return promised(of_request(asked), saved, lambda path: json_result({"type": kind, "path": path}))

        def result(target: SamplingTarget) -> Result:
            session = f"{name}:sampler:{asked.seq_id}"
            tinker.samplers[session] = target
            return json_result({"type": kind, "sampling_session_id": session})

        future = live.snapshot(name, asked.seq_id, asked.kind == "inflight")
        return promised(of_request(asked), future, result)

    @tinker.route("POST", "weights_info")
    async def weights_info(request: Request) -> Json:
        asked = await tinker.read(request, requests.WeightsInfo)
        base_model, settings = live.checkpoints.about(asked.tinker_path)
        return {"base_model": base_model, "is_lora": True, "lora_rank": settings.rank, **_trained(settings)}


def _trained(settings: LoraSettings) -> Json:
    return {name: getattr(settings, name) for name in ("train_attn", "train_mlp", "train_unembed")}
