"""PEFT's adapters in a patched model: LoRA and DoRA of linear layers, LoRA on parameters of experts.

In reading order: ``find`` the wrappers that PEFT put around modules; ``rows`` that choose adapters; the fused
forwards, ``linear``, ``embeddings`` and ``experts``; ``prove`` a fused forward against PEFT's own; ``fuse``, and give
the wrappers their own forward back; ``follow`` which adapters are active; what rows may ``choose``; ``files`` that come
and go while the model runs. Saving, merging and switching stay PEFT's: the wrappers remain in the model.
"""

from toolkit.patching.adapters.choose import (
    active_adapter,
    adapter_names,
    adapts,
    check_choosable,
    check_rows,
    merged_adapters,
    unknown_adapter,
)
from toolkit.patching.adapters.files import (
    contents,
    internal_name,
    load_adapter,
    move,
    parts_of,
    put_in,
    remove_adapter,
    take_out,
)
from toolkit.patching.adapters.find import (
    adapter_layers,
    adapter_parts,
    base_module,
    inner_model,
    is_adapter,
    unwrapped,
    vocabulary_size,
    without_adapters,
    wraps_parameter,
    wraps_tokens,
)
from toolkit.patching.adapters.follow import AdapterSwitches, adapter_entries, base_modules
from toolkit.patching.adapters.fuse import FUSED, adapter_report, fuse_adapters, release_adapters
from toolkit.patching.adapters.linear import refresh_scales

__all__ = [
    "FUSED",
    "AdapterSwitches",
    "active_adapter",
    "adapter_entries",
    "adapter_layers",
    "adapter_names",
    "adapter_parts",
    "adapter_report",
    "adapts",
    "base_module",
    "base_modules",
    "check_choosable",
    "check_rows",
    "contents",
    "fuse_adapters",
    "inner_model",
    "internal_name",
    "is_adapter",
    "load_adapter",
    "merged_adapters",
    "move",
    "parts_of",
    "put_in",
    "refresh_scales",
    "release_adapters",
    "remove_adapter",
    "take_out",
    "unknown_adapter",
    "unwrapped",
    "vocabulary_size",
    "without_adapters",
    "wraps_parameter",
    "wraps_tokens",
]
