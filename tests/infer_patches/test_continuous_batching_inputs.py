"""Any argument that a caller hands to the manager: the request at hand ends with a sentence, and the next one runs."""

import asyncio

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus

import toolkit
from infer_patches.continuous_batching import route_continuous_batching
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

FIRST, SECOND = [5, 6, 7], [8, 9]


@pytest.fixture(scope="module")
def model():
    model = random_model("llama", max_position_embeddings=128)
    toolkit.patch(model)
    with route_continuous_batching(model, num_blocks=64):
        yield model


@pytest.fixture
def manager(model):
    manager = model.init_continuous_batching(GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None))
    manager.start()
    yield manager
    manager.stop(hard_stop=True)


def greedy(model, prompt):
    ids = list(prompt)
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def collected(manager, count):
    return [manager.get_result(timeout=30) for _ in range(count)]


@pytest.mark.parametrize("started", [True, False])
def test_one_id_given_twice_names_both_requests(model, started):
    manager = model.init_continuous_batching(GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None))
    if started:
        manager.start()
    for prompt in (FIRST, SECOND):
        assert manager.add_request(prompt, request_id="x") == "x"
    manager.start()
    got = {tuple(one.prompt_ids): one.generated_tokens for one in collected(manager, 2)}
    assert got == {tuple(prompt): greedy(model, prompt) for prompt in (FIRST, SECOND)}
    later = manager.add_request(FIRST, request_id="x")
    assert manager.get_result(later, timeout=30).generated_tokens == greedy(model, FIRST)
    for _ in range(2):
        manager.add_request(FIRST, request_id="x", max_new_tokens=100)
    manager.cancel_request("x")
    assert [one.error for one in collected(manager, 2)] == ["cancelled"] * 2
    assert manager.is_running()
    manager.stop()


def test_ids_that_are_made_up_are_free_ones(manager):
    with manager.pause():
        named = [manager.add_request(FIRST, request_id=name) for name in ("req_0", "req_2")]
        made_up = [manager.add_request(SECOND) for _ in range(3)]
    assert made_up == ["req_1", "req_3", "req_4"]
    assert sorted(one.request_id for one in collected(manager, 5)) == sorted(named + made_up)


def test_a_handler_sees_all_results_of_its_id(model, manager):
    async def collect():
        seen, done = [], asyncio.Event()
        manager.register_result_handler("x", lambda one: (seen.append(one), len(seen) == 2 and done.set()))
        with manager.pause():
            for prompt in (FIRST, SECOND):
                manager.add_request(prompt, request_id="x")
        await asyncio.wait_for(done.wait(), 30)
        return seen

    seen = asyncio.run(collect())
    assert sorted(one.generated_tokens for one in seen) == sorted(greedy(model, one) for one in (FIRST, SECOND))


WRONG = [
    ((None,), {}, "input_ids must be a list of token ids, got None."),
    ((7,), {}, "input_ids must be a list of token ids, got 7."),
    ((FIRST,), {"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0."),
    ((FIRST,), {"max_new_tokens": "9"}, "max_new_tokens must be an integer >= 1, got '9'."),
    ((FIRST,), {"eos_token_id": "end"}, "eos_token_id must be a token id, a list of them or None, got 'end'."),
    ((FIRST,), {"eos_token_id": [3, [4]]}, "eos_token_id must be .*, got .3, .4..."),
    ((FIRST,), {"request_id": ["x"]}, "request_id must be a string or None, got ..x..."),
    ((FIRST,), {"repetition_penalty": float("nan")}, "repetition_penalty must be a finite number .*, got nan."),
]


@pytest.mark.parametrize(("args", "settings", "sentence"), WRONG)
def test_a_wrong_argument_is_a_sentence_and_leaves_nothing_behind(manager, args, settings, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        manager.add_request(*args, **settings)
    assert not manager._of_id
    assert manager.get_result(manager.add_request(FIRST), timeout=30).error is None


@pytest.mark.parametrize("prompt", [[], "text", [1.5], [True], [-1], [10**6], [2**70], [[3]], [None]])
def test_a_prompt_that_cannot_run_fails_alone(manager, prompt):
    names = [manager.add_request(one) for one in (prompt, FIRST)]
    failed, good = (manager.get_result(name, timeout=30) for name in names)
    assert (failed.status, good.error) == (RequestStatus.FAILED, None)
    assert failed.error.startswith("prompt must ")


def test_ids_that_nobody_has(manager):
    manager.cancel_request("nobody")
    assert manager.get_result("nobody") is None  # at once: none can come
    assert list(manager.request_id_iter("nobody")) == []
    name = manager.add_request(FIRST)
    assert manager.get_result(timeout=30).request_id == name
    manager.cancel_request(name)
    assert manager.get_result(name) is None


def test_after_an_error_in_a_step_the_next_request_gets_a_new_engine(model, manager, capsys):
    broken = manager.engine
    broken.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with manager.pause():
        names = [manager.add_request(one) for one in (FIRST, SECOND)]
    for name in names:
        assert manager.get_result(name, timeout=30).error == "The engine has stopped: out of memory"
    assert "out of memory" in capsys.readouterr().err
    assert manager.get_result(manager.add_request(SECOND), timeout=30).generated_tokens == greedy(model, SECOND)
    assert broken.is_closed
    assert manager.engine is not broken


def test_a_stopped_manager_takes_calls(manager):
    manager.stop()
    assert manager.add_request(FIRST) is None
    manager.cancel_request("x")
    assert (manager.get_result(), list(manager), list(manager.request_id_iter("x"))) == (None, [], [])
    manager.stop()
    manager.start()
    assert manager.get_result(manager.add_request(FIRST), timeout=30).error is None
