"""Quantisation-aware training: ``model.quantise`` without adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit
from tests.helpers.objective_recipes import LOWER, objective_recipe, resumed
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.loading.quantised_codes import CODES, read_codes, write_codes
from toolkit.quantised import QuantisedWeight, quantise, quantised_weights
from toolkit.testing.models import random_model
from toolkit.training.loop import Trainer, train
from toolkit.training.precision import LowPrecisionAdamW
from toolkit.training.report import read_metrics

SEQUENCES = [list(range(3, 30)), list(range(3, 20))]


def aware(tmp_path: Path, kind: str = "sft", objective: dict[str, Any] | None = None, **sections: Any) -> Any:
    quantise = sections.pop("quantise", {"format": "int4", "options": {"group": 32}})
    model = {"quantise": quantise, **sections.pop("model", {})}
    optimizer = {"learning_rate": 1e-2}
    return objective_recipe(tmp_path, kind, objective or {}, model=model, optimizer=optimizer, **sections)


def parts_of(model: Any) -> dict[str, list[torch.Tensor]]:
    return {
        name: [part.float() for part in (weight.codes, *weight.scales)] for name, weight in quantised_weights(model)
    }


def assert_equal_weights(one: Any, other: Any) -> None:
    mine, others = parts_of(one), parts_of(other)
    assert mine.keys() == others.keys()
    assert len(mine) > 0
    assert all(all(map(torch.equal, mine[name], others[name])) for name in mine)
    dense = {name: value for name, value in one.named_parameters() if name not in mine}
    assert all(torch.equal(value, other.get_parameter(name)) for name, value in dense.items())


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("format", ["int4", pytest.param("nf4", marks=pytest.mark.sweep)])
def test_a_resumed_run_ends_with_the_same_codes_and_loads_with_them(
    tmp_path: Path, format: str, precision: str
) -> None:
    """Codes are always the rounding of the masters; frozen weights keep theirs."""
    sections = {
        "quantise": format,
        "model": {"freeze_parameters": ["model.layers.0.mlp"]},
        "train": {"mixed_precision": precision},
        "evaluate": {"do_eval": False},
    }
    whole = Trainer(aware(tmp_path / "whole", **sections), quiet=True)
    before = {name: weight.dequantise() for name, weight in quantised_weights(whole.hf_model)}
    whole.fit()
    moved = {
        name: not torch.equal(weight.dequantise(), before[name]) for name, weight in quantised_weights(whole.hf_model)
    }
    assert all(moves == (".layers.0.mlp." not in name) for name, moves in moved.items())
    for weight, state in whole.optimizer.optimizer.state.items():
        if isinstance(weight, QuantisedWeight):
            rounded = QuantisedWeight.of(state["master"], weight.format).dequantise(weight.dtype)
            assert torch.equal(weight.dequantise(), rounded)
    assert_equal_weights(resumed(aware(tmp_path / "parts", **sections)).hf_model, whole.hf_model)
    dtype = {"no": "float32", "bf16": "bfloat16"}[precision]
    loaded, _ = load_model(str(tmp_path / "whole" / "runs" / "sft"), dtype)
    assert_equal_weights(loaded, whole.hf_model)


def test_codes_beside_a_checkpoint_are_of_its_model(tmp_path: Path) -> None:
    model, other = random_model("qwen3_moe"), random_model("qwen3_moe")
    quantise(model, "fp8")
    write_codes(model, tmp_path)
    read_codes(other.bfloat16(), tmp_path)
    assert_equal_weights(other, model.bfloat16())
    wrong = f"{CODES}' does not hold codes of the model beside it"
    with pytest.raises(ToolkitError, match=wrong):
        read_codes(random_model("llama"), tmp_path)
    (tmp_path / CODES).write_bytes((tmp_path / CODES).read_bytes()[:100])
    with pytest.raises(ToolkitError, match=wrong):
        read_codes(random_model("qwen3_moe"), tmp_path)


@pytest.mark.parametrize("format", ["int4", pytest.param("nf4", marks=pytest.mark.sweep)])
def test_rollouts_have_the_log_probabilities_of_training(tmp_path: Path, format: str) -> None:
    objective = {"task": LOWER, "prompts": 4, "num_generations": 4, "beta": 0.01}
    train(aware(tmp_path, "grpo", objective, quantise=format), quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 4
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference is quantised too
    assert lines[-1]["kl"] > 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_engine_reads_the_codes_of_every_step(family: str) -> None:
    """A training loop of one's own: after each step the engine's log-probabilities are those of training."""
    model = random_model(family).requires_grad_(True)
    report = toolkit.quantise(model, "int8", trainable=True)
    toolkit.patch(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = LowPrecisionAdamW([{"params": trained}], lr=1e-3, betas=(0.9, 0.99), eps=1e-8, masters=report.masters)
    params = toolkit.SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    losses = []
    with toolkit.Engine(model) as engine:
        for _ in range(3):
            found = engine.generate([[5, 6, 7, 8]] * 2, params)
            again = toolkit.token_logprobs(model, [one.prompt_token_ids + one.token_ids for one in found])
            for one, logprobs in zip(found, again, strict=True):
                assert torch.equal(torch.tensor(one.logprobs), logprobs.detach()[-6:])
            loss = -torch.cat(toolkit.token_logprobs(model, SEQUENCES)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_masters_are_float32(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ToolkitError, match=r"model\.dtype must be 'float32' with model\.quantise and"):
        aware(tmp_path, model={"dtype": dtype})
