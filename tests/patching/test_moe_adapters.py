"""Adapters of PEFT on parameters of experts: grouped, and equal to PEFT's own in outputs, gradients and files."""

import copy

import pytest
import torch

import toolkit
from toolkit.config.schema import LoraSection, ModelSection
from toolkit.errors import ToolkitError
from toolkit.ops import lora_linear
from toolkit.patching.adapters import fuse_adapters
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double
from toolkit.training.model import patch_model

peft = pytest.importorskip("peft")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3_moe")


def settings(parameters=tuple(BOTH), rank=3, modules=("q_proj",)):
    return peft.LoraConfig(
        r=rank, lora_alpha=5, target_modules=list(modules), target_parameters=list(parameters), init_lora_weights=False
    )


def adapted(model, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model.add_adapter(settings(**kwargs))
    return model


def loss_and_gradients(model):
    ids = torch.randint(3, 331, (2, 13), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))


def assert_near(got, expected, limit):
    assert relative(got[0], expected[0]) < limit
    assert set(got[1]) == set(expected[1]) != set()
    for name, gradient in got[1].items():
        assert relative(gradient, expected[1][name]) < limit, name


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "up", "down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pefts_own(family, parameters):
    model = random_model(family)
    oracle = adapted(eager(copy.deepcopy(model)).double(), parameters=parameters)
    patched = copy.deepcopy(model).double()
    toolkit.patch(patched)
    adapted(patched, parameters=parameters)
    assert fuse_adapters(patched) == len(parameters) * (1 if family == "deepseek_v3_moe" else 2)
    with lifted_to_double():
        expected = loss_and_gradients(oracle)
        assert_near(loss_and_gradients(patched), expected, 1e-10)
    toolkit.patch(model)
    adapted(model, parameters=parameters)
    fuse_adapters(model)
    assert_near(loss_and_gradients(model), expected, 1e-4)


def test_no_weights_of_all_experts_are_made(monkeypatch):
    """PEFT registers a parametrisation at each forward, which computes W + BA; adopted wrappers do not."""
    model = adapted_and_patched(modules=())
    calls = []
    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", lambda *a, **k: calls.append(a))
    grouped = []
    original = lora_linear._FORWARD

    class Counting:
        def select(self, impl):
            grouped.append(1)
            return original.select(impl)

    monkeypatch.setattr(lora_linear, "_FORWARD", Counting())
    loss_and_gradients(model)
    assert calls == []
    assert len(grouped) == 4


def adapted_and_patched(family="qwen3_moe", **kwargs):
    model = random_model(family)
    toolkit.patch(model)
    adapted(model, **kwargs)
    fuse_adapters(model)
    return model


def test_several_active_adapters_add_up_and_disabled_ones_do_not():
    model = random_model("qwen3_moe")
    ids = torch.arange(3, 16)[None]
    plain = model(ids).logits

    def both(model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            model.add_adapter(settings(rank=3), "one")
            model.add_adapter(settings(rank=3), "two")
        model.set_adapter(["one", "two"])
        return model

    expected = both(copy.deepcopy(model))(ids).logits
    toolkit.patch(model)
    both(model)
    fuse_adapters(model)
    assert relative(expected, plain) > 0.05
    assert relative(model(ids).logits, expected) < 1e-5
    model.set_adapter("two")
    assert relative(model(ids).logits, expected) > 0.01
    model.disable_adapters()
    assert relative(model(ids).logits, plain) < 1e-5
    model.enable_adapters()
    model.set_adapter(["one", "two"])
    toolkit.unpatch(model)
    assert relative(model(ids).logits, expected) < 1e-5


def test_adapters_that_were_there_before_the_patch_are_found():
    model = adapted(random_model("qwen3_moe"), modules=())
    ids = torch.arange(3, 16)[None]
    expected = model(ids).logits
    report = toolkit.patch(model)
    assert {"router", "experts"} <= set(report.roles())
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    assert all("forward" in wrapper.__dict__ for wrapper in wrappers)
    assert relative(model(ids).logits, expected) < 1e-5
    toolkit.unpatch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(ids).logits, expected)


def test_merged_and_unmerged_and_saved_as_peft_does(tmp_path):
    model = random_model("qwen3_moe")
    oracle = adapted(copy.deepcopy(model))
    toolkit.patch(model)
    adapted(model)
    fuse_adapters(model)
    ids = torch.arange(3, 16)[None]
    expected = oracle(ids).logits
    oracle.save_pretrained(tmp_path / "oracle")
    model.save_pretrained(tmp_path / "patched")
    one, other = (
        peft.utils.save_and_load.load_peft_weights(str(tmp_path / name), device="cpu") for name in ("oracle", "patched")
    )
    assert set(one) == set(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    for wrapper in wrappers:
        wrapper.merge()
    assert relative(model(ids).logits, expected) < 1e-5
    for wrapper in wrappers:
        wrapper.unmerge()
    assert relative(model(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rollout_and_training_are_bitwise_identical(family):
    """The engine adopts adapters when a prompt enters; its captured graphs see them change."""
    model = random_model(family)
    toolkit.patch(model)
    adapted(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    prompts = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [21]]
    seen = []
    with toolkit.Engine(model) as engine:
        for _ in range(2):
            outputs = engine.generate(prompts, toolkit.SamplingParams(max_tokens=10, seed=3, ignore_eos=True))
            logprobs = toolkit.token_logprobs(model, [[*o.prompt_token_ids, *o.token_ids] for o in outputs])
            for output, values in zip(outputs, logprobs):
                expected = values.detach()[len(output.prompt_token_ids) - 1 :]
                assert torch.equal(torch.tensor(output.logprobs), expected)
                seen.append(tuple(output.logprobs))
            (-torch.cat(logprobs).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert seen[:4] != seen[4:]


def test_recipes_name_parameters():
    model = random_model("qwen3_moe")
    lora = LoraSection(r=2, lora_alpha=4.0, target_modules=[], target_parameters=["experts.down_proj"])
    patch_model(model, ModelSection(name_or_path="it", lora=lora))
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
    assert all("forward" in layer.mlp.experts.__dict__ for layer in model.model.layers)
    loss_and_gradients(model)
    lora = LoraSection(target_modules=[], target_parameters=["experts.sideways"])
    with pytest.raises(
        ToolkitError, match=r"model\.lora\.target_parameters must name .* got \[\] and \['experts\.sideways'"
    ):
        patch_model(random_model("qwen3_moe"), ModelSection(name_or_path="it", lora=lora))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"target_modules": []}, "target_parameters must name something, got "),
        (
            {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1},
            "lora_dropout must be 0 with model.lora.target_parameters, got 0.1",
        ),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraSection(**fields)
