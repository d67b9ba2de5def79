"""Derivatives and outputs that users of a model ask for beside a loss: those of the stock model, or a sentence."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap

import toolkit
from toolkit.errors import ToolkitError
from toolkit.state import RaggedBatch
from toolkit.state.active import set_forward_context
from toolkit.state.dense import DenseContext
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
MODELS = [("llama", "bitwise"), ("llama", "fast"), ("gpt_oss", "bitwise"), ("qwen3_next", "bitwise")]
Model = Any


def pair(family: str, numerics: str) -> tuple[Model, Model]:
    """A stock model and a patched copy."""
    stock = eager(random_model(family, hidden=32, vocabulary=97)).train()
    model = copy.deepcopy(stock)
    toolkit.patch(model, numerics=numerics)
    return stock, model


def same(name: str, stock: Any, ours: Any) -> None:
    """Equal tensors to rounding, in any nesting."""
    wanted, got = (torch.utils._pytree.tree_leaves(one) for one in (stock, ours))
    assert len(wanted) == len(got) > 0, name
    for exact, value in zip(wanted, got):
        assert value.shape == exact.shape, name
        assert (value - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-7, name


def parameters(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_at(model: Model, values: dict[str, Tensor]) -> Tensor:
    return functional_call(model, values, (), {"input_ids": IDS, "labels": IDS}).loss


def loss_of_logits(model: Model, values: dict[str, Tensor]) -> Tensor:
    logits = functional_call(model, values, (), {"input_ids": IDS}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def tangents(model: Model) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 0.1) for name, value in parameters(model).items()}


def forward_mode(model: Model) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        hidden = model.get_input_embeddings()(IDS).detach()
        dual = forward_ad.make_dual(hidden, torch.full_like(hidden, 0.1))
        output = model(inputs_embeds=dual, labels=IDS)
        loss, logits = forward_ad.unpack_dual(output.loss), forward_ad.unpack_dual(output.logits)
        return loss.primal, loss.tangent, logits.tangent


def gradient_of_gradient(model: Model) -> dict[str, Tensor]:
    def norm(values: dict[str, Tensor]) -> Tensor:
        gradients = grad(lambda inner: loss_at(model, inner))(values)
        return sum(value.square().sum() for value in gradients.values())

    return grad(norm)(parameters(model))


def at_other_values(model: Model) -> tuple[Tensor, ...]:
    values = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
    return torch.autograd.grad(loss_at(model, values), list(values.values()))


REVERSE = {
    "torch.func.grad": lambda m: grad(lambda p: loss_at(m, p))(parameters(m)),
    "torch.func.grad through logits": lambda m: grad(lambda p: loss_of_logits(m, p))(parameters(m)),
    "torch.func.vjp": lambda m: vjp(lambda p: loss_at(m, p), parameters(m))[1](torch.ones(())),
    "functional_call": at_other_values,
}
FORWARD = {
    "torch.func.jvp": lambda m: jvp(lambda p: loss_at(m, p), (parameters(m),), (tangents(m),)),
    "forward mode": forward_mode,
    "grad of grad": gradient_of_gradient,
    "jvp of grad": lambda m: jvp(grad(lambda p: loss_at(m, p)), (parameters(m),), (tangents(m),)),
}


@pytest.mark.parametrize(("family", "numerics"), MODELS)
def test_function_transforms(family: str, numerics: str) -> None:
    stock, model = pair(family, numerics)
    for name, derivative in REVERSE.items():
        same(name, derivative(stock), derivative(model))


@pytest.mark.sweep  # torch compiles its table of forward derivatives first
@pytest.mark.parametrize(("family", "numerics"), MODELS)
def test_forward_mode_and_second_derivatives(family: str, numerics: str) -> None:
    stock, model = pair(family, numerics)
    for name, derivative in FORWARD.items():
        if family == "llama" or "grad" not in name:
            same(name, derivative(stock), derivative(model))


def retained(model: Model) -> Tensor:
    logits = model(input_ids=IDS).logits
    logits.retain_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return logits.grad


def of_logits(model: Model) -> tuple[Tensor, ...]:
    logits = model(input_ids=IDS).logits
    return torch.autograd.grad(logits.square().mean(), logits)


def hooked(model: Model) -> list[Tensor]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.register_hook(lambda gradient: 2.0 * gradient)
    logits.logsumexp(-1).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


UNKNOWN = {
    "autograd.grad": lambda o: torch.autograd.grad(o.loss, o.logits),
    "autograd.grad of several": lambda o: torch.autograd.grad(o.loss, [o.logits], allow_unused=True),
    "retain_grad": lambda o: o.logits.retain_grad(),
    "hook": lambda o: o.logits.register_hook(print),
    "backward to logits": lambda o: (o.loss.backward(inputs=[o.logits]), o.logits.grad),
    "of a part": lambda o: torch.autograd.grad(F.cross_entropy(o.logits[:, 0] + 0, IDS[:, 1]), o.logits),
}


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
def test_gradients_of_logits(numerics: str) -> None:
    stock, model = pair("llama", numerics)
    for name, derivative in (("retain_grad", retained), ("autograd.grad", of_logits), ("hook", hooked)):
        same(name, derivative(stock), derivative(model))
    for ask in UNKNOWN.values():
        output = model(input_ids=IDS, labels=IDS)
        with pytest.raises(ToolkitError, match=r"the gradient of logits is not known.*logits\.retain_grad\(\)"):
            ask(output)


@pytest.mark.parametrize(("family", "numerics"), [*MODELS, ("deepseek_v3_moe", "bitwise")])
def test_second_derivatives_by_autograd_are_refused(family: str, numerics: str) -> None:
    _, model = pair(family, numerics)
    leaves = [one for one in model.parameters() if one.requires_grad]
    with pytest.raises(ToolkitError, match=r"create_graph=True is not supported|has no second derivative"):
        torch.autograd.grad(
            sum(
                one.square().sum()
                for one in torch.autograd.grad(
                    model(input_ids=IDS, labels=IDS).loss, leaves, create_graph=True, allow_unused=True
                )
                if one is not None
            ),
            leaves,
            allow_unused=True,
        )
    # A graph that is kept and not used again is no second derivative.
    loss = model(input_ids=IDS).logits.logsumexp(-1).mean()
    kept = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    again = torch.autograd.grad(model(input_ids=IDS).logits.logsumexp(-1).mean(), leaves, allow_unused=True)
    same("create_graph", [one for one in again if one is not None], [one for one in kept if one is not None])


def test_vmap_is_refused() -> None:
    _, model = pair("llama", "bitwise")
    values = parameters(model)
    with pytest.raises(ToolkitError, match=r"torch\.vmap must be outside of a patched model's calls"):
        vmap(lambda row: functional_call(model, values, (), {"input_ids": row[None]}).logits)(IDS)


@pytest.mark.parametrize(("family", "numerics"), [*MODELS, ("granite_swa", "bitwise"), ("deepseek_v3_moe", "bitwise")])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_outputs_of_layers(family: str, numerics: str, side: str) -> None:
    """Attention weights, hidden states and router logits; rows of padding are nobody's business."""
    stock, model = pair(family, numerics)
    mask = torch.ones_like(IDS)
    if side != "none":
        mask[0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    wanted: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    if family in ("gpt_oss", "deepseek_v3_moe"):
        wanted["output_router_logits"] = True
    exact, ours = (one(input_ids=IDS, attention_mask=mask, labels=IDS * mask, **wanted) for one in (stock, model))
    real = mask.bool()
    assert len(ours.attentions) == len(exact.attentions) > 0
    for got, weights in zip(ours.attentions, exact.attentions):
        same("attentions", weights.transpose(1, 2)[real], got.transpose(1, 2)[real])
    for got, states in zip(ours.hidden_states, exact.hidden_states, strict=True):
        same("hidden states", states[real], got[real])
    if "output_router_logits" in wanted:
        for got, logits in zip(ours.router_logits, exact.router_logits, strict=True):
            same("router logits", logits[real.flatten()], got[real.flatten()])
    if side == "none":
        same("loss", exact.loss, ours.loss)
        found = [torch.autograd.grad(one.attentions[0].square().sum(), one_leaf) for one, one_leaf in
                 ((exact, next(stock.parameters())), (ours, next(model.parameters())))]  # fmt: skip
        same("gradient through weights", *found)


def test_attention_weights_of_generate_and_of_ragged_batches() -> None:
    stock, model = (one.eval() for one in pair("llama", "bitwise"))
    settings = {"max_new_tokens": 3, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    exact, ours = (one.generate(IDS, pad_token_id=0, **settings).attentions for one in (stock, model))
    same("generate", exact, ours)
    batch = RaggedBatch.from_sequences([[4, 5, 6]])
    with set_forward_context(DenseContext(batch)), pytest.raises(ToolkitError, match="output_attentions must be False"):
        model(input_ids=batch.tokens[None], position_ids=batch.positions[None], output_attentions=True, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_attention_weights_under_activation_checkpointing(family: str) -> None:
    """The recomputation in the backward has to compute them, too."""
    stock, model = pair(family, "bitwise")
    found = []
    for one in (stock, model):
        one.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = one(input_ids=IDS, labels=IDS, output_attentions=True, use_cache=False)
        (out.loss + sum(weights.square().sum() for weights in out.attentions)).backward()
        found.append([out.loss, *out.attentions, *(parameter.grad for parameter in one.parameters())])
    for exact, got in zip(*found, strict=True):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=1e-3, atol=1e-5)
