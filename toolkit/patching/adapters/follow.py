"""Which adapters are active: PEFT switches, merges and rescales them without writing a parameter."""

from typing import Any


def adapter_state(layers: list[Any]) -> int:
    """A hash of what wrappers (``adapter_layers``) do besides their parameters: active, disabled, merged, scaling."""
    return hash(
        tuple(
            (
                tuple(layer.active_adapters),
                bool(layer.disable_adapters),
                tuple(layer.merged_adapters),
                tuple(sorted(getattr(layer, "scaling", {}).items())),
            )
            for layer in layers
        )
    )
