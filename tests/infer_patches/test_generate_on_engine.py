"""``model.generate`` on the engine, against transformers' own ``generate`` of the unpatched model."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, MinLengthLogitsProcessor
from transformers.generation.streamers import BaseStreamer

import toolkit
from infer_patches.generate import route_generate
from tests.helpers.rope import rope_model, sequences
from toolkit.errors import ToolkitError
from toolkit.ops.token_logprob import token_logprob
from toolkit.testing.models import random_model, tiny_tokenizer

PAD = 0


@pytest.fixture(scope="module")
def pair():
    """(transformers' own model, the same weights patched and routed)."""
    model = random_model("llama")
    own = copy.deepcopy(model)
    toolkit.patch(model)
    with route_generate(model, num_blocks=256) as route:
        yield own, model
        route.engine.engine.check_integrity()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def padded(side: str = "left", rows: int = 3, length: int = 13) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 331, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        cut = 4 * row + 3
        mask[row, slice(0, cut) if side == "left" else slice(length - cut, length)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def most_probable(own, inputs, offset: int) -> list[int]:
    """The tokens that the rows take greedily at an offset."""
    return own.generate(**inputs, max_new_tokens=offset + 1, eos_token_id=None, pad_token_id=PAD)[:, -1].tolist()


GREEDY = {
    "new tokens": {"max_new_tokens": 9},
    "whole length": {"max_length": 21},
    "several ends": {"max_new_tokens": 12, "eos_token_id": "most probable"},
    "ends suppressed": {"max_new_tokens": 12, "eos_token_id": "most probable", "min_new_tokens": 8},
    "least length": {"max_new_tokens": 12, "eos_token_id": "most probable", "min_length": 18},
    "repetition": {"max_new_tokens": 9, "repetition_penalty": 1.7},
    "the default length": {},
    "without cache": {"max_new_tokens": 4, "use_cache": False},
    "first end pads": {"max_new_tokens": 12, "eos_token_id": "most probable", "pad_token_id": None},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_are_transformers_own(pair, name):
    own, model = pair
    inputs = padded()
    settings = {"pad_token_id": PAD, "eos_token_id": None} | GREEDY[name]
    if settings["eos_token_id"] == "most probable":  # rows end at different lengths
        settings["eos_token_id"] = [most_probable(own, inputs, 2)[0], most_probable(own, inputs, 5)[1]]
    expected = own.generate(**inputs, **settings)
    got = model.generate(**inputs, **settings)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert name not in ("several ends", "first end pads") or len(set(got[:, -1].tolist())) > 1


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "bamba", "qwen3_moe"])
def test_greedy_tokens_of_other_architectures(family):
    model = random_model(family)
    inputs, settings = padded(), {"max_new_tokens": 7, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(**inputs, **settings)
    toolkit.patch(model)
    with route_generate(model, num_blocks=64):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_a_configuration_and_positional_ids(pair):
    own, model = pair
    config = GenerationConfig(max_new_tokens=6, eos_token_id=None, pad_token_id=PAD, do_sample=False)
    ids = padded()["input_ids"][2:]
    assert torch.equal(model.generate(ids, config), own.generate(ids, config))
    assert torch.equal(model.generate(max_new_tokens=4), own.generate(max_new_tokens=4))  # from the first token


def test_padding_on_the_right_continues_as_alone(pair):
    own, model = pair
    inputs, settings = padded("right"), {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": PAD}
    got = model.generate(**inputs, **settings)
    for row, (ids, mask) in enumerate(zip(*inputs.values())):
        alone = own.generate(ids[mask.bool()][None], **settings)
        assert torch.equal(got[row, 13:], alone[0, int(mask.sum()) :])
        assert torch.equal(got[row, :13], ids)


@pytest.mark.parametrize("strings", ["e", ["zz", "o", "e"]])
def test_stop_strings_end_where_transformers_does(pair, tokenizer, strings):
    own, model = pair
    settings = {"max_new_tokens": 40, "pad_token_id": PAD, "eos_token_id": 2}
    config = GenerationConfig(**settings, stop_strings=strings)
    expected = own.generate(**padded(), **settings, stop_strings=strings, tokenizer=tokenizer)
    for given in ({**settings, "stop_strings": strings}, {"generation_config": config}):
        assert torch.equal(model.generate(**padded(), **given, tokenizer=tokenizer), expected)
    assert config.stop_strings == strings
    assert (expected[:, -1] == PAD).any()


def test_criteria_of_the_caller_end_their_rows(pair):
    own, model = pair

    class EvenAfter(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, -1] % 2 == 0) & torch.tensor(input_ids.shape[1] > 15)

    settings = {"max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": 2, "stopping_criteria": [EvenAfter()]}
    expected = own.generate(**padded(), **settings)
    assert torch.equal(model.generate(**padded(), **settings), expected)
    assert expected.shape[1] < 33
    assert model.generate(**padded(), max_new_tokens=20, pad_token_id=PAD, max_time=0.0).shape[1] == 14


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2}


def test_sampled_tokens_have_the_processed_probabilities_of_transformers(pair):
    """Scores after every processor are those that transformers makes for the sampled text; tokens come as often."""
    own, model = pair
    torch.manual_seed(3)
    inputs = padded(rows=2)
    out = model.generate(
        **inputs,
        **SAMPLED,
        max_new_tokens=5,
        num_return_sequences=150,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert out.sequences.shape == (300, 18)
    assert torch.equal(out.sequences[::150, :13], inputs["input_ids"])
    assert len(out.scores) == len(out.logits) == 5
    sampled = out.sequences[:, 13:]
    scores = torch.stack(out.scores, 1).log_softmax(-1)
    assert scores.gather(2, sampled[:, :, None]).isfinite().all()
    mask = inputs["attention_mask"].repeat_interleave(150, 0)
    full = torch.cat([mask, torch.ones_like(sampled)], 1)
    positions = (full.cumsum(-1) - 1).clamp_min(0)
    raw = own(out.sequences, attention_mask=full, position_ids=positions).logits[:, 12:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), raw, rtol=1e-4, atol=1e-4)
    # The first token, sampled 150 times from one distribution that an independent chain of transformers' gives.
    first = own.generate(
        **inputs,
        **SAMPLED,
        max_new_tokens=1,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
    ).scores[0]
    for row in range(2):
        torch.testing.assert_close(out.scores[0][150 * row], first[row], rtol=1e-4, atol=1e-4)
        probabilities = first[row].softmax(-1)
        counts = torch.bincount(sampled[150 * row : 150 * row + 150, 0], minlength=331)
        often = probabilities * 150 >= 5
        chi = ((counts - probabilities * 150)[often] ** 2 / (probabilities * 150)[often]).sum()
        assert float(chi) < 3 * int(often.sum()) + 15
        assert int(often.sum()) >= 3
    transition = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transition.shape == (300, 5)


def test_scores_of_ended_rows_are_transformers_own(pair):
    own, model = pair
    inputs = padded()
    settings = {
        "max_new_tokens": 8,
        "min_new_tokens": 2,
        "pad_token_id": PAD,
        "eos_token_id": [most_probable(own, inputs, 2)[0]],
        "repetition_penalty": 1.1,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected, got = own.generate(**inputs, **settings), model.generate(**inputs, **settings)
    assert type(got) is type(expected)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for mine, theirs in zip(got[name], expected[name]):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    plain = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert plain.scores is None
    assert plain.logits is None


def test_torchs_global_seed_repeats_samples_and_greedy_leaves_it(pair):
    _, model = pair
    settings = {**padded(), "do_sample": True, "max_new_tokens": 8, "pad_token_id": PAD, "num_return_sequences": 2}
    torch.manual_seed(7)
    first = model.generate(**settings)
    assert not torch.equal(model.generate(**settings), first)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**settings), first)
    assert not torch.equal(first[0], first[1])
    state = torch.get_rng_state()
    model.generate(**padded(), max_new_tokens=2, pad_token_id=PAD)
    assert torch.equal(torch.get_rng_state(), state)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamers_get_what_transformers_gives_them(pair, tokenizer):
    own, model = pair
    inputs = padded()
    settings = {"max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": most_probable(own, inputs, 4)[:2]}
    mine, theirs = Recorder(), Recorder()
    own.generate(**inputs, **settings, streamer=theirs)
    model.generate(**inputs, **settings, streamer=mine)
    assert mine.ended == theirs.ended == 1
    assert len(mine.values) == len(theirs.values)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine.values, theirs.values))
    # A text as it comes, from another thread.
    one = {"input_ids": inputs["input_ids"][2:], "max_new_tokens": 10, "pad_token_id": PAD}
    texts = []
    for which in (own, model):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=which.generate, kwargs={**one, "streamer": streamer})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("cache", ["static", "hybrid", "offloaded"])
@pytest.mark.parametrize("where", ["model", "argument"])
def test_a_cache_that_a_configuration_names_is_the_engines(pair, cache, where, monkeypatch):
    own, model = pair
    expected = own.generate(**padded(), max_new_tokens=4, pad_token_id=PAD)

    def allocate(*_, **__):
        raise AssertionError("transformers allocates a cache that nobody reads")

    monkeypatch.setattr(model, "_prepare_static_cache", allocate)
    if where == "model":
        monkeypatch.setattr(model.generation_config, "cache_implementation", cache)
        got = model.generate(**padded(), max_new_tokens=4, pad_token_id=PAD)
    else:
        config = GenerationConfig(max_new_tokens=4, pad_token_id=PAD, eos_token_id=2, cache_implementation=cache)
        got = model.generate(**padded(), generation_config=config)
    assert torch.equal(got, expected)


UNSUPPORTED = {
    "num_beams": 4,
    "bad_words_ids": [[5]],
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [3],
    "prompt_lookup_num_tokens": 3,
    "guidance_scale": 1.5,
    "typical_p": 0.5,
    "cache_implementation": "static",
    "output_attentions": True,
    "output_hidden_states": True,
    "forced_eos_token_id": 2,
    "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 2)]),
    "prefix_allowed_tokens_fn": lambda batch, ids: [1],
    "inputs_embeds": torch.zeros(3, 13, 64),
    "past_key_values": object(),
    "position_ids": torch.arange(13)[None],
    "max_new_token": 3,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_the_engine_does_not_do_is_an_error_by_name(pair, name):
    _, model = pair
    with pytest.raises(ToolkitError, match=name):
        model.generate(**padded(), pad_token_id=PAD, return_dict_in_generate=True, **{name: UNSUPPORTED[name]})


def test_other_bad_input_is_an_error(pair):
    _, model = pair
    inputs = padded()
    holes = inputs["attention_mask"].clone()
    holes[2, 5] = 0
    for mask, message in ((holes, "holes in row 2"), (torch.zeros_like(holes), "no token in row 0")):
        with pytest.raises(ToolkitError, match=message):
            model.generate(inputs["input_ids"], attention_mask=mask, pad_token_id=PAD)
    with pytest.raises(ToolkitError, match="tokenizer must be given with stop_strings 'x'"):
        model.generate(**inputs, stop_strings="x")
    with pytest.raises(ToolkitError, match=", got 600"):
        model.generate(**inputs, max_new_tokens=600, pad_token_id=PAD)
    with pytest.raises(ToolkitError, match="routed already"):
        route_generate(model)
    with pytest.raises(ToolkitError, match="not patched"):
        route_generate(random_model("llama"))


def test_the_way_out_and_the_way_round():
    model = random_model("llama")
    inputs = padded()
    beams = {"num_beams": 2, "max_new_tokens": 3, "pad_token_id": PAD, "eos_token_id": None}
    toolkit.patch(model)
    attributes = dict(model.__dict__)
    expected = model.generate(**inputs, **beams)
    with route_generate(model, num_blocks=64, fallback=True) as route:
        assert torch.equal(model.generate(**inputs, **beams), expected)
        assert route.engine.stats()["generation_tokens"] == 0
        model.generate(**inputs, max_new_tokens=2, pad_token_id=PAD, eos_token_id=None)
        assert route.engine.stats()["generation_tokens"] == 6
        copied = copy.deepcopy(model)  # without an engine: transformers' own
        assert torch.equal(copied.generate(**inputs, **beams), expected)
        loaded = pickle.loads(pickle.dumps(model))
        assert torch.equal(loaded.generate(**inputs, **beams), expected)
    assert model.__dict__ == attributes
    assert torch.equal(model.generate(**inputs, **beams), expected)
    with toolkit.Engine(model, num_blocks=64) as engine:
        route = route_generate(model, engine)
        model.generate(**inputs, max_new_tokens=2, pad_token_id=PAD)
        route.undo()
        route.undo()
        assert engine.generate([[3, 4]])[0].finish_reason in ("length", "stop")
        with pytest.raises(ToolkitError, match="num_blocks must be left out where engine is given"):
            route_generate(model, engine, num_blocks=3)
    with pytest.raises(ToolkitError, match="num_page"):
        route_generate(model, num_page=3)
    assert "generate" not in model.__dict__


def test_scores_have_the_rotary_tables_that_tokens_were_sampled_by():
    """The request declares 40 tokens, beyond the border, and a row that ends early is on this side of it."""
    model = rope_model("longrope")
    toolkit.patch(model)
    ids = torch.tensor(sequences(20, 20))
    with toolkit.Engine(model) as engine, route_generate(model, engine):
        result = model.generate(
            ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
        )
        greedy = toolkit.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        completions = engine.generate(ids.tolist(), greedy)
        ended = model.generate(
            ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=completions[0].token_ids[4], pad_token_id=0,
        )  # fmt: skip
    for row, one in enumerate(completions):
        logits = torch.stack([step[row] for step in result.logits])
        assert result.sequences[row, 20:].tolist() == one.token_ids
        assert torch.equal(token_logprob(logits, torch.tensor(one.token_ids))[0], torch.tensor(one.logprobs))
    assert torch.equal(ended.logits[0][0], result.logits[0][0])


def test_after_an_error_in_a_step_the_next_call_gets_a_new_engine(pair, capsys):
    own, _ = pair
    model = copy.deepcopy(own)
    toolkit.patch(model)
    ids = torch.tensor([[5, 6, 7]])
    with route_generate(model, num_blocks=64) as route:
        broken = route.engine.engine
        broken.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
        with pytest.raises(ToolkitError, match="The engine has stopped: out of memory"):
            model.generate(ids, max_new_tokens=4, do_sample=False)
        expected = own.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert broken.is_closed
    assert "out of memory" in capsys.readouterr().err
