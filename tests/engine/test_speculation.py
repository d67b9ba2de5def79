"""Speculative decoding returns what plain decoding does, bit by bit, for any drafts."""

import dataclasses
import random

import pytest

import toolkit
from toolkit.engine.speculation.drafter import Draft
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

VOCABULARY = 31
FAMILIES = ["llama", "gemma2", "qwen3_moe", "qwen3_next", "mamba2"]
METHODS = [
    {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1},
    {"method": "suffix", "num_speculative_tokens": 4, "prompt_lookup_min": 1},
]


class Foretelling:
    """Drafts what plain decoding returned, with errors here and there.

    Args:
        completions: of plain decoding.
        chance: of everything.
        right: the share of tokens that are drafted as they will be.
    """

    seconds_per_token = 0.0

    def __init__(self, completions, chance, right=0.8):
        self.texts = {(one.prompt_index, one.index): one.token_ids for one in completions}
        self.chance = chance
        self.right = right
        self.finished = 0

    def propose(self, sequences, most):
        drafts = []
        for sequence, count in zip(sequences, most):
            text = self.texts[sequence.request.prompt_index, sequence.index]
            tokens = [
                token if self.chance.random() < self.right else self.chance.randrange(VOCABULARY)
                for token in text[sequence.generated :][:count]
            ]
            tokens += [self.chance.randrange(VOCABULARY) for _ in range(count - len(tokens))]
            drafts.append(Draft(tokens[: self.chance.randint(0, count)], 1))
        return drafts

    def observe(self, sequence):
        self.finished += 1

    def sleep(self):
        pass

    def close(self):
        pass


def requests(chance, count, most=24):
    shared = [chance.randrange(VOCABULARY) for _ in range(9)]
    prompts = [
        shared[: chance.choice((0, 8, 9))] + [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 9))]
        for _ in range(count)
    ]
    params = [
        toolkit.SamplingParams(
            n=chance.choice((1, 1, 3)),
            max_tokens=chance.randint(1, most),
            min_tokens=chance.choice((0, 1)),
            temperature=chance.choice((0.0, 0.7, 1.0)),
            top_p=chance.choice((1.0, 0.9)),
            repetition_penalty=chance.choice((1.0, 1.3)),
            frequency_penalty=chance.choice((0.0, 0.4)),
            stop_token_ids=chance.choice((None, [3, 4])),
            seed=chance.randrange(1000),
            logprobs=chance.choice((None, 2)),
        )
        for _ in range(count)
    ]
    return prompts, params


def engine_of(model, **settings):
    settings = {"max_num_seqs": 4, "max_model_len": 64, "block_size": 4, "seed": 1, **settings}
    return toolkit.Engine(model, **settings)


def run(engine, prompts, params):
    completions = engine.generate(prompts, params)
    engine.check_integrity()
    return [dataclasses.replace(one, request_id=0) for one in completions]


def check_drafts(family, schedules, count, most=24, adapted=lambda model: model):
    """Tokens that were compared, and accepted, in ``schedules`` with as many requests each."""
    compared = accepted = 0
    for seed in range(schedules):
        chance = random.Random(seed)
        model = adapted(random_model(family, layers=2, vocabulary=VOCABULARY))
        prompts, params = requests(chance, count, most)
        settings = {
            "num_blocks": chance.choice((24, 400)),  # few: sequences are preempted
            "swap_space": chance.choice((0, 1)),
            "max_num_batched_tokens": chance.choice((7, 64)),
            "enable_prefix_caching": chance.choice((True, False)),
        }
        plain = engine_of(model, **settings)
        expected = run(plain, prompts, params)
        # Adaptive lengths follow how long steps take: how much is drafted then is the machine's affair.
        config = {"num_speculative_tokens": chance.randint(3, 7), "adaptive": bool(seed % 2)}
        engine = engine_of(model, **settings, speculative_config=config)
        engine.speculation.drafter = Foretelling(expected, chance)
        for _ in range(2):  # the second one finds prefixes that the first one left
            assert run(engine, prompts, params) == expected
        assert engine.speculation.drafter.finished == 2 * len(expected)
        accepted += engine.speculation.num_accepted_tokens
        compared += 2 * sum(len(one.token_ids) for one in expected)
        for one in (plain, engine):
            one.close()
    return compared, accepted


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_bit(family):
    compared, accepted = check_drafts(family, 2, 5)
    assert compared > 200
    assert accepted > 20


@pytest.mark.sweep
@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3_moe", "gpt_oss", "bamba", "lfm2", "phi3_longrope"])
def test_drafts_change_no_bit_of_many_tokens(family):
    compared, accepted = check_drafts(family, 8, 14, most=40)
    assert compared > 2500
    assert accepted > 500


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("qwen3_next", ["o_proj"])])
def test_drafts_change_no_bit_under_an_adapter(family, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    compared, accepted = check_drafts(family, 4, 8, adapted=lambda model: peft.get_peft_model(model, config))
    assert compared > 500
    assert accepted > 50


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config["method"])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_methods_change_no_bit(family, config):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(3), 6)
    prompts = [prompt * 3 for prompt in prompts]
    expected = run(engine_of(model, max_model_len=128), prompts, params)
    for adaptive in (True, False):
        engine = engine_of(model, max_model_len=128, speculative_config={**config, "adaptive": adaptive})
        for _ in range(2):
            assert run(engine, prompts, params) == expected
    assert engine.speculation.num_drafts > 10


@pytest.mark.parametrize(("family", "drafting"), [("llama", "llama"), ("qwen3_next", "mamba2"), ("mamba2", "mamba2")])
def test_a_model_that_drafts_changes_no_bit(family, drafting):
    model = random_model(family, layers=2, vocabulary=VOCABULARY)
    small = model if family == drafting == "llama" else random_model(drafting, layers=1, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(5), 6)
    params = [dataclasses.replace(one, stop_token_ids=None, ignore_eos=True) for one in params]
    expected = run(engine_of(model), prompts, params)
    config = {"method": "draft_model", "model": small, "num_speculative_tokens": 3, "adaptive": False}
    engine = engine_of(model, speculative_config=config, num_blocks=60)
    for _ in range(2):
        assert run(engine, prompts, params) == expected
    drafter = engine.speculation.drafter
    assert not drafter._known
    drafter.block_manager.check_integrity([])
    assert engine.speculation.num_drafts > 30
    if small is model:  # it samples with the randomness that it is verified with
        assert engine.speculation.num_accepted_tokens == engine.speculation.num_draft_tokens


def test_a_model_that_drafts_follows_new_weights():
    model, small = (random_model("llama", layers=layers, vocabulary=VOCABULARY) for layers in (2, 1))
    prompts, params = requests(random.Random(5), 6)
    config = {"method": "draft_model", "model": small, "num_speculative_tokens": 3, "adaptive": False}
    engine = engine_of(model, speculative_config=config)
    run(engine, prompts, params)
    small.model.embed_tokens.weight.data.mul_(1.5)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    assert run(engine, prompts, params) == run(engine_of(model), prompts, params)


def test_a_model_that_drafts_sleeps_with_the_engine():
    model, small = (random_model("llama", layers=layers, vocabulary=VOCABULARY) for layers in (2, 1))
    prompts, params = requests(random.Random(5), 6)
    config = {"method": "draft_model", "model": small, "num_speculative_tokens": 3, "adaptive": False}
    engine = engine_of(model, speculative_config=config)
    engine.submit_batch(prompts, params)
    deltas = [delta for _ in range(4) for delta in engine.step()]
    engine.sleep()
    drafter = engine.speculation.drafter
    assert all(store.untyped_storage().nbytes() == 0 for state in drafter.pool.states for store in state.stores)
    engine.wake()
    deltas += [delta for _ in range(100) for delta in engine.step()]
    finished = [delta.finished for delta in deltas if delta.finished]
    assert sorted(one.token_ids for one in finished) == sorted(
        one.token_ids for one in run(engine_of(model), prompts, params)
    )
    assert not drafter._known
    assert engine.speculation.num_drafts > 10


def test_steps_with_drafts_are_captured():
    model = random_model("qwen3_next", layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(1), 4)
    expected = run(engine_of(model), prompts, params)
    engine = engine_of(model, speculative_config={"adaptive": False})
    engine.speculation.drafter = Foretelling(expected, random.Random(2))
    served, graphs = [], engine.backend.graphs
    serves = graphs.serves
    graphs.serves = lambda *batch: served.append(serves(*batch)) or served[-1]
    assert run(engine, prompts, params) == expected
    assert served.count(False) <= 2  # prompts
    assert served.count(True) >= 4
    assert graphs.captured >= 3


def test_experts_of_rejected_tokens_are_not_returned():
    model = random_model("qwen3_moe", layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(1), 4)
    plain = engine_of(model, enable_return_routed_experts=True)
    expected = run(plain, prompts, params)
    engine = engine_of(model, enable_return_routed_experts=True, speculative_config={"adaptive": False})
    engine.speculation.drafter = Foretelling(expected, random.Random(2), right=0.6)
    found = run(engine, prompts, params)
    assert engine.speculation.num_accepted_tokens < engine.speculation.num_draft_tokens
    for one, another in zip(found, expected):
        assert one.routed_experts.equal(another.routed_experts)


def test_a_step_adds_one_delta_to_a_sequence_and_nothing_after_its_end():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(4), 5)
    expected = run(engine_of(model), prompts, params)
    engine = engine_of(model, speculative_config={"num_speculative_tokens": 6, "adaptive": False})
    engine.speculation.drafter = Foretelling(expected, random.Random(2), right=1.0)
    ids = engine.submit_batch(prompts, params)
    streamed, several = {}, 0
    while engine.has_work:
        deltas = engine.step()
        assert len({(delta.request_id, delta.index) for delta in deltas}) == len(deltas)
        for delta in deltas:
            tokens, logprobs, tops, finished = streamed.setdefault((delta.request_id, delta.index), ([], [], [], []))
            assert not finished
            tokens += delta.token_ids
            logprobs += delta.logprobs
            tops += delta.top_logprobs or []
            finished += [delta.finished] if delta.finished else []
            several += len(delta.token_ids) > 1
    assert several > 5
    for one in expected:
        tokens, logprobs, tops, (finished,) = streamed[ids[one.prompt_index], one.index]
        assert (tokens, logprobs, tops or None) == (one.token_ids, one.logprobs, one.top_logprobs)
        assert finished.token_ids == one.token_ids


def test_what_is_drafted_fits_in_the_budget_of_a_step():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(4), 5)
    expected = run(engine_of(model), prompts, params)
    engine = engine_of(model, max_num_batched_tokens=6, speculative_config={"adaptive": False})
    engine.speculation.drafter = Foretelling(expected, random.Random(2), right=1.0)
    sizes, build = [], engine.runner.build
    engine.runner.build = lambda chunks, *size: sizes.append(sum(one.count for one in chunks)) or build(chunks, *size)
    assert run(engine, prompts, params) == expected
    assert max(sizes) == 6
    assert engine.speculation.num_accepted_tokens > 10


def test_a_drafter_that_fails_ends_no_request():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    prompts, params = requests(random.Random(4), 3)
    engine = engine_of(model, speculative_config={"method": "ngram"})

    def propose(sequences, most):
        raise ValueError("no idea")

    engine.speculation.drafter.propose = propose
    with pytest.warns(UserWarning, match="its drafter failed: ValueError: no idea"):
        found = run(engine, prompts, params)
    assert found == run(engine_of(model), prompts, params)


def test_totals_have_vllms_names():
    model = random_model("llama", layers=2, vocabulary=VOCABULARY)
    engine = engine_of(
        model, speculative_config={"num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}
    )
    run(engine, [[1, 2] * 8], toolkit.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    stats, speculation = engine.stats(), engine.speculation
    assert stats["spec_decode_num_drafts"] == speculation.num_drafts > 0
    assert stats["spec_decode_num_draft_tokens"] <= 3 * speculation.num_drafts
    assert stats["spec_decode_num_accepted_tokens"] == sum(speculation.num_accepted_tokens_per_pos)
    assert "spec_decode_num_drafts" not in engine_of(model).stats()


def test_a_drafting_model_needs_the_vocabulary():
    model, other = (random_model("llama", layers=1, vocabulary=size) for size in (31, 32))
    with pytest.raises(ToolkitError, match=r"must have the vocabulary and device of .* 31 tokens on cpu"):
        engine_of(model, speculative_config={"method": "draft_model", "model": other})
