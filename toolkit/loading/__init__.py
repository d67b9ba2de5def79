"""Models, tokenizers and processors from a folder, a run, adapters, a GGUF file or the Hub: one loader for all callers.

Weights are safetensors or GGUF, never pickled; a tensor that the files lack is an error, never random values.
"""

from typing import Any

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.loading.classes import RUNNERS, auto_class, pooling_class, runner_of
from toolkit.loading.generation_config import sampling_defaults
from toolkit.loading.model import DTYPES, load_weights, load_with_adapters, read_config
from toolkit.loading.new_weights import read_new_weights
from toolkit.loading.pooling_files import pooler_settings, pooling_files
from toolkit.loading.processor import add_files, load_processor, processor_files
from toolkit.loading.source import Source, find_source
from toolkit.loading.tokenizer import find_tokenizer, load_tokenizer

__all__ = [
    "DTYPES",
    "RUNNERS",
    "Source",
    "add_files",
    "auto_class",
    "choose_runner",
    "find_source",
    "find_tokenizer",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "load_weights",
    "load_with_adapters",
    "pooler_settings",
    "pooling_class",
    "pooling_files",
    "processor_files",
    "read_config",
    "read_new_weights",
    "runner_of",
    "sampling_defaults",
    "with_draft_model",
]


def load_model(
    name_or_path: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    field: str = "model",
    runner: str = "generate",
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None). A model with image or audio towers has them all.

    Args:
        name_or_path: a folder of a Hugging Face model or of PEFT adapters (merged into their base model), a training
            run (its latest checkpoint), a GGUF file, or a repository of the Hub such as ``org/name``. The Hub's cache
            alone is read when ``HF_HUB_OFFLINE`` is set.
        dtype: one of ``DTYPES``. Weights are memory-mapped and converted tensor by tensor.
        device: where the weights are loaded to.
        revision: branch, tag or commit of a repository of the Hub.
        trust_remote_code: run Python code that comes with the checkpoint.
        field: what the user calls ``name_or_path``, for error sentences.
        runner: as ``choose_runner`` returns it.

    Raises:
        ToolkitError: what is missing, corrupt or does not fit, in one sentence.
    """
    source = find_source(name_or_path, revision=revision, trust_remote_code=trust_remote_code, field=field)
    return load_weights(source, dtype, device, runner), load_tokenizer(source)


def with_draft_model(limits: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of ``Engine``, with the model of ``speculative_config`` loaded where that is a name.

    Args:
        limits: the arguments.
        dtype, device: as for ``load_model``.

    Raises:
        ToolkitError: as ``load_model``.
    """
    config = limits.get("speculative_config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        return limits
    model, _ = load_model(config["model"], dtype, device, field="model of speculative_config")
    return {**limits, "speculative_config": {**config, "model": model}}


def choose_runner(source: Source, runner: str = "auto") -> tuple[str, dict[str, Any]]:
    """("generate" or "pooling", fields of a ``PoolerConfig`` that the model's files give).

    Args:
        source: of the model.
        runner: "auto" for what the checkpoint is for (``runner_of``); or one of ``RUNNERS``, which is returned.

    Raises:
        ToolkitError: another runner, or files that ask for a pooling that is not served.
    """
    allowed = ("auto", *RUNNERS)
    if runner not in allowed:
        raise ToolkitError(must_be_one_of("runner", runner, allowed))
    base = source.whole
    if runner == "generate" or base.gguf is not None:
        return "generate" if runner == "auto" else runner, {}
    settings = pooler_settings(base)
    if runner == "auto":
        runner = runner_of(read_config(base), settings is not None)
    return runner, (settings or {}) if runner == "pooling" else {}
