"""A client of rank 0 trains the model's own weights, is alone, and gives them back."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.live import WAIT, examples, live_engine, sampled, training
from toolkit.errors import ToolkitError
from toolkit.live import Example, LiveConfig, LiveTraining
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager

STEP = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
FULL = {"rank": 0}


@pytest.fixture(scope="module")
def engine():
    with live_engine() as one:
        yield one


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def trained_by_torch(data, steps):
    """The unpatched model in float64 after so many steps of torch's Adam on one batch."""
    torch.manual_seed(0)
    model = eager(random_model("llama")).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.95), 1e-8, weight_decay=0.0)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for one in data:
            logprobs = model(one.tokens[None]).logits[0].log_softmax(-1).gather(1, one.targets[:, None])[:, 0]
            loss = loss - (logprobs * one.inputs["weights"]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_all_weights_are_trained_sampled_saved_and_given_back(engine, tmp_path):
    model = engine.engine.backend.model
    before, data = weights(model), examples(3, 3, 16, False)
    with training(engine, tmp_path) as live:
        base = sampled(live, live.target(None), 7)
        live.create("f", "base", FULL).result(WAIT)
        for number in (1, 3):
            live.forward_backward("f", number, data, "cross_entropy", {})
            live.optim_step("f", number + 1, STEP).result(WAIT)
        mine, theirs = weights(model), dict(trained_by_torch(data, 2).named_parameters())
        assert mine.keys() == theirs.keys() == live.tenant("f").parameters.keys()
        # Adam divides by the root of what may be 0: where it is not, its steps have the length of the learning rate.
        moved = sum(float((mine[name].double() - theirs[name].detach()).abs().sum()) for name in mine)
        assert moved < 1e-3 * sum(float((mine[name] - before[name]).abs().sum()) for name in mine)

        now = live.snapshot("f", 5, False).result(WAIT)
        tokens, logprobs = sampled(live, now, 7)
        assert (tokens, logprobs) != base
        whole = torch.tensor([5, 6, 7, *tokens])
        scored = [Example(whole[:-1], whole[1:], {})]
        found = live.forward_backward("f", 6, scored, "cross_entropy", {}, True).result(WAIT)
        assert found.logprobs[0][2:].tolist() == list(logprobs)  # bitwise

        path = live.save("f", 7, "weights", "two").result(WAIT)
        folder = live.checkpoints.folder(path)
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(one, mine[name]) for name, one in stock.named_parameters())
        live.forward_backward("f", 8, data, "cross_entropy", {})
        live.optim_step("f", 9, STEP).result(WAIT)
        after = weights(model)
        with pytest.raises(ToolkitError, match="weights as they are now"):
            sampled(live, now, 7)
        live.load("f", 10, path, optimizer=True).result(WAIT)
        live.forward_backward("f", 11, data, "cross_entropy", {})
        live.optim_step("f", 12, STEP).result(WAIT)
        assert all(torch.equal(one, after[name]) for name, one in weights(model).items())

        live.unload("f")
        assert sampled(live, live.target(None), 7) == base
        assert all(torch.equal(one, before[name]) for name, one in weights(model).items())


def test_it_is_alone(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4}).result(WAIT)
        adapter = live.target(live.save("a", 1, "sampler_weights", "x").result(WAIT))
        with pytest.raises(ToolkitError, match="while there are other training clients, got 0"):
            live.create("f", "base", FULL)
        live.unload("a")
        live.create("f", "base", FULL).result(WAIT)
        for rank in (0, 4):
            with pytest.raises(ToolkitError, match="rank"):
                live.create("b", "base", {"rank": rank})
        for target in (adapter, live.target(None)):
            with pytest.raises(ToolkitError, match="must be of f, which trains all weights"):
                sampled(live, target, 1)
        with pytest.raises(ToolkitError, match="got all weights of a model"):
            live.target(live.save("f", 1, "sampler_weights", "y").result(WAIT))
        live.unload("f")
        live.create("b", "base", {"rank": 4}).result(WAIT)
        with pytest.raises(ToolkitError, match="where not all of attn, mlp and unembed train"):
            live.create("c", "base", {"rank": 0, "train_mlp": False})


def test_it_outlives_the_server(engine, tmp_path):
    data = examples(3, 3, 16, False)
    before = weights(engine.engine.backend.model)

    def started():
        live = LiveTraining(engine, LiveConfig(("base",), tmp_path, durable=True, state_interval=1))
        live.start()
        return live

    live = started()
    live.create("f", "base", FULL).result(WAIT)
    for number in (1, 3):
        live.forward_backward("f", number, data, "cross_entropy", {})
        live.optim_step("f", number + 1, STEP).result(WAIT)
    target = live.snapshot("f", 5, False).result(WAIT)
    expected, found = sampled(live, target, 7), weights(engine.engine.backend.model)
    live.close()
    with torch.no_grad():  # another process begins with the model as it was
        for name, one in engine.engine.backend.model.named_parameters():
            one.copy_(before[name])
    live = started()
    futures = {one.number: one.future for one in live.recovered}
    assert sampled(live, futures[5].result(WAIT), 7) == expected
    assert all(torch.equal(one, found[name]) for name, one in weights(engine.engine.backend.model).items())
    live.unload("f").result(WAIT)
    live.close()
    assert all(torch.equal(one, before[name]) for name, one in weights(engine.engine.backend.model).items())
