"""Kahneman-Tversky optimisation: its loss by its definition, its data, what it learns."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.objective_recipes import LOWER, check_resumes, dense_logprobs, objective_recipe
from toolkit.errors import ToolkitError
from toolkit.training.loop import Trainer, train
from toolkit.training.objectives.kto import KTO, Judged

LINES = [
    {"prompt": "a b", "completion": " c d", "label": True},
    {"prompt": "e", "completion": " f", "label": 0},
    {"prompt": "g h i", "chosen": " j", "rejected": " k l m"},
    *({"prompt": f"p{at}", "completion": " q" * (at + 1), "label": at % 3 == 0} for at in range(5)),
]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def of_lines(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> Any:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    given = {"task": None, "data_files": str(path), "evaluation": {"val_set_size": 1e-9}, **fields}
    return objective_recipe(
        tmp_path, "kto", given, model={"dtype": "float64"}, train={"batch_tokens": 16}, tokenizer={"vocab_size": 300}
    )


def moved(trainer: Trainer) -> KTO:
    """The objective of a run whose weights are no longer the reference's."""
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.hf_model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance, dtype=torch.float64))
    assert isinstance(trainer.objective, KTO)
    return trainer.objective


def ratio(trainer: Trainer, prompt: list[int], completion: list[int]) -> float:
    """By the unpatched forward of each model, on a sequence alone."""
    objective = trainer.objective
    assert isinstance(objective, KTO)
    own, reference = (
        float(dense_logprobs(model, prompt + completion)[-len(completion) :].sum().detach())
        for model in (trainer.hf_model, objective.reference.model)
    )
    return own - reference


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_run_has_the_loss_of_the_definition(loss_type: str, tmp_path: Path) -> None:
    fields = {"loss_type": loss_type, "lines": 8, "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.25}
    trainer = Trainer(of_lines(tmp_path, LINES, **fields), quiet=True)
    objective = moved(trainer)
    micros = next(objective.updates(0))
    assert len(micros) > 1
    examples: list[Judged] = [one for micro in micros for one in micro if one.weight]
    assert len(examples) == 9
    loss = torch.stack([objective.loss(trainer.forward, micro) for micro in micros]).detach().sum()
    others = [examples[-1], *examples[:-1]]
    mixed = [ratio(trainer, one.prompt, other.completion) for one, other in zip(examples, others)]
    kl = max(sum(mixed) / len(mixed), 0.0) if loss_type == "kto" else 0.0
    exact = [
        1.5 * (1 - s(0.5 * (ratio(trainer, one.prompt, one.completion) - kl)))
        if one.label
        else 0.25 * (1 - s(0.5 * (kl - ratio(trainer, one.prompt, one.completion))))
        for one in examples
    ]
    assert float(loss) == pytest.approx(sum(exact) / len(exact), rel=1e-6)
    _, metrics = objective.finish()
    assert metrics.get("kl", 0.0) == pytest.approx(kl)
    good = [0.5 * ratio(trainer, one.prompt, one.completion) for one in examples if one.label]
    assert metrics["rewards/chosen"] == pytest.approx(sum(good) / len(good), rel=1e-6)


def test_lines_and_pairs_become_completions_with_labels(tmp_path: Path) -> None:
    objective = Trainer(of_lines(tmp_path, LINES, lines=8), quiet=True).objective
    assert isinstance(objective, KTO)
    assert objective.dataset is not None
    found = [[one.label for one in objective.examples(line)] for line in objective.dataset.train[:4]]
    assert found == [[True], [False], [True, False], [True]]
    tokens = objective.context.tokenizer
    first, *_ = objective.examples(objective.dataset.train[0])
    assert tokens.decode(first.prompt) == "a b"
    assert tokens.decode(first.completion).startswith(" c d")


@pytest.mark.parametrize("label", [None, "yes", 2, 1.0])
def test_a_label_is_true_or_false(label: Any, tmp_path: Path) -> None:
    line = {"prompt": "a", "completion": " b"} | ({} if label is None else {"label": label})
    with pytest.raises(ToolkitError, match="must have 'label' as true or false, got"):
        Trainer(of_lines(tmp_path, [*LINES, line]), quiet=True)


def test_labels_are_learnt(tmp_path: Path) -> None:
    sections = {
        "train": {"max_steps": 15, "batch_tokens": 512},
        "optimizer": {"learning_rate": 1e-2},
        "evaluate": {"do_eval": True},
        "checkpoint": {"save_steps": None},
    }
    metrics = train(objective_recipe(tmp_path, "kto", {"task": LOWER, "lines": 16}, **sections), quiet=True)
    assert metrics["before_training"]["eval_rewards/accuracies"] == 0.5
    assert metrics["eval_rewards/accuracies"] > 0.9
    assert metrics["eval_rewards/chosen"] > 0 > metrics["eval_rewards/rejected"]


def test_resuming_is_exact(tmp_path: Path) -> None:
    recipe = objective_recipe(tmp_path, "kto", {"lines": 6})
    whole = Trainer(recipe, quiet=True)
    whole.fit()
    check_resumes(whole, recipe)
