"""Steps that are launched ahead while weights change: each token has those of its step, and says which they are."""

from collections import Counter

import pytest
import torch

import toolkit
from tests.helpers.ahead import SMALL_POOL, chance_of, check_idle, first_in_sweep, pair, plain, random_plan


class Aligned:
    """Two engines that have made the same steps whenever something happens to both."""

    def __init__(self, sync, ahead):
        self.engines = self.sync, self.ahead = sync, ahead
        self.finished = [{}, {}]

    def step(self):
        for engine, finished in zip(self.engines, self.finished):
            self._keep(engine.step(), finished)

    def align(self):
        self.ahead.synchronize()
        while self.sync.stats()["num_steps"] < self.ahead.stats()["num_steps"]:
            self._keep(self.sync.step(), self.finished[0])
        assert self.sync.stats()["generation_tokens"] == self.ahead.stats()["generation_tokens"]

    @staticmethod
    def _keep(deltas, finished):
        finished |= {(one.request_id, one.index): one.finished for one in deltas if one.finished is not None}

    def each(self, function, *args):
        self.align()
        for engine in self.engines:
            function(engine, *args)


def trained(engine, seed):
    parameters = list(engine.backend.model.parameters())
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(seed))
    torch.optim.SGD(parameters, lr=0.01).step()
    for one in parameters:
        one.grad = None


def slept(engine):
    engine.sleep()
    engine.wake()


def weights_schedule(aligned, chance, steps):
    """Requests come, weights are written and pools sleep, at the same step of both engines; what happened."""
    happened = Counter()
    for _ in range(steps):
        live = list(aligned.sync.requests.by_id)
        if not live or (len(live) < 5 and chance.random() < 0.15):
            (one,) = random_plan(chance, count=1)
            aligned.each(toolkit.Engine.submit, one.prompt, one.params)
            happened["submitted"] += 1
        if chance.random() < 0.1:
            aligned.each(trained, chance.randrange(999))
            happened["trained"] += 1
        if chance.random() < 0.04:
            aligned.each(slept)
            happened["slept"] += 1
        if live and chance.random() < 0.04:
            request = chance.choice(live)
            assert len({engine.cancel(request) for engine in aligned.engines}) == 1
            happened["cancelled"] += 1
        aligned.step()
    while any(engine.has_work for engine in aligned.engines):
        aligned.step()
    expected, found = aligned.finished
    assert found == expected
    return happened


@pytest.mark.parametrize("settings", [{}, SMALL_POOL, {**SMALL_POOL, "swap_space": None}], ids=str)
def test_each_token_has_the_weights_and_the_version_of_its_step(settings):
    sync, ahead, launches = pair(max_num_seqs=16, **settings)
    with sync, ahead:
        aligned = Aligned(sync, ahead)
        happened = weights_schedule(aligned, chance_of(7), 120)
        assert min(happened[one] for one in ("trained", "slept", "cancelled", "submitted")) > 1
        assert launches.count > 20
        versions = [set(one.weight_versions) for one in aligned.finished[1].values()]
        assert sum(len(one) > 1 for one in versions) > 3
        for engine in (sync, ahead):
            check_idle(engine)


@pytest.mark.parametrize("seed", first_in_sweep(range(20), 4))
def test_many_schedules_of_weights(seed):
    sync, ahead, _ = pair(max_num_seqs=16, num_blocks=15 + seed, swap_space=None if seed % 2 else 0)
    with sync, ahead:
        weights_schedule(Aligned(sync, ahead), chance_of(seed), 400)
        for engine in (sync, ahead):
            check_idle(engine)


def test_weights_written_behind_the_engine_leave_a_step_in_flight_with_its_own():
    """Nobody has synchronised: the token is of the old weights and says so, and no block is found under the new key."""
    sync, ahead, _ = pair()
    with sync, ahead:
        for engine in (sync, ahead):
            engine.submit([5, 6, 7, 8, 9], plain(max_tokens=12))
            for _ in range(3):
                engine.step()
        before = ahead.stats()["weight_version"]
        trained(ahead, 1)
        (expected,), (delta,) = sync.step(), ahead.step()
        assert delta == expected
        assert delta.weight_version == before
        versions = []
        while ahead.has_work:
            versions += [one.weight_version for one in ahead.step()]
        assert set(versions) == {ahead.stats()["weight_version"]} != {before}
        assert ahead.generate([[5, 6, 7, 8, 9]], plain(max_tokens=1))[0].num_cached_tokens == 0
        check_idle(ahead)
