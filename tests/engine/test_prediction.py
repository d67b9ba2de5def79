"""Predicted outputs: they are followed as a slow definition says, save steps, and change no bit of a result."""

import dataclasses
import random

import pytest
import torch

import toolkit
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.prediction import PredictedOutput
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

VOCABULARY = 31


def edited(text, chance, edits):
    """``text`` with some tokens replaced, left out and put in."""
    text = list(text)
    for _ in range(edits):
        at = chance.randrange(len(text) + 1)
        text[at : at + chance.randint(0, 2)] = [chance.randrange(VOCABULARY) for _ in range(chance.randint(0, 2))]
    return text


def followed(prediction, output):
    """(draft of 3 tokens behind each token of the output, tokens of the prediction that it has), by the definition."""
    end, match, came, drafts = 0, 0, set(), []
    for index, token in enumerate(output):
        if (match or index == 0) and prediction[end : end + 1] == [token]:
            end, match = end + 1, match + 1
        else:
            match = 0
            for length in range(min(8, index + 1), 1, -1):
                run = output[index + 1 - length : index + 1]
                ends = [at for at in range(length, len(prediction) + 1) if prediction[at - length : at] == run]
                if ends:
                    end = min((at for at in ends if at > end), default=ends[-1])
                    match = length
                    break
        came |= set(range(end - match, end))
        drafts.append(prediction[end : end + 3] if match else [])
    return drafts, len(came)


@pytest.mark.parametrize("seed", range(60))
def test_an_output_is_followed_and_found_again(seed):
    chance = random.Random(seed)
    tokens = chance.choice((2, 4, VOCABULARY))
    output = [chance.randrange(tokens) for _ in range(chance.randint(1, 50))]
    prediction = edited(output, chance, chance.randint(0, 6)) if seed % 5 else output[: seed % 3 * 20]
    drafts, came = followed(prediction, output)
    following = PredictedOutput(prediction)
    for token, draft in zip(output, drafts):
        following.follow(token)
        assert following.draft(3) == draft
    assert following.num_accepted == came
    assert following.num_accepted + following.num_rejected == len(prediction)


def test_an_edit_costs_the_tokens_around_it():
    following = PredictedOutput([1, 2, 3, 4, 5, 6, 7, 8])
    for token in (1, 2, 30, 4, 5):
        following.follow(token)
    assert (following.draft(9), following.match) == ([6, 7, 8], 2)
    assert (following.num_accepted, following.num_rejected) == (4, 4)


def engine_of(model, tokenizer=None, **settings):
    settings = {"max_num_seqs": 4, "max_model_len": 96, "block_size": 4, "seed": 1, **settings}
    return toolkit.Engine(model, tokenizer, **settings)


def run(engine, prompts, params):
    completions = engine.generate(prompts, params)
    engine.check_integrity()
    return [dataclasses.replace(one, request_id=0) for one in completions]


def requests(chance, count, most=40):
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 12))] for _ in range(count)]
    params = [
        toolkit.SamplingParams(
            n=chance.choice((1, 1, 2)),
            max_tokens=chance.randint(most // 2, most),
            temperature=at % 2,
            repetition_penalty=chance.choice((1.0, 1.3)),
            frequency_penalty=chance.choice((0.0, 0.4)),
            logit_bias=chance.choice((None, {3: -2.0})),
            stop_token_ids=chance.choice((None, [3])),
            ignore_eos=True,
            seed=chance.randrange(1000),
            logprobs=2,
        )
        for at in range(count)
    ]
    return prompts, params


def predicting(params, completions, chance):
    """``params`` with what came of the first completion of each, edited, as predictions."""
    texts = {one.prompt_index: one.token_ids for one in completions if one.index == 0}
    return [
        dataclasses.replace(one, predicted_token_ids=edited(texts[at], chance, at % 3)) for at, one in enumerate(params)
    ]


def assert_same_bits(found, expected):
    assert found == expected
    for one, other in zip(found, expected):
        assert torch.equal(torch.tensor(one.token_ids), torch.tensor(other.token_ids))
        for values in ("logprobs", "sampling_logprobs"):
            mine, others = (torch.tensor(getattr(which, values), dtype=torch.float64) for which in (one, other))
            assert torch.equal(mine, others)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_predictions_change_no_bit(family):
    chance = random.Random(0)
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(chance, 6)
    params = predicting(params, run(engine_of(model), prompts, params), chance)
    expected = run(engine_of(model), prompts, params)
    assert all(one.accepted_prediction_tokens + one.rejected_prediction_tokens > 0 for one in expected)
    settings = [
        {"speculative_config": {"method": "prediction"}},
        {"speculative_config": {"method": "prediction", "adaptive": False, "num_speculative_tokens": 7}},
        {"speculative_config": {"method": "ngram", "adaptive": False, "prompt_lookup_min": 1}, "num_blocks": 30},
        {"speculative_config": {"method": "suffix", "adaptive": False}, "max_num_batched_tokens": 7, "swap_space": 1},
    ]
    for given in settings:
        engine = engine_of(model, **given)
        for _ in range(2):
            assert_same_bits(run(engine, prompts, params), expected)
        if not given["speculative_config"].get("adaptive", True):
            assert engine.speculation.num_accepted_tokens > 100
        assert not engine.speculation.failed


def test_predictions_change_no_bit_in_a_grammar():
    model, tokenizer = random_model("llama", layers=2, vocabulary=352), make_tokenizer("byte_level")
    form = {"regex": "(the quick|a brown) (fox|dog)( jumps| over)*"}
    params = [
        toolkit.SamplingParams(
            max_tokens=30, temperature=at % 2, seed=at, structured_outputs=form, repetition_penalty=1 + at % 3 / 10
        )
        for at in range(6)
    ]
    prompts = [[7, 8, 9 + at] for at in range(6)]
    expected = run(engine_of(model, tokenizer), prompts, params)
    chance = random.Random(1)
    params = [
        dataclasses.replace(one, predicted_token_ids=edited(done.token_ids, chance, at % 2))
        for at, (one, done) in enumerate(zip(params, expected))
    ]
    expected = run(engine_of(model, tokenizer), prompts, params)
    engine = engine_of(model, tokenizer, speculative_config={"method": "prediction", "adaptive": False})
    assert_same_bits(run(engine, prompts, params), expected)
    assert engine.speculation.num_accepted_tokens > 10


def test_a_right_prediction_takes_fewer_steps_and_says_so():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    params = toolkit.SamplingParams(max_tokens=49, temperature=1, seed=3, ignore_eos=True)
    (plain,) = run(engine_of(model), [[1, 2, 3]], params)
    assert plain.accepted_prediction_tokens is plain.rejected_prediction_tokens is None
    params = dataclasses.replace(params, predicted_token_ids=plain.token_ids)
    engine = engine_of(model, speculative_config={"method": "prediction", "adaptive": False})
    (found,) = run(engine, [[1, 2, 3]], params)
    assert found.token_ids == plain.token_ids
    assert (found.accepted_prediction_tokens, found.rejected_prediction_tokens) == (49, 0)
    # The prompt's step samples one token, the others six each: five drafts and the one behind them.
    assert engine.stats()["num_steps"] == 1 + 48 // 6
    assert engine.speculation.num_accepted_tokens == engine.speculation.num_draft_tokens == 40


def test_the_configured_drafter_drafts_where_the_prediction_does_not():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    params = toolkit.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5, 6]]
    asked = []
    engine = engine_of(model, speculative_config={"method": "ngram", "adaptive": False})
    propose = engine.speculation.drafter.propose

    def spy(sequences, most):
        asked.append([one.request.prompt_index for one in sequences])
        return propose(sequences, most)

    engine.speculation.drafter.propose = spy
    texts = [one.token_ids for one in run(engine_of(model), prompts, params)]
    predicted = dataclasses.replace(params, predicted_token_ids=texts[0][:20])
    assert [one.token_ids for one in run(engine, prompts, [predicted, params])] == texts
    assert asked[0] == [1]  # the first one follows its prediction
    assert any(0 in indices for indices in asked)  # which ends before its text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([VOCABULARY], "predicted_token_ids must have token ids from 0 to 30, got 31"),
        ("text", "predicted_token_ids must be a list of token ids or None, got 'text'"),
        ({1, 2}, "predicted_token_ids must be a list of token ids or None"),
        ([1.5], "predicted_token_ids must be a list of token ids or None"),
    ],
)
def test_what_is_no_prediction_is_one_sentence(given, message):
    engine = engine_of(random_model("llama", layers=1, vocabulary=VOCABULARY))
    with pytest.raises(ToolkitError, match=message):
        engine.generate([[1]], toolkit.SamplingParams(predicted_token_ids=given))


def test_an_empty_prediction_is_one():
    engine = engine_of(random_model("llama", layers=1, vocabulary=VOCABULARY), speculative_config={})
    (found,) = engine.generate([[1]], toolkit.SamplingParams(predicted_token_ids=[]))
    assert (found.accepted_prediction_tokens, found.rejected_prediction_tokens) == (0, 0)
