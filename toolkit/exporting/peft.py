"""A folder of PEFT's adapters, without the weights of their base model."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.hf import generate_greedily
from toolkit.exporting.manifest import installed_version
from toolkit.loading import load_with_adapters


class Peft(ExportTarget, name="peft"):
    """The active adapter in PEFT's format, which PEFT, vLLM and this project's server open beside the base model."""

    holds_adapters = True

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("peft",)

    def check(self, job: ExportJob) -> None:
        active_adapter(job.model, self.target)
        base = job.model.get_base_model()
        if not getattr(base, "name_or_path", None):
            raise ToolkitError(
                f"An export to {self.target!r} names the base model, which must come from a folder or the Hub."
            )

    def write(self, job: ExportJob, folder: Path) -> None:
        name = active_adapter(job.model, self.target)
        job.model.peft_config[name].base_model_name_or_path = job.model.get_base_model().name_or_path
        job.model.save_pretrained(str(folder), selected_adapters=[name])
        inside = folder / name
        if inside.is_dir():  # PEFT gives adapters that are not named "default" a folder each
            for file in inside.iterdir():
                file.rename(folder / file.name)
            inside.rmdir()
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder)

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        if importlib.util.find_spec("peft") is None:
            return None
        model = load_with_adapters(folder)
        return ConsumerOutput(f"peft {installed_version('peft')}", generate_greedily(model, prompts, max_tokens))


def active_adapter(model: Any, target: str) -> str:
    """The name of the one adapter that acts.

    Raises:
        ToolkitError: a model without adapters, or with several that act.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        raise ToolkitError(f"An export to {target!r} holds PEFT's adapters, got a {type(model).__name__} without any.")
    names = list(getattr(model, "active_adapters", ()))
    if len(names) != 1:
        raise ToolkitError(f"An export to {target!r} holds one adapter, and active are {', '.join(names) or 'none'}.")
    return str(names[0])
