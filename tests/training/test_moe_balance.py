"""Section ``train.moe`` in every objective: weights of the losses, metrics, corrections, several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.moe_recipes import KINDS, MOE_CONFIG, moe_recipe
from tests.helpers.objective_recipes import weights
from tests.helpers.processes import run_processes
from toolkit.errors import ToolkitError
from toolkit.moe.balance import RouterStatistics
from toolkit.testing.oracle import eager
from toolkit.training import model, start_model
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics

METRICS = {"expert_load_max", "expert_load_entropy", "aux_loss", "router_z_loss"}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in float64, whose experts transformers' default code does not take."""
    for module, name in ((start_model, "make_model"), (start_model, "load_checkpoint"), (model, "load_checkpoint")):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, make=make: eager(make(*given)))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainer.hf_model.named_parameters() if p.grad is not None}
    trainer.hf_model.zero_grad()
    return found


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_adds_the_losses_of_its_update(tmp_path: Path, kind: str) -> None:
    """The gradient of a step is the objective's, and that of the micro-batches' losses by their share of the tokens."""
    moe = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
    accumulate = {"gradient_accumulation_steps": 2} if kind in ("pretrain", "sft") else {}
    recipe = moe_recipe(tmp_path, kind, moe, model={"dtype": "float64"}, train={"batch_tokens": 48, **accumulate})
    trainer = Trainer(recipe, quiet=True)
    objective = trainer.objective
    micros = next(objective.updates(0))
    assert len(micros) > 1
    trainer.balancing.begin(micros, objective.rows)
    for index, micro in enumerate(micros):
        loss = objective.loss(trainer.forward, micro)
        part = trainer.balancing.loss(index)
        assert part is not None
        (loss + part).backward()
    ours = gradients(trainer)
    trainer.balancing.finish_update()
    got = trainer.balancing.metrics()

    total = sum(objective.rows(micro) for micro in micros)
    sums = [0.0, 0.0]
    for micro in micros:
        statistics = RouterStatistics()
        trainer.ragged.observer = statistics
        loss = objective.loss(trainer.forward, micro)
        balance, z_loss = statistics.take_losses()
        seen = statistics.take_loads()
        assert all(load.sum() == 2 * objective.rows(micro) for load in seen.values())
        share = objective.rows(micro) / total
        (loss + share * (0.3 * balance + 0.2 * z_loss)).backward()
        sums = [sums[0] + share * balance.item(), sums[1] + share * z_loss.item()]
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert got["aux_loss"] == pytest.approx(sums[0])
    assert got["router_z_loss"] == pytest.approx(sums[1])
    assert set(got) == METRICS


def test_a_run_logs_and_evens_out_its_experts(tmp_path: Path) -> None:
    loads = []
    for name, balance in (("off", 0.0), ("on", 1.0)):
        recipe = moe_recipe(
            tmp_path,
            "pretrain",
            {"router_aux_loss_coef": balance},
            run_name=name,
            train={"max_steps": 25, "batch_tokens": 160},
        )
        trainer = Trainer(recipe, quiet=True)
        trainer.fit()
        lines = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
        assert set(lines[0]) >= (METRICS if balance else {"expert_load_max", "expert_load_entropy"})
        assert ("aux_loss" in lines[0]) == (balance > 0)
        loads.append([line["expert_load_max"] - 1.0 for line in lines])  # what is above an even load
    assert loads[0][0] == loads[1][0]
    assert sum(loads[1][-5:]) < 0.8 * sum(loads[0][-5:])


@pytest.mark.usefixtures("exact")
def test_the_z_loss_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    found = []
    for name, budget in (("small", 40), ("large", 4096)):
        recipe = moe_recipe(
            tmp_path,
            "dpo",
            {"router_z_loss_coef": 0.5},
            run_name=name,
            model={"dtype": "float64"},
            train={"batch_tokens": budget},
        )
        trainer = Trainer(recipe, quiet=True)
        loss, norm = trainer.train_step()
        found.append((loss, norm, trainer.balancing.metrics()["router_z_loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_forwards_without_gradients_are_not_counted(tmp_path: Path) -> None:
    trainer = Trainer(
        moe_recipe(tmp_path, "sft", {"router_aux_loss_coef": 0.1}, evaluate={"do_eval": True}), quiet=True
    )
    trainer.objective.evaluate()
    assert trainer.balancing.statistics.take_loads() == {}


def test_recomputing_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for name, recompute in (("kept", False), ("again", True)):
        trainer = Trainer(moe_recipe(tmp_path, "sft", {"recompute": recompute}, run_name=name), quiet=True)
        experts = [module for path, module in trainer.hf_model.named_modules() if path.endswith(".experts")]
        assert [module.recompute_experts for module in experts] == [recompute] * 2
        trainer.train_step()
        found.append(weights(trainer))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_expert_biases_move_against_the_load(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **{
            name: value
            for name, value in MOE_CONFIG.items()
            if name not in ("num_experts", "head_dim", "norm_topk_prob")
        },
        "model_type": "deepseek_v3",
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    recipe = moe_recipe(tmp_path, "sft", {"bias_update_rate": 0.125})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    trainer = Trainer(recipe, quiet=True)
    expected = {layer: bias.clone() for layer, bias in enumerate(biases(trainer))}
    assert len(expected) == 2
    for _ in range(3):
        trainer.train_step()
        for layer, load in trainer.balancing._step_loads.items():
            assert load.sum() > 0
            expected[layer] += 0.125 * (load.mean() - load).sign().float()
        assert len(trainer.balancing._step_loads) == 2
        trainer.balancing.metrics()
        for layer, bias in enumerate(biases(trainer)):
            assert torch.equal(bias, expected[layer])
    assert any(bias.any() for bias in expected.values())
    trainer.save()
    again = Trainer(recipe.model_copy(update={"resume_from_checkpoint": True}), quiet=True)
    assert all(torch.equal(bias, expected[layer]) for layer, bias in enumerate(biases(again)))


def biases(trainer: Trainer) -> list[torch.Tensor]:
    return [b for name, b in trainer.hf_model.named_buffers() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize(
    ("moe", "sentence"),
    [
        (
            {"router_aux_loss_coef": 0.01},
            "train.moe.router_aux_loss_coef must be 0 for a model without a patched router",
        ),
        ({"router_z_loss_coef": 1.0}, "train.moe.router_z_loss_coef must be 0 for a model without a patched router"),
        ({"bias_update_rate": 0.001}, "train.moe.bias_update_rate must be 0 for a model without a patched router"),
        ({"recompute": True}, "train.moe.recompute must be false for a model without patched experts"),
    ],
)
def test_a_dense_model_has_nothing_to_balance(tmp_path: Path, moe: dict[str, Any], sentence: str) -> None:
    recipe = moe_recipe(tmp_path, "sft", moe)
    config = {name: value for name, value in MOE_CONFIG.items() if "expert" not in name and "norm_topk" not in name}
    config = {**config, "model_type": "llama"}
    del config["moe_intermediate_size"]
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
    with pytest.raises(ToolkitError) as caught:
        Trainer(recipe, quiet=True)
    assert sentence in str(caught.value)


def test_a_router_without_an_expert_bias_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"must be 0 for a model whose routers have no expert bias, got 0\.001"):
        Trainer(moe_recipe(tmp_path, "sft", {"bias_update_rate": 0.001}), quiet=True)


@pytest.mark.sweep
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_processes("training/two_balances.py", tmp_path, says="same weights", seconds=300)
    trainer = Trainer(
        moe_recipe(tmp_path, "dpo", {"router_z_loss_coef": 0.5}, run_name="one", train={"max_steps": 2}), quiet=True
    )
    trainer.fit()
    one, two = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    for key in ("router_z_loss", "expert_load_max", "expert_load_entropy"):
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-6), key
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-4)
