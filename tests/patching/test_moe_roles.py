"""Roles ``experts`` and ``router``: what is claimed in which architecture, and what is skipped."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import toolkit
from toolkit.errors import ToolkitError
from toolkit.modules.moe_experts import moe_experts_of
from toolkit.patching import find_claims
from toolkit.patching.roles.experts import find as find_experts
from toolkit.testing.models import random_model

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip

# Architecture, settings, and what its router and its experts become.
KNOWN = [
    ("qwen2_moe", {}, "softmax, top 3", "silu, halves"),
    ("deepseek_v2", GROUPED | LATENT | {"topk_method": "group_limited_greedy"},
     "softmax, top 3, in 2 of 4 groups, x 1.5", "silu, halves"),
    ("deepseek_v3", GROUPED | LATENT,
     "sigmoid, top 3, in 2 of 4 groups, expert bias, normalised, x 1.5", "silu, halves"),
    ("glm4_moe", GROUPED, "sigmoid, top 3, in 2 of 4 groups, expert bias, normalised, x 1.5", "silu, halves"),
    ("dots1", GROUPED | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
     "sigmoid, top 3, expert bias, x 1.5", "silu, halves"),
    ("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 3, "moe_layer_start_index": 0},
     "softmax, top 3, expert bias, normalised", "silu, halves"),
    ("granitemoe", {}, "softmax, top 3, normalised", "silu, halves"),
    ("hunyuan_v1_moe", {"moe_topk": 3}, "softmax, top 3, normalised", "silu, halves"),
    ("minimax_m2", {}, "sigmoid, top 3, expert bias, normalised", "silu, halves"),
    ("lfm2_moe", {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2, "routed_scaling_factor": 2.0},
     "sigmoid, top 3, expert bias, normalised, x 2", "silu, halves"),
    ("gpt_oss", {}, "softmax, top 3, normalised", "clamped_swiglu, interleaved, transposed, biases"),
    ("flex_olmo", {}, "softmax, top 3", "silu, halves"),
]  # fmt: skip


def small_model(architecture, settings):
    config = AutoConfig.for_model(architecture, **(SMALL | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def becomes(report, role):
    return {claim.op for claim in report.claims if claim.role == role and claim.path}


@pytest.mark.parametrize(("architecture", "settings", "router", "experts"), KNOWN, ids=[known[0] for known in KNOWN])
def test_routers_and_experts_are_recognised_by_what_they_compute(architecture, settings, router, experts):
    report = find_claims(small_model(architecture, settings), ["router", "experts"])
    assert becomes(report, "router") == {f"route ({router})"}
    assert becomes(report, "experts") == {f"experts ({experts})"}
    assert report.skipped == []


def test_experts_without_a_gate_are_proven():
    """Nemotron-H: relu squared of one product."""
    settings = {"hybrid_override_pattern": "E*", "layers_block_type": ["moe", "attention"], "n_routed_experts": 8,
                "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 24}  # fmt: skip
    report = find_claims(small_model("nemotron_h", settings), ["router", "experts"])
    assert becomes(report, "experts") == {"experts (relu2, no gate)"}


def test_a_router_that_samples_random_numbers_in_training_is_skipped():
    report = find_claims(small_model("phimoe", {"router_jitter_noise": 0.1}), ["experts", "norm"])
    assert becomes(report, "experts") == {"experts (silu, halves)"}
    with pytest.raises(ToolkitError, match="differs in training mode"):
        find_claims(small_model("phimoe", {"router_jitter_noise": 0.1}), ["router"])


def test_the_index_of_experts_counts_moe_layers_alone():
    model = random_model("deepseek_v3_moe", layers=3)
    toolkit.patch(model)
    layers = [moe_experts_of(layer.mlp.experts).layer for layer in model.model.layers[1:]]
    assert layers == [0, 1]
    toolkit.unpatch(model)
    assert all(moe_experts_of(layer.mlp.experts) is None for layer in model.model.layers[1:])


def test_experts_with_other_limits_are_skipped_and_the_others_are_not():
    model = random_model("gpt_oss")
    model.model.layers[0].mlp.experts.limit = 5.0
    before = model(torch.arange(3, 16)[None]).logits
    report = toolkit.patch(model)
    assert [claim.path for claim in report.claims if claim.role == "experts"] == ["", "model.layers.1.mlp.experts"]
    skipped = next(skipped for skipped in report.skipped if skipped.role == "experts")
    assert skipped.path == "model.layers.0.mlp.experts"
    assert "probe error" in skipped.reason
    torch.testing.assert_close(model(torch.arange(3, 16)[None]).logits, before, rtol=1e-4, atol=1e-4)


def test_experts_of_a_class_that_does_not_dispatch_are_given_another_forward():
    model = random_model("qwen3_moe")
    own = type(model.model.layers[0].mlp.experts)
    plain = type("Plain", (nn.Module,), {"forward": own.forward.__wrapped__})
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = plain
    ids = torch.arange(3, 16)[None]
    before = model(ids).logits
    report = toolkit.patch(model)
    assert [claim.path for claim in report.claims if claim.role == "experts"] == [
        "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    ]  # fmt: skip
    assert model.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    toolkit.unpatch(model)
    assert torch.equal(model(ids).logits, before)


def test_a_probe_of_many_experts_takes_a_few_and_leaves_the_weights():
    model = random_model("qwen3_moe", num_experts=64)
    before = copy.deepcopy(model.state_dict())
    taken = []
    original = nn.Parameter.normal_

    def watched(self, *args, **kwargs):
        taken.append(tuple(self.shape))
        return original(self, *args, **kwargs)

    nn.Parameter.normal_ = watched
    try:
        find_experts(model, toolkit.numerics.Numerics.BITWISE)
    finally:
        del nn.Parameter.normal_
    assert {shape[0] for shape in taken} == {5}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_generation_does_not_switch_the_experts_of_a_patched_model(monkeypatch):
    """transformers changes grouped_mm into batched_mm while it generates on a GPU; ours stays."""
    model = random_model("qwen3_moe")
    ids = torch.arange(3, 12)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    seen = []

    def inside():
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
            with model._optimize_model_for_decode():
                seen.append(model.config._experts_implementation)

    inside()
    toolkit.patch(model)
    inside()
    assert seen == ["batched_mm", "toolkit"]
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)


def test_a_patched_copy_computes_the_same():
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    ids = torch.arange(3, 16)[None]
    assert torch.equal(copy.deepcopy(model)(ids).logits + 0, model(ids).logits + 0)
