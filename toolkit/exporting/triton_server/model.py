"""The Python model that Triton Inference Server runs: an engine on the checkpoint beside this file.

Triton hands over requests as they come and waits for none of them: the engine batches them. Each has a thread here,
which sends what the engine generates. This package must be importable for the Python that Triton's backend runs.
"""

import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from toolkit import AsyncEngine, Engine, SamplingParams
from toolkit.engine import Completion, Delta
from toolkit.errors import ToolkitError
from toolkit.loading import load_model

CHECKPOINT = "checkpoint"


class TritonPythonModel:
    """What the backend calls. Parameters of config.pbtxt: ``dtype``, and ``engine``, the engine's options as JSON."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = {name: one["string_value"] for name, one in json.loads(args["model_config"])["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"] / CHECKPOINT
        model, tokenizer = load_model(str(folder), settings.get("dtype", "float32"))
        self.engine = AsyncEngine(Engine(model, tokenizer, **json.loads(settings.get("engine") or "{}")))
        self.engine.start()
        self.threads: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            given = values_of(request)  # here: the backend frees a request's tensors when this method returns
            thread = threading.Thread(target=self.respond, args=(given, request.get_response_sender()), daemon=True)
            self.threads.add(thread)
            thread.start()

    def finalize(self) -> None:
        self.engine.shutdown()
        for thread in list(self.threads):
            thread.join()

    def respond(self, given: dict[str, Any], sender: Any) -> None:
        """Send the responses of one request, or why there are none; the last one is marked as such."""
        try:
            self.send(given, sender)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # the client waits for it
            code = (
                pb_utils.TritonError.INVALID_ARG if isinstance(error, ToolkitError) else pb_utils.TritonError.INTERNAL
            )
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
            with contextlib.suppress(Exception):  # the client is gone
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        finally:
            self.threads.discard(threading.current_thread())

    def send(self, given: dict[str, Any], sender: Any) -> None:
        prompt, params, stream = asked(given)
        handle = self.engine.submit([prompt], params)
        handle.accepted.result()
        try:
            for delta in handle:
                if sender.is_cancelled():
                    return
                finished = delta.finished
                if stream and (delta.text or delta.token_ids or finished is not None):
                    sender.send(response_of(delta, finished))
                elif finished is not None:
                    sender.send(response_of(finished, finished))
        finally:
            handle.cancel()


def values_of(request: Any) -> dict[str, Any]:
    """The inputs of a request as lists, and its parameters as JSON under ``parameters``."""
    given: dict[str, Any] = {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in request.inputs()}
    return given | {"parameters": request.parameters() or "{}"}


def asked(given: dict[str, Any]) -> tuple[str | list[int], SamplingParams, bool]:
    """(prompt, sampling parameters, whether to stream) of a request's values.

    Raises:
        ToolkitError: neither ``text_input`` nor ``input_ids``, or a parameter that the engine does not take.
    """
    parameters = json.loads(given["parameters"])
    if "sampling_parameters" in given:
        parameters |= json.loads(given["sampling_parameters"][0])
    stream = bool(parameters.pop("stream", False))
    if "stream" in given:
        stream = bool(given["stream"][0])
    if ("text_input" in given) == ("input_ids" in given):
        raise ToolkitError("text_input or input_ids must be given, and not both.")
    prompt: str | list[int] = given["input_ids"] if "input_ids" in given else given["text_input"][0].decode()
    return prompt, SamplingParams(**parameters), stream


def response_of(part: Delta | Completion, finished: Completion | None) -> Any:
    """Text, tokens and log-probabilities of a part of a completion; why it ended, "" while it has not."""
    reason = "" if finished is None else finished.finish_reason
    tensors = [
        pb_utils.Tensor("text_output", np.array([part.text.encode()], dtype=np.object_)),
        pb_utils.Tensor("token_ids", np.array(part.token_ids, dtype=np.int64)),
        pb_utils.Tensor("logprobs", np.array(part.logprobs, dtype=np.float32)),
        pb_utils.Tensor("finish_reason", np.array([reason.encode()], dtype=np.object_)),
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors)
