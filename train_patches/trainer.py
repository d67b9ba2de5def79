"""transformers' ``Trainer`` on a patched model: training, label smoothing and evaluation without logits.

    trainer = Trainer(model=model, args=arguments, train_dataset=..., eval_dataset=...)
    patch_trainer(trainer)
    trainer.train()
    trainer.evaluate()

A model that was patched before trains in a Trainer as it is; what is added here is the refusal of settings under which
a patch would be lost or wrong, and the logits that are not made where only a loss is asked for.
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
from toolkit.ops.linear_logprob.deferred import token_statistics
from toolkit.patching import PatchReport, patch

if TYPE_CHECKING:
    from transformers import Trainer


def patch_trainer(
    trainer: "Trainer", roles: Sequence[str] | None = None, numerics: str | Numerics | None = None
) -> PatchReport:
    """Patch the model of ``trainer``, after it was made and before ``train`` or ``evaluate``.

    roles, numerics: those of ``toolkit.patch``. Losses, gradients and the count of tokens over accumulated batches are
    the unpatched Trainer's. Training, label smoothing and evaluation without ``compute_metrics`` (or with
    ``prediction_loss_only``) hold no [batch, tokens, vocabulary] logits; under ``torch_compile`` training does, and
    such an evaluation runs the model as it was before compilation. Twice is once.
    Raises ToolkitError, leaving trainer and model as they were, for ``use_liger_kernel``, ``model_init``, several GPUs
    in one process (``DataParallel``), and tensor, context or sequence parallelism.
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
    refused = {
        "args.use_liger_kernel": (arguments.use_liger_kernel, "False: it replaces the same modules"),
        "model_init": (trainer.model_init is not None, "None: train() would make another model, which is not patched"),
        "args.n_gpu": (arguments.n_gpu > 1, "0 or 1: DataParallel copies modules, their patch not; take DDP"),
        "parallelism_config.tp_size": (getattr(parallel, "tp_enabled", False), "1: patched modules hold whole weights"),
        "parallelism_config.cp_size": (getattr(parallel, "cp_enabled", False), "1: a sequence stays on one process"),
        "parallelism_config.sp_size": (getattr(parallel, "sp_enabled", False), "1: a sequence stays on one process"),
    }
    for field, (present, allowed) in refused.items():
        if present:
            holder: Any = {"args": arguments, "parallelism_config": parallel}.get(field.partition(".")[0], trainer)
            value = getattr(holder, field.rpartition(".")[2])
            raise ToolkitError(f"{field} is {value!r}; allowed is {allowed}.")


def _without_logits(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def prediction_step(model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        if not prediction_loss_only:
            return own(model, inputs, prediction_loss_only, *args, **kwargs)
        with loss_only():
            # A compiled graph makes its logits; the module that was compiled need not.
            return own(getattr(model, "_orig_mod", model), inputs, prediction_loss_only, *args, **kwargs)

    return prediction_step


class LabelSmoother:
    """Cross-entropy (nats) with labels smoothed by ``epsilon``: the mean over counted tokens of
    ``(1 - epsilon) (-log p_label) + epsilon sum_v (-log p_v) / V``, from the statistics of each row of logits.

    Called as transformers' own, on a model's output and labels [B, S] int64; -100 counts for nothing.
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
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        counted = labels != -100
        logprob, lse, _, mean = token_statistics(logits, torch.where(counted, labels, -1))
        smooth = torch.where(counted, lse - mean, 0.0)
        total = ((self.epsilon - 1.0) * logprob + self.epsilon * smooth).sum()
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)
