"""How a checkpoint wants to be sampled: its ``generation_config.json``."""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line

FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of a GenerationConfig, and those of ``SamplingParams`` whose defaults they are."""


def sampling_defaults(model: Any, choice: str = "auto") -> dict[str, Any]:
    """Arguments of ``SamplingParams`` that a generation configuration sets.

    Only the fields of ``FIELDS`` count, as in vLLM; ``do_sample`` does not: temperature 0 is greedy.

    Args:
        model: what ``load_model`` returned. With a folder its generation configuration becomes that of the folder, so
            that the engine takes the end-of-text tokens from there, too.
        choice: "auto" for the model's own, "vllm" for no defaults, or a folder with a ``generation_config.json``.

    Raises:
        ToolkitError: the folder has none.
    """
    if choice == "vllm":
        return {}
    if choice != "auto":
        model.generation_config = _from_folder(choice)
    config = getattr(model, "generation_config", None)
    given = config.to_diff_dict() if config is not None else {}
    return {ours: given[theirs] for theirs, ours in FIELDS.items() if given.get(theirs) is not None}


def _from_folder(folder: str) -> Any:
    from transformers import GenerationConfig

    if not (Path(folder) / "generation_config.json").is_file():
        raise ToolkitError(
            f"--generation-config must be auto, vllm or a folder with a generation_config.json, got {folder!r}."
        )
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise ToolkitError(f"generation_config.json in '{folder}' cannot be read ({first_line(error)}).") from None
