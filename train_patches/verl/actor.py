"""Importing this lets verl's FSDP engine patch the models that it builds: ``actor_rollout_ref.model.external_lib``.

The patch comes before sharding, as FSDP2 needs it (``train_patches.fsdp``). Packed rows without padding and verl's
fused kernels replace the forwards that the patch proves equal to its ops, and are refused.
"""

from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from toolkit.errors import ToolkitError
from toolkit.patching import patch


def patch_engines() -> None:
    """Let ``FSDPEngine`` patch what it builds. Does nothing the second time."""
    own = FSDPEngine._build_module
    if getattr(own, "patches", False):
        return

    def build(engine: Any) -> Any:
        for name in ("use_remove_padding", "use_fused_kernels", "use_liger"):
            if getattr(engine.model_config, name):
                raise ToolkitError(f"actor_rollout_ref.model.{name} must be False with the toolkit's actor, got True.")
        module = own(engine)
        patch(module)
        return module

    build.patches = True  # type: ignore[attr-defined]
    FSDPEngine._build_module = build


patch_engines()
