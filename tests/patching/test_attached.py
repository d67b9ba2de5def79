"""What is kept beside a model goes with it: no model outlives its last user, and copies have their own."""

import copy
import gc
import pickle
import weakref

import pytest

import toolkit
from tests.helpers.adapter_folders import save_adapter
from toolkit.engine import Engine, SamplingParams
from toolkit.patching.weights import weight_clock, weight_version
from toolkit.testing.models import random_model


def patched(tmp_path):
    model = random_model("llama", hidden=16, vocabulary=40)
    toolkit.patch(model)
    toolkit.token_logprobs(model, [[1, 2, 3]])[0].sum().backward()
    return model


def served(tmp_path):
    model = random_model("qwen3_moe", hidden=16, vocabulary=40)
    with Engine(model) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    return model


def adapted(tmp_path):
    peft = pytest.importorskip("peft")
    model = random_model("llama", hidden=16, vocabulary=40)
    folder = save_adapter(model, tmp_path / "adapter", 1)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    with Engine(model) as engine:
        engine.load_adapter("one", folder)
        for name in (None, "one"):
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3, lora_name=name))
    return model


@pytest.mark.parametrize("use", [patched, served, adapted])
def test_a_model_is_freed_with_its_last_user(use, tmp_path):
    model = use(tmp_path)
    parts = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not [part() for part in parts if part() is not None]


def test_copies_have_clocks_of_their_own():
    model = random_model("llama", hidden=16, vocabulary=40)
    clock = weight_clock(model)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.detach().add_(1.0)
    assert weight_version(model) > 0
    shallow, deep, loaded = copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    clocks = [weight_clock(one) for one in (shallow, deep, loaded)]
    assert len({id(one) for one in (clock, *clocks)}) == 4
    assert weight_clock(model) is clock
    assert [one.version() for one in clocks] == [0, 0, 0]
    deep.lm_head.weight.detach().add_(1.0)
    assert weight_version(deep) > 0
    assert weight_version(loaded) == 0


def test_an_engine_keeps_its_clock_over_a_second_patch():
    model = random_model("llama", hidden=16, vocabulary=40)
    with Engine(model) as engine:
        clock = weight_clock(model)
        toolkit.unpatch(model)
        assert not [name for name in model.__dict__ if "toolkit" in name]
        toolkit.patch(model)
        assert weight_clock(model) is clock is engine.backend.clock
