"""New weights in a model that serves: experts that checkpoints store one by one, tied heads, bfloat16, adapters."""

import time

import pytest
import torch

from tests.helpers.adapter_folders import save_adapter
from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.engine.new_weights import check_new_weights, write_new_weights
from toolkit.errors import ToolkitError
from toolkit.loading import load_model, read_new_weights

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def experts():
    from transformers import MixtralConfig

    return MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)


def tied():
    from transformers import Qwen2Config

    return Qwen2Config(**SMALL, tie_word_embeddings=True)


def saved(folder, config, seed):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def completion(engine):
    (one,) = engine.generate([PROMPT], SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    return one.token_ids, one.logprobs


@pytest.mark.parametrize(
    ("config", "dtype"), [(experts, "float32"), (tied, "bfloat16")], ids=["experts", "tied, bfloat16"]
)
def test_the_bits_are_those_of_a_new_engine(tmp_path, config, dtype):
    old, new = saved(tmp_path / "old", config(), 1), saved(tmp_path / "new", config(), 2)
    with Engine(load_model(new, dtype)[0]) as engine:
        expected = completion(engine)
    model = load_model(old, dtype)[0]
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with AsyncEngine(Engine(model)) as engine:
        before = completion(engine)
        assert before != expected
        version = write_new_weights(engine, model, read_new_weights(new, model))
        assert version > 0
        assert engine.stats()["num_cached_blocks"] == 0
        assert completion(engine) == expected
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
        write_new_weights(engine, model, read_new_weights(old, model))
        assert completion(engine) == before


def test_weights_go_below_the_adapters_that_requests_choose(tmp_path):
    pytest.importorskip("peft")
    old, new = saved(tmp_path / "old", tied(), 1), saved(tmp_path / "new", tied(), 2)
    folder = save_adapter(load_model(old)[0], tmp_path / "adapter")
    chosen = SamplingParams(max_tokens=12, seed=1, ignore_eos=True, lora_name="legal")

    def completions(engine):
        return [completion(engine), *((one.token_ids, one.logprobs) for one in engine.generate([PROMPT], chosen))]

    with Engine(load_model(new)[0]) as engine:
        engine.load_adapter("legal", folder)
        expected = completions(engine)
    model = load_model(old)[0]
    inner = Engine(model)
    inner.load_adapter("legal", folder)
    with AsyncEngine(inner) as engine:
        before = completions(engine)
        write_new_weights(engine, model, read_new_weights(new, model))
        assert completions(engine) == expected
        write_new_weights(engine, model, read_new_weights(old, model))
        assert completions(engine) == before
    assert len({tuple(tokens) for tokens, _ in (*before, *expected)}) == 4


def test_adapters_are_merged_into_their_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    old = saved(tmp_path / "old", tied(), 1)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(old), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapters")
    model = load_model(old)[0]
    found = read_new_weights(str(tmp_path / "adapters"), model)
    expected = load_model(str(tmp_path / "adapters"))[0].state_dict()
    assert found.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], model.state_dict()[
        "model.layers.0.self_attn.q_proj.weight"
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.norm.weight"), "the new weights must have model.norm.weight, which they lack."),
        (lambda state: state.update(other=torch.ones(2)), "tensors of the served model only, got other."),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(31)}),
            "model.norm.weight must have the shape [32], got [31].",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
            "model.norm.weight must have the dtype torch.float32, got torch.int64.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, words):
    model = load_model(saved(tmp_path / "old", tied(), 1))[0]
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    change(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ToolkitError) as error:
        check_new_weights(model, state)
    assert words in str(error.value)
    with AsyncEngine(Engine(model)) as engine, pytest.raises(ToolkitError):
        write_new_weights(engine, model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_step_runs_while_weights_are_written(tmp_path, monkeypatch):
    model = load_model(saved(tmp_path / "old", tied(), 1))[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with AsyncEngine(Engine(model)) as engine:
        handle = engine.submit([PROMPT], SamplingParams(max_tokens=100, ignore_eos=True))
        next(iter(handle))
        steps = []
        load = model.load_state_dict

        def watched(weights, strict):
            steps.append((engine.is_paused, engine.engine.stats()["num_steps"]))
            for _ in range(50):
                time.sleep(0.001)
            steps.append((engine.is_paused, engine.engine.stats()["num_steps"]))
            return load(weights, strict)

        monkeypatch.setattr(model, "load_state_dict", watched)
        write_new_weights(engine, model, state)
        assert steps[0][0]
        assert steps[0] == steps[1]
        assert not engine.is_paused
        handle.cancel()
