"""16-bit training: no update is lost, resuming is exact, and rollout reads the weights that the forward trains."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.objective_recipes import LOWER, TASK, WARMUP, check_resumes, objective_recipe, weights
from tests.helpers.processes import run_processes
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.precision import LowPrecisionAdamW, lower_precision, stochastic_round

SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
BF16, FP16 = {"train": {"mixed_precision": "bf16"}}, {"train": {"mixed_precision": "fp16"}}
KAHAN = {"model": {"dtype": "bfloat16"}}
STOCHASTIC = {**KAHAN, "optimizer": {"bf16_stochastic_round": True}}


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Sections of recipes, later ones over earlier ones."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, section in part.items():
            found[name] = {**found.get(name, {}), **section} if isinstance(section, dict) else section
    return found


def weight_of(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What the optimizer knows of a weight, in float32."""
    state = optimizer.state[parameter]
    kept = state["kahan_comp"].float() if "kahan_comp" in state else 0.0
    return state["master"] if "master" in state else parameter.detach().float() + kept


def gradients(steps: int) -> list[torch.Tensor]:
    """Gradients that bfloat16 holds, with a drift for the weights to follow."""
    source = torch.Generator().manual_seed(0)
    drift = torch.randn(64, 40, generator=source)
    return [(drift + torch.randn(64, 40, generator=source)).bfloat16() for _ in range(steps)]


def test_master_weights_are_those_of_float32_training() -> None:
    """Against torch's AdamW on float32 weights, the same gradients: every bit; the parameter is the rounding."""
    start = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) * 0.1
    exact = torch.nn.Parameter(start.clone())
    ours = torch.nn.Parameter(start.bfloat16())
    oracle = torch.optim.AdamW([{"params": [exact], "weight_decay": 0.1}], fused=True, **SETTINGS)
    optimizer = LowPrecisionAdamW([{"params": [ours], "weight_decay": 0.1}], masters={ours: start.clone()}, **SETTINGS)
    for gradient in gradients(30):
        exact.grad, ours.grad = gradient.float(), gradient.float()
        oracle.step()
        optimizer.step()
        assert torch.equal(weight_of(optimizer, ours), exact)
        assert torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize(("keep", "least"), [("kahan_sum", 0.99), ("bf16_stochastic_round", 0.5), ("none", 0.0)])
def test_pure_16_bit_weights_follow_float32(keep: str, least: float) -> None:
    start = (torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) * 0.1).bfloat16()
    exact, ours = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    oracle = torch.optim.AdamW([exact], weight_decay=0.0, **SETTINGS)
    optimizer = LowPrecisionAdamW([{"params": [ours], "weight_decay": 0.0}], keep=keep, **SETTINGS)
    for gradient in gradients(60):
        exact.grad, ours.grad = gradient.float(), gradient.float()
        oracle.step()
        optimizer.step()
    way, moved = exact.detach() - start, weight_of(optimizer, ours) - start
    right = float((way.sign() == moved.sign()).double().mean())
    assert right >= least
    if keep == "none":
        assert right < 0.3  # what the other ways are there for
    else:  # the mean step is that of float32
        assert float((moved * way.sign()).mean()) == pytest.approx(float(way.abs().mean()), rel=0.05)


def test_stochastic_rounding() -> None:
    values = torch.tensor([1.0 + 2**-9, -3.0, 0.0, math.inf, -math.inf, math.nan, 3.3e38]).repeat(20_000, 1)
    rounded = stochastic_round(values, torch.Generator().manual_seed(0))
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded[:, 0].double().mean()) == pytest.approx(1.0 + 2**-9, abs=1e-4)
    assert torch.equal(rounded[:, 1:5].float(), values[:, 1:5])  # what bfloat16 holds stays
    assert rounded[:, 5].isnan().all()
    assert rounded[:, 6].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3_moe"])
def test_the_forward_has_the_weights_that_transformers_would_load(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float16"):
        loaded = type(model).from_pretrained(tmp_path, dtype=getattr(torch, dtype)).state_dict()
        lowered = type(model).from_pretrained(tmp_path, dtype=torch.float32)
        masters = lower_precision(lowered, dtype)
        assert {value.dtype for value in masters.values()} == {torch.float32}
        for name, value in lowered.state_dict().items():
            assert torch.equal(value, loaded[name]), name
            assert value.dtype == loaded[name].dtype, name


@pytest.mark.parametrize(
    "precision", [BF16, pytest.param(FP16, marks=pytest.mark.sweep), KAHAN], ids=["bf16", "fp16", "kahan"]
)
def test_no_update_is_lost(precision: dict[str, Any], tmp_path: Path) -> None:
    """At a learning rate of 1e-5, against the same recipe in float32, from the same weights."""
    slow = {
        "optimizer": {"learning_rate": 1e-5, "weight_decay": 0.0},
        "schedule": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0},
        "train": {"max_steps": 25},
    }
    ends = []
    for name, kind in (("float32", {}), ("16 bits", precision)):
        recipe = objective_recipe(tmp_path, "sft", {}, run_name=name.replace(" ", ""), **merged(slow, kind))
        trainer = Trainer(recipe, quiet=True)
        optimizer = trainer.optimizer.optimizer
        parameters = list(trainer.hf_model.parameters())
        start = [weight_of(optimizer, one).clone() for one in parameters]
        for _ in range(25):
            trainer.train_step()
            trainer.objective.finish()
        ends.append([weight_of(optimizer, one) - before for one, before in zip(parameters, start)])
    moved = right = 0
    for exact, ours in zip(*ends):
        moved += int((exact != 0).sum())
        right += int(((exact != 0) & (exact.sign() == ours.sign())).sum())
    assert right >= 0.99 * moved > 1000


SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEACHER = {"config": {**SMALL, "num_attention_heads": 2}, "max_steps": 2}
ROLLOUTS = {"task": LOWER, "prompts": 2, "num_generations": 4}
WITH_REFERENCE = {"task": TASK, "prompts": 2, "num_generations": 2, "warmup": WARMUP, "beta": 0.01}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sft", {}, KAHAN),
    ("grpo", WITH_REFERENCE, BF16),
    ("grpo", ROLLOUTS, FP16),
]
MORE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sft", {}, BF16),
    ("sft", {}, STOCHASTIC),
    ("sft", {}, FP16),
    ("dpo", {"pairs": 4}, BF16),
    ("distill", {"prompts": 4, "teacher": TEACHER}, BF16),
]


@pytest.mark.parametrize(
    ("kind", "objective", "precision"), [*CASES, *(pytest.param(*one, marks=pytest.mark.sweep) for one in MORE)]
)
def test_resuming_is_exact_and_rollout_has_the_bits(
    kind: str, objective: dict[str, Any], precision: dict[str, Any], tmp_path: Path
) -> None:
    recipe = objective_recipe(tmp_path, kind, objective, **precision)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    dtypes = {parameter.dtype for parameter in whole.hf_model.parameters()}
    assert dtypes == {torch.float16 if precision is FP16 else torch.bfloat16}
    again = check_resumes(whole, recipe)
    ours, theirs = (
        {id(p): o.state[p] for p in t.hf_model.parameters()} for t in (whole, again) for o in [t.optimizer.optimizer]
    )
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
            assert value.dtype == other[key].dtype, key
    assert whole.gradients.state_dict() == again.gradients.state_dict()
    lines = read_metrics(whole.folder / "metrics.jsonl")
    if kind == "grpo":
        assert all(line["mismatch_bits"] == 0 for line in lines)
        versions = [line["weight_version"] for line in lines]
        assert versions == sorted(set(versions))
    if precision is FP16:
        assert all(line["loss_scale"] >= 1.0 for line in lines)
    last = whole.folder / "checkpoints" / "step-000004"
    saved = load_file(str(last / "model.safetensors"))
    assert {value.dtype for value in saved.values()} == dtypes  # those that rolled out
    assert json.loads((last / "config.json").read_text())["dtype"] == str(next(iter(dtypes))).removeprefix("torch.")


def test_adapters(tmp_path: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    recipe = objective_recipe(tmp_path, "sft", {"warmup": WARMUP}, model={"lora": lora}, **BF16)
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)
    trained = [p for p in whole.hf_model.parameters() if p.requires_grad]
    assert all("master" in whole.optimizer.optimizer.state[one] for one in trained)
    assert len(whole.optimizer.optimizer.state) == len(trained)


def test_pretraining_accumulates_in_float32(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    accumulate = {"train": {"gradient_accumulation_steps": 3, "max_steps": 2, "mixed_precision": "bf16"}}
    trainer = Trainer(tiny_recipe(tmp_path, **accumulate), quiet=True)
    parts: list[list[torch.Tensor]] = []
    backward = trainer.gradients.backward

    def alone(loss: torch.Tensor) -> None:
        parts.append(list(torch.autograd.grad(loss, list(trainer.ragged.parameters()), retain_graph=True)))
        backward(loss)

    trainer.gradients.backward = alone  # type: ignore[method-assign]
    trainer.gradients._section = trainer.recipe.optimizer.model_copy(update={"max_grad_norm": None})
    seen: list[torch.Tensor] = []
    clip = trainer.gradients._clip
    trainer.gradients._clip = lambda: (seen.extend(p.grad.clone() for p in trainer.ragged.parameters()), clip())[1]  # type: ignore
    trainer.train_step()
    for index, total in enumerate(seen):
        assert total.dtype == torch.float32
        wanted = sum(part[index].float() for part in parts)
        torch.testing.assert_close(total, wanted, rtol=1e-6, atol=1e-9)


def test_a_step_that_overflows_is_skipped_and_the_scale_halved(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "sft", {}, **FP16)
    trainer = Trainer(recipe, quiet=True)
    scaler = trainer.gradients.scaler
    assert scaler is not None
    trainer.train_step()
    assert trainer.gradients.metrics() == {"loss_scale": 65536.0, "skipped_steps": 0}
    state = trainer.gradients.state_dict()
    trainer.gradients.load_state_dict({**state, "scaler": {**state["scaler"], "scale": 2.0**40}})
    before = weights(trainer)
    _, norm = trainer.train_step()
    assert not math.isfinite(norm)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert trainer.gradients.metrics() == {"loss_scale": 2.0**39, "skipped_steps": 1}
    trainer.gradients.load_state_dict(state)
    next(iter(trainer.hf_model.parameters())).data.fill_(math.nan)
    trainer.gradients.load_state_dict({**state, "scaler": {**state["scaler"], "scale": 1.0}})  # no overflow of it
    for _ in range(5):
        trainer.train_step()
    with pytest.raises(ToolkitError, match=r"The gradients of 6 steps up to \d+ are not finite"):
        trainer.train_step()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"dtype": "bfloat16"}, **BF16}, "model.dtype must be 'float32' with train.mixed_precision 'bf16'"),
        ({"model": {"dtype": "float64"}, **FP16}, "model.dtype must be 'float32' with train.mixed_precision 'fp16'"),
        ({"model": {"dtype": "float16"}}, "whose gradients need loss scaling, got 'float16'"),
        ({"optimizer": {"kahan_sum": True}}, "optimizer.kahan_sum must be false unless model.dtype is 'bfloat16'"),
        ({"optimizer": {"bf16_stochastic_round": True}, **BF16}, "bf16_stochastic_round must be false unless"),
        (
            {"optimizer": {"bf16_stochastic_round": True, "kahan_sum": True}, **KAHAN},
            "most one of optimizer.kahan_sum and optimizer.bf16_stochastic_round must be true, got both",
        ),
        ({"train": {"mixed_precision": "fp8"}}, "train.mixed_precision"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(sections: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=re.escape(sentence)):
        tiny_recipe(tmp_path, **sections)


def test_accelerates_own_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        with pytest.raises(
            ToolkitError, match="accelerate's mixed_precision must be 'no', got 'bf16'; the recipe's is"
        ):
            Trainer(objective_recipe(tmp_path, "sft", {}), quiet=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.sweep
def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16", "stochastic", "rounded"):
        run_processes("training/two_precisions.py", tmp_path / precision, precision, says="same weights")
