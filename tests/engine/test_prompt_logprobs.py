"""Log-probabilities of prompts against stock transformers in float64, and prompts that are truncated."""

import copy
import dataclasses
import random

import pytest
import torch

import toolkit
from tests.engine.test_speculation import VOCABULARY, Foretelling, engine_of, run
from tests.helpers.engine_standin import HistoryModel, logits_of
from tests.helpers.engine_tokenizers import byte_level
from tests.helpers.picture_models import picture_model
from toolkit import LLM, AsyncEngine, Engine
from toolkit.engine import prompt_logprobs
from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model


def requests(seed, count, longest=40):
    """About a third asks for no log-probabilities of its prompt; many prompts begin with the same tokens."""
    chance = random.Random(seed)
    shared = [chance.randrange(VOCABULARY) for _ in range(longest // 2)]
    prompts = [
        shared[: chance.choice((0, len(shared)))]
        + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, longest // 2))]
        for _ in range(count)
    ]
    params = [
        SamplingParams(
            max_tokens=chance.randint(1, 20),
            ignore_eos=True,
            n=chance.choice((1, 1, 3)),
            temperature=0.8,
            seed=chance.randrange(99),
            prompt_logprobs=chance.choice((None, 0, 2, -1)),
        )
        for _ in range(count)
    ]
    return prompts, params


def check(completion, params, logits):
    """Against the logits [T, V] of the whole prompt."""
    if params.prompt_logprobs is None:
        assert completion.prompt_logprobs is completion.prompt_ranks is None
        return
    expected = logits.double().log_softmax(-1)
    assert len(completion.prompt_logprobs) == len(completion.prompt_token_ids)
    assert completion.prompt_logprobs[0] is completion.prompt_ranks[0] is None
    for at, found in enumerate(completion.prompt_logprobs[1:]):
        token, count = completion.prompt_token_ids[at + 1], params.prompt_logprobs
        order = expected[at].argsort(descending=True).tolist()
        assert completion.prompt_ranks[at + 1] == 1 + order.index(token)
        best = order[: count if count >= 0 else None]
        assert list(found) == (best if token in best else [token, *best])
        for one, value in found.items():
            assert abs(value - expected[at, one]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_they_are_the_stock_models_and_depend_on_nothing_else(family):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    stock = copy.deepcopy(model).double() if family == "llama" else None
    prompts, params = requests(1, 14)
    expected = run(engine_of(model, enable_prefix_caching=False), prompts, params)
    if stock is not None:
        with torch.no_grad():
            for one in expected:
                check(one, params[one.prompt_index], stock(torch.tensor([one.prompt_token_ids])).logits[0])
    alone = engine_of(model)
    for at, (prompt, one) in enumerate(zip(prompts, params)):
        found = [dataclasses.replace(each, prompt_index=at) for each in run(alone, [prompt], [one])]
        assert found == [each for each in expected if each.prompt_index == at]
    for settings in (
        {"max_num_batched_tokens": 7, "num_blocks": 17},  # chunks, and preempted sequences
        {"max_num_batched_tokens": 5, "num_blocks": 17, "swap_space": 1},
        {"speculative_config": {"num_speculative_tokens": 3, "adaptive": False}},
    ):
        engine = engine_of(model, **settings)
        if engine.speculation is not None:
            engine.speculation.drafter = Foretelling(expected, random.Random(2))
        for _ in range(2):  # the second one finds prefixes that the first one left
            assert run(engine, prompts, params) == expected
        assert engine.speculation is not None or engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])  # the second one's pictures are computed whole
def test_prompts_with_pictures(kind, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "MOST_ROWS", 3)
    monkeypatch.setattr("toolkit.engine.request.MOST_ROWS", 3)
    made = picture_model(kind)
    patched = copy.deepcopy(made.model)
    toolkit.patch(patched)
    parts = [[21, 22, 9, "a", 10, 23, "bb", 24, 25, 26], [31, "bb", 10, 9, "a", 32, 33]]
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, seed=1, ignore_eos=True)
    with Engine(patched, max_num_batched_tokens=24, max_num_seqs=2, block_size=4) as engine:
        found = engine.generate([made.outputs(one) for one in parts], params)
        again = engine.generate([made.outputs(one) for one in parts], params)
    assert [one.prompt_logprobs for one in found] == [one.prompt_logprobs for one in again]
    for one, asked in zip(found, parts, strict=True):
        with torch.no_grad():
            check(one, params, made.model(**made.outputs(asked)).logits[0])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_they_are_bitwise_those_of_training(family):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    prompts, _ = requests(5, 6)
    with engine_of(model, max_num_batched_tokens=9) as engine:
        found = engine.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, seed=1))
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, prompts)
    for one, expected in zip(found, trained, strict=True):
        values = [next(iter(each.values())) for each in one.prompt_logprobs[1:]]
        assert torch.equal(torch.tensor(values), expected)


@pytest.mark.parametrize("leave", ["preempt", "sleep"])
def test_a_prompt_that_is_interrupted_continues(leave):
    prompt, params = [1 + 3 * at % 30 for at in range(40)], SamplingParams(max_tokens=2, prompt_logprobs=2, seed=1)
    model = random_model("llama", layers=1, vocabulary=VOCABULARY)
    (expected,) = run(engine_of(model), [prompt], [params])
    with engine_of(model, max_num_batched_tokens=6) as engine:
        engine.submit(prompt, params)
        finished = None
        for at in range(30):
            for delta in engine.step():
                finished = delta.finished or finished
            if at in (1, 3) and leave == "preempt":
                engine.scheduler.preempt(engine.scheduler.running[0])
            elif at in (1, 3):
                engine.sleep()
                engine.wake()
            engine.check_integrity()
        assert engine.scheduler.num_preemptions == 2
        assert dataclasses.replace(finished, request_id=0) == expected


def test_a_long_prompt_asks_for_few_rows_in_a_step(monkeypatch):
    monkeypatch.setattr("toolkit.engine.request.MOST_ROWS", 16)
    monkeypatch.setattr(prompt_logprobs, "MOST_ROWS", 5)
    prompt = [1 + at % 50 for at in range(120)]
    with Engine(HistoryModel(), num_blocks=60, enable_prefix_caching=False) as engine:
        sizes, build = [], engine.runner.build

        def measured(chunks, *size):
            found = build(chunks, *size)
            sizes.append(len(found[1]))
            return found

        engine.runner.build = measured
        params = SamplingParams(max_tokens=2, prompt_logprobs=1)
        (one,) = engine.generate([prompt], params)
        assert max(sizes) == 16
        engine.generate([prompt], SamplingParams(max_tokens=1))
        assert sizes[-1] == 1
    check(one, params, torch.stack([logits_of(tuple(prompt[: at + 1])) for at in range(len(prompt))]))


def test_no_cached_prefix_is_taken_and_one_is_left():
    prompt = list(range(1, 41))
    with Engine(HistoryModel(), num_blocks=60, block_size=4) as engine:
        plain, asking = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, prompt_logprobs=0)
        engine.generate([prompt], plain)
        engine.generate([prompt], asking)
        assert engine.stats()["prefix_cache_hits"] == 0
        engine.generate([[*prompt[:38], 50, 51]], asking)
        engine.generate([[*prompt[:38], 50, 51]], plain)
        assert engine.stats()["prefix_cache_hits"] == 36


def test_the_first_delta_has_them_and_no_other():
    with AsyncEngine(Engine(HistoryModel(), num_blocks=60)) as engine:
        params = SamplingParams(max_tokens=4, n=2, prompt_logprobs=1, ignore_eos=True)
        deltas = list(engine.stream([[5, 6, 7]], params))
        (cut,) = engine.stream([[5, 6]], SamplingParams(max_tokens=1, prompt_logprobs=1))
    for index in range(2):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.prompt_logprobs is not None for delta in mine] == [True, False, False, False]
        assert mine[0].prompt_logprobs == mine[-1].finished.prompt_logprobs
    assert len(cut.prompt_logprobs) == 2
    assert cut.prompt_logprobs == cut.finished.prompt_logprobs


def test_completions_of_a_short_prompt_are_sampled_behind_it():
    with Engine(HistoryModel(), num_blocks=60) as engine:
        common = {"max_tokens": 3, "n": 2, "seed": 1, "ignore_eos": True}
        plain = engine.generate([[5, 6]], SamplingParams(**common))
        found = engine.generate([[5, 6]], SamplingParams(**common, prompt_logprobs=0))
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert [one.logprobs for one in found] == [one.logprobs for one in plain]


def test_llm_returns_them_with_ranks_and_texts():
    model = random_model("llama", layers=1, vocabulary=300)
    with LLM(model, byte_level(), num_blocks=60) as llm:
        for count in (0, 3, -1):
            (output,) = llm.generate(["the dog"], SamplingParams(max_tokens=1, prompt_logprobs=count))
            first, *others = output.prompt_logprobs
            assert first is None
            for token, found in zip(output.prompt_token_ids[1:], others):
                assert found[token].decoded_token == byte_level().decode([token])
                ranks = [one.rank for one in found.values()]
                best = list(range(1, 1 + (count if count >= 0 else 300)))
                assert ranks == best or (ranks[1:] == best and ranks[0] > count and found[token].rank == ranks[0])


def test_the_last_tokens_of_a_prompt_are_kept():
    prompt = [3 + 7 * at % 200 for at in range(90)]
    model = random_model("llama", layers=1, vocabulary=300)
    text = "the quick brown fox jumps over the lazy dog " * 20
    ids = byte_level().encode(text)
    with Engine(model, byte_level(), max_model_len=64, num_blocks=60) as engine:

        def kept(given, **params):
            (one,) = engine.generate([given], SamplingParams(**{"max_tokens": 4, **params}))
            return one.prompt_token_ids

        assert kept(prompt, truncate_prompt_tokens=5) == prompt[-5:]
        assert kept(prompt[:3], truncate_prompt_tokens=5) == prompt[:3]
        assert kept(prompt, truncate_prompt_tokens=-1) == prompt[-60:]
        assert kept(prompt, truncate_prompt_tokens=-1, max_tokens=None) == prompt[-63:]
        assert kept(text, truncate_prompt_tokens=7) == ids[-7:]
        assert kept({"prompt_token_ids": prompt}, truncate_prompt_tokens=2) == prompt[-2:]
        for given in (prompt, text):
            with pytest.raises(ToolkitError, match="prompt must have <="):
                kept(given)
        with pytest.raises(ToolkitError, match="max_tokens must be <= 2 after a prompt of 62 tokens"):
            kept(prompt, truncate_prompt_tokens=62)
        same = engine.generate([prompt[-9:]], SamplingParams(max_tokens=5, seed=1))
        cut = engine.generate([prompt], SamplingParams(max_tokens=5, seed=1, truncate_prompt_tokens=9))
        assert (same[0].token_ids, same[0].logprobs) == (cut[0].token_ids, cut[0].logprobs)
    with AsyncEngine(Engine(model, byte_level(), max_model_len=64, num_blocks=60)) as engine:
        (one,) = engine.generate(text, SamplingParams(max_tokens=4, truncate_prompt_tokens=-1))
        assert one.prompt_token_ids == ids[-60:]
