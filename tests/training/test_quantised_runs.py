"""Recipes with ``model.quantise``: adapters trained on a base of few bits, rolled out and loaded as trained."""

from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.objective_recipes import LOWER, TASK, WARMUP, objective_recipe, resumed
from toolkit.config.schema import ModelSection, QuantiseSection
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_model
from toolkit.ops.quantised_linear import makers
from toolkit.quantised import QuantisedWeight, dequantise, quantise, quantised_weights
from toolkit.training.loop import Trainer, train
from toolkit.training.report import read_metrics


def qlora(tmp_path: Path, kind: str = "sft", objective: dict[str, Any] | None = None, **model: Any) -> Any:
    sections = {"lora": {"r": 4}, "quantise": "nf4", **model}
    optimizer = {"learning_rate": 5e-2}
    return objective_recipe(
        tmp_path, kind, {"warmup": WARMUP, **(objective or {})}, model=sections, optimizer=optimizer
    )


def test_the_schema_names_the_formats_that_can_be_made() -> None:
    assert sorted(get_args(QuantiseSection.model_fields["format"].annotation)) == makers()


def test_a_format_alone_is_its_section() -> None:
    section = ModelSection(name_or_path="x", lora={}, quantise="int4")
    assert section.quantise == QuantiseSection(format="int4")


def test_only_adapters_move(tmp_path: Path) -> None:
    trainer = Trainer(qlora(tmp_path), quiet=True)
    before = {name: weight.dequantise().clone() for name, weight in quantised_weights(trainer.hf_model)}
    assert len(before) > 0
    trainer.fit()
    after = dict(quantised_weights(trainer.hf_model))
    assert all(torch.equal(after[name].dequantise(), value) for name, value in before.items())
    factors = [one for name, one in trainer.hf_model.named_parameters() if "lora_B" in name]
    assert factors
    assert all(one.any() for one in factors)


@pytest.mark.parametrize("format", ["nf4", pytest.param("int8", marks=pytest.mark.sweep)])
def test_rollouts_have_the_log_probabilities_of_training(tmp_path: Path, format: str) -> None:
    objective = {"task": LOWER, "prompts": 4, "num_generations": 4, "warmup": {**WARMUP, "task": TASK}, "beta": 0.01}
    train(qlora(tmp_path, "grpo", objective, quantise=format), quiet=True)
    lines = read_metrics(tmp_path / "runs" / "grpo" / "metrics.jsonl")
    assert [line["mismatch_bits"] for line in lines] == [0] * 4
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9)  # the reference is quantised too
    assert lines[-1]["kl"] > 1e-6


def test_a_resumed_run_ends_with_the_same_adapters(tmp_path: Path) -> None:
    whole = Trainer(qlora(tmp_path / "whole"), quiet=True)
    whole.fit()
    again = resumed(qlora(tmp_path / "parts"))
    found, wanted = (
        {name: one for name, one in trainer.hf_model.named_parameters() if one.requires_grad}
        for trainer in (again, whole)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "quantised",
    [{"format": "int4", "options": {"group": 32}}, pytest.param({"format": "nf4"}, marks=pytest.mark.sweep)],
)
def test_a_run_loads_as_the_dequantised_base_and_what_was_trained(tmp_path: Path, quantised: dict[str, Any]) -> None:
    trainer = Trainer(qlora(tmp_path, quantise=quantised), quiet=True)
    trainer.fit()
    folder = find_source(tmp_path / "runs" / "sft").folder
    assert "adapter_model.safetensors" in {file.name for file in folder.iterdir()}
    loaded, _ = load_model(str(tmp_path / "runs" / "sft"))
    assert not any(quantised_weights(loaded))
    trained = trainer.hf_model
    for name, weight in quantised_weights(trained):
        path = name.removesuffix(".base_layer.weight")
        layer = trained.get_submodule(path)
        merged = weight.dequantise() + layer.get_delta_weight("default")
        torch.testing.assert_close(loaded.get_submodule(path).weight, merged)
    assert all("lora_" in name for name in load_file(str(folder / "adapter_model.safetensors")))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_on_a_quantised_base_train_as_on_the_dense_weights(dora: bool, dtype: torch.dtype) -> None:
    import copy

    import toolkit
    from toolkit.patching.adapters import FUSED, adapter_report
    from toolkit.testing.models import random_model

    model = random_model("llama").to(dtype)
    quantise(model, "nf4")
    dense = copy.deepcopy(model)
    dequantise(dense)
    results = []
    for one in (model, dense):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, use_dora=dora, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(one, config)
        toolkit.patch(adapted)
        assert {verdict for _, verdict in adapter_report(adapted)} == {FUSED}
        found = torch.cat(toolkit.token_logprobs(adapted, [list(range(3, 40)), list(range(3, 20))]))
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        results.append([found, *torch.autograd.grad(found.sum(), trained)])
    assert len(results[0]) > 28
    assert all(map(torch.equal, *results))
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer.weight, QuantisedWeight)


def test_adapters_are_not_merged_into_codes() -> None:
    from toolkit.testing.models import random_model

    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(random_model("llama"), config)
    quantise(adapted, "nf4")
    with pytest.raises(
        ToolkitError, match="a weight in nf4 must not be written in place, got add_; dequantise the model"
    ):
        adapted.merge_adapter()
    dequantise(adapted)
    adapted.merge_adapter()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rows_choose_adapters_of_a_quantised_base(family: str) -> None:
    import toolkit
    from toolkit.testing.models import random_model

    base = random_model(family)
    quantise(base, "nf4")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config, adapter_name="one")
    adapted.add_adapter("two", config)
    toolkit.patch(adapted)
    params = [
        toolkit.SamplingParams(max_tokens=6, ignore_eos=True, lora_name=name, temperature=0.0)
        for name in ("one", "two", None)
    ]
    with toolkit.Engine(adapted) as engine:
        found = engine.generate([[5, 6, 7, 8]] * 3, params)
    with torch.no_grad():
        trained = toolkit.token_logprobs(
            adapted, [one.prompt_token_ids + one.token_ids for one in found], adapters=["one", "two", None]
        )
    for one, logprobs in zip(found, trained, strict=True):
        assert torch.equal(torch.tensor(one.logprobs), logprobs[-6:])
    assert len({tuple(one.logprobs) for one in found}) == 2  # without a choice it is the active one
