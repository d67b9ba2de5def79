"""Rollout workers: weights as bytes, engines built from a description, versions."""

import asyncio
import pickle
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import toolkit
from infer_patches.ray import RayEngine
from toolkit.errors import ToolkitError
from toolkit.loading.weight_folders import WeightFolders
from toolkit.patching import weight_version
from toolkit.testing.models import random_model
from toolkit.training.rollout_worker import ModelSpec, Worker, packed

PROMPTS = [[7, 8, 9], [5, 6]]
SAMPLED = toolkit.SamplingParams(n=2, max_tokens=6, seed=3)
ENGINE = {"max_model_len": 32, "seed": 5}


def spec_of(model: Any) -> ModelSpec:
    config = type(model.config).from_dict(model.config.to_dict())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return ModelSpec(type(model), config, model.generation_config, dtypes, "cpu", None)


def halved(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4)])
def test_tensors_survive_as_bytes(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    pairs = {"one": tensor, "turned": tensor.mT if tensor.ndim == 2 else tensor}
    sent = pickle.loads(pickle.dumps(packed(pairs)))
    for name, given in pairs.items():
        assert sent[name].tensor().dtype is dtype
        assert torch.equal(sent[name].tensor(), given)


def test_tied_weights_travel_once():
    weight = torch.randn(64, 8)
    sent = packed({"head": weight, "embedding": weight, "other": weight[:32]})
    assert sent["head"] is sent["embedding"]
    assert sent["other"] is not sent["head"]
    assert torch.equal(sent["other"].tensor(), weight[:32])


def test_other_views_of_the_same_memory_are_other_tensors():
    weight = torch.randn(6, 6)
    sent = packed({"one": weight, "turned": weight.mT, "bits": weight.view(torch.int32)})
    assert torch.equal(sent["turned"].tensor(), weight.mT)
    assert torch.equal(sent["bits"].tensor(), weight.view(torch.int32))


@pytest.mark.parametrize("through", ["bytes", pytest.param("folder", marks=pytest.mark.sweep)])
def test_a_worker_samples_what_an_engine_samples_under_the_sender_s_versions(through, tmp_path):
    model = random_model("llama")
    folders = WeightFolders(tmp_path)

    def sent() -> Any:
        state: dict[str, Tensor] = model.state_dict()
        return packed(state) if through == "bytes" else str(folders.write(state))

    async def rounds() -> list[list[Any]]:
        worker = Worker()
        started = await worker.start(pickle.loads(pickle.dumps(spec_of(model))), None, ENGINE, 40, sent())
        assert started.max_model_len == 32
        found = []
        for version in (40, 70):
            if version == 70:
                halved(model)
                await worker.load(version, sent())
            completions = await asyncio.gather(*(worker.generate(prompt, SAMPLED) for prompt in PROMPTS))
            assert {v for group in completions for one in group for v in one.weight_versions} == {version}
            found.append([(one.token_ids, one.logprobs) for group in completions for one in group])
        worker.engine.shutdown()
        return found

    expected = []
    other = random_model("llama")
    with toolkit.Engine(other, **ENGINE) as engine:
        for _ in range(2):
            expected.append([(one.token_ids, one.logprobs) for one in engine.generate(PROMPTS, SAMPLED)])
            halved(other)
    assert expected[0] != expected[1]
    assert asyncio.run(rounds()) == expected


def test_weights_that_do_not_fit_change_nothing():
    model = random_model("llama")

    async def refused() -> tuple[str, list[Any]]:
        worker = Worker()
        await worker.start(spec_of(model), None, ENGINE, 1, packed(model.state_dict()))
        wrong = {**model.state_dict(), "lm_head.weight": torch.zeros(3, 3)}
        with pytest.raises(ToolkitError) as error:
            await worker.load(2, packed(wrong))
        completions = await worker.generate(PROMPTS[0], SAMPLED)
        worker.engine.shutdown()
        return str(error.value), completions

    message, completions = asyncio.run(refused())
    assert "lm_head.weight must have the shape" in message
    assert {version for one in completions for version in one.weight_versions} == {1}


def test_an_update_is_whole_or_not_there(tmp_path):
    folders = WeightFolders(tmp_path)
    with pytest.raises(ToolkitError, match=r"the weights of an update must have >= 1 tensors, got none\."):
        folders.write({})
    first, second = (folders.write({"one": torch.ones(2)}) for _ in range(2))
    folders.remove_previous()
    assert not first.exists()
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
    (tmp_path / ".update-7").mkdir()
    folders.remove_left()
    assert list(tmp_path.iterdir()) == []


class _Ray(SimpleNamespace):
    """Ray whose actors are in this process: a reference is a call without arguments."""

    class RayActorError(Exception):
        pass

    class RayTaskError(Exception):
        pass

    def __init__(self, worker: Any) -> None:
        super().__init__(
            exceptions=SimpleNamespace(RayActorError=self.RayActorError, RayTaskError=self.RayTaskError),
            is_initialized=lambda: True,
            put=lambda value: value,
            get=lambda reference: reference(),
            wait=lambda references, **_: (references, []),
            kill=lambda actor: None,
            remote=lambda kind: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: worker)),
        )


def test_weights_that_an_actor_has_not_taken_are_sent_again(monkeypatch):
    model = random_model("llama")
    loaded: list[int] = []
    refuses = [True]

    def load(version: int, weights: Any) -> None:
        if refuses[0]:
            raise ToolkitError("no room.")
        loaded.append(version)

    started = SimpleNamespace(numerics={}, max_model_len=32)
    methods = {"start": lambda *given: started, "load": load}
    worker = SimpleNamespace(**{name: SimpleNamespace(remote=partial(partial, call)) for name, call in methods.items()})
    monkeypatch.setitem(sys.modules, "ray", _Ray(worker))
    with RayEngine(model, num_workers=1, numerics="fast") as engine:
        halved(model)
        with pytest.raises(ToolkitError, match="no room"):
            engine.sync_weights()
        refuses[0] = False
        assert engine.sync_weights() == weight_version(model)
        assert loaded == [weight_version(model)]


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolkitError, match=r"RayEngine needs the package 'ray': pip install ray\."):
        RayEngine(random_model("llama"))
