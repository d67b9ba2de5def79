"""Which of a patched model's attention layers round their keys and values to eight bits."""

from functools import partial

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.modules.attention import KV_DTYPE
from toolkit.patching.claim import Undo, install_all, set_attribute, undo_all
from toolkit.patching.report import PatchReport
from toolkit.patching.state_spec import state_spec
from toolkit.state.rounding import AUTO


def kept_kv_dtype(model: nn.Module) -> str:
    """What the attention layers of ``model`` keep keys and values as; "auto" where no patch says otherwise."""
    return next((module.__dict__[KV_DTYPE] for module in model.modules() if KV_DTYPE in module.__dict__), AUTO)


def round_keys(model: nn.Module, report: PatchReport, dtype: str) -> tuple[Undo, ...]:
    """The undo steps, after the proven attention layers of ``model`` were told to round keys and values to ``dtype``.

    Raises:
        ToolkitError: no layer has keys and values that can be rounded: latents, selected keys and recurrent states keep
            the model's dtype.
    """
    modules = [claim.module for claim in report.claims if claim.role == "attention"]
    undo = install_all([partial(set_attribute, module, KV_DTYPE, dtype) for module in modules])
    try:
        specs = state_spec(model)
        if not any(spec.kind.endswith(f"_{dtype}") for spec in specs):
            kinds = sorted({spec.kind for spec in specs})
            raise ToolkitError(
                f"kv_cache_dtype must be '{AUTO}' for {type(model).__name__}, got '{dtype}': its layers keep {kinds}, "
                "and keys and values of causal attention alone can be rounded."
            )
    except BaseException:
        undo_all(undo)
        raise
    return undo
