"""transformers' ``Trainer`` on a patched model: training, label smoothing and evaluation without logits.

    trainer = Trainer(model=model, args=arguments, train_dataset=..., eval_dataset=...)
    patch_trainer(trainer)
    trainer.train()
    trainer.evaluate()

A model that is patched already trains in a Trainer unchanged. ``patch_trainer`` also rejects settings that would lose
or break the patch, and skips the logits where only a loss is needed.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.modules.head import loss_only
from toolkit.numerics import Numerics
from toolkit.ops import IGNORED
from toolkit.ops.linear_logprob.deferred import token_statistics
from toolkit.ops.targets import checked_targets, quotient
from toolkit.patching import PatchReport, patch

if TYPE_CHECKING:
    from transformers import Trainer


def patch_trainer(
    trainer: "Trainer", roles: Sequence[str] | None = None, numerics: str | Numerics | None = None
) -> PatchReport:
    """The report of patching the model of ``trainer``; call it before ``train`` or ``evaluate``. Idempotent.

    Losses, gradients and token counts over accumulated batches are the unpatched Trainer's. Training, label smoothing
    and evaluation without ``compute_metrics`` (or with ``prediction_loss_only``) hold no [batch, tokens, vocabulary]
    logits. Under ``torch_compile`` training does, and such an evaluation runs the model without compilation.

    Args:
        roles: of ``toolkit.patch``.
        numerics: of ``toolkit.patch``.

    Raises:
        ToolkitError: ``use_liger_kernel``, ``model_init``, several GPUs in one process (``DataParallel``), or tensor,
            context or sequence parallelism. Trainer and model are unchanged then.
    """
    _check(trainer)
    assert trainer.model is not None
    report = patch(trainer.model, roles, numerics)
    if "prediction_step" not in trainer.__dict__:
        trainer.prediction_step = _without_logits(trainer.prediction_step)  # type: ignore[method-assign]
    if trainer.label_smoother is not None:
        trainer.label_smoother = LabelSmoother(trainer.label_smoother.epsilon)  # type: ignore[assignment]
    return report


def _check(trainer: "Trainer") -> None:
    arguments: Any = trainer.args
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    unsupported = {
        "args.use_liger_kernel": (arguments.use_liger_kernel, "False, as Liger replaces the same modules"),
        "model_init": (
            trainer.model_init is not None,
            "None, as train() would create another model, which is not patched",
        ),
        "args.n_gpu": (arguments.n_gpu > 1, "0 or 1, as DataParallel copies modules without their patch (use DDP)"),
        "parallelism_config.tp_size": (
            getattr(parallel, "tp_enabled", False),
            "1, as patched modules hold whole weights",
        ),
        "parallelism_config.cp_size": (getattr(parallel, "cp_enabled", False), "1, as a sequence stays in one process"),
        "parallelism_config.sp_size": (getattr(parallel, "sp_enabled", False), "1, as a sequence stays in one process"),
    }
    for field, (present, required) in unsupported.items():
        if present:
            holder: Any = {"args": arguments, "parallelism_config": parallel}.get(field.partition(".")[0], trainer)
            value = getattr(holder, field.rpartition(".")[2])
            raise ToolkitError(f"{field} must be {required}, got {value!r}.")


def _without_logits(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def prediction_step(model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        if not prediction_loss_only:
            return own(model, inputs, prediction_loss_only, *args, **kwargs)
        with loss_only():
            # A compiled graph computes its logits; the original module need not.
            return own(getattr(model, "_orig_mod", model), inputs, prediction_loss_only, *args, **kwargs)

    return prediction_step


class LabelSmoother:
    """Cross-entropy (nats) with labels smoothed by ``epsilon``, from the statistics of each row of logits.

    The mean over labelled tokens of ``(1 - epsilon) (-log p_label) + epsilon sum_v (-log p_v) / V``. Called as
    transformers' ``LabelSmoother``, with a model's output and labels [B, S] int64; -100 is ignored.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(
        self,
        model_output: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        counted = labels != IGNORED
        targets = checked_targets(labels, logits.shape[-1], name="labels")
        logprob, lse, _, mean = token_statistics(logits, targets)
        smooth = torch.where(counted, lse - mean, 0.0)
        total = ((self.epsilon - 1.0) * logprob + self.epsilon * smooth).sum()
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return quotient(total, count.to(total.device) if isinstance(count, Tensor) else count)
