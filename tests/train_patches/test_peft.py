"""Adapters in a patched model against PEFT on the unpatched one: loss, every gradient, merged, saved, switched."""

import copy

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.patching import report_of
from toolkit.patching.adapters.linear import fused_linear
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double
from train_patches.peft import fuse_adapters

peft = pytest.importorskip("peft")
LINEAR = ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def lora(targets=LINEAR, **settings):
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": list(targets), "init_lora_weights": False} | settings
    )


def with_adapters(model, config):
    """A ``PeftModel`` whose adapters are the same each time, and where they start at nothing, no longer do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name or "ia3" in name:
                    parameter.mul_(1.0 + 0.3 * torch.randn(parameter.shape))
    return model


def patched_with(model, config, first: str):
    """Patched before or after the adapters came in."""
    if first == "patch":
        toolkit.patch(model)
        model = with_adapters(model, config)
        fuse_adapters(model)
        return model
    model = with_adapters(model, config)
    toolkit.patch(model)
    return model


def ids_of(seed=1, shape=(2, 13)):
    return torch.randint(3, 331, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, seed=1):
    model.zero_grad(set_to_none=True)
    ids = ids_of(seed)
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


CASES = {
    "lora": ("llama", lora()),
    "rslora": ("llama", lora(["v_proj", "up_proj"], use_rslora=True)),
    "dora": ("llama", lora(use_dora=True)),
    "bias": ("gpt_neox", lora(["query_key_value", "dense_4h_to_h", "embed_out"])),
    "dora-bias": ("gpt_neox", lora(["query_key_value", "dense"], use_dora=True)),
    "softcap": ("gemma2", lora(["q_proj", "up_proj"])),
    "experts": ("qwen3_moe", lora(["q_proj", "lm_head"], target_parameters=EXPERTS)),
}


@pytest.mark.parametrize("first", ["patch", "adapters"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_pefts_own(case, first):
    family, config = CASES[case]
    model = random_model(family)
    oracle = with_adapters(eager(copy.deepcopy(model)).double(), copy.deepcopy(config))
    with lifted_to_double():
        expected = loss_and_gradients(oracle)
        double = patched_with(copy.deepcopy(model).double(), copy.deepcopy(config), first)
        assert_near(loss_and_gradients(double), expected, 1e-10)
    single = patched_with(model, copy.deepcopy(config), first)
    assert_near(loss_and_gradients(single), expected, 1e-4)
    report = fuse_adapters(single)
    assert {verdict for _, verdict in report.linear} == {"fused"}
    assert report.experts == (4 if case == "experts" else 0)
    wanted = {"mlp", "attention"} if family in ("llama", "gemma2") else {"attention"}
    assert wanted <= set(report_of(single).roles())
    assert not [r for r in report_of(single).skipped if r.role in ("mlp", "head", "attention")]


def test_fused_layers_run_one_op_and_never_the_weights_of_the_adapter(monkeypatch):
    """The factors' own modules are not called: the product with them is part of ``lora_add``."""
    model = patched_with(random_model("llama"), lora(use_dora=True), "patch")
    called = []
    for name, module in model.named_modules():
        if "lora_A" in name or "lora_B" in name or "magnitude" in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    loss_and_gradients(model)
    assert called == []


def test_the_head_keeps_its_adapter_in_every_loss():
    """An adapter of the head alone moves the loss, the log-probabilities, and what the engine says of them."""
    model = random_model("llama")
    toolkit.patch(model)
    ids = ids_of()
    plain = model(input_ids=ids, labels=ids).loss.item()
    adapted = with_adapters(model, lora(["lm_head"]))
    fuse_adapters(adapted)
    assert abs(adapted(input_ids=ids, labels=ids).loss.item() - plain) > 1e-2
    rows = [row.tolist() for row in ids]
    mean = -torch.cat(toolkit.token_logprobs(adapted, rows)).mean()
    assert mean.item() == pytest.approx(adapted(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    mean.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_a_saved_head_is_trained_and_deferred():
    """``modules_to_save`` trains a copy of the head, and the loss is that of the copy."""
    config = lora(["q_proj"], modules_to_save=["lm_head"])
    oracle = with_adapters(random_model("llama"), copy.deepcopy(config))
    for first in ("patch", "adapters"):
        model = patched_with(random_model("llama"), copy.deepcopy(config), first)
        expected = loss_and_gradients(oracle)
        assert any("modules_to_save" in name for name in expected[1])
        assert_near(loss_and_gradients(model), expected, 1e-4)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_dropout_samples_what_peft_samples(use_dora):
    config = lora(lora_dropout=0.4, use_dora=use_dora)
    results = []
    for first in (None, "patch", "adapters"):
        model = random_model("llama")
        model = with_adapters(model, copy.deepcopy(config)) if first is None else patched_with(model, config, first)
        model.train()
        torch.manual_seed(7)
        results.append(loss_and_gradients(model))
    model.eval()
    assert relative(loss_and_gradients(model)[0], results[0][0]) > 1e-3
    for result in results[1:]:
        assert_near(result, results[0], 1e-4)


def test_wider_adapters_and_autocast():
    """PEFT keeps factors in float32 beside weights in bfloat16; under autocast its own forward serves."""
    losses = []
    for patched in (False, True):
        model = with_adapters(random_model("llama").bfloat16(), lora())
        assert next(p.dtype for n, p in model.named_parameters() if "lora_A" in n) == torch.float32
        if patched:
            toolkit.patch(model)
        losses.append(loss_and_gradients(model)[0].float())
    assert relative(losses[1], losses[0]) < 1e-2
    model = random_model("llama")
    oracle = with_adapters(copy.deepcopy(model), lora())
    model = patched_with(model, lora(), "patch")
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = loss_and_gradients(oracle), loss_and_gradients(model)
    assert relative(got[0], expected[0]) < 1e-2


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_float32_factors_on_a_bfloat16_layer_with_bias(use_dora):
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 48)}).to(torch.bfloat16)
            config = lora(["q_proj"], use_dora=use_dora)
            return peft.inject_adapter_in_model(config, layer)["q_proj"]

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    results = []
    for forward in (type(made()).forward, fused_linear(type(made()).forward)):
        wrapper = made()
        factors = [p.requires_grad_() for name, p in wrapper.named_parameters() if "lora_" in name]
        for factor in factors:
            factor.data = factor.data.float()
        y = forward(wrapper, x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), factors)])
    assert len(results[0]) == (4 if use_dora else 3)
    for expected, got in zip(*results):
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_saved_and_loaded_as_peft_does(use_dora, tmp_path):
    config = lora(use_dora=use_dora)
    ids = ids_of()
    oracle = with_adapters(random_model("llama"), copy.deepcopy(config))
    model = patched_with(random_model("llama"), copy.deepcopy(config), "patch")
    with torch.no_grad():
        expected = oracle(ids).logits
        oracle.save_pretrained(tmp_path / "unpatched")
        model.save_pretrained(tmp_path / "patched")
        opened = peft.PeftModel.from_pretrained(random_model("llama"), tmp_path / "patched")
        assert torch.equal(opened(ids).logits, expected)
        base = random_model("llama")
        toolkit.patch(base)
        ours = peft.PeftModel.from_pretrained(base, tmp_path / "unpatched")
        fuse_adapters(ours)
        assert torch.equal(ours(ids).logits, model(ids).logits)
        assert relative(ours(ids).logits, expected) < 1e-5
        model.merge_adapter()
        assert relative(model(ids).logits, expected) < 1e-5
        model.unmerge_adapter()
        assert relative(model(ids).logits, expected) < 1e-5
        with model.disable_adapter(), oracle.disable_adapter():
            assert relative(model(ids).logits, oracle(ids).logits) < 1e-5
        merged, wanted = ours.merge_and_unload(), oracle.merge_and_unload()
    assert set(merged.state_dict()) == set(wanted.state_dict())
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in merged.state_dict().items())
    assert relative(merged(ids).logits, expected) < 1e-5
    assert relative(toolkit.token_logprobs(merged, [ids[0].tolist()])[0], expected[0].log_softmax(-1)[
        torch.arange(12), ids[0, 1:]
    ]) < 1e-4  # fmt: skip


@pytest.mark.parametrize("config", [lora(), lora(use_dora=True)], ids=["lora", "dora"])
def test_rollout_and_training_agree_in_every_bit_and_see_a_switch(config):
    """Of trained, switched and disabled adapters: nothing of an earlier choice is left in programs or prefixes."""
    model = random_model("llama")
    toolkit.patch(model)
    model = with_adapters(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        model.add_adapter("second", copy.deepcopy(config))
    prompts = [[3, 4, 5, 6, 7] * 5, [8, 9], [10, 11, 12, 13]]
    params = toolkit.SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    seen = []

    def agree(engine):
        outputs = engine.generate(prompts, params)
        logprobs = toolkit.token_logprobs(model, [[*o.prompt_token_ids, *o.token_ids] for o in outputs])
        for output, values in zip(outputs, logprobs):
            rolled = torch.tensor(output.logprobs)
            assert torch.equal(rolled, values.detach()[len(output.prompt_token_ids) - 1 :])
        seen.append(tuple(outputs[0].logprobs))
        return logprobs

    with toolkit.Engine(model) as engine:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        (-torch.cat(agree(engine)).mean()).backward()
        optimizer.step()
        agree(engine)
        model.set_adapter("second")
        agree(engine)
        with model.disable_adapter():
            agree(engine)
        agree(engine)
        model.merge_adapter()
        agree(engine)
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[2]


def test_what_is_not_lora_is_left_to_peft_with_a_reason():
    ids = ids_of()
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    oracle = with_adapters(random_model("llama"), copy.deepcopy(config))
    model = patched_with(random_model("llama"), config, "adapters")
    report = fuse_adapters(model)
    assert {verdict for _, verdict in report.linear} == {"it has no lora_A"}
    assert "4 linear layers: it has no lora_A" in str(report)
    assert relative(model(ids).logits, oracle(ids).logits) < 1e-5
    assert "mlp" in report_of(model).roles()
    assert "skipped: adapter · model.layers.*.self_attn.k_proj · 2 · it has no lora_A" in str(report_of(model))


def test_an_adapted_model_is_one_graph():
    model = patched_with(random_model("llama"), lora(), "patch")
    expected = loss_and_gradients(model)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    loss = compiled(input_ids=ids_of(), labels=ids_of(), use_cache=False).loss
    loss.backward()
    torch._dynamo.reset()
    got = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_near(got, expected, 1e-4)


def test_unpatch_leaves_peft_as_it_was():
    model = with_adapters(random_model("qwen3_moe"), lora(["q_proj", "lm_head"], target_parameters=EXPERTS))
    ids = ids_of()
    expected = model(ids).logits
    assert toolkit.patch(model) is toolkit.patch(model.get_base_model())
    toolkit.unpatch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(ids).logits, expected)


def test_what_cannot_be_meant_is_refused():
    model = random_model("llama")
    with pytest.raises(ToolkitError, match="LlamaForCausalLM is not patched"):
        fuse_adapters(model)
    toolkit.patch(model)
    with pytest.raises(ToolkitError, match="LlamaForCausalLM has no adapters"):
        fuse_adapters(model)
    prompted = peft.get_peft_model(
        random_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ToolkitError, match=r"peft_type of adapter 'default' must be .*, got PROMPT_TUNING"):
        toolkit.patch(prompted)
