"""Requests of a model whose rotary tables depend on the length: fixed when a request comes, by its declared length."""

import random

import pytest
import torch

import toolkit
from tests.helpers.rope import BORDER, rope_model, sequences
from toolkit import SamplingParams
from toolkit.engine.step.decode_graphs import DecodeGraphs
from toolkit.errors import ToolkitError


def trained(model, completions):
    """Log-probabilities of each completion's tokens by the training forward, all in one batch."""
    texts = [[*one.prompt_token_ids, *one.token_ids] for one in completions]
    values = toolkit.token_logprobs(model, texts, rotary_lengths=[one.rotary_length for one in completions])
    return [value.detach()[len(one.prompt_token_ids) - 1 :] for value, one in zip(values, completions, strict=True)]


def assert_same_bits(model, completions):
    for one, expected in zip(completions, trained(model, completions), strict=True):
        assert torch.equal(torch.tensor(one.logprobs), expected)


@pytest.mark.parametrize("name", ["longrope", "longrope with a factor by length", "longrope in one of two layer types"])
def test_no_bit_differs_across_the_border_and_beside_any_neighbour(name):
    model = rope_model(name)
    source = random.Random(0)
    texts = sequences(*(source.randint(1, 60) for _ in range(10)))
    texts += [texts[0] + texts[1], texts[0] + texts[2], texts[0], texts[1][:9] + texts[3]]
    params = [SamplingParams(n=source.choice([1, 3]), max_tokens=source.randint(1, 25), seed=at) for at in range(14)]
    crossings = 0
    for limits in ({"num_blocks": 36, "swap_space": 0}, {"num_blocks": 36, "swap_space": None}):
        with toolkit.Engine(model, block_size=4, max_num_seqs=6, max_num_batched_tokens=33, **limits) as engine:
            for text, one in zip(texts, params, strict=True):
                engine.submit(text, one)
            completions = []
            while engine.has_work:
                completions += [delta.finished for delta in engine.step() if delta.finished is not None]
                if source.random() < 0.1:
                    engine.sleep()
                    engine.wake()
            stats = engine.stats()
        assert stats["num_preemptions"] > 0
        for one in completions:
            declared = len(one.prompt_token_ids) + params[one.request_id].max_tokens
            assert one.rotary_length == (1 if declared <= BORDER else BORDER + 1)
            crossings += len(one.prompt_token_ids) <= BORDER < len(one.prompt_token_ids) + len(one.token_ids)
        source.shuffle(completions)
        assert_same_bits(model, completions)
    assert crossings > 5


def test_a_completion_that_ends_early_keeps_the_tables_of_its_declared_length():
    model = rope_model("longrope")
    (text,) = sequences(10)
    with toolkit.Engine(model) as engine:
        greedy = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        (short,) = engine.generate([text], greedy)
        (probe,) = engine.generate([text], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        stop = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, stop_token_ids=[probe.token_ids[3]])
        (early,) = engine.generate([text], stop)
    assert (short.rotary_length, early.rotary_length) == (1, BORDER + 1)
    assert len(early.token_ids) <= 4
    assert early.logprobs == probe.logprobs[: len(early.logprobs)]
    assert_same_bits(model, [short, early])
    own = toolkit.token_logprobs(model, [[*text, *early.token_ids]])[0].detach()[9:]
    assert not torch.equal(own, torch.tensor(early.logprobs))


def test_requests_with_other_tables_share_no_prefix():
    model = rope_model("longrope")
    (text,) = sequences(24)
    with toolkit.Engine(model, block_size=4) as engine:
        hits = []
        for most in (4, 20, 4, 30):
            engine.generate([text], SamplingParams(max_tokens=most, temperature=0, ignore_eos=True))
            hits.append(engine.stats()["prefix_cache_hits"])
    assert hits == [0, 0, 20, 40]


def test_decode_steps_are_captured(monkeypatch):
    model = rope_model("longrope")
    served = []
    forward = DecodeGraphs.forward

    def record(self, context, *rest):
        logits = forward(self, context, *rest)
        served.append((self.data_dependent_op, context.batch.rotary_lengths.tolist()))
        return logits

    monkeypatch.setattr(DecodeGraphs, "forward", record)
    params = [SamplingParams(max_tokens=most, temperature=0, ignore_eos=True) for most in (8, 30)]
    with toolkit.Engine(model) as engine:
        assert_same_bits(model, engine.generate(sequences(12, 12), params))
    assert {op for op, _ in served} == {""}
    assert [1, BORDER + 1] in [lengths for _, lengths in served]


def test_dynamic_tables_beyond_the_original_length_are_refused_in_bitwise_mode():
    model = rope_model("dynamic")
    with toolkit.Engine(model) as engine:
        (done,) = engine.generate(sequences(12), SamplingParams(max_tokens=BORDER - 12, temperature=0))
        assert done.rotary_length == 1
        assert_same_bits(model, [done])
    with pytest.raises(ToolkitError, match="max_model_len must be <= 32"):
        toolkit.Engine(model, max_model_len=64)
    model.config.max_position_embeddings = 64
    with toolkit.Engine(model) as engine, pytest.raises(ToolkitError, match="together must be <= 32 tokens in bitwise"):
        engine.submit(sequences(12)[0], SamplingParams(max_tokens=BORDER - 11))


def test_dynamic_tables_go_by_the_declared_length_in_fast_mode():
    model = rope_model("dynamic")
    with toolkit.Engine(model, numerics="fast", max_model_len=90) as engine:
        params = [SamplingParams(max_tokens=most, temperature=0, ignore_eos=True) for most in (10, 30, 40, 50)]
        completions = engine.generate(sequences(20, 20, 20, 40), params)
    assert [one.rotary_length for one in completions] == [1, 50, 60, 90]
    for one, expected in zip(completions, trained(model, completions), strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, rtol=1e-4, atol=1e-4)
