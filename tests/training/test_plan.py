"""``toolkit train --plan`` against runs of the same recipes: weights, gradients, optimizer and engine's state nearly
to the byte, activations within a factor of two, tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tests.helpers.moe_recipes import MOE_CONFIG
from tests.helpers.objective_recipes import LOWER, objective_recipe
from tests.helpers.training_recipes import write_corpus
from toolkit.cli import main
from toolkit.config import Recipe
from toolkit.training.loop import Trainer
from toolkit.training.plan import Speed, make_plan
from toolkit.training.plan.model import LayerSizes, empty_model
from toolkit.training.plan.work import SHARES_OF_GEMM, Work

FACTOR = 2.0
"""Within which the activations are planned."""
ON_TASK = {"task": LOWER, "prompts": 4, "num_generations": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("sft", {}, {}),
    "grpo": ("grpo", ON_TASK, {}),
    "dpo": ("dpo", {"pairs": 4}, {"optimizer": {"optim": "sgd"}}),
    "bf16, 8 bits": ("sft", {}, {"optimizer": {"optim": "adamw_8bit"}, "train": {"mixed_precision": "bf16"}}),
    "bfloat16": ("sft", {}, {"model": {"dtype": "bfloat16"}}),
    "adafactor": ("sft", {}, {"optimizer": {"optim": "adafactor"}}),
    "muon": ("sft", {}, {"optimizer": {"optim": "muon"}}),
    "moe": ("sft", {}, {"model": {"config": MOE_CONFIG}}),
    "frozen": ("sft", {}, {"model": {"freeze_parameters": ["model.embed_tokens", "*.self_attn.*"]}}),
    "int8": ("sft", {}, {"model": {"quantise": "int8"}}),
}
QUICK = ("sft", "grpo")


def dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A parameter, or the tensors that a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in dense_parts(getattr(tensor, name))]


def measured(recipe: Recipe) -> dict[str, int]:
    """Bytes of a run's first step, and the tokens that it trained."""
    trainer = Trainer(recipe, quiet=True)
    own = {part.untyped_storage().data_ptr() for one in trainer.hf_model.parameters() for part in dense_parts(one)}
    forwards: list[dict[int, int]] = []
    gradients: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in dense_parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                forwards[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss(forward: Any, micro: Any, of: Any = trainer.objective.loss) -> torch.Tensor:
        forwards.append({})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return of(forward, micro)

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        gradients.append(sum(grad.nbytes for grad in grads))

    trainer.objective.loss = loss  # type: ignore[method-assign]
    optimizer = trainer.optimizer.optimizer
    for part in getattr(optimizer, "parts", [optimizer]):
        part.register_step_pre_hook(count)
    trainer.train_step()
    state = [one for values in optimizer.state.values() for one in values.values() if isinstance(one, torch.Tensor)]
    weights = [part.nbytes for one in trainer.hf_model.parameters() for part in dense_parts(one)]
    rollout = getattr(trainer.objective, "rollout", None)
    found = {
        "parameters": trainer.num_parameters,
        "trainable": trainer.num_trainable,
        "weights": sum(weights),
        "gradients": sum(gradients),
        "optimizer": sum(one.nbytes for one in state if one.dim()),
        "activations": max(sum(one.values()) for one in forwards),
        "state": rollout.engine.pool.bytes if recipe.objective.kind == "grpo" else 0,
        "tokens": trainer.objective.finish()[0],
    }
    trainer.objective.close()
    return found


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in CASES]
)
def test_a_plan_is_what_a_run_takes(tmp_path: Path, case: str) -> None:
    kind, objective, sections = CASES[case]
    recipe = objective_recipe(tmp_path, kind, objective, **sections)
    plan, real = make_plan(recipe), measured(recipe)
    memory, work = plan.memory, plan.work
    assert (plan.parameters, plan.trainable) == (real["parameters"], real["trainable"])
    reference = 2 if kind == "dpo" else 1
    assert memory.weights == pytest.approx(reference * real["weights"], rel=0.0 if case != "int8" else 0.05)
    assert memory.gradients == real["gradients"]
    assert memory.optimizer == pytest.approx(real["optimizer"], rel=0.03)
    assert memory.state == pytest.approx(real["state"], rel=0.02)
    filled = real["activations"]
    if work.at_most:  # of the forwards' tokens, not as many as batch_tokens
        assert filled <= memory.activations * FACTOR
        assert 0 < real["tokens"] <= work.trained_tokens
    else:
        assert memory.activations / FACTOR <= filled <= memory.activations * FACTOR
        assert 0 < real["tokens"] <= work.trained_tokens == recipe.train.batch_tokens


def test_the_time_is_that_of_the_operations() -> None:
    none = {"decode_steps": 0, "decode_flops": 0.0, "weight_bytes": 0.0}
    work = Work(trained_tokens=10, rolled_tokens=0, at_most=False, flops=6e9, layers=2, how="", **none)
    assert work.seconds(Speed(flops=1e9, read_bytes=1.0)) == tuple(pytest.approx(6 / share) for share in SHARES_OF_GEMM)


def test_operations_of_a_llama_are_those_counted_by_hand(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "sft", {})
    sizes = LayerSizes.of(empty_model(recipe))
    # hidden 16, 2 heads of 8, 1 of keys and values, intermediate 24, 2 layers, vocabulary 257
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert (sizes.matrices, sizes.head, sizes.state, sizes.queries) == (2 * layer, 257 * 16, 2 * 2 * 8, 2 * 16)
    tokens, longest = recipe.train.batch_tokens, recipe.train.max_length
    by_hand = tokens * 3 * (2 * (2 * layer + 257 * 16) + 2 * longest * 2 * 16)
    assert make_plan(recipe).work.flops == by_hand


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text")
    assert main(["train", "--plan", "pretrain", "train.gradient_accumulation_steps=3"]) == 0
    said = capsys.readouterr().out
    assert "a step: 1,536 tokens trained: train.batch_tokens 512 x 3 forwards" in said
    for word in ("weights", "gradients", "optimizer", "activations", "Python and its libraries", "time: "):
        assert word in said
    assert {path.name for path in tmp_path.iterdir()} == {"text"}
    assert main(["train", "--plan", "pretrain", "model.config=null", "model.name_or_path=nowhere/at/all"]) == 2
    assert "model.name_or_path must have a configuration" in capsys.readouterr().err
