"""LoRA adapters as a GGUF file, which llama.cpp and Ollama put on the base model's file."""

from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.exporting.base import ExportJob, ExportTarget
from toolkit.exporting.gguf.families import family_of
from toolkit.exporting.gguf.tensors import Names, changed
from toolkit.exporting.peft import active_adapter

FILE = "adapter.gguf"
_PREFIX = "base_model.model."


class GgufLora(ExportTarget, name="gguf-lora"):
    """``adapter.gguf``, float32: the active adapter's matrices, for a model that was exported to "gguf".

    llama.cpp scales every adapter by alpha / rank; where PEFT scales otherwise, matrix B holds the difference.
    """

    holds_adapters = True

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("gguf", "peft")

    def check(self, job: ExportJob) -> None:
        adapter_tensors(job.model, self.target)

    def write(self, job: ExportJob, folder: Path) -> None:
        from gguf import GGUFWriter

        name = active_adapter(job.model, self.target)
        writer = GGUFWriter(folder / FILE, family_of(job.model.get_base_model(), self.target).arch)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(job.model.peft_config[name].lora_alpha))
        for tensor, values in adapter_tensors(job.model, self.target).items():
            writer.add_tensor(tensor, values.detach().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def adapter_tensors(model: Any, target: str) -> dict[str, Tensor]:
    """GGUF's names and tensors of the active adapter.

    Raises:
        ToolkitError: an adapter that llama.cpp does not have: DoRA, whole modules, embeddings, experts, other kinds.
    """
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model, target)
    config, base = model.peft_config[adapter], model.get_base_model()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ToolkitError(f"An export to {target!r} holds LoRA adapters, got peft_type {kind!r}.")
    if config.use_dora or config.bias != "none":
        field = "use_dora must be false" if config.use_dora else f"bias must be 'none', got {config.bias!r}"
        raise ToolkitError(f"An export to {target!r} holds matrices A and B alone: {field}.")
    family = family_of(base, target)
    names = Names(family, base.config.num_hidden_layers, target)
    found: dict[str, Tensor] = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
        stem, _, part = key.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise ToolkitError(
                f"An export to {target!r} cannot hold '{key}': llama.cpp has adapters of linear layers alone."
            )
        layer = stem.removeprefix(_PREFIX)
        name = names.of(f"{layer}.weight")
        if part == "lora_A":
            found[f"{name}.lora_a"] = tensor
        else:
            rows = changed(f"{layer}.weight", base.config, family)(tensor)
            factor = model.get_submodule(stem).scaling[adapter] * tensor.shape[1] / config.lora_alpha
            found[f"{name}.lora_b"] = rows * factor
    if not found:
        raise ToolkitError(f"An export to {target!r} holds adapters of linear layers, and '{adapter}' has none.")
    return found
