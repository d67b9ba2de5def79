"""Collect claims, check them against each other, install them, and take them back."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.numerics import Numerics
from toolkit.patching.adapters import (
    FUSED,
    adapter_report,
    fuse_adapters,
    inner_model,
    release_adapters,
    without_adapters,
)
from toolkit.patching.claim import Claim, Skipped, install_all, put_pre_hook, undo_all
from toolkit.patching.float32_arithmetic import float32_arithmetic
from toolkit.patching.forward import row_forward
from toolkit.patching.instance_forward import UNPROVEN, InstalledForwards, foreign_forward
from toolkit.patching.joined_weights import join_groups, joins_by_default
from toolkit.patching.key_rounding import kept_kv_dtype, round_keys
from toolkit.patching.padding import LabelsOnPadding
from toolkit.patching.probe import device_of
from toolkit.patching.ragged_check import check_ragged
from toolkit.patching.record import PatchRecord, pop_record, put_record, record_of
from toolkit.patching.report import PatchReport
from toolkit.patching.roles import FINDERS, wanted_roles
from toolkit.patching.sharding import check_unsharded, check_unsplit
from toolkit.patching.weights import count_steps, leave_clock, make_room_for_clock
from toolkit.state.rounding import AUTO, checked_kv_dtype


def find_claims(
    model: nn.Module, roles: Sequence[str] | None = None, numerics: str | Numerics | None = None
) -> PatchReport:
    """The report that ``patch`` would return: every probe is run, and nothing is replaced.

    Raises:
        ToolkitError: an unknown role, a requested role that no module of the model has, a parameter that is on the
            meta device, or a model that is patched.
    """
    model = inner_model(model)
    if record_of(model) is not None:
        raise ToolkitError("model must not be patched to be probed; report_of(model) is its report.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ToolkitError(
                f"parameter {name} must be loaded before patching, got a meta tensor (not loaded yet, or offloaded)."
            )
    report = PatchReport(Numerics.choose(numerics, device_of(model)))
    with float32_arithmetic(device_of(model)), without_adapters(model):
        _collect(model, roles, report)
    _check_conflicts(report.claims)
    return report


def _collect(model: nn.Module, roles: Sequence[str] | None, report: PatchReport) -> None:
    for role, required in wanted_roles(roles).items():
        found = [_without_foreign_forward(item) for item in FINDERS[role](model, report.numerics)]
        claims = [item for item in found if isinstance(item, Claim)]
        skipped = [item for item in found if isinstance(item, Skipped)]
        report.claims.extend(claims)
        report.skipped.extend(skipped)
        if required and not claims:
            reasons = sorted({item.reason for item in skipped})
            why = f": {'; '.join(reasons)}" if reasons else ""
            raise ToolkitError(f"roles has {role!r}, but no module of {type(model).__name__} can take it{why}.")


def _without_foreign_forward(item: Claim | Skipped) -> Claim | Skipped:
    """``item``, or the reason why its module keeps the forward that somebody put on its instance."""
    other = foreign_forward(item.module) if isinstance(item, Claim) and item.path else None
    return item if other is None else Skipped(item.role, item.path, UNPROVEN.format(other))


def _check_conflicts(claims: list[Claim]) -> None:
    claimed: dict[int, Claim] = {}
    for claim in claims:
        if claim.path == "":  # a setting of the model as a whole, not a module's forward
            continue
        other = claimed.setdefault(id(claim.module), claim)
        if other is not claim:
            raise ToolkitError(
                f"roles {other.role!r} and {claim.role!r} both claim {claim.path}; ask for one of them with roles=."
            )


def _in_place(report: PatchReport, model: nn.Module) -> bool:
    """Whether the modules that were claimed are still the model's; ``resize_token_embeddings``, say, replaces some."""
    modules = set(model.modules())
    return all(claim.module in modules for claim in report.claims)


def _is_current(record: PatchRecord, model: nn.Module) -> bool:
    """Whether the patch is in place, and the model what it was proven for."""
    if record.report is None or not _in_place(record.report, model):
        return False
    return record.forwards is not None and not record.forwards.changed()


def patch(
    model: nn.Module,
    roles: Sequence[str] | None = None,
    numerics: str | Numerics | None = None,
    kv_cache_dtype: str | None = None,
    join_weights: bool | None = None,
) -> PatchReport:
    """The report of what was replaced, with probe errors, and of what was skipped, with reasons.

    Replaces the forwards of ``model`` by shared ops, in place; each replacement is proven by a probe first. Parameters
    keep their names and layout, and their memory unless ``join_weights`` moves it. Patching twice is patching once;
    other roles, another numerics mode, or other modules in the place of patched ones (after
    ``resize_token_embeddings``, say) replace the earlier patch. ``unpatch`` restores the model.

    Args:
        model: a Hugging Face model. A ``PeftModel`` is patched like the model inside it, before or after its adapters
            were added.
        roles: any of norm, positions, rotary, mlp, activation, router, experts, attention, mixer, layer, linear, head,
            media and encoder_attention (non-causal attention of image and audio towers), which the model must have;
            "default" is all that it has of them but encoder_attention. None is ["default"].
        numerics: "bitwise" or "fast" (``toolkit.numerics``); None is bitwise on CPU and fast elsewhere.
        kv_cache_dtype: "int8" rounds keys and values to eight bits with a scale for each token and head
            (``toolkit.state.rounding``): an engine's pages hold the codes, and training computes with the same values,
            its gradients straight through. "auto" keeps the model's dtype; None leaves it as an earlier patch has it.
        join_weights: whether the weights of queries, keys and values, and those of gate and up, move to one allocation
            each, where in fast mode one cuBLAS / MKL GEMM serves the group. Names, state dicts, optimizers and saved
            files stay what they are, and in bitwise mode all bits. Groups with other than plain linear layers, and
            sharded models, are skipped. None: as an earlier patch has it, or in fast mode on CUDA.

    Raises:
        ToolkitError: an unknown value, or a model that cannot be patched so.
    """
    model = inner_model(model)
    before = kept_kv_dtype(model)
    kv_cache_dtype = before if kv_cache_dtype is None else checked_kv_dtype(kv_cache_dtype)
    wanted = tuple(roles) if roles is not None else None
    record = record_of(model)
    if record is not None and record.roles == wanted and _is_current(record, model):
        assert record.report is not None
        mode = record.report.numerics
        same = kv_cache_dtype == before and join_weights in (None, record.report.join_weights)
        if same and (numerics is None or mode is Numerics.choose(numerics, device_of(model))):
            if record.report.join_weights:  # what was moved since, by Module.to, say
                joined, _ = join_groups(model, record.report.claims)
                put_record(model, replace(record, undo=(*record.undo, *joined)))
            return record.report
    if join_weights is None and record is not None and record.report is not None:
        join_weights = record.report.join_weights
    check_unsplit(model, "another patch")
    unpatch(model)
    check_unsharded(model, "patching")
    count_steps(model)  # deferred logits notice writes by torch's counters
    report = replace(find_claims(model, roles, numerics), kv_cache_dtype=kv_cache_dtype)
    installs = [claim.install for claim in report.claims]
    if "attention" in report.roles():
        installs.append(partial(put_pre_hook, model, LabelsOnPadding()))
    undo = install_all(installs)
    record = PatchRecord(report, wanted, undo, InstalledForwards.of(report.claims))
    put_record(model, record)
    make_room_for_clock(model)
    if join_weights or (join_weights is None and joins_by_default(report.numerics, device_of(model))):
        report = replace(report, join_weights=True)
        joined, separate = join_groups(model, report.claims)
        report.skipped.extend(separate)
        record = replace(record, report=report, undo=(*undo, *joined))
        put_record(model, record)
    fuse_adapters(model, report.numerics)
    skipped = [(path, verdict) for path, verdict in adapter_report(model) if verdict != FUSED]
    report.skipped.extend(Skipped("adapter", path, reason) for path, reason in skipped)
    if {"attention", "mixer"} & set(report.roles()) and not any(one.role == "attention" for one in report.skipped):
        check_ragged(model, report, row_forward)
    if kv_cache_dtype != AUTO:  # the checks compare with the model as it was
        try:
            rounding = round_keys(model, report, kv_cache_dtype)
        except ToolkitError:
            unpatch(model)
            raise
        put_record(model, replace(record, undo=(*record.undo, *rounding)))
    return report


def unpatch(model: nn.Module) -> None:
    """Give every replaced module its own forward back. A model that is not patched stays as it is.

    Raises:
        ToolkitError: somebody has put another forward over one of the patch's since, or the model is split over ranks.
    """
    model = inner_model(model)
    record = record_of(model)
    if record is not None:
        check_unsplit(model, "unpatching")
        over = [] if record.forwards is None else record.forwards.covered()
        if over:
            raise ToolkitError(f"{over[0]} before the patch.")
        pop_record(model)
        release_adapters(model)
        undo_all(record.undo)
        leave_clock(model)
