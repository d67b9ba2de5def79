"""Losses on pairs are those of TRL's DPO and CPO trainers, on the same pairs of uneven lengths in the same order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.objective_recipes import objective_recipe
from toolkit.testing.models import random_model, tiny_tokenizer
from toolkit.training.loop import Trainer
from toolkit.training.metrics import read_metrics
from toolkit.training.preference_losses import WITH_REFERENCE

PAIRS, STEPS = 4, 3
DPO: list[dict[str, Any]] = [
    *({"loss_type": name} for name in WITH_REFERENCE if name not in ("exo_pair", "robust")),
    *({"loss_type": name, "label_smoothing": 0.2} for name in ("exo_pair", "robust")),
    {"loss_type": "sigmoid", "sft_weight": 0.5},
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3], "sft_weight": 0.5},
    {"loss_type": "sigmoid", "ld_alpha": 0.4},
    {"loss_type": "ipo", "ld_alpha": 0.0},
    *({"loss_type": "sigmoid", "f_divergence_type": kind} for kind in ("forward_kl", "alpha_divergence")),
    {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid_norm", "f_divergence_type": "forward_kl"},
    {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9},
    {"loss_type": "discopop", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    {"loss_type": ["sigmoid", "ipo"], "use_weighting": True},
    {"loss_type": "sigmoid", "sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1},
]
CPO: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "hinge", "cpo_alpha": 0.5},
    {"loss_type": "ipo", "cpo_alpha": 0.0},
    {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.3, "label_smoothing": 0.1},
    # Not with a loss of sums: TRL takes the power of a probability that is 0 in float32 (test_preferences.py has it).
    {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.2},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = random_model("llama")
    model.save_pretrained(str(folder / "model"))
    tiny_tokenizer(model.config.vocab_size).save_pretrained(str(folder / "model"))
    lines = [
        {"prompt": f"{at} is", "chosen": " b" * (1 + at % 5) + str(at), "rejected": " c" * (1 + at % 3)}
        for at in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def ours(base: Path, kind: str, fields: dict[str, Any], output: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """The losses of a run, and its pairs in order."""
    recipe = objective_recipe(
        output, kind,
        {"task": None, "data_files": str(base / "pairs.jsonl"), "pairs": PAIRS, "beta": 0.3, **fields},
        model={"name_or_path": str(base / "model"), "config": None},
        train={"max_steps": STEPS, "batch_tokens": 2048, "max_length": 64},
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta2": 0.999},
        schedule={"lr_scheduler_type": "constant", "warmup_steps": 0},
    )  # fmt: skip
    trainer = Trainer(recipe, quiet=True)
    order = trainer.objective.sources(trainer.objective.context).take(PAIRS * STEPS)
    trainer.fit()
    return [line["loss"] for line in read_metrics(trainer.folder / "metrics.jsonl")], [line.value for line in order]


def of_trl(base: Path, make: Any, config: Any, lines: list[dict[str, Any]], output: Path, **fields: Any) -> list[float]:
    """The losses of TRL's trainer."""
    from datasets import Dataset

    from tests.helpers.trl_trainers import trained_losses

    arguments = config(
        output_dir=str(output / "trl"), max_steps=STEPS, per_device_train_batch_size=PAIRS, learning_rate=1e-3,
        lr_scheduler_type="constant", max_grad_norm=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False,
        train_sampling_strategy="sequential", report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, max_length=64, beta=0.3, adam_beta2=0.999, adam_beta1=0.9, **fields,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(str(base / "model"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(base / "model"))
    tokenizer.bos_token = None  # CPO's would add it, although the tokenizer does not
    trainer = make(model=model, args=arguments, train_dataset=Dataset.from_list(lines), processing_class=tokenizer)
    return trained_losses(trainer)


@pytest.mark.sweep
@pytest.mark.parametrize("fields", DPO, ids=lambda fields: "-".join(map(str, fields.values())))
def test_dpo(base: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    losses, lines = ours(base, "dpo", fields, tmp_path)
    given = dict(fields)
    weight = given.pop("sft_weight", None)
    if weight is not None:
        names = [given["loss_type"]] if isinstance(given["loss_type"], str) else given["loss_type"]
        weights = given.get("loss_weights", [1.0])
        given |= {"loss_type": [*names, "sft"], "loss_weights": [*weights, weight]}
    assert of_trl(base, DPOTrainer, DPOConfig, lines, tmp_path, **given) == pytest.approx(losses, abs=1e-4, rel=0)


@pytest.mark.sweep
@pytest.mark.parametrize("fields", CPO, ids=lambda fields: "-".join(map(str, fields.values())))
def test_cpo(base: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    losses, lines = ours(base, "cpo", fields, tmp_path)
    assert of_trl(base, CPOTrainer, CPOConfig, lines, tmp_path, **fields) == pytest.approx(losses, abs=1e-4, rel=0)
