"""The engine on tiny random Hugging Face models: against ``generate``, and against the training forward."""

import copy
import gc
import random
import weakref
from functools import cache

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.patching import patch, report_of
from toolkit.patching.logprobs import token_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def plain_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=199,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def llama() -> LlamaForCausalLM:
    return copy.deepcopy(plain_llama())


@cache
def patched_llama() -> LlamaForCausalLM:
    """For tests that change nothing of it."""
    model = llama()
    patch(model)
    return model


def prompts_of(rng: random.Random, count: int, longest: int = 40) -> list[list[int]]:
    shared = [rng.randrange(3, 199) for _ in range(longest)]
    return [
        shared[: rng.randint(1, longest)]
        if rng.random() < 0.5
        else [rng.randrange(3, 199) for _ in range(rng.randint(1, longest))]
        for _ in range(count)
    ]


def check_parity(model, completions):
    """Returned log-probabilities are the training forward's, bit for bit; returns how many were compared."""
    sequences = [one.prompt_token_ids + one.token_ids for one in completions]
    for one, logprobs in zip(completions, token_logprobs(model, sequences)):
        expected = logprobs[len(one.prompt_token_ids) - 1 :].detach()
        assert torch.equal(torch.tensor(one.logprobs), expected)
    return sum(len(one.token_ids) for one in completions)


def test_greedy_is_what_generate_gives():
    plain, model = plain_llama(), patched_llama()
    prompts = prompts_of(random.Random(0), 8)
    with Engine(model, max_num_batched_tokens=32, block_size=4) as engine:
        got = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    for prompt, one in zip(prompts, got):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
        assert prompt + one.token_ids == expected.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_logprobs_have_the_bits_of_the_training_forward_under_any_schedule(seed):
    rng = random.Random(seed)
    model = patched_llama()
    block_size = rng.choice([1, 4, 16])
    limits = {
        "block_size": block_size,
        "num_blocks": -(-70 // block_size) + rng.choice([2, 40]),
        "max_num_seqs": rng.choice([2, 5, 16]),
        "max_num_batched_tokens": rng.choice([3, 17, 128]),
        "enable_prefix_caching": rng.random() < 0.7,
    }
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice([0, 0.8, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            n=rng.choice([1, 1, 3]),
            seed=rng.randrange(100),
            ignore_eos=True,
        )
        for _ in range(10)
    ]
    prompts = prompts_of(rng, 10)
    torch.set_num_threads(1 + seed % 2)
    with Engine(model, **limits) as engine:
        got = engine.generate(prompts, params)
        engine.check_integrity()
        torch.set_num_threads(2 - seed % 2)
        assert check_parity(model, got) > 50
    with Engine(model) as engine:  # everything at once, and the same tokens again
        again = engine.generate(prompts, params)
    assert [(one.token_ids, one.logprobs, one.sampling_logprobs) for one in again] == [
        (one.token_ids, one.logprobs, one.sampling_logprobs) for one in got
    ]


def test_a_training_step_moves_the_version_and_rollouts_follow():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prompt = list(range(3, 40))
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with Engine(model, block_size=4) as engine:
        before = engine.generate([prompt, prompt], params)
        assert check_parity(model, before)
        torch.cat(token_logprobs(model, [prompt])).sum().backward()
        optimizer.step()
        after = engine.generate([prompt, prompt], params)
        assert check_parity(model, after)
        assert after[0].weight_version != before[0].weight_version
        assert after[0].logprobs != before[0].logprobs
        hits = engine.stats()["prefix_cache_hits"]
        assert engine.generate(prompt, params)[0].logprobs == after[0].logprobs
        assert engine.stats()["prefix_cache_hits"] == hits + 36


def test_a_model_in_train_mode_is_sampled_without_dropout_and_stays_in_it():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=199,
        max_position_embeddings=128,
        hidden_dropout=0.5,
        attention_dropout=0.5,
        initializer_range=0.2,
        eos_token_id=2,
    )
    model = GPTNeoXForCausalLM(config).eval()
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with Engine(model) as engine:
        expected = engine.generate([3, 4, 5], params)[0]
        model.train()
        model.gpt_neox.layers[0].eval()
        modes = [module.training for module in model.modules()]
        got = engine.generate([3, 4, 5], params)[0]
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        assert [module.training for module in model.modules()] == modes


def test_the_engine_patches_once_and_keeps_the_numerics_mode():
    model = llama()
    assert report_of(model) is None
    Engine(model, num_blocks=4)
    report = report_of(model)
    assert report is not None
    forward = model.model.layers[0].mlp.forward
    Engine(model, num_blocks=4, numerics="bitwise")
    assert report_of(model) is report
    assert model.model.layers[0].mlp.forward == forward
    with pytest.raises(ToolkitError, match="numerics must be 'bitwise', as the model is patched, or None, got 'fast'"):
        Engine(model, num_blocks=4, numerics="fast")
    with pytest.raises(ToolkitError, match="numerics must be one of fast, bitwise, got 'exact'"):
        Engine(model, num_blocks=4, numerics="exact")


def test_ends_of_text_come_from_config_generation_config_and_tokenizer():
    model = llama()
    model.generation_config.eos_token_id = [5, 6]
    engine = Engine(model, type("Tokenizer", (), {"eos_token_id": 7})(), num_blocks=4)
    assert engine.eos == {2, 5, 6, 7}


def test_default_limits_follow_the_model():
    engine = Engine(patched_llama(), max_num_seqs=4)
    assert engine.max_model_len == 128
    assert engine.stats()["num_blocks"] == 4 * 8
    with pytest.raises(ToolkitError, match=r"max_model_len must be <= 128, .*, got 129"):
        Engine(patched_llama(), max_model_len=129)


def test_closing_frees_the_pool_with_everything_recorded_around_it():
    with Engine(patched_llama(), block_size=4) as engine:
        engine.generate([[3, 4, 5], [6]], SamplingParams(max_tokens=4, ignore_eos=True))
        pool = weakref.ref(engine.pool)
    gc.collect()
    assert pool() is None
