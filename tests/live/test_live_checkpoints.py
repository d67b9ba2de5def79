"""Checkpoints are PEFT folders that are there whole or not at all, and a client continues from one bitwise."""

import pytest
import torch

from tests.helpers.adapter_folders import oracle_logprobs
from tests.helpers.live import WAIT, examples, live_engine, sampled, training
from toolkit.errors import ToolkitError
from toolkit.live import checkpoints
from toolkit.live.checkpoints import Checkpoints
from toolkit.testing.models import random_model

STEP = {"learning_rate": 1e-2}


@pytest.fixture(scope="module")
def engine():
    with live_engine() as one:
        yield one


def train(live, name, first, rounds):
    """Rounds of a forward, a backward and a step, numbered from ``first``; the losses."""
    losses = []
    for at in range(rounds):
        data = examples(first + 2 * at, 3, 16, False)
        losses.append(live.forward_backward(name, first + 2 * at, data, "cross_entropy", {}))
        step = live.optim_step(name, first + 2 * at + 1, STEP)
    step.result(WAIT)  # the last one writes the weights after the losses are there
    return [one.result(WAIT).loss for one in losses]


def test_a_client_continues_from_a_checkpoint(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4, "seed": 1, "train_unembed": False}).result(WAIT)
        train(live, "a", 1, 2)
        path = live.save("a", 5, "weights", "two").result(WAIT)
        undisturbed = train(live, "a", 6, 2)
        weights = {name: one.detach().clone() for name, one in live.tenant("a").parameters.items()}
        assert not any("lm_head" in name for name in weights)

        live.create_from("b", path, optimizer=True).result(WAIT)
        for number in range(1, 6):  # the same numbers, hence the same examples, as behind the checkpoint
            live.forward_backward("b", number, examples(0, 1, 8, False), "cross_entropy", {}, True)
        assert train(live, "b", 6, 2) == undisturbed
        assert all(torch.equal(one, weights[name]) for name, one in live.tenant("b").parameters.items())

        live.load("a", 10, path, optimizer=True).result(WAIT)  # back again
        saved = live.checkpoints.read(path, optimizer=True)
        mine = live.tenant("a")
        assert all(torch.equal(one, saved.factors[name]) for name, one in mine.parameters.items())
        assert mine.optimizer.step == saved.optimizer.step == 2
        live.load("a", 11, path, optimizer=False).result(WAIT)
        assert mine.optimizer.step == 0
        live.create("c", "base", {"rank": 8, "seed": 1}).result(WAIT)
        with pytest.raises(ToolkitError, match="same layers and rank"):
            live.load("c", 1, path, optimizer=False).result(WAIT)


def test_a_checkpoint_is_an_adapter_of_peft(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
        train(live, "a", 1, 1)
        path = live.save("a", 3, "sampler_weights", "x").result(WAIT)
        data = examples(5, 2, 16, False)
        found = live.forward_backward("a", 4, data, "cross_entropy", {}, True).result(WAIT)
        folder = live.checkpoints.folder(path)
    torch.manual_seed(0)
    sequences = [[*one.tokens.tolist(), int(one.targets[-1])] for one in data]
    for mine, theirs in zip(found.logprobs, oracle_logprobs(random_model("llama"), folder, sequences)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_names_and_paths(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
        path = live.save("a", 1, "weights", "x").result(WAIT)
        assert path == "tinker://a/weights/x"
        with pytest.raises(ToolkitError, match="name that no checkpoint of a has, got 'x'"):
            live.save("a", 2, "weights", "x").result(WAIT)
        assert live.save("a", 3, "weights", "x", overwrite=True).result(WAIT) == path
        for number, name in enumerate(("../x", "", ".x", "a/b"), 4):
            with pytest.raises(ToolkitError, match="path must be a name of letters"):
                live.save("a", number, "weights", name).result(WAIT)
        for wrong in (
            "x",
            "tinker://a/weights/../x",
            "tinker://../a/weights",
            "tinker://a/other/x",
            "tinker://a/weights/y",
        ):
            with pytest.raises(ToolkitError, match="path must be"):
                live.target(wrong)
        sampler = live.save("a", 8, "sampler_weights", "s").result(WAIT)
        with pytest.raises(ToolkitError, match="with the optimizer's state"):
            live.checkpoints.read(sampler, optimizer=True)


def test_checkpoints_end_and_do_not_come_back(engine, tmp_path):
    now = [1000.0]
    kept = Checkpoints(tmp_path, lambda: now[0])
    with training(engine, tmp_path / "live") as live:
        live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
        saved = live.tenant("a").saved(optimizer=True)
    paths = [kept.save("a", "weights", name, saved, ttl_seconds=ttl) for name, ttl in (("x", 100), ("y", None))]
    now[0] = 1001.0
    later = kept.save("b", "sampler_weights", "z", saved)
    assert [one.path for one in kept.entries()] == [later, *paths]
    assert [(one.saved_at, one.expires_at) for one in kept.entries("a")] == [(1000.0, 1100.0), (1000.0, None)]
    assert kept.entries("a")[0].num_bytes > sum(one.numel() * 4 for one in saved.factors.values())
    kept.set_ttl(paths[0], 200)
    kept.set_ttl(paths[1], 300)
    now[0] = 1150.0
    assert kept.about(paths[0])[0] == "base"
    now[0] = 1201.0
    with pytest.raises(ToolkitError, match="saved here"):
        kept.folder(paths[0])
    assert [one.path for one in kept.entries()] == [later, paths[1]]
    kept.remove(later)
    assert [kept.path_of("b", "sampler_weights", name) for name in ("z", "w")] == [later, None]
    assert kept.save("a", "weights", "x", saved) == paths[0]  # its name is free again
    assert [one.path for one in kept.entries()] == [paths[0], paths[1]]
    assert not list(tmp_path.glob("**/.*.old"))


def test_a_name_that_is_saved_again_is_sampled_as_it_is_now(engine, tmp_path):
    with training(engine, tmp_path) as live:
        live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
        found = []
        for at in range(2):
            live.forward_backward("a", 3 * at + 1, examples(at, 2, 12, False), "cross_entropy", {})
            live.optim_step("a", 3 * at + 2, STEP)
            path = live.save("a", 3 * at + 3, "sampler_weights", "same").result(WAIT)
            target = live.target(path)
            found.append(sampled(live, target, 4))
            live.checkpoints.remove(path)
            with pytest.raises(ToolkitError, match="not removed"):
                sampled(live, target, 4)
        assert found[0] != found[1]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, saved):
        (folder / "half").write_text("x")
        raise OSError("no space")

    monkeypatch.setattr(checkpoints, "write_saved", fail)
    kept = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="no space"):
        kept.save("a", "weights", "x", None)
    assert list((tmp_path / "a" / "weights").iterdir()) == []


def test_saved_versions_leave_the_model_for_others_and_come_back(engine, tmp_path):
    with training(engine, tmp_path, max_samplers=1) as live:
        live.create("a", "base", {"rank": 4, "seed": 1}).result(WAIT)
        targets, found = [], []
        for at in range(3):
            live.forward_backward("a", 3 * at + 1, examples(at, 2, 12, False), "cross_entropy", {})
            live.optim_step("a", 3 * at + 2, STEP)
            targets.append(live.snapshot("a", 3 * at + 3, False).result(WAIT))
            found.append(sampled(live, targets[-1], 4))
        assert len(set(found)) == 3
        assert [sampled(live, one, 4) for one in targets] == found
        names = [name for name in engine.call(lambda: engine.engine.adapters.names) if name.startswith("sampler-")]
        assert len(names) == 1
