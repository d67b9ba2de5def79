"""The routes of samplers."""

import uuid
from contextlib import ExitStack
from typing import Any

from fastapi import Request

from toolkit.engine import Completion, RequestHandle, SamplingParams
from toolkit.engine.prompts import check_num_sequences
from toolkit.errors import ToolkitError
from toolkit.live import SamplingTarget
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.tinker import requests
from toolkit.serving.tinker.completions import CLONE_NUMBERS
from toolkit.serving.tinker.messages import sample_response
from toolkit.serving.tinker.promises import Result, protobuf_result
from toolkit.serving.tinker.sessions import SAMPLE, Tinker


def add_sampling_routes(tinker: Tinker) -> None:
    """Add them."""
    base, live, engine = tinker.generation.base, tinker.live, tinker.generation.engine

    def sampler(name: str) -> SamplingTarget:
        try:
            return live.named_target(name)
        except ToolkitError as error:
            raise RequestError(str(error), "sampling_session_id", status=404) from None

    def target(base_model: str | None, model_path: str | None) -> SamplingTarget:
        if base_model is not None:
            live.check_base(base_model)
        elif model_path is None:
            raise RequestError("'base_model' must be given where 'model_path' is not.", "base_model")
        return live.target(model_path)

    @tinker.route("POST", "create_sampling_session")
    async def create(request: Request) -> Json:
        asked = await tinker.read(request, requests.CreateSampler)
        tinker.session(asked.session_id)
        name = f"{asked.session_id}:sample:{asked.sampling_session_seq_id}"
        await base.on_thread(live.name_target, name, target(asked.base_model, asked.model_path))
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @tinker.route("GET", "samplers/{sampler_id:path}")
    async def about(sampler_id: str) -> Json:
        return {"sampler_id": sampler_id, "base_model": live.base_model, "model_path": sampler(sampler_id).path}

    @tinker.route("POST", "asample")
    async def sample(request: Request) -> Json:
        asked = await tinker.read(request, requests.Sample)
        session = None
        if asked.sampling_session_id is None:
            chosen, name = target(asked.base_model, asked.model_path), f"{SAMPLE}{uuid.uuid4().hex}"
        else:
            chosen = sampler(asked.sampling_session_id)
            name = f"{SAMPLE}{asked.sampling_session_id}:{asked.seq_id}"
            session = (asked.sampling_session_id, (asked.seq_id or 0) // CLONE_NUMBERS)
        promise = {"request_id": name, "sample_sequence_ids": [f"{name}:{at}" for at in range(asked.num_samples)]}
        if name in tinker.promises:
            return promise
        tokens = asked.prompt.tokens
        check_num_sequences(asked.num_samples, engine.max_queued_seqs)
        tinker.generation.check_tokens([tokens], "prompt")
        params = sampling_params(asked)
        tinker.promises.add(name, run(request, chosen, asked, tokens, params), session)
        return promise

    async def run(
        request: Request, chosen: SamplingTarget, asked: requests.Sample, tokens: list[int], params: dict[str, Any]
    ) -> Result:
        with ExitStack() as stack:
            lora = await base.on_thread(stack.enter_context, live.sampled(chosen))
            given = SamplingParams(**params, lora_name=lora)
            handle = await base.running.start(
                request, engine, lambda: engine.submit([tokens], given), asked.num_samples
            )
            completions = await finished(handle)
        return protobuf_result(
            sample_response(
                completions, asked.topk_sample_logprobs, params["prompt_logprobs"], asked.prompt_logprobs_last_n
            )
        )


async def finished(handle: RequestHandle) -> list[Completion]:
    """All completions of a request, in order. Gives it up when it is cancelled, and raises what the engine says."""
    found: dict[int, Completion] = {}
    try:
        await handle.wait_accepted()
        async for delta in handle:
            if delta.finished is not None:
                found[delta.index] = delta.finished
    finally:
        handle.cancel()
    for one in found.values():
        if one.finish_reason not in ("stop", "length"):
            raise ToolkitError(f"The request ended in the engine: {one.error or one.finish_reason}.")
    return [found[index] for index in sorted(found)]


def sampling_params(asked: requests.Sample) -> dict[str, Any]:
    """Arguments of ``SamplingParams``. Raises ToolkitError for bad values."""
    given, stop = asked.sampling_params, asked.sampling_params.stop
    scored = asked.prompt_logprobs or asked.topk_prompt_logprobs > 0
    params: dict[str, Any] = {
        "n": asked.num_samples,
        "temperature": given.temperature,
        "top_k": given.top_k,
        "top_p": given.top_p,
        "seed": given.seed,
        "ignore_eos": stop == [],
        "logprobs": asked.topk_sample_logprobs or None,
        "prompt_logprobs": asked.topk_prompt_logprobs if scored else None,
        "max_tokens": given.max_tokens,
    }
    if isinstance(stop, list) and stop and isinstance(stop[0], int):
        params["stop_token_ids"] = stop
    elif stop:
        params["stop"] = stop
    SamplingParams(**params)
    return params
