"""Claim, probe, apply, undo, report: how a Hugging Face model is patched. Knows transformers; nothing below it does."""

from toolkit.callable_package import make_callable
from toolkit.modules.experts import expert_layers
from toolkit.patch.apply import find_claims, patch, report_of, unpatch
from toolkit.patch.forward import ragged_forward, token_logprobs
from toolkit.patch.report import PatchReport
from toolkit.patch.state_spec import state_spec
from toolkit.patch.weights import weight_version, weights_changed

__all__ = [
    "PatchReport",
    "expert_layers",
    "find_claims",
    "patch",
    "ragged_forward",
    "report_of",
    "state_spec",
    "token_logprobs",
    "unpatch",
    "weight_version",
    "weights_changed",
]

make_callable(__name__, patch)
