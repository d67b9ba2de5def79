"""Weights of linear layers of one input in one allocation: nothing that others see of a model is another."""

import copy
import pickle
from collections import OrderedDict

import accelerate
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.config.optimization import OptimizerSection
from toolkit.modules import joined_linear
from toolkit.ops.joined_linear import lie_together, placed_together
from toolkit.patching import joined_weights, report_of
from toolkit.patching.joined_weights import ROLE
from toolkit.testing.models import random_model
from toolkit.training.optimizers import make_optimizer

IDS = torch.arange(3, 27).view(2, 12)
PROMPTS = [[5, 6, 7], [9, 8], list(range(40, 60))]
GREEDY = toolkit.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def groups(model):
    """The weights, and the biases, of each group of linear layers of one input."""
    found = []
    for module in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            layers = [getattr(module, name, None) for name in names]
            layers = [getattr(layer, "base_layer", layer) for layer in layers]
            if None not in layers:
                found.append([layer.weight for layer in layers])
                found += [[layer.bias for layer in layers]] * (layers[0].bias is not None)
    return found


def joined(model):
    return list(map(lie_together, groups(model)))


def counted(monkeypatch):
    """Counts calls of the op by the modules."""
    calls = []
    own = joined_linear.joined_linear
    monkeypatch.setattr(joined_linear, "joined_linear", lambda *args: calls.append(1) or own(*args))
    return calls


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def trained(model, optim="adamw_torch_fused", steps=3):
    """The state after steps of training."""
    optimizer = make_optimizer(model, OptimizerSection(optim=optim, learning_rate=1e-2))
    for _ in range(steps):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"attention_bias": True}), ("qwen3", {}), ("gemma", {}), ("deepseek_v3_moe", {})],
)
def test_parameters_stay_and_their_memory_moves(family, settings):
    model = random_model(family, **settings)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    assert not any(joined(model))
    report = toolkit.patch(model, join_weights=True)
    assert report.join_weights
    assert "weights of linear layers of one input: joined" in str(report)
    assert len(joined(model)) >= 2
    assert all(joined(model))
    assert all(one is parameters.pop(name) for name, one in model.named_parameters())
    assert equal(model.state_dict(), before)
    storages = [one.untyped_storage() for one in {id(one): one for one in model.parameters()}.values()]
    assert len({one.data_ptr() for one in storages}) == len(storages)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in model.parameters())
    toolkit.unpatch(model)
    assert not any(joined(model))
    assert equal(model.state_dict(), before)


def test_it_is_off_on_a_cpu_and_stays_as_an_earlier_patch_had_it():
    model = random_model("llama")
    assert not toolkit.patch(model, numerics="fast").join_weights
    assert toolkit.patch(model, numerics="fast", join_weights=True).join_weights
    assert all(joined(model))
    report = toolkit.patch(model)
    assert report is report_of(model)
    assert report.join_weights
    assert toolkit.patch(model, numerics="bitwise").join_weights
    assert not toolkit.patch(model, join_weights=False).join_weights
    assert not any(joined(model))


def test_bits_of_bitwise_mode_are_the_same():
    plain, together = random_model("qwen3"), random_model("qwen3")
    toolkit.patch(plain)
    toolkit.patch(together, join_weights=True)
    assert torch.equal(logits(plain), logits(together))
    results = []
    for model in (plain, together):
        with toolkit.Engine(model, max_num_seqs=4, max_model_len=64) as engine:
            results.append([(one.token_ids, one.logprobs) for one in engine.generate(PROMPTS, GREEDY)])
    assert results[0] == results[1]
    assert equal(trained(plain), trained(together))
    assert all(joined(together))


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "muon", "sgd"])
def test_optimizers_take_the_same_steps(optim):
    states = []
    for join in (False, True):
        model = random_model("llama", hidden=32)
        toolkit.patch(model, join_weights=join)
        states.append(trained(model, optim))
        assert all(joined(model)) == join
    assert equal(*states)


def test_memory_that_happens_to_adjoin_is_not_used(monkeypatch):
    """As that of a file's tensors, mapped one after another."""
    model, calls = random_model("llama"), counted(monkeypatch)
    toolkit.patch(model, numerics="fast")
    for group in groups(model):
        for one, moved in zip(group, placed_together(group)):
            one.data = moved
    assert all(joined(model))
    logits(model)
    assert not calls
    toolkit.unpatch(model)
    assert all(joined(model))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_optimizers_of_torch_and_their_state_are_the_same(make, how):
    states = []
    for join in (False, True):
        model = random_model("llama", hidden=32)
        optimizer = make(model.parameters(), lr=1e-2, **how)  # before the patch: it holds the parameters
        toolkit.patch(model, join_weights=join)
        for _ in range(2):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"].items()
        moments = {f"{at} {name}": one for at, held in state for name, one in held.items() if torch.is_tensor(one)}
        states.append(moments | dict(model.state_dict()))
    assert equal(*states)


def test_fast_mode_runs_one_gemm_a_group_with_the_same_numbers(monkeypatch):
    calls = counted(monkeypatch)
    gradients, outputs = [], []
    for join in (False, True):
        model = random_model("llama", attention_bias=True).double()
        toolkit.patch(model, numerics="fast", join_weights=join)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        outputs.append(logits(model))
        gradients.append({name: one.grad for name, one in model.named_parameters()})
        assert len(calls) == (8 if join else 0)  # two groups, two layers, two forwards
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    for name, one in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], one, rtol=1e-8, atol=1e-12)


def hooked(model):
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)


def frozen(model):
    model.model.layers[0].mlp.up_proj.requires_grad_(False)


def moved(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.detach().clone()


def replaced(model):
    model.model.layers[0].mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("change", [hooked, frozen, moved, replaced])
def test_a_group_whose_layers_must_be_called_is(change, monkeypatch):
    model = random_model("llama").double()
    toolkit.patch(model, numerics="fast", join_weights=True)
    wanted, calls = logits(model), counted(monkeypatch)
    logits(model)
    assert len(calls) == 4
    change(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-11, atol=1e-11)
    assert len(calls) == 7


def test_autocast_sees_linear_layers(monkeypatch):
    model = random_model("llama")
    toolkit.patch(model, numerics="fast", join_weights=True)
    calls = counted(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert not calls


@pytest.mark.sweep
def test_compilers_see_linear_layers(monkeypatch):
    model = random_model("llama")
    toolkit.patch(model, numerics="fast", join_weights=True)
    wanted, calls = logits(model), counted(monkeypatch)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), wanted, rtol=1e-5, atol=1e-5)
    assert not calls


def test_saved_files_are_those_of_an_ordinary_model(tmp_path):
    model = random_model("llama")
    toolkit.patch(model, join_weights=True)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "pretrained")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "pretrained").state_dict(), state)
    accelerate.Accelerator().save_model(model, tmp_path / "accelerate")
    safetensors.torch.save_file(OrderedDict(state), tmp_path / "file.safetensors")
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("accelerate/model.safetensors", "file.safetensors", "model.safetensors"):
        assert equal(safetensors.torch.load_file(tmp_path / name), state), name
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.2 * sum(one.nbytes for one in state.values())
    other = random_model("llama", seed=1)
    toolkit.patch(other, join_weights=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(joined(other))
    assert torch.equal(logits(other), logits(model))


def test_weights_that_are_assigned_lie_where_they_lay():
    model, other = random_model("llama"), random_model("llama", seed=1)
    toolkit.patch(model, numerics="fast", join_weights=True)
    toolkit.patch(other, numerics="fast")
    model.load_state_dict(other.state_dict(), assign=True)
    assert not any(joined(model))
    assert torch.equal(logits(model), logits(other))
    assert toolkit.patch(model).join_weights  # again: they are joined now
    assert all(joined(model))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    other.load_state_dict(random_model("llama", seed=2).state_dict())  # which still has its own


@pytest.mark.parametrize("move", [lambda model: model.double(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_casts_are_separate_until_they_are_patched_again(move):
    model = random_model("llama")
    toolkit.patch(model, join_weights=True)
    wanted = logits(model).double()
    made = move(model)
    assert not any(joined(made))
    torch.testing.assert_close(logits(made).double(), wanted, rtol=1e-5, atol=1e-5)
    toolkit.patch(made, join_weights=True)
    assert all(joined(made))
    toolkit.unpatch(made)
    assert not any(joined(made))
    assert made is model or all(joined(model))


def test_one_group_at_a_time_is_copied(monkeypatch):
    """The old memory of a group is free before the next one is copied."""
    model = random_model("llama", layers=4)
    own = joined_weights.placed_together
    before = [StorageWeakRef(one.untyped_storage()) for group in groups(model) for one in group]
    kept, sizes = [], []

    def watched(tensors):
        kept.append(sum(not one.expired() for one in before))
        sizes.append(len(tensors))
        return own(tensors)

    monkeypatch.setattr(joined_weights, "placed_together", watched)
    toolkit.patch(model, join_weights=True)
    assert kept == [sum(sizes[at:]) for at in range(len(sizes))]


def test_tied_and_sharded_weights_are_skipped_with_a_reason():
    model = random_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    report = toolkit.patch(model, join_weights=True)
    reasons = {one.path: one.reason for one in report.skipped if one.role == ROLE}
    assert reasons == dict.fromkeys(
        ["model.layers.0.mlp", "model.layers.1.mlp"], "a weight is shared with another module"
    )
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
    assert sum(joined(model)) == 2

    model = random_model("llama")
    model.model.layers[0].mlp.up_proj.weight.ds_id = 1  # as ZeRO-3 marks its parameters, here gathered
    model.model.layers[0].mlp.up_proj.weight.ds_numel = model.model.layers[0].mlp.up_proj.weight.numel()
    report = toolkit.patch(model, join_weights=True)
    assert {one.reason for one in report.skipped} == {"a framework shards the parameters, and owns their memory"}
    assert not any(joined(model))


def with_adapter(model):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config)


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters_are_those_of_separate_weights(numerics, first):
    outputs = []
    for join in (False, True):
        model = random_model("llama").double()
        if first == "patch":
            toolkit.patch(model, numerics=numerics, join_weights=join)
        adapted = with_adapter(model)
        if first == "adapter":
            toolkit.patch(adapted, numerics=numerics, join_weights=join)
        assert all(joined(adapted)) == join
        loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        own = [one.grad for name, one in adapted.named_parameters() if "lora" in name]
        merged = logits(adapted.merge_and_unload())
        outputs.append([loss.detach(), *own, merged])
        assert all(joined(model)) == join  # PEFT merges in place
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert numerics == "fast" or torch.equal(one, other)


@pytest.mark.parametrize("numerics", ["fast", "bitwise"])
def test_quantised_weights_are_those_of_separate_ones(numerics):
    outputs = []
    for join in (False, True):
        model = random_model("llama")
        toolkit.patch(model, numerics=numerics, join_weights=join)
        toolkit.quantise(model, "int8", include=["*q_proj*", "*mlp*"])
        outputs.append(logits(model))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert numerics == "fast" or torch.equal(*outputs)
    assert toolkit.patch(model).join_weights


def test_a_checkpoint_of_joined_weights_resumes_without_them_bit_for_bit(tmp_path):
    def run(model, steps, optimizer):
        for _ in range(steps):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, half, resumed = (random_model("llama", seed=seed) for seed in (0, 0, 1))
    optimizers = {}
    for model, join in ((whole, False), (half, True), (resumed, False)):
        toolkit.patch(model, join_weights=join)
        optimizers[model] = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run(whole, 4, optimizers[whole])
    run(half, 2, optimizers[half])
    torch.save([half.state_dict(), optimizers[half].state_dict()], tmp_path / "checkpoint.pt")
    weights, moments = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(weights)
    optimizers[resumed].load_state_dict(moments)
    run(resumed, 2, optimizers[resumed])
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_small_grpo_loop_has_no_mismatch():
    """Rollout and training on the same joined weights, in bitwise mode, between steps of an optimizer."""
    model = random_model("llama")
    toolkit.patch(model, join_weights=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    params = toolkit.SamplingParams(max_tokens=5, temperature=1.0, ignore_eos=True, n=4, seed=1)
    with toolkit.Engine(model, max_num_seqs=8, max_model_len=64) as engine:
        for _ in range(3):
            samples = engine.generate(PROMPTS, params)
            texts = [[*PROMPTS[at // 4], *one.token_ids] for at, one in enumerate(samples)]
            found = toolkit.token_logprobs(model, texts)
            for one, logprob in zip(samples, found, strict=True):
                assert one.logprobs == logprob[-5:].tolist()
            advantages = torch.tensor([float(one.token_ids[0] % 7) for one in samples]).view(3, 4)
            advantages = (advantages - advantages.mean(1, keepdim=True)).flatten()
            loss = -sum(advantage * one[-5:].sum() for advantage, one in zip(advantages, found))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(joined(model))


def test_unplain_layers_have_a_reason():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = random_model("llama")
    own = model.model.layers[1].self_attn.k_proj
    made = Scaled(own.in_features, own.out_features, bias=False)
    model.model.layers[1].self_attn.k_proj = made
    report = toolkit.patch(model, join_weights=True)
    assert [(one.path, one.reason) for one in report.skipped if one.role == ROLE] == [
        ("model.layers.1.self_attn", "a layer is no plain linear layer")
    ]
