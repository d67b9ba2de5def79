import random

import pytest
import torch

from tests.helpers.engine_pictures import Picture, PictureModel, expected_history, hash_of
from tests.helpers.engine_standin import logits_of
from toolkit import AsyncEngine, Engine, SamplingParams
from toolkit.engine import EngineUnavailable
from toolkit.engine.media import EncoderCache, PromptMedia
from toolkit.errors import ToolkitError
from toolkit.state import PrefixKey
from toolkit.state.media import Features, MediaSpan

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def _media(*spans: tuple, tokens: int = 40) -> PromptMedia:
    found = tuple(MediaSpan(first, length, hash_of(name), 0, both) for name, first, length, both in spans)
    return PromptMedia([5] * tokens, found, {}, torch.arange(tokens), 0)


def test_names_are_of_content_and_never_meet():
    one = _media(("a", 2, 3, False), ("b", 9, 2, False))
    other = _media(("b", 2, 3, False), ("a", 9, 2, False))
    assert one.names[:2] == [5, 5]
    assert one.names[2:4] == other.names[9:11], "a row of a picture has one name, wherever it lies"
    assert len({*one.names, *other.names} - {5}) == 6
    assert all(name < 0 for name in one.names if name != 5)


def test_tokens_that_see_each_other_are_named_by_their_whole_block():
    alone = _media(("a", 2, 3, True))
    beside = _media(("a", 2, 3, True), ("b", 5, 2, True))
    assert alone.blocks == [(2, 5)]
    assert beside.blocks == [(2, 7)]
    assert not {*alone.names} & {*beside.names} - {5}


def test_chunks_cut_no_block():
    media = _media(("a", 2, 6, True), ("b", 20, 4, False))
    for start in [*range(3), *range(8, 40)]:
        for count in range(1, 41 - start):
            taken = media.chunk(start, count)
            assert 0 <= taken <= count
            assert media.block_around(start + taken) is None
            if taken < count:
                assert start + taken == 2


def test_positions_go_on_behind_the_prompt():
    media = PromptMedia([5] * 4, (), {}, torch.tensor([[0, 1, 1, 2], [0, 5, 6, 7]]), delta=10)
    assert media.positions_of(2, 4).tolist() == [[1, 2, 14, 15], [6, 7, 14, 15]]
    assert media.positions_of(6, 1).tolist() == [[16], [16]]


def test_encoder_cache_knows_content_and_weights_and_stays_small():
    made = []
    cache = EncoderCache(lambda item: made.append(item) or Features(torch.zeros(4, 1)), capacity=8)
    for name, version in [("a", 0), ("a", 0), ("b", 0), ("a", 1), ("a", 0), ("c", 1), ("b", 0)]:
        cache.get(name.encode(), (name, version), PrefixKey(version))
    assert made == [("a", 0), ("b", 0), ("a", 1), ("a", 0), ("c", 1), ("b", 0)]
    cache.drop_outdated(PrefixKey(1))
    cache.get(b"c", ("c", 1), PrefixKey(1))
    assert cache.hits == 2


def _prompt(rng: random.Random) -> list:
    """Texts and pictures of few kinds, so that prefixes are common."""
    parts: list = [rng.randrange(1, 4) for _ in range(rng.randrange(3))]
    for _ in range(rng.randrange(1, 4)):
        name, both = rng.choice([("cat", False), ("dog", True), ("cow", True)])
        parts.append(Picture(name, 5 if both else rng.choice([6, 9]), 0 if both else rng.choice([0, 2]), both))
        parts += [rng.randrange(1, 4) for _ in range(rng.randrange(4))]
    return [*parts, rng.randrange(1, 50)]


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_each_request_what_it_gets_alone(seed):
    rng = random.Random(seed)
    model = PictureModel()
    engine = Engine(
        model, max_num_seqs=4, max_num_batched_tokens=rng.choice([20, 64]), block_size=(1, 4, 16)[seed % 3],
        num_blocks=256 if seed % 2 else None, encoder_cache_size=rng.choice([0, 64, 1000]),
    )  # fmt: skip
    prompts = [_prompt(rng) for _ in range(14)]
    params = [SamplingParams(max_tokens=rng.randrange(1, 9), **GREEDY) for _ in prompts]
    order = dict(zip(engine.submit_batch([{"input_ids": [one]} for one in prompts[:7]], params[:7]), range(7)))
    done = {}
    while engine.has_work or len(order) < len(prompts):
        if rng.random() < 0.3 and len(order) < len(prompts):
            at = len(order)
            order[engine.submit({"input_ids": [prompts[at]]}, params[at])] = at
        for delta in engine.step():
            if delta.finished is not None:
                done[order[delta.request_id]] = delta.finished
        engine.check_integrity()
    for at, prompt in enumerate(prompts):
        output = done[at].token_ids
        assert len(output) == params[at].max_tokens
        for count, token in enumerate(output):
            assert token == int(logits_of(expected_history(model, prompt, output[:count])).argmax())
    if seed % 3 == 0:
        assert engine.stats()["prefix_cache_hits"] > 0


def test_a_picture_is_encoded_once_and_again_under_other_weights():
    model = PictureModel()
    engine = Engine(model)
    prompt = {"input_ids": [[1, Picture("cat", 6), 2]]}
    engine.generate([prompt, prompt], SamplingParams(max_tokens=2, **GREEDY))
    assert model.encoded == ["cat"]
    model.weights = 1
    engine.generate([prompt], SamplingParams(max_tokens=2, **GREEDY))
    assert model.encoded == ["cat", "cat"]


def test_a_broken_picture_ends_its_request_alone():
    model = PictureModel()
    model.fail_on = "dog"
    good, bad = Engine(model).generate(
        [{"input_ids": [[1, Picture("cat", 6), 2]]}, {"input_ids": [[1, Picture("dog", 6), 2]]}],
        SamplingParams(max_tokens=2, **GREEDY),
    )
    assert good.finish_reason == "length"
    assert (bad.finish_reason, bad.error) == ("error", "RuntimeError: a broken picture")


def test_prompts_that_cannot_run_are_one_sentence():
    engine = Engine(PictureModel(), max_num_batched_tokens=16, max_num_seqs=8)
    with pytest.raises(ToolkitError, match="pictures of <= 9 tokens that see each other"):
        engine.generate([{"input_ids": [[Picture("cow", 10, 0, True), 2]]}])
    with pytest.raises(ToolkitError, match="needs the model's processor"):
        engine.generate([{"prompt": "<image>", "multi_modal_data": {"image": object()}}])
    with pytest.raises(ToolkitError, match="must have 'input_ids', 'prompt' or 'prompt_token_ids'"):
        engine.generate([{"image": 1}])
    plain = SamplingParams(max_tokens=2, **GREEDY)
    assert engine.generate({"prompt_token_ids": [3, 4]}, plain)[0].prompt_token_ids == [3, 4]


def test_encoded_pictures_are_shared_within_a_cache_salt_alone():
    model = PictureModel()
    prompt = {"input_ids": [[1, 2, Picture("cat", 6), 3]]}
    with Engine(model, max_num_seqs=4) as engine:
        salts = [None, "one", "one", "two", None]  # of several requests in one step, and of later ones
        for given in (salts[:4], salts[2:]):
            params = [SamplingParams(max_tokens=2, cache_salt=salt, **GREEDY) for salt in given]
            found = engine.generate([prompt] * len(given), params)
            assert len({tuple(one.token_ids) for one in found}) == 1
        assert model.encoded == ["cat"] * 3
        assert engine.stats()["num_encoded"] == 3


SPACE = 3 / 1024  # GiB: three of the prompts below


def _large(name):
    """A prompt whose picture takes 1 MiB."""
    return {"input_ids": [[1, Picture(name, 6), 2]], "pixel_values": torch.zeros(1 << 18)}


def test_pictures_of_requests_that_wait_have_a_bound():
    params = SamplingParams(max_tokens=2, **GREEDY)
    with Engine(PictureModel(), max_num_seqs=1, media_space=SPACE) as engine:
        for name in "abc":
            engine.submit(_large(name), params)
        with pytest.raises(ToolkitError, match=r"media_space.*beside 0\.00293 of requests that wait or run"):
            engine.submit(_large("d"), params)
        engine.submit([1, 2, 3], params)  # text has no bound of that kind
        while engine.has_work:
            engine.step()
        assert len(engine.generate(_large("d"), params)) == 1
        with pytest.raises(ToolkitError, match=r"<= 0\.00292969 GiB together \(media_space\), got 0\.00391\.$"):
            engine.generate([_large(name) for name in "efgh"], params)
    with Engine(PictureModel(), media_space=None) as engine:
        assert len(engine.generate([_large(name) for name in "abcdefgh"], params)) == 8
    with pytest.raises(ToolkitError, match="media_space must be"):
        Engine(PictureModel(), media_space=-1)


def test_pictures_of_requests_that_no_step_has_seen_have_a_bound():
    engine = AsyncEngine(Engine(PictureModel(), max_num_seqs=1, media_space=SPACE))
    params = SamplingParams(max_tokens=2, **GREEDY)
    with engine:
        with engine.pause():
            handles = [engine.submit(_large(name), params) for name in "abc"]
            with pytest.raises(EngineUnavailable, match="try again later"):
                engine.submit(_large("d"), params)
        assert all(len([delta for delta in handle if delta.finished]) == 1 for handle in handles)
        with pytest.raises(ToolkitError, match="together") as failure:
            engine.submit([_large(name) for name in "efgh"], params)
        assert not isinstance(failure.value, EngineUnavailable)
        assert len(engine.generate(_large("d"), params)) == 1
