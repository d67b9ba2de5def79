"""Keys that TRL and Axolotl share: transformers' ``TrainingArguments``, and PEFT's adapters."""

import re
import typing
from pathlib import PurePosixPath
from typing import Any

from toolkit.config.outputs import LoggerName
from toolkit.config.translation.base import Translation

OPTIMIZERS = {
    "adamw_torch": "adamw_torch_fused",
    "adamw_hf": "adamw_torch_fused",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_apex_fused": "adamw_torch_fused",
    "paged_adamw_32bit": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "ademamix_8bit": "",
}
ADAPTERS_OWN = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora", "init_lora_weights",
)  # fmt: skip
"""Keys of adapters that are in the configuration of those that are continued."""
ALWAYS = {
    "logging_*": "every step is logged",
    "log_level*": "the program prints what a run does",
    "disable_tqdm": "a progress bar is shown on terminals",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing has no settings",
    "attn_implementation": "patched layers run the toolkit's attention",
    "use_liger_kernel": "patched layers run the toolkit's kernels",
    "dataloader_*": "lines are read by position",
    "dataset_num_proc": "lines are tokenised as they come",
    "dataset_batch_size": "lines are tokenised as they come",
    "remove_unused_columns": "further columns of a line are ignored",
    "pad_to_multiple_of": "ragged batches have no padding",
    "padding_free": "ragged batches have no padding",
    "group_by_length": "ragged batches have no padding",
    "torch_empty_cache_steps": "nothing is to be emptied",
    "ddp_*": "data parallel needs no settings",
    "local_rank": "the launcher sets it",
    "tf32": "the numerics mode says how matrices are multiplied",
    "save_safetensors": "weights are saved as safetensors",
    "save_only_model": "a checkpoint resumes exactly",
    "use_cpu": "accelerate chooses the device",
    "full_determinism": "runs are deterministic",
    "data_seed": "seed orders the data, too",
    "average_tokens_across_devices": "a loss is a mean over the tokens of all processes",
    "include_num_input_tokens_seen": "num_tokens is logged",
    "ignore_data_skip": "a run resumes at its position in the data",
    "skip_memory_metrics": "it is off by default",
    "torch_compile*": "patched layers run the toolkit's kernels",
    "hub_*": "nothing is pushed",
    "push_to_hub": "nothing is pushed",
}
"""Keys that need no counterpart, and why."""


def training_arguments(t: Translation, defaults: dict[str, Any]) -> None:
    """Model, precision, adapters, optimizer, schedule, steps, checkpoints and logs.

    Args:
        defaults: of the other program, where the recipe's differ: they are written out.
    """
    _run(t)
    t.put("model.name_or_path", t.take("model_name_or_path"))
    revision = t.take("model_revision", "main")
    if revision != "main":
        t.put("model.revision", revision)
    t.move("trust_remote_code", "model.trust_remote_code")
    _adapters(t, defaults)
    _optimizer(t, defaults)
    _precision(t)
    _schedule(t, defaults)
    steps = t.take("max_steps", -1)
    epochs = t.take("num_train_epochs", defaults["num_train_epochs"])
    if steps > 0:
        t.put("train.max_steps", steps)
    else:
        t.put("train.num_train_epochs", float(epochs))
    _checkpoints(t)
    _measures(t)
    _logs(t)
    if t.take("gradient_checkpointing", False):
        t.put("train.gradient_checkpointing", True, "gradient_checkpointing")


def _run(t: Translation) -> None:
    folder = PurePosixPath(str(t.take("output_dir", "runs/run")))
    named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder.name) is not None
    t.put("run_name", folder.name if named else "run")
    t.put("output_dir", str(folder.parent) if named else str(folder))
    if t.take("run_name") is not None:
        t.unneeded("run_name", f"a run is called by its folder, {folder.name}")
    t.put("seed", int(t.take("seed", 42)))
    resumed = t.take("resume_from_checkpoint")
    if resumed not in (None, False):
        t.lose("resume_from_checkpoint", "checkpoints of other programs are not resumed; toolkit train --resume is")


def _adapters(t: Translation, defaults: dict[str, Any]) -> None:
    t.take("lora_task_type")
    four, eight = t.take("load_in_4bit", False), t.take("load_in_8bit", False)
    kind = t.take("bnb_4bit_quant_type", "nf4")
    if four and kind != "nf4":
        t.lose("bnb_4bit_quant_type", "a base of 4 bits is in nf4")
    double = t.take("use_bnb_nested_quant", False)
    if not t.adapters:
        for name in ("load_in_4bit", "load_in_8bit"):
            if t.get(name):
                t.lose(name, "without adapters model.quantise trains the weights through their rounding")
        return
    if four:
        t.put("model.quantise", {"format": "nf4", "options": {"double": True}} if double else "nf4")
    elif eight:
        t.put("model.quantise", "int8")
    folder = t.take("adapter_folder")
    if folder is not None:
        t.put("model.lora.adapter", folder)
        for name in ADAPTERS_OWN:
            t.unneeded(name, "the adapters of model.lora.adapter have theirs")
        return
    t.put("model.lora.r", t.take("lora_r", defaults["lora_r"]))
    t.put("model.lora.lora_alpha", float(t.take("lora_alpha", defaults["lora_alpha"])))
    t.put("model.lora.lora_dropout", float(t.take("lora_dropout", defaults["lora_dropout"])))
    targets = t.take("lora_target_modules")
    if targets not in (None, "all-linear", ["all-linear"]):
        t.put("model.lora.target_modules", [targets] if isinstance(targets, str) else targets)
    t.move("lora_target_parameters", "model.lora.target_parameters")
    for name, field in (
        ("lora_modules_to_save", "modules_to_save"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora")
    ):  # fmt: skip
        value = t.take(name)
        if value:
            t.put(f"model.lora.{field}", value, name)
    start = t.take("init_lora_weights")
    if start is not None:
        t.put("model.lora.init_lora_weights", start)


def _optimizer(t: Translation, defaults: dict[str, Any]) -> None:
    name = str(t.take("optim", "adamw_torch_fused"))
    t.put("optimizer.optim", OPTIMIZERS.get(name, name), "optim")
    for field in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        t.put(f"optimizer.{field}", float(t.take(field, defaults[field])))
    norm = float(t.take("max_grad_norm", 1.0))
    t.put("optimizer.max_grad_norm", norm if norm > 0 else None)


def _precision(t: Translation) -> None:
    half = {"bf16": t.take("bf16", False), "fp16": t.take("fp16", False)}
    names = [name for name in ("dtype", "torch_dtype") if t.take(name) is not None]
    dtype = str(t.get(names[0])).removeprefix("torch.") if names else "float32"
    mixed = next((name for name, on in half.items() if on), "fp16" if dtype == "float16" else None)
    if t.values["optimizer"].get("optim", "adamw_torch_fused") not in ("adamw_torch_fused", "adamw_8bit"):
        for name in (*(name for name, on in half.items() if on), *names):
            if dtype != "float32" or half.get(name):
                t.lose(name, "weights of 16 bits are trained by AdamW")
    elif mixed is not None:
        t.put("train.mixed_precision", mixed)
    elif dtype == "bfloat16":
        t.put("model.dtype", dtype)


def _schedule(t: Translation, defaults: dict[str, Any]) -> None:
    kind = t.take("lr_scheduler_type", defaults["lr_scheduler_type"])
    steps, ratio = t.take("warmup_steps", 0), t.take("warmup_ratio", 0.0)
    if 0 < steps < 1:  # transformers 5: a share of the run
        steps, ratio = 0, steps
    if kind == "constant" and (steps or ratio):
        kind = "constant_with_warmup"
    options = dict(t.take("lr_scheduler_kwargs", {}) or {})
    if kind in ("cosine_with_min_lr", "warmup_stable_decay"):
        for name, field in (
            ("min_lr_rate", "min_lr_ratio"), ("min_lr_ratio", "min_lr_ratio"), ("num_decay_steps", "num_decay_steps")
        ):  # fmt: skip
            if name in options:
                t.put(f"schedule.{field}", options.pop(name), "lr_scheduler_kwargs")
        if options:
            t.lose("lr_scheduler_kwargs", f"schedule.lr_scheduler_type '{kind}' has no {', '.join(options)}")
    elif options:
        t.put("schedule.lr_scheduler_kwargs", {name: float(value) for name, value in options.items()})
    t.put("schedule.lr_scheduler_type", kind, "lr_scheduler_type")
    if steps:
        t.put("schedule.warmup_steps", int(steps))
    elif ratio:
        t.put("schedule.warmup_ratio", float(ratio))


def _checkpoints(t: Translation) -> None:
    strategy, steps = t.take("save_strategy", "steps"), t.take("save_steps", 500)
    t.put("checkpoint.save_steps", int(steps) if strategy == "steps" and steps >= 1 else None)
    if strategy not in ("steps", "no"):
        t.lose("save_strategy", "checkpoints are every checkpoint.save_steps and after the last step")
    if strategy == "steps" and 0 < steps < 1:
        t.lose("save_steps", "checkpoint.save_steps is a number of steps")
    limit = t.take("save_total_limit")
    if limit:
        t.put("checkpoint.save_total_limit", int(limit))


def _measures(t: Translation) -> None:
    """Held-out measures between steps."""
    strategy, steps = t.get("eval_strategy"), t.take("eval_steps")
    if strategy == "steps" and steps is None:
        steps = t.get("logging_steps", 10)
    if strategy == "no" and steps is not None:
        t.unneeded("eval_steps", "nothing is evaluated")
    elif strategy not in (None, "no", "steps"):
        t.lose("eval_strategy", "evaluate.eval_steps is a number of steps")
    elif steps is not None and not steps >= 1:
        t.lose("eval_steps", "evaluate.eval_steps is a number of steps")
    elif steps is not None:
        t.put("evaluate.eval_steps", int(steps), "eval_steps")
    t.move("greater_is_better", "evaluate.greater_is_better")


def _logs(t: Translation) -> None:
    given = t.take("report_to", "none")
    names = [given] if isinstance(given, str) else list(given)
    known = [name for name in names if name in typing.get_args(LoggerName)]
    for name in names:
        if name not in (*known, "none", "all"):
            t.lose("report_to", f"there is no {name}; metrics.jsonl has every step")
    t.put("log.report_to", known or "none")
