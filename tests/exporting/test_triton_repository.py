"""The model repository of Triton Inference Server: its Python model, run here by a stand-in for the backend."""

import importlib.util
import json
import queue
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine import Engine, SamplingParams
from toolkit.exporting import export
from toolkit.testing.models import random_model

FINAL = 1


class Backend(ModuleType):
    """What of ``triton_python_backend_utils`` the model uses."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL

    class TritonError(Exception):
        INVALID_ARG, INTERNAL = 1, 2

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            self.code = code

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            self._name, self._values = name, values

        def name(self) -> str:
            return self._name

        def as_numpy(self) -> np.ndarray:
            return self._values

    class InferenceResponse:
        def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
            self.outputs = {one.name(): one.as_numpy().tolist() for one in output_tensors}
            self.error = error


class Request:
    """A request, and what it gets; ``cancelled_after``: responses after which the client goes away."""

    def __init__(self, parameters: dict[str, Any], cancelled_after: int | None = None, **tensors: np.ndarray) -> None:
        self._parameters, self._tensors, self._after = parameters, tensors, cancelled_after
        self._sent: queue.Queue[tuple[Any, int]] = queue.Queue()
        self._count = 0

    def inputs(self) -> list[Any]:
        return [Backend.Tensor(name, values) for name, values in self._tensors.items()]

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> "Request":
        return self

    def is_cancelled(self) -> bool:
        return self._after is not None and self._count >= self._after

    def send(self, response: Any = None, flags: int = 0) -> None:
        self._count += response is not None
        self._sent.put((response, flags))

    def responses(self) -> list[Any]:
        found = []
        while True:
            response, flags = self._sent.get(timeout=60)
            if response is not None:
                found.append(response)
            if flags == FINAL:
                return found


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=np.object_)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    model = random_model("llama", hidden=16, layers=1, vocabulary=340)
    return model, export(model, tmp_path_factory.mktemp("triton") / "out", "triton-server", make_tokenizer())


@pytest.fixture
def served(repository, monkeypatch):
    path = repository[1]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("served_model", path / "model" / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    served = module.TritonPythonModel()
    parameters = {"dtype": {"string_value": "float32"}, "engine": {"string_value": '{"max_num_seqs": 4}'}}
    config = json.dumps({"parameters": parameters})
    served.initialize({"model_repository": str(path / "model"), "model_version": "1", "model_config": config})
    yield served
    served.finalize()


def test_requests_are_batched_streamed_cancelled_and_refused(served, repository):
    assert served.engine.engine.config.max_num_seqs == 4
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with Engine(repository[0], make_tokenizer()) as engine:
        expected = engine.generate(["the quick", [5, 6, 7]], params)
    greedy = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = Request(greedy, text_input=text("the quick"))
    streamed = Request(greedy, input_ids=np.array([5, 6, 7]), stream=np.array([True]))
    options = text(json.dumps(greedy | {"stream": True}))
    left = Request({}, 1, input_ids=np.array([5, 6, 7]), sampling_parameters=options)
    refused = [
        (Request({"max_tokens": 0.5}, text_input=text("a")), "max_tokens"),
        (Request({"tempreature": 1}, text_input=text("a")), "SamplingParams"),
        (Request({}), "text_input or input_ids must be given"),
    ]
    served.execute([whole, streamed, left, *(request for request, _ in refused)])
    (response,) = whole.responses()
    assert response.outputs["text_output"] == [expected[0].text.encode()]
    assert response.outputs["token_ids"] == expected[0].token_ids
    assert response.outputs["finish_reason"] == [b"length"]
    parts = [part.outputs for part in streamed.responses()]
    assert len(parts) > 1
    assert [token for part in parts for token in part["token_ids"]] == expected[1].token_ids
    assert b"".join(part["text_output"][0] for part in parts).decode() == expected[1].text
    assert [part["finish_reason"] for part in parts] == [[b""]] * (len(parts) - 1) + [[b"length"]]
    assert len(left.responses()) == 1
    for request, word in refused:
        (response,) = request.responses()
        assert word in str(response.error)
        assert response.error.code == Backend.TritonError.INVALID_ARG
