"""Biases, allowed tokens, bad words and logits processors, against stock transformers in float64 and plain Python."""

import copy
import dataclasses
import math
import random

import pytest
import torch

import toolkit
from tests.engine.test_speculation import Foretelling, engine_of, run
from tests.helpers.engine_standin import VOCAB, HistoryModel, logits_of, oracle, result
from tests.helpers.engine_tokenizers import byte_level, metaspace
from toolkit.engine.adjustments import bad_word_tokens
from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

VOCABULARY = 300  # the tokenizer's
WORDS = ["the", "dog", "quick", "w", " jum"]


def toward_multiples_of_the_last(output, logits):
    """Changes the row that it is given, as a function of the output."""
    step = 2 + (output[-1] % 5 if output else 0)
    logits[::step] += 3.0
    return logits


def against_the_prompt(prompt, output, logits):
    return logits.index_add(0, torch.tensor(prompt), logits.new_full((len(prompt),), -0.5 * len(output)))


def params_of(chance, **given):
    """Some changes; about one in five has none."""
    found = {
        "max_tokens": chance.randint(3, 12),
        "temperature": chance.choice((0.0, 0.7, 1.0)),
        "seed": chance.randrange(1000),
        "n": chance.choice((1, 1, 2)),
        "logprobs": chance.choice((None, 2)),
    }
    if chance.random() < 0.4:
        found["logit_bias"] = {chance.randrange(VOCABULARY): chance.uniform(-130, 130) / chance.choice((1, 20))
                               for _ in range(chance.randint(1, 30))}  # fmt: skip
    if chance.random() < 0.4:
        found["allowed_token_ids"] = chance.sample(range(VOCABULARY), chance.choice((2, 30, 200)))
    if chance.random() < 0.5:
        found["bad_words"] = chance.sample(WORDS, chance.randint(1, 4))
    if chance.random() < 0.3:
        found["logits_processors"] = chance.sample(
            [toward_multiples_of_the_last, against_the_prompt], chance.randint(1, 2)
        )
    return SamplingParams(**{**found, **given})


def requests(seed, count, **given):
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 12))] for _ in range(count)]
    return prompts, [params_of(chance, **given) for _ in range(count)]


def adjusted(logits, prompt, output, params):
    """A list of logits [V] as the request changes them, one token after another."""
    for processor in params.logits_processors or ():
        row = torch.tensor(logits, dtype=torch.float64)
        logits = (
            processor(prompt, output, row) if processor is against_the_prompt else processor(output, row)
        ).tolist()
    bias = {token: max(-100, min(100, value)) for token, value in (params.logit_bias or {}).items()}
    logits = [value + bias.get(token, 0.0) for token, value in enumerate(logits)]
    permitted = params.allowed_token_ids
    logits = [value if permitted is None or token in permitted else -math.inf for token, value in enumerate(logits)]
    for word in params.bad_words or ():
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = byte_level().encode(text, add_special_tokens=False)
            if [*output, ids[-1]][-len(ids) :] == ids:
                logits[ids[-1]] = -math.inf
    return logits


def check(completion, params, raw_logits):
    """The rows' tokens and both kinds of log-probabilities of a completion."""
    prompt, changed = completion.prompt_token_ids, 0
    for at, token in enumerate(completion.token_ids):
        output = completion.token_ids[:at]
        raw = raw_logits(prompt + output)
        scores = adjusted(raw.tolist(), prompt, output, params)
        changed += scores != raw.tolist()
        raw, scores = raw.double().log_softmax(-1), torch.tensor(scores, dtype=torch.float64)
        assert abs(completion.logprobs[at] - raw[token]) < 1e-4
        if params.greedy:
            assert scores.max() - scores[token] < 1e-4
            assert completion.sampling_logprobs[at] == 0
        else:
            assert abs(completion.sampling_logprobs[at] - (scores / params.temperature).log_softmax(-1)[token]) < 1e-3
    return changed


def plain_model():
    return random_model("llama", layers=2, vocabulary=VOCABULARY)


def test_rows_are_changed_as_plain_python_changes_the_stock_models():
    model = plain_model()
    stock = copy.deepcopy(model).double()
    stock.config._attn_implementation = "eager"
    prompts, params = requests(1, 24, ignore_eos=True)
    with torch.no_grad():
        found = run(engine_of(model, tokenizer=byte_level(), max_num_seqs=8), prompts, params)
        changed = sum(
            check(one, params[one.prompt_index], lambda tokens: stock(torch.tensor([tokens])).logits[0, -1])
            for one in found
        )
    assert changed > 100
    assert all(one.error is None for one in found)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_no_bit_depends_on_the_batch_or_on_drafts(family):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    settings = {"tokenizer": byte_level(), "num_blocks": 60}
    prompts, params = requests(2, 10, repetition_penalty=1.2, min_tokens=2)
    expected = run(engine_of(model, **settings), prompts, params)
    alone = engine_of(model, **settings)
    for at, (prompt, one) in enumerate(zip(prompts, params)):
        found = [dataclasses.replace(each, prompt_index=at) for each in run(alone, [prompt], [one])]
        assert found == [each for each in expected if each.prompt_index == at]
    engine = engine_of(model, **settings, speculative_config={"num_speculative_tokens": 5, "adaptive": False})
    engine.speculation.drafter = Foretelling(expected, random.Random(1))
    assert run(engine, prompts, params) == expected
    assert engine.speculation.num_accepted_tokens > 20


def of_history(params, prompt=(5, 6), **settings):
    with toolkit.Engine(HistoryModel(), max_num_seqs=4, num_blocks=60, **settings) as engine:
        return engine.generate([list(prompt)], params)


def test_a_bias_is_added_and_cut_to_a_hundred():
    logits = logits_of((5, 6))
    worst = int(logits[:60].argmin())
    for bias, added in ((3.5, 3.5), (100, 100), (250, 100), (-1e9, -100)):
        (one,) = of_history(SamplingParams(max_tokens=1, logit_bias={worst: bias}, seed=3, ignore_eos=True))
        scores = logits.double()
        scores[worst] += added
        assert abs(one.sampling_logprobs[0] - scores.log_softmax(-1)[one.token_ids[0]]) < 1e-6
        assert (one.token_ids == [worst]) == (added == 100)
        assert one.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[one.token_ids[0]]), abs=1e-5)
    assert SamplingParams(logit_bias={1: 250}).logit_bias == {1: 100.0}


def test_allowed_tokens_are_all_that_comes_out_the_end_of_text_too():
    params = SamplingParams(max_tokens=30, allowed_token_ids=[7, 8, 9], temperature=2.0, seed=1, n=3)
    found = of_history(params)
    assert {token for one in found for token in one.token_ids} == {7, 8, 9}
    assert all(one.finish_reason == "length" for one in found)
    (one,) = of_history(SamplingParams(max_tokens=30, allowed_token_ids=[0]))
    assert (one.token_ids, one.finish_reason) == ([0], "stop")


def test_a_row_that_nothing_may_follow_ends_its_request_alone():
    prompts = [[5, 6], [7]]
    params = [SamplingParams(max_tokens=3, allowed_token_ids=[60]), SamplingParams(max_tokens=3, seed=1)]
    with toolkit.Engine(HistoryModel(), num_blocks=60) as engine:
        first, second = engine.generate(prompts, params)
        assert first.finish_reason == "error"
        assert "leave no token to sample" in first.error
        assert second.finish_reason in ("length", "stop")


def test_bad_words_of_several_tokens_are_left_out_at_their_last_token():
    tokenizer = byte_level()
    word = "fig"
    ids = tokenizer.encode(word)
    assert len(ids) > 1
    toward = dict.fromkeys(ids, 60.0)
    model = plain_model()

    def written(**given):
        params = SamplingParams(max_tokens=60, seed=2, ignore_eos=True, logit_bias=toward, **given)
        with engine_of(model, tokenizer=tokenizer) as engine:
            return engine.generate([[9, 10]], params)[0]

    assert word in written().text
    found = written(bad_words=[word])
    assert word not in found.text
    assert set(found.token_ids) == set(ids)  # each of its tokens still comes out


def test_bad_words_are_those_of_the_output_alone():
    ids = byte_level().encode("fig")
    params = SamplingParams(max_tokens=1, temperature=0, logit_bias={ids[-1]: 100}, bad_words=["fig"])
    with engine_of(plain_model(), tokenizer=byte_level()) as engine:
        (one,) = engine.generate([ids[:-1]], params)
    assert one.token_ids == ids[-1:]


def test_bad_words_are_tokenised_as_they_begin_a_text_and_behind_a_space():
    tokenizer = byte_level()
    forms = [tokenizer.encode("the"), tokenizer.encode(" the")]
    assert forms[0] != forms[1]
    assert bad_word_tokens(tokenizer, ["the", " the"]) == forms
    for one in (tokenizer, metaspace()):
        plain = one.encode("dog", add_special_tokens=False)
        assert plain in bad_word_tokens(one, ["dog"])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda output, logits: logits[:5], "logits_processors must return a tensor of shape [61], got shape [5]."),
        (lambda output, logits: None, "logits_processors must return a tensor of shape [61], got NoneType."),
        (lambda output, logits: 1 / 0, "logits_processors failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_processor_that_fails_ends_its_request_alone(processor, message):
    params = [SamplingParams(max_tokens=4, logits_processors=[processor]), SamplingParams(max_tokens=4, seed=1)]
    with toolkit.Engine(HistoryModel(), num_blocks=60) as engine:
        first, second = engine.generate([[5], [5]], params)
        engine.check_integrity()
    assert (first.finish_reason, first.error) == ("error", message)
    assert second.error is None


def test_processors_see_the_output_and_leave_the_models_own_logits():
    seen = []

    def note(output, logits):
        seen.append(list(output))
        return logits.fill_(-torch.inf).index_fill_(0, torch.tensor([9]), 0.0)

    (one,) = of_history(SamplingParams(max_tokens=3, logits_processors=[note]))
    assert (one.token_ids, seen) == ([9] * 3, [[], [9], [9, 9]])
    history = (5, 6)
    for logprob in one.logprobs:
        assert logprob == pytest.approx(float(logits_of(history).log_softmax(-1)[9]), abs=1e-5)
        history += (9,)
    assert one.sampling_logprobs == [0.0] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_bias": {61: 1.0}}, "logit_bias must have token ids from 0 to 60, got 61."),
        ({"allowed_token_ids": [3, 10**30]}, f"allowed_token_ids must have token ids from 0 to 60, got {10**30}."),
        ({"bad_words": ["a"]}, "bad_words must be None, since the engine has no tokenizer, got ['a']."),
    ],
)
def test_what_the_model_does_not_have_is_refused(given, message):
    with pytest.raises(ToolkitError) as caught:
        of_history(SamplingParams(**given))
    assert str(caught.value) == message
    with pytest.raises(ToolkitError, match=r"bad_words must have strings that the tokenizer has tokens of, got ' '"):
        bad_word_tokens(byte_level(), [" "])


def test_all_of_the_vocabulary_is_returned_best_first():
    (one,) = of_history(SamplingParams(max_tokens=2, logprobs=-1, temperature=0))
    history = (5, 6)
    for token, top in zip(one.token_ids, one.top_logprobs):
        expected = logits_of(history).double().log_softmax(-1)
        assert sorted(top) == list(range(VOCAB))
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert all(top[at] == value or abs(top[at] - value) < 1e-5 for at, value in enumerate(expected.tolist()))
        history += (token,)


@pytest.mark.parametrize("swap_space", [0, 1])
def test_requests_of_a_lower_priority_run_first(swap_space):
    chance = random.Random(3)
    prompts = [[chance.randrange(1, 60) for _ in range(6)] for _ in range(24)]
    params = [
        SamplingParams(max_tokens=8, seed=at, n=chance.choice((1, 2)), priority=chance.choice((-1, 0, 0, 5)))
        for at in range(len(prompts))
    ]
    settings = {"max_num_seqs": 3, "num_blocks": 9, "block_size": 4, "swap_space": swap_space}
    with toolkit.Engine(HistoryModel(), **settings) as engine:
        ids = [engine.submit(*one) for one in zip(prompts, params)]
        first, finished = {}, {one: {} for one in ids}
        while engine.has_work:
            for delta in engine.step():
                first.setdefault(delta.request_id, len(first))
                if delta.finished is not None:
                    finished[delta.request_id][delta.index] = result(delta.finished)
            engine.check_integrity()
        assert engine.scheduler.num_preemptions > 0
    assert sorted(ids, key=first.__getitem__) == sorted(ids, key=lambda one: (params[ids.index(one)].priority, one))
    for one, prompt, each in zip(ids, prompts, params):
        assert [found for _, found in sorted(finished[one].items())] == oracle(prompt, each)


def test_a_request_of_a_higher_priority_is_preempted_first():
    with toolkit.Engine(HistoryModel(), max_num_seqs=4, num_blocks=10, block_size=2) as engine:
        common = {"ignore_eos": True, "temperature": 0.0}
        early = engine.submit([5, 6, 7], SamplingParams(max_tokens=12, priority=1, **common))
        engine.step()
        late = engine.submit([8, 9, 10], SamplingParams(max_tokens=12, priority=0, **common))
        finished = []
        while engine.has_work:
            finished += [delta.request_id for delta in engine.step() if delta.finished is not None]
        assert engine.scheduler.num_preemptions > 0
    assert finished == [late, early]


@pytest.mark.parametrize("speculative", [None, {"num_speculative_tokens": 4, "adaptive": False}])
def test_a_grammar_holds_beside_them(speculative):
    """Of four texts a bias and allowed tokens make one come; where both leave nothing, that is an error."""
    pytest.importorskip("llguidance")
    tokenizer, words = byte_level(), ["the dog", "the fox", "a dog", "lazy"]
    choice = {"structured_outputs": {"choice": words}, "max_tokens": 20, "temperature": 1.0}
    of = {word: tokenizer.encode(word) for word in words}
    eos, start = tokenizer.eos_token_id, {ids[0] for ids in of.values()}
    assert len(start) == 3
    given = [
        {"logit_bias": {of["lazy"][0]: 100}},
        {"bad_words": ["the"], "n": 12},
        {"allowed_token_ids": [*of["the fox"], eos]},
        {"allowed_token_ids": [9, 10]},
        {"allowed_token_ids": [9, eos], "min_tokens": 3},
        {"min_tokens": 20, "allowed_token_ids": [*of["a dog"], eos]},
    ]
    params = [SamplingParams(**{**choice, "n": 3, "seed": at, **one}) for at, one in enumerate(given)]
    engine = engine_of(plain_model(), tokenizer=tokenizer, speculative_config=speculative, max_num_seqs=32)
    if speculative:
        plain = run(engine_of(plain_model(), tokenizer=tokenizer, max_num_seqs=32), [[9, 10]] * len(given), params)
        engine.speculation.drafter = Foretelling(plain, random.Random(4))
    found = run(engine, [[9, 10]] * len(given), params)
    texts = [{one.text for one in found if one.prompt_index == at} for at in range(len(given))]
    assert (texts[0], texts[2]) == ({"lazy"}, {"the fox"})
    assert texts[5] == {"a dog"}  # the end must come, before min_tokens
    (whole,) = tokenizer.encode("the")
    free = [one for one in found if one.prompt_index == 1]
    assert all(whole not in one.token_ids for one in free)
    assert {one.text for one in free if one.error is None} > {"lazy"}
    for at in (3, 4):
        (error,) = {one.error for one in found if one.prompt_index == at}
        assert "leave no token to sample" in error
    if speculative:
        assert found == plain
