"""Claim, probe, apply, undo, report: how a Hugging Face model is patched. Knows transformers; nothing below it does."""

from toolkit.modules.index_observer import IndexLosses, index_losses
from toolkit.modules.moe_experts import expert_layers
from toolkit.patching.apply import find_claims, patch, unpatch
from toolkit.patching.forward import ragged_forward
from toolkit.patching.logprobs import (
    ReadLogits,
    choose_rotary_lengths,
    sequence_readings,
    target_logprobs,
    token_logprobs,
)
from toolkit.patching.record import report_of
from toolkit.patching.report import PatchReport
from toolkit.patching.roles.pooled_attention import indexers_of
from toolkit.patching.state_spec import state_spec
from toolkit.patching.weights import weight_version, weights_changed

__all__ = [
    "IndexLosses",
    "PatchReport",
    "ReadLogits",
    "choose_rotary_lengths",
    "expert_layers",
    "find_claims",
    "index_losses",
    "indexers_of",
    "patch",
    "ragged_forward",
    "report_of",
    "sequence_readings",
    "state_spec",
    "target_logprobs",
    "token_logprobs",
    "unpatch",
    "weight_version",
    "weights_changed",
]
