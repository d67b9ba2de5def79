"""What training clients' requests promise, and what the results are on the wire."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from toolkit.serving.errors import Json
from toolkit.serving.tinker.messages import forward_backward_output
from toolkit.serving.tinker.promises import Result, json_result, protobuf_result
from toolkit.serving.tinker.sessions import Tinker

KINDS_OF_RESULT = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
"""The type of the result of saving a checkpoint of each kind."""


def promised(
    tinker: Tinker, name: str, number: int, method: str, arguments: Mapping[str, Any], future: Future[Any]
) -> Json:
    """The response to a request of a training client; a retry has the same.

    Args:
        name: of the client.
        number: of the request; 0 for its creation.
        method, arguments: as ``LiveTraining`` has them.
        future: of its result.
    """

    async def work() -> Result:
        value = await asyncio.shield(asyncio.wrap_future(future))
        if method == "snapshot":
            await tinker.generation.base.on_thread(tinker.live.name_target, sampler_of(name, number), value)
        return result(name, number, method, arguments, value)

    promise = f"{name}:{number}"
    if promise not in tinker.promises:
        tinker.promises.add(promise, work())
    return {"request_id": promise, "model_id": name}


def recover_promises(tinker: Tinker) -> None:
    """Promise again what journals have."""
    for one in tinker.live.recovered:
        promised(tinker, one.name, one.number, one.method, one.arguments, one.future)


def sampler_of(name: str, number: int) -> str:
    """The sampling session of a snapshot."""
    return f"{name}:sampler:{number}"


def result(name: str, number: int, method: str, arguments: Mapping[str, Any], value: Any) -> Result:
    """What a request's future has given, as a message or JSON."""
    if method == "forward_backward":
        return protobuf_result(forward_backward_output(value))
    if method == "optim_step":
        return json_result({"metrics": {"grad_norm": value}})
    if method == "save":
        return json_result({"type": KINDS_OF_RESULT[arguments["kind"]], "path": value})
    if method == "snapshot":
        return json_result({"type": "save_weights_for_sampler", "sampling_session_id": sampler_of(name, number)})
    if arguments.get("path") is not None:
        return json_result({"type": "load_weights", "path": arguments["path"], "model_id": name})
    return json_result({"type": "create_model", "model_id": name})
