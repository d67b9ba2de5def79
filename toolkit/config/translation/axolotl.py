"""Axolotl's YAML."""

from collections.abc import Mapping
from typing import Any

from toolkit.config.objective import DatasetSection
from toolkit.config.translation import objectives
from toolkit.config.translation.arguments import ALWAYS, training_arguments
from toolkit.config.translation.base import Translation
from toolkit.config.translation.processes import processes
from toolkit.errors import ToolkitError

NAMES = {
    "model_name_or_path": "base_model",
    "model_revision": "revision_of_model",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "sequence_len",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "init_lora_weights": "peft_init_lora_weights",
    "adapter_folder": "lora_model_dir",
    "beta": "rl_beta",
}
"""TRL's name of a key: Axolotl's."""
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "weight_decay": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
    "learning_rate": 2e-5,
}  # fmt: skip
KINDS = {"dpo": "dpo", "ipo": "dpo", "simpo": "cpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo"}
"""Objectives by Axolotl's ``rl``."""
FILES = ("json", "csv", "parquet", "arrow", "text")
UNNEEDED = {
    **ALWAYS,
    "sample_packing*": "sequences are always packed",
    "eval_sample_packing": "sequences are always packed",
    "multipack_*": "sequences are always packed",
    "pad_to_sequence_len": "ragged batches have no padding",
    "flash_attention": "patched layers run the toolkit's attention",
    "sdp_attention": "patched layers run the toolkit's attention",
    "xformers_attention": "patched layers run the toolkit's attention",
    "eager_attention": "patched layers run the toolkit's attention",
    "flash_attn_*": "patched layers run the toolkit's attention",
    "liger_*": "patched layers run the toolkit's kernels",
    "lora_mlp_kernel": "adapters run the toolkit's kernels",
    "lora_qkv_kernel": "adapters run the toolkit's kernels",
    "lora_o_kernel": "adapters run the toolkit's kernels",
    "dataset_processes": "lines are tokenised as they come",
    "tokenizer_type": "the checkpoint says which",
    "model_type": "the checkpoint says which",
    "is_*_derived_model": "the checkpoint says which",
    "strict": "unknown keys of recipes are errors",
    "wandb_*": "log.project and run_name say what a run is called",
    "trackio_*": "log.project and run_name say what a run is called",
    "eval_batch_size": "train.batch_tokens is the size of every forward",
    "eval_table_size": "details.jsonl has completions, and toolkit watch shows them",
    "debug": "the data report shows a decoded example",
    "default_system_message": "the chat template has its own",
}


def translate(settings: Mapping[str, Any], kind: str | None) -> Translation:
    """The recipe, and notes. Raises ToolkitError where it is not valid."""
    rl = settings.get("rl")
    if rl is not None and kind is None and rl not in KINDS:
        raise ToolkitError(f"rl must be one of {', '.join(KINDS)}, got '{rl}'.")
    plain = "reward" if settings.get("reward_model") else "sft"
    t = Translation(settings, kind or KINDS.get(str(rl), plain), NAMES)
    t.take("rl")
    t.take("reward_model")
    _loggers(t)
    _tokens(t)
    _adapter(t)
    training_arguments(t, DEFAULTS)
    _data(t)
    if t.kind == "grpo":
        t.add(t.take("trl", {}))
        objectives.rollouts(t)
    else:
        objectives.sizes(t, 512)
        objectives.losses(t)
    if rl == "ipo":
        t.put("objective.loss_type", "ipo")
    if rl == "simpo":
        t.put("objective.loss_type", "simpo")
        t.put("objective.cpo_alpha", float(t.take("cpo_alpha", 0.0)))
    if t.kind == "sft":
        everything = bool(t.take("train_on_inputs", False))
        t.put("objective.assistant_only_loss", not everything)
        t.put("objective.completion_only_loss", not everything)
    _template(t)
    processes(t)
    t.finish(UNNEEDED)
    return t


def _adapter(t: Translation) -> None:
    adapter = t.take("adapter")
    if adapter not in (None, "lora", "qlora"):
        t.lose("adapter", "model.lora is LoRA")
    t.adapters = adapter in ("lora", "qlora")
    if t.take("lora_target_linear"):
        t.unneeded("lora_target_linear", "model.lora.target_modules is every linear layer by default")
    if t.get("adapter_folder") is not None and not t.adapters:
        t.lose("adapter_folder", "name the folder in model.name_or_path to merge an adapter and train on")


LOGGERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "trackio": ("use_trackio", "trackio_project_name"),
    "tensorboard": ("use_tensorboard", "tensorboard"),
}
"""Loggers, and the keys each of which asks for one."""


def _loggers(t: Translation) -> None:
    asked = {name: [t.take(key) for key in keys] for name, keys in LOGGERS.items()}
    project = next((value for values in asked.values() for value in values if isinstance(value, str)), None)
    t.add({"report_to": [name for name, values in asked.items() if any(values)] or "none"})
    if project is not None:
        t.put("log.project", project)


def _tokens(t: Translation) -> None:
    """Tokens that are added."""
    special = t.take("special_tokens") or {}
    added = [*(t.take("tokens") or ()), *(special.get("additional_special_tokens") or ())]
    if added:
        t.put("tokenizer.added_tokens", added)
    others = {name: value for name, value in special.items() if name not in ("additional_special_tokens", "pad_token")}
    if others:
        t.lose("special_tokens", "the tokenizer says which tokens are special, beside those that are added", others)


def _template(t: Translation) -> None:
    name, text = t.take("chat_template"), t.take("chat_template_jinja")
    if text is not None:
        t.put("objective.chat_template", text, "chat_template_jinja")
    elif name not in (None, "tokenizer_default", "jinja"):
        t.lose("chat_template", "the tokenizer's template is taken; objective.chat_template has the text of another")


def _data(t: Translation) -> None:
    share = float(t.take("val_set_size", 0.0) or 0.0)
    given, streamed = t.take("datasets"), t.take("pretraining_dataset")
    given = given or streamed or []
    datasets = [_dataset(t, one) for one in ([given] if isinstance(given, (dict, str)) else given)]
    if streamed is given and t.kind == "sft":
        t.put("objective.excess_length_strategy", "split")
        if len(datasets) == 1 and "max_steps" in t.values["train"]:
            datasets[0]["streaming"] = True
    tests = [_dataset(t, one) for one in t.take("test_datasets") or ()]
    if not t.has("objective.datasets"):
        if datasets:
            t.lose("datasets", f"objective.kind '{t.kind}' takes a task")
        t.put("evaluate.do_eval", bool(share or tests))
        return
    t.put("objective.datasets", datasets)
    objectives.held_out(t, tests or None, share)


def _dataset(t: Translation, given: Any) -> dict[str, Any]:
    """An entry of ``objective.datasets``."""
    given = {"path": given} if isinstance(given, str) else dict(given)
    found: dict[str, Any] = {"path": given.pop("path")}
    kind, files = given.pop("ds_type", None), given.pop("data_files", None)
    if found["path"] in FILES and isinstance(files, str):
        found["path"] = files
    elif files is not None:
        found["data_files"] = files
    if kind is not None and kind not in FILES:
        t.lose("datasets.ds_type", "files are recognised by their ends", kind)
    columns = _columns(t, given)
    if columns:
        found["columns"] = columns
    for key in ("name", "split", "revision"):
        if given.get(key) is not None:
            found[key] = given.pop(key)
    for key, value in given.items():
        if value is None:
            continue
        if key in DatasetSection.model_fields and key not in found:
            found[key] = value
        else:
            t.lose(f"datasets.{key}", "an entry of objective.datasets has no such field", value)
    return found


def _columns(t: Translation, given: dict[str, Any]) -> dict[str, str]:
    """Which column is which field; formats are told apart by their fields, not by ``type``."""
    kind = given.pop("type", None)
    columns: dict[str, str] = {}
    if isinstance(kind, dict):  # a prompt made of fields by a format
        t.lose("datasets.type", "name the fields in columns; a format around them is the chat template's", kind)
    elif kind is not None and str(kind).partition(".")[0] in ("chatml", "llama3", "chat_template", "sharegpt"):
        if str(kind).endswith((".intel", ".ultra", ".argilla")):
            columns |= {"prompt": "question"} if str(kind).endswith(".intel") else {}
    elif kind not in (None, "alpaca", "completion", "user_defined.default"):
        t.lose("datasets.type", "lines are read as messages, prompts with completions, Alpaca's, pairs or text", kind)
    text = given.pop("field", None)
    if text not in (None, "text"):
        columns["text"] = text
    for key, field in (
        ("field_messages", "messages"), ("field_chosen", "chosen"), ("field_rejected", "rejected"),
        ("field_prompt", "prompt"), ("field_tools", "tools"), ("field_completion", "completion"),
        ("field_label", "label"),
    ):  # fmt: skip
        column = given.pop(key, None)
        if column not in (None, field) and (field, column) != ("messages", "conversations"):
            columns[field] = column
    mapping = given.pop("message_property_mappings", None)
    if mapping not in (None, {"role": "role", "content": "content"}, {"role": "from", "content": "value"}):
        t.lose("datasets.message_property_mappings", "messages have role and content, or from and value", mapping)
    for key, neutral in (
        ("roles_to_train", ["assistant"]), ("train_on_eos", "turn"), ("message_field_training", "train"),
    ):  # fmt: skip
        value = given.pop(key, None)
        if value not in (None, neutral) and not (key == "roles_to_train" and value == ["gpt"]):
            t.lose(f"datasets.{key}", "the assistant's turns count in the loss, each with its end", value)
    return columns
