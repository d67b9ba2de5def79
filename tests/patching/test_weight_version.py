"""The weight version sees every write, and captured decode graphs follow it."""

import copy
import gc
import random
import weakref
from functools import cache

import peft
import pytest
import torch
from torch import nn

import toolkit
from toolkit.patching import weight_version
from toolkit.patching.weights import weight_clock
from toolkit.patching.weights.tensors import ModelTensors
from toolkit.testing.models import random_model
from toolkit.testing.weight_writes import weight_writes

PROMPT = list(range(3, 60))
PARAMS = toolkit.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
ADAPTER = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "deepseek_v3_moe": {"hidden": 32},
}


@cache
def patched(name):
    model = random_model("llama" if name == "tied" else name, **MODELS[name])
    toolkit.patch(model)
    return model


def make(name):
    return copy.deepcopy(patched(name))


def stock_logprobs(model, sequence, count):
    """Of the last ``count`` tokens, by unpatched transformers code on a copy of the weights."""
    stock = copy.deepcopy(model)
    toolkit.unpatch(stock)
    with torch.no_grad():
        logits = stock(torch.tensor([sequence])).logits[0].log_softmax(-1)
    return logits[torch.arange(len(sequence) - 1), torch.tensor(sequence[1:])][-count:]


def check(model, completion):
    sequence = [*completion.prompt_token_ids, *completion.token_ids]
    count, got = len(completion.token_ids), torch.tensor(completion.logprobs)
    trained = toolkit.token_logprobs(model, [sequence])[0][-count:].detach()
    assert torch.equal(got, trained)
    torch.testing.assert_close(got, stock_logprobs(model, sequence, count), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["tied", "deepseek_v3_moe"])
def test_every_write_moves_the_version_and_hides_old_prefixes(name):
    model, source = make(name), random.Random(3)
    with toolkit.Engine(model, num_blocks=64) as engine:
        hits = 0
        for kind, write in weight_writes(model).items():
            done = engine.generate([PROMPT, PROMPT[:40]], PARAMS)  # the second shares pages of the first
            hits = engine.stats()["prefix_cache_hits"]
            before = weight_version(model)
            assert weight_version(model) == before == done[0].weight_version, kind
            write(model, source)
            after = engine.generate([PROMPT], PARAMS)[0]
            assert engine.stats()["prefix_cache_hits"] == hits, kind
            assert after.weight_version == weight_version(model) != before, kind
            check(model, after)
            # The version does not move any more, so the new prefixes are hit.
            engine.generate([PROMPT], PARAMS)
            assert engine.stats()["prefix_cache_hits"] > hits, kind
        engine.check_integrity()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3_moe"])
def test_a_write_during_a_decode_acts_at_the_next_step(name):
    """As the same write does in an engine that has captured nothing."""
    for kind in weight_writes(patched(name)):
        tokens = []
        for captured in (True, False):
            model = make(name)
            with toolkit.Engine(model, num_blocks=64) as engine:
                engine.submit(PROMPT, toolkit.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
                if not captured:
                    engine.backend.graphs.serves = lambda *_: False
                for _ in range(3):
                    engine.step()
                weight_writes(model)[kind](model, random.Random(7))
                while engine.has_work:
                    done = [delta.finished for delta in engine.step() if delta.finished][-1:]
            assert done[0].weight_versions[:3] == [0, 0, 0], kind
            assert len(set(done[0].weight_versions[3:])) == 1, kind
            assert done[0].weight_versions[3] != 0, kind
            tokens.append((done[0].token_ids, done[0].logprobs))
        assert tokens[0] == tokens[1], kind


class Scaled(nn.Module):
    """A module whose output is multiplied by a tensor that is neither a parameter nor a buffer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, torch.tensor(1.0)

    def forward(self, x):
        return self.inner(x) * self.gain


def rebind(scaled):
    scaled.gain = torch.tensor(2.0)


def rebind_data(scaled):
    scaled.gain.data = torch.tensor(2.0)


@pytest.mark.parametrize("write", [rebind, rebind_data, lambda scaled: scaled.gain.mul_(2)])
def test_plain_tensor_attributes_are_weights(write):
    model = random_model("llama")
    scaled = model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    toolkit.patch(model)
    with toolkit.Engine(model, num_blocks=64) as engine:
        before = engine.generate([PROMPT], PARAMS)[0].weight_version
        write(scaled)
        after = engine.generate([PROMPT], PARAMS)[0]
        assert engine.stats()["prefix_cache_hits"] == 0
    assert after.weight_version == weight_version(model) != before
    check(model, after)


def test_what_a_forward_leaves_on_a_module_is_no_weight():
    model = make("llama")
    version = weight_version(model)
    for value in (1.0, 2.0):
        model.model.layers[0].seen = torch.tensor(value)
        assert weight_version(model) == version
        model.model.norm.weight.data.mul_(1.5)
        version = weight_version(model)


def test_a_setting_of_a_module_is_a_weight():
    model = make("llama")
    with toolkit.Engine(model, num_blocks=64) as engine:
        before = engine.generate([PROMPT], PARAMS)[0].weight_version
        model.model.layers[0].self_attn.scaling *= 2
        after = engine.generate([PROMPT], PARAMS)[0]
        assert engine.stats()["prefix_cache_hits"] == 0
        assert after.weight_version != before
        check(model, after)
        version = weight_version(model)
        model.train().eval()
        model.gradient_checkpointing_enable()
        assert weight_version(model) == version


def test_what_deepspeed_counts_on_modules_is_no_setting():
    model = make("llama")
    clock = weight_clock(model)
    for count in range(3):
        for module in model.modules():
            module.ds_grads_remaining = count
            module.applied_pre_backward_ref_cnt = 2 * count
        assert weight_version(model) == 0
        assert clock.layout == 0


def test_another_view_of_the_same_memory_is_a_write():
    model = make("llama")
    weight = model.model.layers[0].self_attn.o_proj.weight
    before, at = weight_version(model), weight.data_ptr()
    weight.data = weight.data.t()
    after = weight_version(model)
    weight.data = weight.data[:-1]
    assert weight.data_ptr() == at
    assert len({before, after, weight_version(model)}) == 3


def test_memory_allocated_again_at_an_old_address_is_told_apart():
    model = random_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    seen, addresses = [weight_version(model)], []
    for _ in range(30):
        addresses.append(weight.data_ptr())
        for _ in range(2):
            weight.data = weight.data * 1.01
        seen.append(weight_version(model))
    assert len(set(addresses)) < len(addresses)  # it does happen
    assert len(set(seen)) == len(seen)


def test_nothing_that_was_replaced_is_kept_alive():
    model = random_model("llama")
    weight_version(model)
    layer = weakref.ref(model.model.layers[0])
    memory = model.model.layers[0].mlp.up_proj.weight.untyped_storage()
    storage = torch.multiprocessing.reductions.StorageWeakRef(memory)
    del memory
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    gc.collect()
    assert layer() is None
    assert storage.expired()
    version = weight_version(model)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())
    assert weight_version(model) != version


def test_a_model_made_in_inference_mode_has_a_version():
    with torch.inference_mode():
        model = random_model("llama")
        before = weight_version(model)
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert weight_version(model) != before


def with_adapters(count):
    model = peft.get_peft_model(random_model("llama"), ADAPTER, adapter_name="a0")
    for at in range(1, count):
        model.add_adapter(f"a{at}", ADAPTER)
    toolkit.patch(model)
    return model.eval()


def test_a_step_looks_at_the_adapters_that_act_alone():
    counts = []
    for model in map(with_adapters, (1, 12)):
        clock = weight_clock(model)
        seen = clock._tensors
        seen._resting._watch = None  # a look at it would fail
        assert clock.version() == 0
        counts.append(len(seen._acting._watch.stamps()))
    assert counts[0] == counts[1] > 0


def test_a_write_that_is_seen_beside_a_move_counts():
    model = with_adapters(2)
    seen = ModelTensors(model, ["a0"])
    resting = next(one for name, one in model.named_parameters() if ".a1." in name)
    moved = next(one for name, one in model.named_parameters() if "norm" in name)
    with torch.no_grad():
        resting.mul_(2)
    moved.data = moved.data.clone()
    assert seen.writes(all_adapters=True) is None
    assert seen.differing(ModelTensors(model, ["a0"], seen)) == {"a1", None}


@pytest.mark.parametrize("past_the_counters", [False, True])
def test_what_is_written_to_an_adapter_that_rests_counts_when_it_acts(past_the_counters):
    model = with_adapters(3)
    with toolkit.Engine(model, num_blocks=64) as engine:
        model.set_adapter("a2")
        before = engine.generate([PROMPT], PARAMS)[0]
        model.set_adapter("a1")
        other = engine.generate([PROMPT], PARAMS)[0].weight_version
        written = [one for name, one in model.named_parameters() if ".a2." in name]
        with torch.no_grad():
            for one in written:
                one.data.copy_(one * 1.5) if past_the_counters else one.mul_(1.5)
        hits = engine.stats()["prefix_cache_hits"]
        assert engine.generate([PROMPT], PARAMS)[0].weight_version == other  # its pages stay
        assert engine.stats()["prefix_cache_hits"] > hits
        hits = engine.stats()["prefix_cache_hits"]
        model.set_adapter("a2")
        after = engine.generate([PROMPT], PARAMS)[0]
        assert engine.stats()["prefix_cache_hits"] == hits
    assert after.weight_version != before.weight_version
    assert after.logprobs != before.logprobs
    check(model, after)


def test_an_unrelated_optimizer_moves_nothing():
    model, other = random_model("llama"), nn.Linear(3, 3)
    before = weight_version(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert weight_version(model) == before


def test_parts_of_quantised_parameters_are_watched():
    class State:
        def __init__(self):
            self.absmax, self.name = torch.ones(4), "nf4"

    class Packed(nn.Parameter):
        """As bitsandbytes': packed bytes, with scales in an attribute's attribute."""

    model = random_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = Packed(layer.weight.detach())
    layer.weight.state = State()
    seen = [weight_version(model)]
    layer.weight.state.absmax.mul_(2)
    seen.append(weight_version(model))
    layer.weight.state.absmax = torch.ones(4)
    seen.append(weight_version(model))
    layer.weight.state = State()
    seen.append(weight_version(model))
    assert len(set(seen)) == 4
    assert weight_version(model) == seen[-1]


def test_the_layout_changes_with_objects_and_memory_alone():
    model = random_model("llama")
    clock = weight_clock(model)
    layout = clock.layout
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    clock.version()
    assert clock.layout == layout
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    clock.version()
    assert clock.layout != layout


def test_a_forward_that_reads_a_weight_on_the_host_is_captured_again_for_other_weights():
    model = random_model("llama")
    model.gain = nn.Parameter(torch.tensor(1.0))
    head = type(model.lm_head).forward
    model.lm_head.forward = lambda x: head(model.lm_head, x) * model.gain.item()
    toolkit.patch(model, roles=["norm", "rotary", "attention", "mlp", "activation", "linear"])
    with toolkit.Engine(model, num_blocks=64) as engine:
        first = engine.generate([PROMPT], PARAMS)[0]
        with torch.no_grad():
            model.gain.mul_(0.25)
        second = engine.generate([PROMPT], PARAMS)[0]
        assert engine.backend.graphs.data_dependent_op == ""
    assert first.logprobs != second.logprobs
    trained = toolkit.token_logprobs(model, [[*PROMPT, *second.token_ids]])[0][-5:]
    assert torch.equal(torch.tensor(second.logprobs), trained.detach())
