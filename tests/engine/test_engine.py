import gc
import random
import weakref

import pytest
import torch

from tests.helpers.engine_standin import EOS, POISON, VOCAB, HistoryModel, oracle, random_prompts, result
from tests.helpers.engine_tokenizers import byte_level
from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError


def random_params(rng: random.Random, longest: int) -> SamplingParams:
    most = rng.randint(1, longest)
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 4]),
        max_tokens=most,
        min_tokens=rng.choice([0, 0, rng.randint(0, most)]),
        temperature=rng.choice([0, 0.7, 1.0]),
        top_k=rng.choice([0, 0, 10]),
        top_p=rng.choice([1.0, 0.8]),
        min_p=rng.choice([0.0, 0.05]),
        stop_token_ids=rng.choice([None, [7]]),
        ignore_eos=rng.random() < 0.5,
        repetition_penalty=rng.choice([1.0, 1.2]),
        logprobs=rng.choice([None, 3]),
        seed=rng.randrange(1000),
    )


def random_limits(rng: random.Random, longest: int) -> dict:
    block_size = rng.choice([1, 2, 4, 16])
    return {
        "max_num_seqs": rng.choice([1, 2, 5, 16]),
        "max_num_batched_tokens": rng.choice([1, 3, 8, 64]),
        "block_size": block_size,
        "num_blocks": -(-longest // block_size) + rng.choice([0, 1, 4, 40]),
        "enable_prefix_caching": rng.random() < 0.7,
    }


@pytest.mark.parametrize("seed", range(30))
def test_any_schedule_gives_what_one_sequence_alone_gives(seed):
    rng = random.Random(seed)
    prompts = random_prompts(rng, 8)
    params = [random_params(rng, 16) for _ in prompts]
    with Engine(HistoryModel(), **random_limits(rng, 40)) as engine:
        got = engine.generate(prompts, params)
        engine.check_integrity()
        assert engine.stats()["num_used_blocks"] == 0
    expected = [one for prompt, p in zip(prompts, params) for one in oracle(prompt, p)]
    assert [result(one) for one in got] == expected
    assert [(one.prompt_index, one.index) for one in got] == [
        (at, index) for at, p in enumerate(params) for index in range(p.n)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_arrivals_and_cancellations_at_any_step(seed):
    """Pages add up after every step, deltas to completions; cancelled ones are beginnings of the whole."""
    rng = random.Random(1000 + seed)
    engine = Engine(HistoryModel(), **random_limits(rng, 40))
    asked, grown, finished = {}, {}, {}
    todo = list(zip(random_prompts(rng, 14), [random_params(rng, 16) for _ in range(14)]))
    while todo or engine.has_work:
        if todo and rng.random() < 0.5:
            prompt, params = todo.pop()
            asked[engine.submit(prompt, params)] = (prompt, params)
        if asked and rng.random() < 0.1:
            victim = rng.choice(list(asked))
            there = any((victim, index) not in finished for index in range(asked[victim][1].n))
            assert engine.cancel(victim) == there
            engine.check_integrity()
        for delta in engine.step():
            key = (delta.request_id, delta.index)
            assert key not in finished
            tokens, logprobs = grown.setdefault(key, ([], []))
            tokens += delta.token_ids
            logprobs += delta.logprobs
            if delta.finished is not None:
                finished[key] = delta.finished
        engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0
    reasons = set()
    for number, (prompt, params) in asked.items():
        for index, expected in enumerate(oracle(prompt, params)):
            done = finished[number, index]
            reasons.add(done.finish_reason)
            assert grown.get((number, index), ([], [])) == (done.token_ids, done.logprobs)
            if done.finish_reason == "cancelled":
                count = len(done.token_ids)
                assert done.token_ids == expected[0][:count]
                assert done.logprobs == expected[1][:count]
                assert len(done.sampling_logprobs) == len(done.weight_versions) == count
            else:
                assert result(done) == expected
            if done.top_logprobs is not None:
                assert len(done.top_logprobs) == len(done.token_ids)
    assert reasons <= {"cancelled", "stop", "length"}


def test_preemption_happens_in_the_random_tests():
    engine = Engine(HistoryModel(), block_size=2, num_blocks=20, enable_prefix_caching=False)
    prompts = [[1 + at, 2, 3] for at in range(6)]
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=3)
    got = engine.generate(prompts, params)
    stats = engine.stats()
    assert stats["num_preemptions"] > 3
    assert stats["generation_tokens"] == 180
    assert [result(one) for one in got] == [oracle(prompt, params)[0] for prompt in prompts]


def test_the_prompt_of_n_completions_is_computed_once():
    model = HistoryModel()
    engine = Engine(model, enable_prefix_caching=False, block_size=4, max_num_batched_tokens=16)
    prompt, params = list(range(1, 31)), SamplingParams(n=8, max_tokens=5, ignore_eos=True, seed=1)
    got = engine.generate(prompt, params)
    assert sum(int(batch.query_offsets[-1]) for batch in model.batches) == 30 + 8 * 4
    assert len({tuple(one.token_ids) for one in got}) == 8
    assert [result(one) for one in got] == oracle(prompt, params)


def test_only_rows_that_sample_arrive_at_the_head():
    class Counting(HistoryModel):
        rows = 0

        def forward(self, batch, rows):
            self.rows += len(rows)
            return super().forward(batch, rows)

    model = Counting()
    Engine(model, max_num_batched_tokens=4).generate([[1] * 17, [2] * 5], SamplingParams(max_tokens=3, ignore_eos=True))
    assert model.rows == 6


def test_a_new_weight_version_tags_tokens_and_hides_old_prefixes():
    model = HistoryModel()
    engine = Engine(model, block_size=4, max_num_batched_tokens=64)
    prompt = list(range(1, 18))
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=5)
    first = engine.submit(prompt, params)
    for _ in range(3):
        engine.step()
    model.weights = 1
    done = [delta.finished for _ in range(3) for delta in engine.step() if delta.finished]
    assert [one.request_id for one in done] == [first]
    assert done[0].weight_versions == [0, 0, 0, 1, 1, 1]
    assert done[0].weight_version == 1
    hits = engine.stats()["prefix_cache_hits"]
    model.versions_read.clear()
    engine.generate(prompt, params)
    assert engine.stats()["prefix_cache_hits"] == hits
    engine.generate(prompt, params)
    assert engine.stats()["prefix_cache_hits"] == hits + 16
    assert all(read == {1} for read in model.versions_read)
    # What a sequence of mixed weight versions wrote after the move is never registered either.
    longer = done[0].prompt_token_ids + done[0].token_ids
    engine.generate(longer, params)
    assert all(read == {1} for read in model.versions_read)
    engine.check_integrity()


def test_prefixes_are_shared_within_a_cache_salt_only():
    engine = Engine(HistoryModel(), block_size=4)
    hits = []
    for salt in (None, "a", "b", None, "a"):
        engine.generate(list(range(1, 18)), SamplingParams(max_tokens=2, cache_salt=salt))
        hits.append(engine.stats()["prefix_cache_hits"])
    assert hits == [0, 0, 0, 16, 32]
    engine.check_integrity()


def test_a_sequence_preempted_over_a_weight_move_is_recomputed_whole():
    model = HistoryModel()
    engine = Engine(model, block_size=2, num_blocks=14)
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=5)
    ids = [engine.submit([1 + at, 2], params) for at in range(3)]
    versions = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.finished:
                versions[delta.request_id] = delta.finished.weight_versions
        model.weights += engine.stats()["num_steps"] == 12
        engine.check_integrity()
    assert engine.stats()["num_preemptions"] > 0
    assert sorted(versions) == ids
    assert all(one == sorted(one) and len(one) == 20 for one in versions.values())


def test_one_bad_request_ends_alone():
    prompts = [[1, 2], [3, VOCAB], [4, 5, POISON], [6, -1], [7]]
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
    engine = Engine(HistoryModel())
    got = engine.generate(prompts, params)
    assert [one.finish_reason for one in got] == ["length", "error", "error", "error", "length"]
    assert "token ids from 0 to 60, got 61." in got[1].error
    assert "not finite" in got[2].error
    assert "got -1." in got[3].error
    assert [result(got[at]) for at in (0, 4)] == [oracle(prompts[at], params)[0] for at in (0, 4)]
    assert engine.stats()["num_used_blocks"] == 0
    engine.check_integrity()


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**32 + 1, 2**64, -(2**63)])
def test_no_tokenizer_reads_ids_outside_of_the_vocabulary(wrong):
    engine = Engine(HistoryModel(), byte_level(), num_blocks=64)
    good, bad = engine.generate([[5, 6], [5, wrong]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert (good.finish_reason, bad.finish_reason, bad.text) == ("length", "error", "")
    assert bad.error == f"prompt must have token ids from 0 to {VOCAB - 1}, got {wrong}."
    assert not engine.has_work


def test_an_error_in_one_sibling_ends_its_request():
    engine = Engine(HistoryModel())
    bad = engine.submit([POISON], SamplingParams(n=3))
    good = engine.submit([1], SamplingParams(max_tokens=2, ignore_eos=True))
    reasons = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.finished:
                reasons.setdefault(delta.request_id, []).append(delta.finished.finish_reason)
        engine.check_integrity()
    assert reasons == {bad: ["error"] * 3, good: ["length"]}


def test_a_failing_detokenizer_ends_its_request_alone():
    class Fragile:
        eos_token_id = None

        def __call__(self, text):
            return {"input_ids": [1]}

        def decode(self, ids, skip_special_tokens):
            if 6 in ids:
                raise UnicodeError("no such chunk")
            return "x" * len(ids)

    engine = Engine(HistoryModel(), Fragile())
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=2)
    got = engine.generate([[at] for at in range(1, 20) if at != 6], params)
    reasons = [one.finish_reason for one in got]
    assert {"length", "error"} == set(reasons)
    for one in got:
        assert (one.finish_reason == "error") == (6 in one.token_ids)
        if one.error:
            assert one.error == "UnicodeError: no such chunk"
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0


def test_a_failing_forward_ends_its_batch_and_the_engine_goes_on():
    model = HistoryModel()
    engine = Engine(model, max_num_seqs=2)
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
    ids = [engine.submit([at], params) for at in (1, 2, 3)]
    engine.step()
    model.failure = RuntimeError("out of device memory")
    done = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.finished:
                done[delta.request_id] = delta.finished
        engine.check_integrity()
    assert [done[one].finish_reason for one in ids] == ["error", "error", "length"]
    assert done[ids[0]].error == "RuntimeError: out of device memory"
    assert len(done[ids[0]].token_ids) == 1
    assert result(engine.generate([1], params)[0]) == oracle([1], params)[0]


def test_an_interrupt_gets_through_and_leaves_nothing_behind():
    model = HistoryModel()
    engine = Engine(model)
    model.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], SamplingParams())
    assert not engine.has_work
    assert engine.stats()["num_used_blocks"] == 0
    assert len(engine.generate([1], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_eos_stop_tokens_and_ignore_eos():
    params = SamplingParams(max_tokens=200, seed=1)
    done = Engine(HistoryModel()).generate([[at] for at in range(1, 9)], params)
    ended = [one for one in done if one.finish_reason == "stop"]
    assert ended
    for one in ended:
        assert one.token_ids[-1] == EOS
        assert EOS not in one.token_ids[:-1]
        assert one.stop_reason is None
    params = SamplingParams(max_tokens=200, seed=1, stop_token_ids=[9], ignore_eos=True)
    done = Engine(HistoryModel()).generate([[at] for at in range(1, 9)], params)
    assert {one.stop_reason for one in done if one.finish_reason == "stop"} == {9}
    assert any(EOS in one.token_ids for one in done)


def test_text_and_stop_strings_through_the_engine():
    tokenizer = byte_level()

    class LargeVocabulary(HistoryModel):
        vocab_size = len(tokenizer)

        def forward(self, batch, rows):
            logits = super().forward(batch, rows)
            return torch.cat([logits, torch.full((len(logits), self.vocab_size - VOCAB), -torch.inf)], 1)

    engine = Engine(LargeVocabulary(), tokenizer)
    prompts = ["a", "b", "c"]
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=4)
    free = engine.generate(prompts, params)
    for prompt, one in zip(prompts, free):
        assert one.prompt_token_ids == tokenizer(prompt)["input_ids"]
        assert one.text == tokenizer.decode(one.token_ids, skip_special_tokens=True)
    stop = free[0].text[20:23]
    for include in (False, True):
        params = SamplingParams(max_tokens=60, ignore_eos=True, seed=4, stop=[stop], include_stop_str_in_output=include)
        deltas = [delta for delta in engine.stream(prompts, params) if delta.prompt_index == 0]
        done = deltas[-1].finished
        cut = free[0].text.index(stop)
        assert done.text == free[0].text[: cut + len(stop) if include else cut]
        assert "".join(delta.text for delta in deltas) == done.text
        assert (done.finish_reason, done.stop_reason) == ("stop", stop)
        assert done.token_ids == free[0].token_ids[: len(done.token_ids)]
    late = SamplingParams(max_tokens=60, min_tokens=55, ignore_eos=True, seed=4, stop=[stop])
    one = engine.generate(prompts, late)[0]
    assert one.text == free[0].text
    assert one.finish_reason == "length"
    token = free[0].token_ids[10]
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=4, stop_token_ids=[token])
    one = engine.generate(prompts, params)[0]
    assert one.token_ids[-1] == token
    assert one.text == tokenizer.decode(one.token_ids[:-1], skip_special_tokens=True)


def test_stream_yields_each_token_and_cancels_when_left():
    engine = Engine(HistoryModel())
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=2)
    deltas = list(engine.stream([[1], [2, 3]], params))
    assert len(deltas) == 20
    assert sum(delta.finished is not None for delta in deltas) == 4
    stream = engine.stream([1, 2], params)
    next(stream)
    stream.close()
    assert not engine.has_work
    assert engine.stats()["num_used_blocks"] == 0
    unread = engine.stream([1, 2], params)
    del unread
    gc.collect()
    assert not engine.has_work


def test_generate_leaves_the_deltas_of_other_requests_to_step():
    engine = Engine(HistoryModel())
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
    other = engine.submit([9], params)
    engine.generate([1, 2, 3], params)
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert {delta.request_id for delta in deltas} == {other}
    assert [token for delta in deltas for token in delta.token_ids] == oracle([9], params)[0][0]


def test_unseeded_requests_differ_and_follow_the_engines_seed():
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def run(seed):
        return [tuple(one.token_ids) for one in Engine(HistoryModel(), seed=seed).generate([[1], [1]], params)]

    assert run(1) == run(1)
    assert len({*run(1), *run(2), *run(None)}) == 6


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("text", {}, "prompt must be token ids, since the engine has no tokenizer, got a text."),
        ([1], {"stop": "x"}, "since the engine has no tokenizer, got ('x',); use stop_token_ids."),
        ([], {}, "prompt must have >= 1 tokens, got 0."),
        ([1, "a"], {}, "prompt must be a text or a list of token ids, got "),
        ([1.5], {}, "prompt must be a text or a list of token ids, got "),
        (None, {}, "prompt must be a text or a list of token ids, got "),
        (
            [1] * 30,
            {"max_tokens": 3},
            "must be <= 2 after a prompt of 30 tokens, so that both fit in max_model_len (32), got 3.",
        ),
        ([1] * 32, {"max_tokens": 1}, "prompt must have <= 31 tokens, one below max_model_len, got 32."),
        ([1] * 99, {"max_tokens": None}, "prompt must have <= 31 tokens, one below max_model_len, got 99."),
    ],
)
def test_requests_that_cannot_run_are_refused_at_once(prompt, params, message):
    engine = Engine(HistoryModel(), max_model_len=32)
    with pytest.raises(ToolkitError) as caught:
        engine.submit(prompt, SamplingParams(**params))
    assert message in str(caught.value)
    assert not engine.has_work
    with pytest.raises(ToolkitError):
        engine.generate([[1, 2], prompt], SamplingParams(**params))
    assert not engine.has_work


def test_requests_that_the_pool_can_never_hold_are_refused_and_the_largest_runs():
    engine = Engine(HistoryModel(), block_size=4, num_blocks=3)
    with pytest.raises(
        ToolkitError,
        match=r"must be <= 5 after .*, so that both fit in num_blocks \* block_size \+ 1 \(13\), got 6",
    ):
        engine.submit([1] * 8, SamplingParams(max_tokens=6))
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=3, seed=1)
    got = engine.generate([1] * 8, params)
    assert [result(one) for one in got] == oracle([1] * 8, params)
    assert len(engine.generate([1] * 8, SamplingParams(max_tokens=None, ignore_eos=True))[0].token_ids) == 5


def test_wrong_calls_are_one_clear_sentence():
    engine = Engine(HistoryModel())
    for prompts, params, message in [
        (5, None, "prompts must be .*, got int"),
        ([[1], [2]], [SamplingParams()], r"params must have one entry per prompt \(2\), got 1"),
        ([1], {"n": 1}, "params must be .*, got {'n': 1}"),
        ([1], [3], r"params must be .*, got \[3\]"),
    ]:
        with pytest.raises(ToolkitError, match=message):
            engine.generate(prompts, params)
    assert engine.generate([]) == []
    with pytest.raises(ToolkitError, match=r"max_model_len must be <= 256, .*, got 512"):
        Engine(HistoryModel(), max_model_len=512)
    with pytest.raises(
        ToolkitError, match=r"Engine has no argument 'max_num_sequences'; it has model, .*, max_num_seqs,"
    ):
        Engine(HistoryModel(), max_num_sequences=3)


def test_token_ids_may_be_tensors():
    engine = Engine(HistoryModel())
    params = SamplingParams(max_tokens=3, seed=1)
    expected = [one.token_ids for one in engine.generate([[1, 2], [3, 4]], params)]
    assert [one.token_ids for one in engine.generate(torch.tensor([[1, 2], [3, 4]]), params)] == expected
    assert [one.token_ids for one in engine.generate([torch.tensor([1, 2]), (3, 4)], params)] == expected
    assert [one.token_ids for one in engine.generate(torch.tensor([1, 2]), params)] == expected[:1]


def test_a_closed_engine_gives_everything_back_and_refuses():
    with Engine(HistoryModel()) as engine:
        engine.submit([1, 2], SamplingParams(ignore_eos=True))
        engine.step()
        assert engine.stats()["num_used_blocks"] == 1
    assert engine.stats()["num_used_blocks"] == 0
    assert [delta.finished.finish_reason for delta in engine.step()] == ["cancelled"]
    assert not engine.has_work
    for call in (engine.submit, engine.generate, lambda prompt: list(engine.stream(prompt))):
        with pytest.raises(ToolkitError, match="the engine is closed"):
            call([1, 2])
    engine.close()
    assert engine.cancel(0) is False


def test_closing_frees_the_pool():
    model = HistoryModel()
    with Engine(model) as engine:
        pool = weakref.ref(engine.pool)
        engine.generate([1, 2], SamplingParams())
        model.batches.clear()
    gc.collect()
    assert pool() is None
