"""PEFT's adapters in a patched model: LoRA and DoRA of linear layers, LoRA on parameters of experts.

In reading order: ``find`` the wrappers that PEFT put around modules; the fused forwards, ``linear`` and ``experts``;
``prove`` a fused forward against PEFT's own; ``fuse``, and give the wrappers their own forward back; ``follow`` which
adapters are active. Saving, loading, merging and switching stay PEFT's: the wrappers remain in the model.
"""

from toolkit.patching.adapters.find import (
    adapter_layers,
    base_module,
    inner_model,
    unwrapped,
    vocabulary_size,
    without_adapters,
    wraps_parameter,
)
from toolkit.patching.adapters.follow import AdapterSwitches, adapter_entries, base_modules
from toolkit.patching.adapters.fuse import FUSED, adapter_report, fuse_adapters, release_adapters

__all__ = [
    "FUSED",
    "AdapterSwitches",
    "adapter_entries",
    "adapter_layers",
    "adapter_report",
    "base_module",
    "base_modules",
    "fuse_adapters",
    "inner_model",
    "release_adapters",
    "unwrapped",
    "vocabulary_size",
    "without_adapters",
    "wraps_parameter",
]
