"""PEFT: adapters in a patched model, fused where they are proven, left to PEFT's own forward where not.

    model = get_peft_model(model, LoraConfig(...))  # before or after the patch
    toolkit.patch(model)
    print(fuse_adapters(model))  # after adapters came into a model that was patched before

``patch`` adopts the adapters that it finds and the engine those that came later, so the call is for training, and for
reading what was done. Saving, loading, merging and switching are PEFT's own: the wrappers stay where they are.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching import adapters, report_of
from toolkit.patching.adapters import adapter_report, inner_model


@dataclass(frozen=True)
class AdapterReport:
    """``linear``: (path, "fused" or the reason for PEFT's own forward) of each adapted layer; ``experts``: how many
    parameters of experts have grouped adapters.
    """

    linear: tuple[tuple[str, str], ...]
    experts: int

    def __str__(self) -> str:
        counts = Counter(verdict for _, verdict in self.linear)
        lines = [f"{count} linear layers: {verdict}" for verdict, count in counts.items()]
        return "\n".join(lines + [f"{self.experts} parameters of experts: grouped"] * bool(self.experts))


def fuse_adapters(model: nn.Module) -> AdapterReport:
    """Fuse the adapters of a patched model (a ``PeftModel``, or one with ``add_adapter``), new ones and old.

    A linear layer with LoRA or DoRA becomes the layer and one ``lora_add``; adapters of parameters of experts become
    grouped products. Outputs and gradients are PEFT's. An adapted head makes its logits, so that no loss misses the
    adapter. Raises ToolkitError for a model that is not patched or has no adapters.
    """
    model = inner_model(model)
    report = report_of(model)
    if report is None:
        raise ToolkitError(f"model {type(model).__name__} is not patched; call toolkit.patch(model) first.")
    experts = adapters.fuse_adapters(model, report.numerics)
    linear = adapter_report(model)
    if not linear and not experts:
        raise ToolkitError(f"model {type(model).__name__} has no adapters; put them in with PEFT first.")
    return AdapterReport(tuple(linear), experts)
