"""Structured output through the engine on tiny random models, against stock transformers and ``jsonschema``."""

import copy
import dataclasses
import json
import random
import re
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toolkit
from tests.helpers.json_schemas import ENFORCED, violation
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine import AsyncEngine, Engine, SamplingParams, StructuredOutputsParams
from toolkit.errors import ToolkitError
from toolkit.patching import patch

EOS, VOCAB = 2, 352  # the tokenizer has 340
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def plain_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.2, eos_token_id=EOS, bos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@cache
def exact_llama() -> LlamaForCausalLM:
    return copy.deepcopy(plain_llama()).double()


@cache
def patched_llama() -> LlamaForCausalLM:
    model = copy.deepcopy(plain_llama())
    patch(model)
    return model


@cache
def tokenizer() -> Any:
    return make_tokenizer("byte_level")


def engine(**given: Any) -> Engine:
    return Engine(patched_llama(), tokenizer(), **{"block_size": 4, **given})


def prompts_of(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 340) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def result_of(one: toolkit.engine.Completion) -> tuple[Any, ...]:
    return one.token_ids, one.logprobs, one.sampling_logprobs, one.finish_reason, one.stop_reason, one.text


@pytest.mark.parametrize("n", [2, pytest.param(10, marks=pytest.mark.sweep)])
def test_finished_outputs_of_200_schemas_are_valid_and_others_say_length(n: int) -> None:
    params = [
        SamplingParams(
            n=n, max_tokens=64, seed=at, structured_outputs={"json": schema, "disable_any_whitespace": at % 3 > 0}
        )
        for at, schema in enumerate(ENFORCED)
    ]
    with engine(max_num_seqs=64) as made:
        found = made.generate([[7, 8, 9]] * len(params), params)
        made.check_integrity()
    assert len(found) == n * len(ENFORCED)
    stopped = 0
    for one in found:
        assert one.error is None
        assert one.finish_reason in ("stop", "length")
        if one.finish_reason == "stop":
            stopped += 1
            assert one.token_ids[-1] == EOS
            assert violation(ENFORCED[one.prompt_index], one.text) is None, (ENFORCED[one.prompt_index], one.text)
        else:
            assert len(one.token_ids) == 64
    assert stopped > 0.4 * len(found)


WORDS = ["the dog", "the", "a fox", "over", "quick brown"]


@torch.no_grad()
def masked_greedy(prompt: list[int]) -> tuple[list[int], list[float], list[float]]:
    """(tokens, log-probabilities by the model, by the allowed tokens alone) of one of ``WORDS``, by stock transformers.

    A token is allowed where its text continues one of them, found by trying every token.
    """
    text_of = {token: tokenizer().decode([token]) for token in range(5, 340)}
    tokens, so_far, raw, masked = list(prompt), "", [], []
    while tokens[-1] != EOS or tokens == prompt:
        logits = exact_llama()(torch.tensor([tokens])).logits[0, -1]
        allowed = [one for one, text in text_of.items() if text and any(w.startswith(so_far + text) for w in WORDS)]
        allowed += [EOS] * (so_far in WORDS)
        scores = torch.full_like(logits, -torch.inf)
        scores[allowed] = logits[allowed]
        token = int(scores.argmax())
        raw.append(logits.log_softmax(-1)[token].item())
        masked.append(scores.log_softmax(-1)[token].item())
        tokens.append(token)
        so_far += text_of.get(token, "")
    return tokens[len(prompt) :], raw, masked


def test_a_greedy_row_takes_the_best_allowed_token_of_stock_transformers() -> None:
    prompts = prompts_of(12)
    structured = {"choice": WORDS}
    with engine() as made:
        greedy = made.generate(prompts, SamplingParams(temperature=0, max_tokens=20, structured_outputs=structured))
        # Through the filters of a sample, of which one token is left.
        sampled = made.generate(prompts, SamplingParams(top_k=1, max_tokens=20, structured_outputs=structured))
    for prompt, one, other in zip(prompts, greedy, sampled):
        tokens, raw, _ = masked_greedy(prompt)
        assert one.token_ids == tokens == other.token_ids
        assert one.text in WORDS
        assert one.logprobs == pytest.approx(raw, abs=1e-4)
        assert one.sampling_logprobs == [0.0] * len(tokens)


def test_both_log_probabilities_are_returned() -> None:
    """By the model of what was sampled, and by the allowed tokens alone."""
    prompt = prompts_of(1)[0]
    params = SamplingParams(seed=3, max_tokens=20, logprobs=2, structured_outputs={"choice": WORDS})
    with engine() as made:
        (one,) = made.generate([prompt], params)
    text_of = {token: tokenizer().decode([token]) for token in range(5, 340)}
    so_far = ""
    for at, token in enumerate(one.token_ids):
        with torch.no_grad():
            logits = exact_llama()(torch.tensor([prompt + one.token_ids[:at]])).logits[0, -1]
        allowed = [t for t, text in text_of.items() if text and any(w.startswith(so_far + text) for w in WORDS)]
        allowed += [EOS] * (so_far in WORDS)
        assert token in allowed
        assert one.logprobs[at] == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
        among = logits[allowed].log_softmax(-1)[allowed.index(token)].item()
        assert one.sampling_logprobs[at] == pytest.approx(among, abs=1e-4)
        assert one.top_logprobs is not None
        assert list(one.top_logprobs[at]) == logits.topk(2).indices.tolist()  # the model's, of all tokens
        so_far += text_of.get(token, "")


FORMS: list[dict[str, Any] | None] = [
    {"json": PERSON}, {"regex": "[a-z]{2,8}( [a-z]+)?"}, {"choice": WORDS}, {"json_object": True}, None,
    {"grammar": 'start: "x" item+ \nitem: /[0-9]/ | "(" item ")"'},
]  # fmt: skip


def mixed(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(seed)
    params = [
        SamplingParams(
            seed=rng.randrange(1000), max_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.7, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.3]), top_p=rng.choice([1.0, 0.8]), min_tokens=rng.choice([0, 1]),
            structured_outputs=rng.choice(FORMS),
        )
        for _ in range(count)
    ]  # fmt: skip
    return prompts_of(count, seed), params


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.sweep), pytest.param(2, marks=pytest.mark.sweep)]
)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_preemption(seed: int) -> None:
    prompts, params = mixed(seed, 24)
    with engine() as made:
        alone = [made.generate([prompt], one)[0] for prompt, one in zip(prompts, params)]
    with engine() as made:
        beside = made.generate(prompts, params)
    with engine(num_blocks=20, max_model_len=64, max_num_batched_tokens=16) as made:
        preempted = made.generate(prompts, params)
        assert made.stats()["num_preemptions"] > 0
        made.check_integrity()
    for one, two, three in zip(alone, beside, preempted):
        assert one.error is None
        assert result_of(one) == result_of(two) == result_of(three)


def test_completions_of_one_prompt_are_those_of_single_runs() -> None:
    prompts = prompts_of(3)
    params = SamplingParams(n=5, seed=11, max_tokens=40, structured_outputs={"json": PERSON})
    with engine() as made:
        together = made.generate(prompts, params)
    with engine(max_num_seqs=2) as made:
        few = made.generate(prompts, params)
    assert [result_of(one) for one in together] == [result_of(one) for one in few]
    assert len({tuple(one.token_ids) for one in together}) > 10
    for one in together:
        assert one.finish_reason == "length" or violation(PERSON, one.text) is None


def test_what_is_cancelled_leaves_the_others_as_they_are() -> None:
    prompts = prompts_of(6)
    params = SamplingParams(seed=5, max_tokens=40, structured_outputs={"json": PERSON})
    with engine() as made:
        expected = made.generate(prompts, params)
        ids = made.submit_batch(prompts, params)
        found: dict[int, Any] = {}
        for step in range(100):
            if step in (1, 4):
                made.cancel(ids[step])
            for delta in made.step():
                if delta.finished is not None:
                    found[delta.request_id] = delta.finished
            if not made.has_work:
                break
        made.check_integrity()
    for at, request in enumerate(ids):
        one = found[request]
        if at in (1, 4):
            assert one.finish_reason == "cancelled"
            assert one.token_ids == expected[at].token_ids[: len(one.token_ids)]
        else:
            assert result_of(one) == result_of(expected[at])


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    params = SamplingParams(max_tokens=8, structured_outputs={"regex": "[ab]+"})
    with engine() as made:
        forward = made.backend.forward

        def failing(*args: Any) -> torch.Tensor:
            raise RuntimeError("out of order")

        made.backend.forward = failing  # type: ignore[method-assign]
        (one,) = made.generate([[7]], params)
        assert one.finish_reason == "error"
        made.backend.forward = forward  # type: ignore[method-assign]
        (one,) = made.generate([[7]], params)
        assert re.fullmatch("[ab]+", one.text)


def test_ends() -> None:
    def run(**given: Any) -> Any:
        given = {"max_tokens": 8, "seed": 0, **given}
        return made.generate([[7, 8]], SamplingParams(**given))[0]

    letter = tokenizer().convert_tokens_to_ids("c")
    with engine() as made:
        # A complete output ends before min_tokens too.
        one = run(structured_outputs={"regex": "ab"}, min_tokens=5)
        assert (one.text, one.finish_reason, one.stop_reason) == ("ab", "stop", None)
        # min_tokens holds while anything else may follow.
        one = run(structured_outputs={"regex": "a*"}, min_tokens=6, temperature=0)
        assert len(one.token_ids) >= 6
        # Stop tokens end an output where it is complete, and are no text of it.
        one = run(structured_outputs={"regex": "abc?"}, stop_token_ids=[letter], ignore_eos=True)
        assert one.text[:2] == "ab"
        assert one.finish_reason in ("stop", "length")
        # With ignore_eos ends follow a complete output until max_tokens.
        one = run(structured_outputs={"regex": "ab"}, ignore_eos=True)
        assert (one.text, one.finish_reason, len(one.token_ids)) == ("ab", "length", 8)
        assert set(one.token_ids[2:]) == {EOS}
        # A stop string ends a text where it is, complete or not, and says so.
        one = run(structured_outputs={"regex": "abcdef"}, stop="d")
        assert (one.text, one.finish_reason, one.stop_reason) == ("abc", "stop", "d")
        assert run(structured_outputs={"regex": "[ab]{20}"}).finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_parameters_that_exclude_tokens_act_too(temperature: float) -> None:
    a, b = (tokenizer().convert_tokens_to_ids(letter) for letter in "ab")

    def run(**given: Any) -> Any:
        params = SamplingParams(
            max_tokens=8, seed=0, temperature=temperature, structured_outputs={"regex": "[ab]{2}"}, **given
        )
        return made.generate([[7]], params)[0]

    with engine() as made:
        assert run(allowed_token_ids=[b, EOS]).text == "bb"
        assert run(logit_bias={a: 100}).text == "aa"
        assert run(allowed_token_ids=[b, EOS], min_tokens=5).text == "bb"
        for nothing in ({"allowed_token_ids": [EOS]}, {"bad_words": ["a", "b"]}):
            one = run(**nothing)
            assert one.finish_reason == "error"
            assert "leave no token to sample" in str(one.error)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafts_change_no_bit(method: str, temperature: float) -> None:
    """What a prompt repeats is drafted, some of which a grammar forbids; or what the model itself samples in it."""
    text = tokenizer()('{"name": "abc", "age": 12} ' * 3)["input_ids"]
    prompts = [text, [*text[3:], 7], *prompts_of(4)]
    forms: list[dict[str, Any] | None] = [
        {"json": PERSON}, {"regex": '[{}"a-z: 0-9,]{30,60}'}, {"json_object": True}, {"choice": WORDS}, None,
        {"json": PERSON},
    ]  # fmt: skip
    params = [
        SamplingParams(
            n=2, seed=at, max_tokens=60, temperature=temperature, repetition_penalty=1.1 if at == 1 else 1.0,
            structured_outputs=form,
        )
        for at, form in enumerate(forms)
    ]  # fmt: skip
    with engine() as made:
        plain = made.generate(prompts, params)
    config = {"method": method, "num_speculative_tokens": 4, "adaptive": False, "prompt_lookup_min": 1}
    with engine(speculative_config=config | ({"model": patched_llama()} if method == "draft_model" else {})) as made:
        drafted = made.generate(prompts, params)
        stats = made.stats()
        made.check_integrity()
        assert made.speculation is not None
        assert not made.speculation.failed
    if method == "draft_model":  # but for what stands behind an end
        assert stats["spec_decode_num_accepted_tokens"] > 0.9 * stats["spec_decode_num_draft_tokens"]
    assert stats["spec_decode_num_draft_tokens"] > 100
    assert stats["spec_decode_num_accepted_tokens"] > 10
    assert [result_of(one) for one in plain] == [result_of(one) for one in drafted]
    for one in drafted:
        if forms[one.prompt_index] == {"json": PERSON} and one.finish_reason == "stop":
            assert violation(PERSON, one.text) is None


def test_what_cannot_be_enforced_starts_nothing() -> None:
    params = [SamplingParams(), SamplingParams(structured_outputs={"json": {"not": {}}})]
    with engine() as made:
        with pytest.raises(ToolkitError, match="structured_outputs must not have 'not' in a JSON schema"):
            made.generate([[7], [8]], params)
        assert not made.has_work
    with (
        Engine(patched_llama()) as made,
        pytest.raises(ToolkitError, match="needs a tokenizer, and the engine has none"),
    ):
        made.submit([7], SamplingParams(structured_outputs={"json_object": True}))


def test_a_thread_that_submits_compiles_the_grammar() -> None:
    with AsyncEngine(engine()) as running:
        with pytest.raises(ToolkitError, match="'uniqueItems'"):
            running.submit([[7]], SamplingParams(structured_outputs={"json": {"uniqueItems": True}}))
        assert not running.is_running
        params = SamplingParams(max_tokens=40, structured_outputs=StructuredOutputsParams(json=PERSON))
        found = running.generate([[7], [8, 9]], params)
        assert [one.finish_reason == "length" or violation(PERSON, one.text) is None for one in found] == [True, True]


def test_the_offline_class_and_other_grammars() -> None:
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}]}
    with toolkit.LLM(patched_llama(), tokenizer()) as llm:
        (one,) = llm.generate(["a"], SamplingParams(max_tokens=40, seed=1, structured_outputs={"structural_tag": tag}))
        assert "<f" not in one.outputs[0].text or "<f>{" in one.outputs[0].text
        gbnf = 'root ::= "a" [0-9]{2} | "b"\n'
        (one,) = llm.generate(
            ["a"], toolkit.SamplingParams(structured_outputs=toolkit.StructuredOutputsParams(grammar=gbnf))
        )
        assert re.fullmatch(r"a\d\d|b", one.outputs[0].text)


def test_a_deep_copy_and_json_of_parameters_are_equal() -> None:
    params = SamplingParams(structured_outputs={"json": PERSON})
    assert copy.deepcopy(params) == params
    assert isinstance(params.structured_outputs, StructuredOutputsParams)
    assert json.loads(str(params.structured_outputs.json)) == PERSON


def test_a_draft_ends_before_the_end_of_its_grammar_where_the_output_goes_on() -> None:
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True, structured_outputs={"choice": WORDS})
    with engine() as made:
        (plain,) = made.generate(prompts_of(1), params)
    assert plain.token_ids[-9:] == [EOS] * 9
    with engine(speculative_config={"method": "prediction", "num_speculative_tokens": 9, "adaptive": False}) as made:
        foretold = dataclasses.replace(params, predicted_token_ids=plain.token_ids)
        (drafted,) = made.generate(prompts_of(1), foretold)
    assert result_of(drafted) == result_of(plain)
