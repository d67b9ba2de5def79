"""Sampling inside of a decode step: the bits of the sampler, of the rows that need no host, and only of those."""

import random

import pytest
import torch

import toolkit
from toolkit.engine.sampler import Sampler
from toolkit.engine.step.sampling import SamplingInputs, sample_step
from toolkit.testing.models import random_model

VOCABULARY = 97


def reverse(output, row):
    return row.flip(0)


def random_params(chance):
    return toolkit.SamplingParams(
        max_tokens=30,
        min_tokens=chance.choice((0, 0, 12)),
        temperature=chance.choice((0.0, 0.7, 1.3)),
        top_k=chance.choice((0, 4, 2**63 - 1)),
        top_p=chance.choice((1.0, 0.7)),
        min_p=chance.choice((0.0, 0.2)),
        repetition_penalty=chance.choice((1.0, 1.5)),
        frequency_penalty=chance.choice((0.0, 0.4)),
        presence_penalty=chance.choice((0.0, 0.6)),
        logit_bias=chance.choice((None, {7: 2.5, 90: -100.0})),
        allowed_token_ids=chance.choice((None, None, [3, 4, 5, 60])),
        stop_token_ids=[60, 5],
        ignore_eos=True,
        seed=chance.randrange(100),
    )


@pytest.fixture(scope="module")
def engine():
    with toolkit.Engine(random_model("llama", layers=1, vocabulary=VOCABULARY), max_num_seqs=8) as made:
        yield made


def sequences_of(engine, chance, count):
    """Sequences that ran for a while; most of ``count``."""
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 9))] for _ in range(count)]
    requests = [engine.submit(prompt, random_params(chance)) for prompt in prompts]
    for _ in range(chance.randint(1, 8)):
        engine.step()
    live = [engine.requests.by_id[one] for one in requests if one in engine.requests.by_id]
    return [one for request in live for one in request.sequences]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_samples_what_the_sampler_does(engine, dtype):
    """In memory that other rows, other drafts and longer histories were in before."""
    chance, made = random.Random(1), torch.Generator().manual_seed(1)
    inputs = SamplingInputs(VOCABULARY, torch.promote_types(dtype, torch.float32), torch.device("cpu"))
    seen = set()
    for _ in range(60):
        sequences = sequences_of(engine, chance, 6)
        for one in sequences:
            one.draft = [chance.randrange(VOCABULARY) for _ in range(chance.choice((0, 0, 2)))]
        rows = [(one, drafted) for one in sequences for drafted in range(len(one.draft) + 1)][:12]
        logits = (4 * torch.randn(12, VOCABULARY, generator=made)).to(dtype)
        sampling = inputs.of(rows, 12)
        seen.add(sampling.parts)
        sample_step(logits, sampling.parts, sampling.tensors)
        taken = logits[: len(rows)]
        drafts = [drafted for _, drafted in rows]
        expected = Sampler().sample(taken, [one for one, _ in rows], drafts)
        found = Sampler().read(sampling.result, logits, range(len(rows)), [one for one, _ in rows], drafts, ())
        assert found == list(expected.rows())
        of_rows = torch.logsumexp(taken.double(), -1)
        torch.testing.assert_close(sampling.result[: len(rows), 3], of_rows, rtol=1e-6, atol=0.0)
        for request in list(engine.requests.by_id):
            engine.cancel(request)
        engine.take_deltas()
    assert ("addends", "penalties") in seen


def counted(engine, monkeypatch):
    sampler, rows = engine._steps._decoding.sampler, []
    sample = sampler.sample

    def counting(logits, sequences, *rest):
        rows.append(len(sequences))
        return sample(logits, sequences, *rest)

    monkeypatch.setattr(sampler, "sample", counting)
    return rows


def test_only_rows_that_need_the_host_leave_the_step(monkeypatch):
    """Prompts, and then of three that decode the one with a logits processor."""
    params = [
        toolkit.SamplingParams(max_tokens=6, temperature=1.0, seed=1, ignore_eos=True, logits_processors=given)
        for given in (None, [reverse], None)
    ]
    model = random_model("llama", layers=1, vocabulary=VOCABULARY)
    prompts = [[5, 6], [7, 8], [9, 10]]
    with toolkit.Engine(model, max_num_seqs=4) as engine:
        rows = counted(engine, monkeypatch)
        found = engine.generate(prompts, params)
    assert rows == [3] + [1] * 5
    with toolkit.Engine(model, max_num_seqs=4) as engine:
        engine.backend.graphs.serves = lambda *_: False
        assert found == engine.generate(prompts, params)


def test_a_step_whose_rows_all_need_the_host_samples_none(monkeypatch):
    params = toolkit.SamplingParams(max_tokens=4, ignore_eos=True, logits_processors=[reverse])
    with toolkit.Engine(random_model("llama", layers=1, vocabulary=VOCABULARY), max_num_seqs=4) as engine:
        rows = counted(engine, monkeypatch)
        engine.generate([[5, 6], [7, 8]], params)
        assert all(key[3] is None for key in engine.backend.graphs._graphs)
    assert rows == [2] * 4


def test_logits_that_are_not_finite_end_the_request():
    model = random_model("llama", layers=1, vocabulary=VOCABULARY)
    with toolkit.Engine(model, max_num_seqs=4) as engine:
        engine.submit([5, 6], toolkit.SamplingParams(max_tokens=9, temperature=1.0, seed=1, ignore_eos=True))
        engine.step()
        engine.step()
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        (delta,) = engine.step()
        assert delta.finished.finish_reason == "error"
        assert "not finite" in delta.finished.error
