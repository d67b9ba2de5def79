"""Training of patched MoE models against transformers' own: auxiliary loss, checkpointing, autocast, compilers."""

import copy

import pytest
import torch

import toolkit
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double

AUXILIARY = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_next_moe")  # models whose own loss has the term


def batch(vocabulary):
    source = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocabulary, (2, 11), generator=source)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def outputs_and_gradients(model, **settings):
    model.zero_grad(set_to_none=True)
    output = model(**batch(model.config.vocab_size), use_cache=False, **settings)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.mark.parametrize("family", AUXILIARY)
def test_auxiliary_loss_and_its_gradients_are_transformers_own(family):
    model = random_model(family, router_aux_loss_coef=0.7).double()
    oracle = eager(copy.deepcopy(model))
    assert {"router", "experts"} <= set(toolkit.patch(model).roles())
    with lifted_to_double():
        expected, exact = outputs_and_gradients(oracle, output_router_logits=True)
        got, gradients = outputs_and_gradients(model, output_router_logits=True)
    assert relative(got.aux_loss, expected.aux_loss) < 1e-12
    assert relative(got.loss, expected.loss) < 1e-12
    assert len(got.router_logits) == len(expected.router_logits) == 2
    real = batch(model.config.vocab_size)["attention_mask"].flatten().bool()  # padding rows are nobody's business
    for one, other in zip(got.router_logits, expected.router_logits):
        assert relative(one[real], other[real]) < 1e-12
    for name, gradient in gradients.items():
        assert relative(gradient, exact[name]) < 1e-10, name


def test_router_outputs_are_recorded_before_and_after_a_patch():
    """transformers' hooks stay on the modules; the forwards under them come and go."""
    model = random_model("mixtral")
    ids = batch(model.config.vocab_size)["input_ids"]
    before = model(ids, output_router_logits=True).router_logits
    toolkit.patch(model)
    patched = model(ids, output_router_logits=True).router_logits
    toolkit.unpatch(model)
    after = model(ids, output_router_logits=True).router_logits
    assert all(relative(one, other) < 1e-5 for one, other in zip(patched, before))
    assert all(torch.equal(one, other) for one, other in zip(after, before))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3_moe"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = random_model(family).train()
    toolkit.patch(model)
    texts = [[3, 4, 5, 6, 7, 8], [3, 4, 9, 10], [11, 12, 13]]

    def gradients():
        model.zero_grad(set_to_none=True)
        torch.cat(toolkit.token_logprobs(model, texts)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(one, other) for one, other in zip(gradients(), plain))


def test_autocast_is_honoured_by_experts():
    model = random_model("qwen3_moe")
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = outputs_and_gradients(eager(copy.deepcopy(model)))
        toolkit.patch(model)
        got, gradients = outputs_and_gradients(model)
    # By token: rounding sends one of them to other experts, in either model, and those behind it attend to it.
    errors = (got.logits - expected.logits).float().norm(dim=-1) / expected.logits.float().norm(dim=-1)
    assert float(errors.detach().median()) < 0.05
    experts = model.model.layers[0].mlp.experts
    hidden, ids, scores = torch.randn(5, 64), torch.arange(10).view(5, 2), torch.rand(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        half = experts(hidden, ids, scores)
    assert half.dtype == torch.float32
    assert 1e-4 < relative(half, experts(hidden, ids, scores)) < 0.03
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3_moe"])
def test_bfloat16_models_keep_the_dtypes_of_their_routers(family):
    """DeepSeek's weights stay float32, Qwen's do not; either way the experts take them."""
    model = random_model(family, seed=1).to(torch.bfloat16)  # in which rounding moves no token to another expert
    router = model.model.layers[1].mlp.gate
    hidden = torch.randn(7, 64, dtype=torch.bfloat16)
    expected = [value.dtype for value in router(hidden)]
    logits = model(torch.arange(3, 14)[None]).logits
    toolkit.patch(model)
    assert [value.dtype for value in router(hidden)] == expected
    assert relative(model(torch.arange(3, 14)[None]).logits, logits) < 0.05


def test_compiled_training_step_has_no_graph_break():
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    inputs = batch(model.config.vocab_size)
    expected, exact = outputs_and_gradients(model)
    model.zero_grad(set_to_none=True)
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).loss
    loss.backward()
    assert relative(loss, expected.loss) < 1e-5
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, exact[name]) < 1e-4, name
