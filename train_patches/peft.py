"""PEFT: adapters of a patched model are fused where a probe proves them, and run PEFT's own forward where not.

    model = get_peft_model(model, LoraConfig(...))  # before or after the patch
    toolkit.patch(model)
    print(fuse_adapters(model))  # for adapters that were added after the patch

``patch`` fuses the adapters that it finds, and the engine those that were added later. Call ``fuse_adapters`` to train
adapters that were added after the patch, and to read what was fused. Saving, loading, merging and switching stay
PEFT's: the wrappers remain in the model.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching import adapters, report_of
from toolkit.patching.adapters import adapter_report, inner_model


@dataclass(frozen=True)
class AdapterReport:
    """Which adapters are fused.

    Args:
        linear: (path, "fused" or the reason why PEFT's own forward stays) of each adapted linear layer.
        experts: number of parameters of experts with grouped adapters.
    """

    linear: tuple[tuple[str, str], ...]
    experts: int

    def __str__(self) -> str:
        counts = Counter(verdict for _, verdict in self.linear)
        lines = [f"{count} linear layers: {verdict}" for verdict, count in counts.items()]
        return "\n".join(lines + [f"{self.experts} parameters of experts: grouped"] * bool(self.experts))


def fuse_adapters(model: nn.Module) -> AdapterReport:
    """A report of all adapters, after those that were not fused yet are.

    A linear layer with LoRA or DoRA becomes the layer and one ``lora_add``; LoRA on parameters of experts becomes
    grouped GEMMs. Outputs and gradients are PEFT's. An adapted head computes its logits in the forward, so every loss
    includes its adapter.

    Args:
        model: a patched ``PeftModel``, or a patched model with ``add_adapter``.

    Raises:
        ToolkitError: the model is not patched, or has no adapters.
    """
    model = inner_model(model)
    report = report_of(model)
    if report is None:
        raise ToolkitError(f"model {type(model).__name__} is not patched; call toolkit.patch(model) first.")
    experts = adapters.fuse_adapters(model, report.numerics)
    linear = adapter_report(model)
    if not linear and not experts:
        raise ToolkitError(f"model {type(model).__name__} has no adapters; add them with PEFT first.")
    return AdapterReport(tuple(linear), experts)
