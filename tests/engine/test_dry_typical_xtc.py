"""DRY, locally typical sampling and XTC: against written-out definitions, and no bit of them depends on the batch."""

import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import TypicalLogitsWarper

from toolkit.engine import Engine, SamplingParams
from toolkit.engine.samplers.dry import LONGEST, dry_penalties
from toolkit.engine.samplers.typical import typical_tokens
from toolkit.engine.samplers.xtc import xtc_removed
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model, tiny_tokenizer


def logits_of(seed, scale=2.0, count=97):
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
def test_typical_tokens_are_those_of_transformers(mass):
    for seed in range(20):
        logits = logits_of(seed)
        expected = TypicalLogitsWarper(mass)(None, logits[None].double())[0].isfinite()
        assert torch.equal(typical_tokens(logits, mass), expected)
    logits[5:] = -torch.inf  # what a grammar leaves
    kept = typical_tokens(logits, mass)
    assert kept.any()
    assert not kept[5:].any()


def test_xtc_leaves_the_least_of_the_probable_tokens():
    happened = 0
    for seed in range(60):
        logits = logits_of(seed, scale=3.0)
        p = logits.double().softmax(-1).tolist()
        above = sorted((at for at in range(len(p)) if p[at] >= 0.1), key=lambda at: p[at])
        removed = xtc_removed(logits, 1.0, 0.1, seed, 4)
        assert removed.nonzero().squeeze(-1).tolist() == sorted(above[1:])
        assert not xtc_removed(logits, 0.0, 0.1, seed, 4).any()
        assert not xtc_removed(logits, 1.0, 0.51, seed, 4).any()
        happened += len(above) > 1
    assert happened > 20
    two = torch.tensor([0.0, 0.0])
    assert xtc_removed(two, 1.0, 0.5, 0, 0).tolist() == [True, False]
    times = sum(bool(xtc_removed(two, 0.3, 0.1, 7, step).any()) for step in range(4000))
    assert abs(times / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)  # of fixed seeds


def repeated_before(tokens, breakers, token):
    """The longest run of last tokens without a breaker that stood before ``token`` earlier, by trying all."""
    longest = 0
    for at in range(1, len(tokens)):
        if tokens[at] != token:
            continue
        length = 0
        while length < min(at, LONGEST) and tokens[at - 1 - length] == tokens[-1 - length]:
            if tokens[at - 1 - length] in breakers:
                break
            length += 1
        longest = max(longest, length)
    return longest


def test_dry_penalises_what_would_repeat():
    chance, seen = random.Random(0), 0
    for trial in range(200):
        tokens = chance.choices(range(3 if trial % 2 else 6), k=chance.randint(0, 40))
        tokens = tokens * chance.choice((1, 1, 3))
        breakers, allowed = chance.choice(((), (0,), (1, 2))), chance.randint(1, 4)
        expected = {}
        for token in set(tokens) - set(breakers):
            length = repeated_before(tokens, breakers, token)
            if length >= allowed:
                expected[token] = 0.8 * 1.5 ** (length - allowed)
        assert dry_penalties(tokens, breakers, 0.8, 1.5, allowed) == pytest.approx(expected)
        seen += len(expected)
    assert seen > 100
    assert max(dry_penalties([5] * 400, (), 1.0, 4.0, 1).values()) == 4.0 ** (LONGEST - 1)


SAMPLED = [
    {"typical_p": 0.6},
    {"xtc_probability": 0.5, "xtc_threshold": 0.01},
    {"dry_multiplier": 2.0, "dry_allowed_length": 1},
    {"temperature": 0.0, "dry_multiplier": 1.5},
    {"typical_p": 0.8, "xtc_probability": 0.3, "xtc_threshold": 0.02, "dry_multiplier": 1.0, "repetition_penalty": 1.1,
     "top_p": 0.95, "structured_outputs": {"regex": "[a-e ]+"}},
    {},
]  # fmt: skip


def outcome(completion):
    return completion.token_ids, completion.logprobs, completion.sampling_logprobs


def test_no_bit_depends_on_neighbours_or_drafts():
    tokenizer = tiny_tokenizer()
    model = random_model("llama", layers=1, vocabulary=len(tokenizer))
    prompts = [[5, 6, 7, 8] * 3 + [at] for at in range(len(SAMPLED))]
    params = [SamplingParams(max_tokens=16, seed=at, ignore_eos=True, **one) for at, one in enumerate(SAMPLED)]
    with Engine(model, tokenizer) as engine:
        alone = [outcome(*engine.generate([prompt], one)) for prompt, one in zip(prompts, params)]
        plain = [outcome(*engine.generate([p], SamplingParams(max_tokens=16, seed=at, ignore_eos=True)))
                 for at, p in enumerate(prompts)]  # fmt: skip
        assert [*map(outcome, engine.generate(prompts, params))] == alone
    assert [one == other for one, other in zip(alone, plain)] == [False] * 5 + [True]
    guesses = [[*tokens[:9], 5, *tokens[10:]] for tokens, *_ in alone]  # drafts that go wrong once
    predicted = [replace(one, predicted_token_ids=guess) for one, guess in zip(params, guesses)]
    config = {"method": "prediction", "adaptive": False}
    with Engine(model, tokenizer, speculative_config=config) as engine:
        assert [*map(outcome, engine.generate(prompts, predicted))] == alone
        assert engine.stats()["spec_decode_num_accepted_tokens"] > 40


def test_runs_end_at_breakers_and_repeats_grow_rare():
    tokenizer = tiny_tokenizer()
    model = random_model("llama", layers=1, vocabulary=len(tokenizer))
    (breaker,) = {tokenizer.encode("a" + one, add_special_tokens=False)[-1] for one in ("e",)}
    favoured = {token: 90.0 - token for token in range(5, 25)}
    base = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True, "logit_bias": favoured}
    dry = {"dry_multiplier": 50.0, "dry_allowed_length": 2}
    prompt = [7, 8, breaker, 9, 10]
    with Engine(model, tokenizer) as engine:
        plain, kept = (engine.generate([prompt], SamplingParams(**base, **one))[0].token_ids for one in ({}, dry))
        request = engine._make([prompt], SamplingParams(**dry, dry_sequence_breakers=["e"]), None)[0]
        assert request.adjustments.dry_breakers == {breaker}

    def repeats(tokens):
        triples = list(zip(tokens, tokens[1:], tokens[2:]))
        return len(triples) - len(set(triples))

    assert repeats(plain) > 20
    assert repeats(kept) == 0


def test_bad_values_are_one_sentence():
    for name, value in (
        ("typical_p", 0), ("xtc_probability", 1.5), ("xtc_threshold", -0.1), ("dry_multiplier", -1), ("dry_base", 0.5),
        ("dry_allowed_length", 0), ("dry_sequence_breakers", "x"),
    ):  # fmt: skip
        with pytest.raises(ToolkitError, match=name):
            SamplingParams(**{name: value})
    no_tokenizer = "dry_sequence_breakers must be None, since the engine has no tokenizer"
    with Engine(random_model("llama", layers=1)) as engine, pytest.raises(ToolkitError, match=no_tokenizer):
        engine.generate([[1, 2]], SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=["x"]))
