import random
from collections import defaultdict

import pytest

from tests.helpers.engine_standin import make_request
from toolkit.engine.params import SamplingParams
from toolkit.engine.scheduler import Scheduler
from toolkit.state import BlockManager, Group, PrefixKey, WeightKeys

WEIGHTS = WeightKeys(PrefixKey(), 0)


class Drive:
    """Steps a scheduler without a model: tokens are sampled from a counter, everything else is checked."""

    def __init__(self, num_blocks=64, block_size=4, seqs=8, budget=32, enable_prefix_caching=True, seed=0):
        self.block_manager = BlockManager([Group()], [num_blocks], block_size)
        self.allocator = self.block_manager.allocators[0]
        self.scheduler = Scheduler(self.block_manager, seqs, budget, enable_prefix_caching)
        self.rng = random.Random(seed)
        self.budget = budget
        self.requests = []
        self.chunks = []
        self.log = defaultdict(list)

    def add(self, length, max_tokens, n=1, prompt=None):
        prompt = prompt or [self.rng.randrange(1, 50) for _ in range(length)]
        request = make_request(prompt, SamplingParams(n=n, max_tokens=max_tokens), len(self.requests))
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self):
        scheduler = self.scheduler
        decoding = [one for one in scheduler.running if one.remaining == 1]
        preemptions = scheduler.num_preemptions
        self.chunks = chunks = scheduler.schedule(WEIGHTS)
        scheduler.check_integrity()
        total = sum(chunk.count for chunk in chunks)
        assert total <= self.budget
        assert len({chunk.sequence.order for chunk in chunks}) == len(chunks)
        assert len({slot for chunk in chunks for slot in chunk.slots[0]}) == total
        assert all(chunk.count > 0 and len(chunk.slots[0]) == chunk.count for chunk in chunks)
        if scheduler.num_preemptions == preemptions:
            assert {one.order for one in decoding} <= {chunk.sequence.order for chunk in chunks}
        alive = [one for request in self.requests for one in request.sequences if one.completion is None]
        if alive:
            assert chunks, "nothing runs though something waits"
        for chunk in chunks:
            one = chunk.sequence
            one.block_tables.take_copies()
            assert chunk.start == one.block_tables.length
            one.block_tables.commit(one.tokens[chunk.start : chunk.start + chunk.count], WEIGHTS.active)
            self.log[one.order[1:]].append((chunk.start, chunk.count))
            assert chunk.samples == (one.block_tables.length == len(one.tokens))
            for owner in [one, *scheduler.fork_siblings(one)] if chunk.samples else []:
                owner.accept(self.rng.randrange(1, 50), 0.0, 0.0, None, 0)
                if owner.completion is not None:
                    scheduler.remove(owner)
            scheduler.check_integrity()
        return chunks

    def drain(self, limit=2000):
        steps = 0
        while any(one.completion is None for request in self.requests for one in request.sequences):
            self.step()
            steps += 1
            assert steps < limit, "no progress"
        assert self.allocator.num_free_blocks == self.allocator.num_blocks
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        return steps


def test_a_prompt_is_truncated_to_the_budget_and_sampled_once():
    drive = Drive(budget=5)
    drive.add(13, 2)
    assert [[(c.start, c.count, c.samples) for c in drive.step()] for _ in range(4)] == [
        [(0, 5, False)],
        [(5, 5, False)],
        [(10, 3, True)],
        [(13, 1, True)],
    ]
    assert not drive.scheduler.running


def test_decodes_go_first_and_prompts_fill_the_rest():
    drive = Drive(budget=6, seqs=4)
    drive.add(2, 9)
    drive.add(2, 9)
    drive.step()
    drive.add(20, 2)
    assert [c.count for c in drive.step()] == [1, 1, 4]
    drive.add(3, 2)
    assert [c.count for c in drive.step()] == [1, 1, 4]


def test_the_budget_bounds_what_runs():
    drive = Drive(budget=3, seqs=8)
    for _ in range(6):
        drive.add(1, 5)
    for _ in range(4):
        drive.step()
        assert len(drive.scheduler.running) <= 3
    drive.drain()


def test_requests_are_let_in_in_order_and_none_overtakes():
    drive = Drive(num_blocks=8, block_size=4, seqs=8)
    drive.add(14, 10)
    drive.add(20, 4)  # does not fit beside the first
    drive.add(1, 2)  # would fit, but came later
    drive.step()
    assert [one.request.request_id for one in drive.scheduler.running] == [0]
    drive.drain()
    assert drive.log[(2, 0)]


def test_the_youngest_is_preempted_and_keeps_its_tokens():
    drive = Drive(num_blocks=6, block_size=2, seqs=3, enable_prefix_caching=False)
    old, young = drive.add(2, 9), drive.add(2, 9)
    while not drive.scheduler.num_preemptions:
        drive.step()
    assert [one.request for one in drive.scheduler.running] == [old]
    assert [one.request for one in drive.scheduler.waiting] == [young]
    kept = young.sequences[0].tokens.copy()
    assert len(kept) > 2
    drive.drain()
    assert young.sequences[0].tokens[: len(kept)] == kept
    starts = [start for start, _ in drive.log[(1, 0)]]
    assert starts.count(0) == 2


def test_prefix_hits_skip_whole_blocks():
    drive = Drive(block_size=4)
    prompt = list(range(1, 15))
    drive.add(0, 2, prompt=prompt)
    drive.drain()
    drive.add(0, 2, prompt=prompt)
    drive.drain()
    assert drive.log[(1, 0)][0] == (12, 2)
    assert drive.scheduler.prefix_cache_hits == 12
    other = Drive(block_size=4, enable_prefix_caching=False)
    for _ in range(2):
        other.add(0, 2, prompt=prompt)
        other.drain()
    assert other.log[(1, 0)][0] == (0, 14)


def test_siblings_fork_one_prefill():
    drive = Drive(budget=6, seqs=8, enable_prefix_caching=False)
    drive.add(15, 3, n=4)
    for _ in range(3):
        drive.step()
    assert len(drive.scheduler.running) == 4
    drive.drain()
    assert drive.log[(0, 0)][:3] == [(0, 6), (6, 6), (12, 3)]
    for index in (1, 2, 3):
        assert drive.log[(0, index)] == [(15, 1), (16, 1)]


def test_rows_are_kept_for_siblings_while_their_prompt_is_computed():
    drive = Drive(budget=6, seqs=4)
    drive.add(15, 3, n=4)
    drive.add(1, 3)
    drive.step()
    assert len(drive.scheduler.running) == 1
    drive.step()
    drive.step()
    assert [one.order[1:] for one in drive.scheduler.running] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    drive.drain()


def test_more_siblings_than_rows():
    drive = Drive(budget=16, seqs=3)
    drive.add(9, 4, n=8)
    drive.add(2, 2)
    drive.drain()
    assert all(one.generated == 4 for one in drive.requests[0].sequences)


@pytest.mark.parametrize("seed", range(40))
def test_random_loads_end_within_bounds_and_leak_nothing(seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 16])
    longest = 40
    drive = Drive(
        num_blocks=-(-longest // block_size) + rng.choice([0, 1, 5, 30]),
        block_size=block_size,
        seqs=rng.choice([1, 2, 5, 16]),
        budget=rng.choice([1, 2, 7, 64]),
        enable_prefix_caching=rng.random() < 0.7,
        seed=seed,
    )
    shared = [rng.randrange(1, 50) for _ in range(20)]
    for _ in range(60):
        if rng.random() < 0.4:
            length = rng.randint(1, 24)
            prompt = shared[:length] if rng.random() < 0.5 else None
            drive.add(length, rng.randint(1, longest - length), rng.choice([1, 1, 1, 3]), prompt)
        if rng.random() < 0.1 and drive.requests:
            for one in rng.choice(drive.requests).sequences:
                if one.completion is None:
                    one.finish("cancelled")
                    drive.scheduler.remove(one)
            drive.scheduler.check_integrity()
        drive.step()
    drive.drain(6000)


@pytest.mark.parametrize("seed", range(10))
def test_nobody_starves_under_a_stream_of_newcomers(seed):
    """Requests continue arriving; the oldest unfinished one always gets on, so each ends in bounded time."""
    rng = random.Random(seed)
    drive = Drive(num_blocks=12, block_size=2, seqs=4, budget=rng.choice([3, 8]), seed=seed)
    watched = drive.add(10, 10)
    for _ in range(30):
        drive.add(rng.randint(1, 10), rng.randint(1, 10))
    for _ in range(300):
        drive.add(rng.randint(1, 10), rng.randint(1, 10))
        before = watched.sequences[0].block_tables.length if watched.sequences[0].block_tables else 0
        oldest = min(one.order for r in drive.requests for one in r.sequences if one.completion is None)
        chunks = drive.step()
        assert oldest in {chunk.sequence.order for chunk in chunks}
        if watched.finished:
            break
        assert watched.sequences[0].block_tables.length > before
    assert watched.finished
