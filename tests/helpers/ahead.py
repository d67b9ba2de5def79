"""Engines that launch steps ahead beside synchronous ones, and random schedules that both are told."""

import random
from dataclasses import dataclass, field

import pytest
import torch

import toolkit
from toolkit.engine.runner import SampledStep
from toolkit.engine.step.executors import straight_line
from toolkit.engine.step.native import native_replay
from toolkit.ops import native
from toolkit.testing.models import random_model, tiny_tokenizer

VOCABULARY = 331
SETTINGS = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 5, "max_model_len": 48, "seed": 1}
LETTERS = "etaoinsrhl"
NATIVE_OR_PYTHON = straight_line if native.load() is None else native_replay
SMALL_POOL = {"num_blocks": 15}


def first_in_sweep(values, count):
    """Parameters of which the first ``count`` run in the sweep and the others in the soak."""
    return [
        pytest.param(one, marks=pytest.mark.sweep if at < count else pytest.mark.soak) for at, one in enumerate(values)
    ]


def plain(**more):
    """Sampling parameters that leave the host nothing to do between two steps."""
    return toolkit.SamplingParams(**{"max_tokens": 10, "temperature": 0.8, "seed": 3, "ignore_eos": True, **more})


def flipped(output, row):
    """A logits processor."""
    return row.flip(0) if len(output) % 2 else row


def new_engine(ahead, family="llama", executor=None, **settings):
    """An engine of a small model, whose weights are those of every other one."""
    hidden, layers = (32, 1) if family == "llama" else (64, 2)
    model = random_model(family, hidden=hidden, layers=layers, vocabulary=VOCABULARY)
    engine = toolkit.Engine(model, tiny_tokenizer(), **{**SETTINGS, "async_scheduling": ahead, **settings})
    if executor is not None:
        engine.backend.graphs.executors = (executor,)
    return engine


class Launches:
    """Counts what an engine launches ahead. ``log``: launches and collections, in order, by the step's number."""

    def __init__(self, engine):
        self.count, self.log, self._numbers, self._launched = 0, [], {}, 0
        decoding = engine._steps._decoding
        launch, ahead, collect = decoding.launch, decoding.launch_ahead, decoding.collect

        def launched(step, features):
            self._note("launch", step)
            launch(step, features)

        def launched_ahead(*args):
            step = ahead(*args)
            self.count += 1
            self._note("launch", step)
            return step

        def collected(step):
            self._note("collect", step)
            return collect(step)

        decoding.launch, decoding.launch_ahead, decoding.collect = launched, launched_ahead, collected

    def _note(self, what, step):
        if what == "launch":  # steps that are gone leave their id to others
            self._numbers[id(step)] = self._launched
            self._launched += 1
        self.log.append((what, self._numbers[id(step)]))


def poison(engine):
    """Let the host find NaN in place of what a step has sampled, until it reads the step's result."""
    step = engine.runner.step

    def poisoned(*args):
        logits, sampled = step(*args)
        if sampled is None:
            return logits, None
        kept = sampled.result.clone()
        sampled.result.fill_(float("nan"))
        return logits, SampledStep(kept, kept.clone)

    engine.runner.step = poisoned


def pair(executor=NATIVE_OR_PYTHON, family="llama", poisoned=False, **settings):
    """A synchronous engine, one that launches ahead, and what it launches."""
    sync, ahead = (new_engine(flag, family, executor, **settings) for flag in (False, True))
    launches = Launches(ahead)
    if poisoned:
        poison(ahead)
    return sync, ahead, launches


@dataclass
class Planned:
    """A request of a schedule.

    Args:
        call: of ``step`` before which it is submitted, at the earliest.
        prompt, params: of it.
        cancel: tokens after which it is cancelled; None for not.
    """

    call: int
    prompt: list[int]
    params: toolkit.SamplingParams
    cancel: int | None = None


@dataclass
class Outcome:
    """What a request has come to, and what its deltas add up to."""

    completions: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    texts: dict = field(default_factory=dict)

    def add(self, delta):
        self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
        self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
        if delta.finished is not None:
            assert delta.index not in self.completions
            self.completions[delta.index] = delta.finished


def random_params(chance, adapters=(), hosted=True):
    """Sampling parameters; where ``hosted``, some that need the host between two steps."""
    found = {
        "n": chance.choice((1, 1, 1, 2, 3)),
        "max_tokens": chance.choice((1, 2, 4, 8, 12, 16)),
        "temperature": chance.choice((0.0, 0.8, 1.3)),
        "seed": chance.randrange(1000),
        "logprobs": chance.choice((None, None, 3)),
        "top_k": chance.choice((0, 20)),
        "top_p": chance.choice((1.0, 0.9)),
        "min_tokens": chance.choice((0, 0, 3)),
        "lora_name": chance.choice((None, *adapters)),
        "ignore_eos": chance.random() < 0.5,
        "stop": chance.choice((None, None, chance.sample(LETTERS, 3))),
        "stop_token_ids": chance.choice((None, chance.sample(range(VOCABULARY), 20))),
        "logit_bias": chance.choice((None, None, {chance.randrange(VOCABULARY): 3.0})),
        "priority": chance.choice((0, 0, 1)),
    }
    found["min_tokens"] = min(found["min_tokens"], found["max_tokens"])
    if hosted and chance.random() < 0.3:
        found |= chance.choice(
            (
                {"repetition_penalty": 1.3},
                {"frequency_penalty": 0.4},
                {"bad_words": chance.sample(LETTERS, 2)},
                {"logits_processors": [flipped]},
                {"structured_outputs": {"regex": "[a-e]{1,9}"}},
                {"dry_multiplier": 0.8},
                {"predicted_token_ids": [5, 6, 7]},
                {"prompt_logprobs": 2},
                {"n": 1, "best_of": 3},
            )
        )
    return toolkit.SamplingParams(**found)


def random_plan(chance, adapters=(), count=6):
    """The requests of a schedule, none of which needs the host between two steps in two of three schedules."""
    hosted = chance.random() < 1 / 3
    prefix = [chance.randrange(3, VOCABULARY) for _ in range(12)]
    plan = []
    for _ in range(count):
        own = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 7))]
        prompt = prefix[: chance.choice((0, 4, 8, 12))] + own
        params = random_params(chance, adapters, hosted)
        # Of several completions which one has how many tokens is a matter of when they are let in.
        cancel = chance.randint(1, 6) if chance.random() < 0.2 and params.num_candidates == 1 else None
        plan.append(Planned(chance.randrange(12), prompt, params, cancel))
    return sorted(plan, key=lambda one: one.call)


def run(engine, plan, between=lambda call: None):
    """The outcome of each request of ``plan``; ``between`` is called before each step, with its number."""
    found = [Outcome() for _ in plan]
    of_id, call = {}, 0
    while len(of_id) < len(plan) or engine.has_work:
        while len(of_id) < len(plan) and plan[len(of_id)].call <= call:
            one = plan[len(of_id)]
            of_id[engine.submit(one.prompt, one.params)] = len(of_id)
        between(call)
        for deltas in (engine.take_deltas, engine.step):  # whoever synchronises has a step's before the next one runs
            for delta in deltas():
                at = of_id[delta.request_id]
                found[at].add(delta)
                wanted = plan[at].cancel
                if wanted is not None and sum(map(len, found[at].tokens.values())) >= wanted:
                    engine.cancel(delta.request_id)
        call += 1
    return found


def check_equal(found, expected):
    """Raise AssertionError unless the outcomes are equal in every token, bit of a log-probability, reason and text."""
    for one, other in zip(found, expected, strict=True):
        assert one.completions == other.completions
        assert one.tokens == other.tokens
        assert one.texts == other.texts
        for at, completion in one.completions.items():
            for name in ("logprobs", "sampling_logprobs"):
                bits = [
                    torch.tensor(getattr(of, name), dtype=torch.float64) for of in (completion, other.completions[at])
                ]
                assert torch.equal(*bits)


def check_idle(engine):
    """Raise AssertionError unless an engine without requests holds nothing."""
    engine.check_integrity()
    stats = engine.stats()
    assert not engine.has_work
    assert stats["num_used_blocks"] == stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    assert engine.scheduler.held is None


def chance_of(seed):
    """Random numbers of a schedule."""
    return random.Random(seed)
