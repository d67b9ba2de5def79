"""The YAML of TRL's commands (``trl sft --config FILE``)."""

from collections.abc import Mapping
from typing import Any

from toolkit.config.objective import DatasetSection
from toolkit.config.translation import objectives
from toolkit.config.translation.arguments import ALWAYS, training_arguments
from toolkit.config.translation.base import Translation
from toolkit.config.translation.processes import processes

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "weight_decay": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
}  # fmt: skip
RATES = {"sft": 2e-5, "distill": 2e-5, "reward": 1e-4, "prm": 1e-5}
"""Default learning rates; others are 1e-6."""
UNNEEDED = {
    **ALWAYS,
    "packing*": "sequences are always packed",
    "eval_packing": "sequences are always packed",
    "truncation_mode": "sequences are cut at the end",
    "dataset_text_field": "a line's text is called text; objective.datasets has columns for other names",
    "use_vllm": "the engine rolls out from the live weights",
    "vllm_*": "the engine rolls out from the live weights",
    "use_transformers_paged": "the engine rolls out from the live weights",
    "ds3_gather_for_generation": "the engine rolls out from the live weights",
    "log_completions": "details.jsonl has completions, and toolkit watch shows them",
    "num_completions_to_print": "log.num_completions says how many details.jsonl has",
    "generation_batch_size": "objective.prompts says how many prompts a step has",
    "steps_per_generation": "objective.prompts says how many prompts a step has",
    "precompute_ref_log_probs": "the reference runs beside the model",
    "pad_token": "ragged batches have no padding",
    "shuffle_dataset": "lines are shuffled",
    "do_train": "toolkit train does",
    "eval_on_start": "evaluate.do_eval is before the first step and after the last",
    "per_device_eval_batch_size": "train.batch_tokens is the size of every forward",
    "disable_dropout": "models have no dropout unless model.config gives it",
    "ignore_bias_buffers": "buffers are not broadcast",
}


def kind_of(settings: Mapping[str, Any]) -> str:
    """The objective that the keys are of; sft where they leave it open."""
    if "distillation_mode" in settings or "teacher_model_kind" in settings:
        return "sdft"
    if "normalize_advantages" in settings or "reward_clip_range" in settings:
        return "rloo"
    if "reward_funcs" in settings or "num_generations" in settings:
        return "grpo"
    if "teacher_model_name_or_path" in settings:
        return "distill"
    if "step_separator" in settings or "train_on_last_step_only" in settings:
        return "prm"
    if "center_rewards_coefficient" in settings:
        return "reward"
    if "desirable_weight" in settings or "undesirable_weight" in settings:
        return "kto"
    if "cpo_alpha" in settings or "simpo_gamma" in settings:
        return "cpo"
    return "dpo" if "beta" in settings or "precompute_ref_log_probs" in settings else "sft"


def translate(settings: Mapping[str, Any], kind: str | None) -> Translation:
    """The recipe, and notes. Raises ToolkitError where it is not valid."""
    t = Translation(settings, kind or kind_of(settings))
    t.adapters = bool(t.take("use_peft", False))
    training_arguments(t, {**DEFAULTS, "learning_rate": RATES.get(t.kind, 1e-6)})
    _data(t)
    if t.kind in ("grpo", "rloo", "reinforce_plus_plus"):
        objectives.rollouts(t)
    elif t.kind == "sdft":
        objectives.self_distillation(t)
    elif t.kind == "distill":
        objectives.distillation(t)
    else:
        objectives.sizes(t, 1024)
        objectives.losses(t)
    if t.kind == "sft":
        t.put("objective.assistant_only_loss", bool(t.take("assistant_only_loss", False)))
        if t.take("completion_only_loss") is False:
            t.put("objective.completion_only_loss", False)
    t.move("chat_template_path", "objective.chat_template")
    processes(t)
    t.finish(UNNEEDED)
    return t


def _data(t: Translation) -> None:
    split, name = t.take("dataset_train_split", "train"), t.take("dataset_config")
    path, test = t.take("dataset_name"), t.take("dataset_test_split", "test")
    given = t.take("datasets")
    streaming = bool(t.take("dataset_streaming", False))
    datasets = [_dataset(t, one, streaming) for one in given or ()]
    if path is not None and not datasets:
        datasets = [_dataset(t, {"path": path, "name": name, "split": split}, streaming)]
    evaluated = t.take("eval_strategy", "no") != "no"
    if t.get("eval_strategy", "no") == "steps":
        t.unneeded("eval_strategy", "evaluate.do_eval is also before the first step and after the last")
    if not (t.has("objective.datasets") and datasets):
        if datasets:
            t.lose("dataset_name" if path is not None else "datasets", f"objective.kind '{t.kind}' takes a task")
        t.put("evaluate.do_eval", evaluated)
        return
    t.put("objective.datasets", datasets)
    held_out = None
    if evaluated and path is not None:
        held_out = [{**datasets[0], "split": test}]
        held_out[0].pop("streaming", None)  # it is measured on in order, as often as is asked
    share = float(t.take("test_split_size", 0.0) or 0.0)
    objectives.held_out(t, held_out, share if evaluated else 0.0)


def _dataset(t: Translation, given: Mapping[str, Any], streaming: bool) -> dict[str, Any]:
    """An entry of ``objective.datasets``."""
    found = {key: value for key, value in given.items() if value is not None and key in DatasetSection.model_fields}
    columns = given.get("columns")
    if isinstance(columns, dict):
        found["columns"] = columns
    elif columns is not None:
        found.pop("columns")
    for key, value in given.items():
        if key not in found and value is not None and key != "columns":
            t.lose(f"datasets.{key}", "an entry of objective.datasets has no such field", value)
    if streaming and "streaming" in DatasetSection.model_fields:
        found["streaming"] = True
    elif streaming:
        t.lose("dataset_streaming", "datasets are opened whole, from disk")
    return found
