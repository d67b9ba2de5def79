"""The engine's log-probabilities are bitwise identical to training's, for every family."""

import pytest
import torch

import toolkit
from toolkit.engine.step.decode_graphs import CAPTURE_SIZES, DecodeGraphs, padded_size
from toolkit.testing.architectures import small_model
from toolkit.testing.models import FAMILIES, MOE_FAMILIES, random_model
from toolkit.testing.parity import check_parity
from toolkit.testing.weight_writes import weight_writes, with_embedding_adapters


def prompts_for(vocabulary, seed=7):
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 90, (32,), generator=source).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=source).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_differs_under_random_schedules(family):
    model = random_model(family)
    parity = check_parity(model, prompts_for(model.config.vocab_size), min_tokens=2000, seed=1)
    assert parity.tokens >= 2000
    assert parity.differing == 0
    assert parity.replayed_differing == 0
    assert parity.replayed == (parity.tokens if family in MOE_FAMILIES else 0)
    assert parity.largest == 0.0
    # The schedules did what they are there for.
    assert parity.chunked_prompts > 0
    assert parity.prefix_cache_hits > 0
    assert parity.num_preemptions >= parity.num_swaps > 0
    assert parity.forked > 0


@pytest.mark.parametrize("case", ["deepseek_v3_moe", "llama with adapters on its embedding"])
def test_no_token_differs_when_weights_are_written_meanwhile(case):
    model = random_model(case.split()[0], hidden=32)
    if "adapters" in case:
        model = with_embedding_adapters(model).get_base_model()
    parity = check_parity(model, prompts_for(331), min_tokens=200, max_new_tokens=12, seed=1, writes=True)
    assert parity.tokens >= 200
    assert parity.differing == parity.replayed_differing == 0
    assert set(parity.writes) == set(weight_writes(model))
    assert parity.prefix_cache_hits > 0


def test_adapters_of_a_model_whose_kernels_read_a_projection_themselves():
    adapted = with_embedding_adapters(random_model("mamba2"))
    layers = {name.rpartition(".")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert any(name.endswith("in_proj") for name in layers)
    assert not any(name.endswith("out_proj") for name in layers)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.sweep) for f in FAMILIES if f != "llama")]
)
def test_float64_models_keep_the_promise_in_float64(family):
    """MoE models too, whose stock experts (torch's grouped GEMM) have no float64."""
    model = random_model(family).double()
    parity = check_parity(model, prompts_for(model.config.vocab_size), min_tokens=200, seed=1)
    assert parity.differing == parity.replayed_differing == 0
    assert parity.num_preemptions >= parity.num_swaps > 0
    with toolkit.Engine(model, num_blocks=32) as engine:
        (found,) = engine.generate([[5, 6, 7]], toolkit.SamplingParams(max_tokens=9, seed=1))
    sequence = [*found.prompt_token_ids, *found.token_ids]
    (trained,) = toolkit.token_logprobs(model, [sequence], rotary_lengths=[found.rotary_length])
    own = torch.tensor(found.logprobs, dtype=torch.float64)
    assert torch.equal(own, trained[2:].detach().double())
    if trained.dtype == torch.float64:  # Mamba's logits are float32 in every model
        assert not torch.equal(own, own.float().double())
    else:
        assert family == "mamba2"


@pytest.mark.sweep
@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_sparse_attention_replays_the_keys_that_the_engine_recorded(model_type):
    pytest.importorskip(f"transformers.models.{model_type}")
    parity = check_parity(small_model(model_type), prompts_for(331), min_tokens=1200, seed=1)
    assert parity.replayed == parity.tokens >= 1200
    assert parity.differing == parity.replayed_differing == 0
    assert parity.prefix_cache_hits > 0
    assert parity.num_preemptions >= parity.num_swaps > 0
    written = check_parity(small_model(model_type), prompts_for(331), min_tokens=400, seed=1, writes=True)
    assert written.replayed == written.tokens >= 400
    assert written.differing == written.replayed_differing == 0


def test_the_check_sees_a_model_whose_bits_depend_on_the_batch():
    """With MKL GEMMs the same check finds differing tokens, so it can fail."""
    model = random_model("llama", hidden=72)
    parity = check_parity(model, prompts_for(model.config.vocab_size), min_tokens=100, numerics="fast")
    assert parity.differing > 0
    assert parity.largest < 1e-4


def test_parity_holds_after_training_steps_between_rollouts():
    """Captured decode graphs outlive optimizer steps; returned tokens carry the version they were sampled under."""
    model = random_model("qwen3")
    toolkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prompts = prompts_for(model.config.vocab_size)[:5]
    versions = []
    with toolkit.Engine(model) as engine:
        for _ in range(3):
            outputs = engine.generate(prompts, toolkit.SamplingParams(max_tokens=9, seed=3, ignore_eos=True))
            texts = [[*o.prompt_token_ids, *o.token_ids] for o in outputs]
            trained = toolkit.token_logprobs(model, texts)
            for output, logprobs in zip(outputs, trained):
                expected = logprobs.detach()[len(output.prompt_token_ids) - 1 :]
                assert torch.equal(torch.tensor(output.logprobs), expected)
            versions.append(outputs[0].weight_version)
            (-torch.cat(trained).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(set(versions)) == 3


def test_replaced_parameters_and_hooks_are_noticed_by_captured_graphs():
    model = random_model("llama")
    params = toolkit.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with toolkit.Engine(model) as engine:
        engine.generate([[3, 4, 5]], params)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        output = engine.generate([[3, 4, 5]], params)[0]
        expected = toolkit.token_logprobs(model, [[3, 4, 5, *output.token_ids]])[0][2:]
        assert torch.equal(torch.tensor(output.logprobs), expected.detach())
        calls = []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        engine.generate([[3, 4, 5]], params)
        assert len(calls) == 6


def test_batches_are_padded_to_a_few_sizes():
    assert [padded_size(n) for n in (1, 5, 16, 17, 256, 300)] == [1, 6, 16, 20, 256, 300]
    assert sorted(set(CAPTURE_SIZES)) == list(CAPTURE_SIZES)
    model = random_model("llama")
    toolkit.patch(model)
    assert DecodeGraphs(model).model is model
