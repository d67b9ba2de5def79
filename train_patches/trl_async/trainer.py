"""AsyncGRPOTrainer on a server of this project."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from toolkit.engine.fingerprint import model_fingerprint
from toolkit.errors import ToolkitError
from toolkit.patching import patch, weight_version
from toolkit.training.losses import divergence_estimate
from train_patches.trl_async.transfer import FolderWeightTransfer
from train_patches.trl_clients import replaced

if TYPE_CHECKING:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

_REQUIRED = {
    "bf16": False, "fp16": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None,
    "repetition_penalty": 1.0,
}  # fmt: skip
"""Settings under which the server's log-probabilities are those that the trainer computes."""
_REMEMBERED = 65_536
"""Samples whose weights are known until they are trained."""


def async_grpo_trainer(
    model: str, *, args: "AsyncGRPOConfig", weight_folder: str | Path, numerics: str | None = None,
    server_timeout: float = 60.0, **arguments: Any,
) -> "AsyncGRPOTrainer":  # fmt: skip
    """TRL's AsyncGRPOTrainer of a model that ``toolkit serve --enable-admin-endpoints`` serves.

    Weights travel as folders (``FolderWeightTransfer``). The training forward runs over prefix trees, in which samples
    share what they have in common, by the kernels of the server: no package of vLLM and no GPU is needed.

    Logs beside TRL's metrics:

    - ``mismatch/bits``, ``mismatch/kl``: of samples that the weights being trained made alone, the fraction of tokens
      whose log-probabilities here and of the server differ in any bit, and the mean of ``e^d - d - 1`` of the
      difference d, in nats. Both are 0 in bitwise mode. ``mismatch/tokens_total`` counts those tokens.
    - ``off_policy/kl``, ``off_policy/tokens_total``: the same of all other samples, whose ratio of probabilities TRL's
      loss corrects for and clips (``ratio``, ``clip_ratio``).
    - ``off_policy/staleness_max``: updates between a sample's weights and those that are trained, when it is trained.
      TRL drops samples that are staler than ``args.max_staleness`` when they leave its queue, a batch ahead of that.
    - ``sample/dropped_other_weights_total``: samples of weights that this trainer did not send.

    Args:
        model: folder or name of the checkpoint that the server was started with.
        args: ``vllm_server_base_url`` is the server's address.
        weight_folder: where updates are written, which the server sees under the same path.
        numerics: mode of the patch; None is the device's default.
        server_timeout: seconds without an answer after which the run ends.
        arguments: of AsyncGRPOTrainer: ``train_dataset``, ``reward_funcs``, ``processing_class`` and the rest.

    Raises:
        ToolkitError: a missing package, an argument or setting that the server's log-probabilities do not allow
            (mixed precision, a temperature other than 1, truncated sampling, a penalty, ``peft_config``, a loss of
            routers, rotary tables that depend on the length). While it trains: a server that does not answer, was
            started again, refuses or computes by other numerics; a rollout worker that has ended.
    """
    for name, allowed in _REQUIRED.items():
        if (given := getattr(args, name)) != allowed:
            raise ToolkitError(f"args.{name} must be {allowed!r} with toolkit serve, got {given!r}.")
    for name in ("peft_config", "rollout_worker", "weight_transfer"):
        if arguments.get(name) is not None:
            raise ToolkitError(f"{name} must be None with toolkit serve, got {type(arguments[name]).__name__}.")
    for package in ("trl", "aiohttp", "requests"):
        if importlib.util.find_spec(package) is None:
            raise ToolkitError(f"async_grpo_trainer needs the package '{package}': pip install {package}.")
    from trl.experimental.async_grpo import async_grpo_trainer as module

    from train_patches.trl_async.forward import TreeForward
    from train_patches.trl_async.worker import ServerRolloutWorker

    transfer = FolderWeightTransfer(
        args.vllm_server_base_url, weight_folder, weight_sync_timeout=args.weight_sync_timeout,
        server_timeout=server_timeout,
    )  # fmt: skip
    transfer.client.server_timeout = args.vllm_server_timeout
    own_flops = module.get_peak_flops_per_device  # of a GPU; without one there is none to ask
    flops = own_flops if torch.cuda.is_available() else lambda *_: None
    with (
        replaced(module, "AsyncRolloutWorker", ServerRolloutWorker),
        replaced(module, "get_peak_flops_per_device", flops),
    ):
        trainer: Any = module.AsyncGRPOTrainer(model, args=args, weight_transfer=transfer, **arguments)
    if trainer.aux_loss_enabled:
        raise ToolkitError(f"args.router_aux_loss_coef must be 0.0, got {trainer.router_aux_loss_coef}.")
    trainer.model.set_attn_implementation("eager")  # TRL's own needs a kernel of a GPU
    report = patch(trainer.model, numerics=numerics)
    if report.rotary_regimes() is not None:
        raise ToolkitError(
            f"model must have rotary tables that do not depend on the length of the sequence, got {model!r}."
        )
    transfer.numerics_fingerprint = model_fingerprint(trainer.model)
    forward = trainer.model.forward = TreeForward(trainer.model)
    rollout = AsyncRollout(trainer, forward, trainer.compute_loss)
    transfer.on_sent = rollout.sent
    trainer.compute_loss = rollout.compute_loss
    if trainer.rollout_worker is not None:  # of the main process
        trainer.rollout_worker.check_server = transfer.check
        trainer.rollout_queue = KnownSamples(trainer.rollout_queue, rollout)
    made: AsyncGRPOTrainer = trainer
    return made


class Sent(NamedTuple):
    """An update.

    Attributes:
        model_version: the trainer's count of updates.
        weights: ``weight_version`` of the trainer's model.
    """

    model_version: int
    weights: int


@dataclass
class AsyncRollout:
    """What is known of samples and of the weights that made them.

    Args:
        trainer: AsyncGRPOTrainer.
        forward: of its model.
        loss: the trainer's own ``compute_loss``.
        updates: by the server's weight version.
        made: of samples that wait: their update, and whether no other weights made any token of theirs. By the tokens
            up to the last trained one.
    """

    trainer: Any
    forward: Any
    loss: Callable[..., Any]
    updates: dict[int, Sent] = field(default_factory=dict)
    made: dict[bytes, tuple[Sent, bool]] = field(default_factory=dict)

    def sent(self, version: int) -> None:
        """Note an update; the trainer counts it when the server has been resumed."""
        self.updates[version] = Sent(self.trainer.model_version + 1, weight_version(self.trainer.model))

    def admits(self, sample: Any) -> bool:
        """Whether the weights of a sample are this trainer's."""
        from train_patches.trl_async.worker import NEWEST, OLDEST

        oldest, newest = (self.updates.get(int(sample.metrics[name])) for name in (OLDEST, NEWEST))
        if oldest is None or newest is None:
            self.trainer._metrics["train"]["sample/dropped_other_weights_total"].append(1.0)
            return False
        # A group has the version at which its first sample was begun; tokens at the end have the newest.
        alone = oldest == newest and newest.model_version == sample.model_version
        last = int(sample.completion_mask.nonzero()[0][-1])
        self.made[sample.input_ids[: last + 1].tobytes()] = newest, alone
        while len(self.made) > _REMEMBERED:
            del self.made[next(iter(self.made))]
        return True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """TRL's loss; logs how far its log-probabilities are from the server's."""
        loss = self.loss(model, inputs, *arguments, **keywords)
        self._compare(inputs)
        return loss

    def _compare(self, inputs: dict[str, Any]) -> None:
        selected = inputs["token_index"] >= 0
        at, rolled, samples = (inputs[name][selected].cpu() for name in ("token_index", "old_log_probs", "segment_id"))
        trained = self.forward.log_probs.cpu()[at]
        now, counted = weight_version(self.trainer.model), torch.zeros(len(at), dtype=torch.bool)
        staleness = 0
        for sample in samples.unique().tolist():
            of_sample = samples == sample
            key = self.forward.row.tokens_to(int(at[of_sample][-1])).numpy().tobytes()
            update, alone = self.made.pop(key, (None, False))
            if update is not None:
                counted[of_sample] = alone and update.weights == now
                staleness = max(staleness, self.trainer.model_version - update.model_version)
        apart = divergence_estimate(trained.double() - rolled.double())
        differing = (trained.view(torch.int32) != rolled.view(torch.int32)).double()
        sums = [*_sums(counted, apart, differing), *_sums(~counted, apart, differing)]
        accelerator = self.trainer.accelerator
        found = accelerator.reduce(torch.tensor(sums, device=accelerator.device), reduction="sum").tolist()
        metrics = self.trainer._metrics["train"]
        for name, (divergence, bits, count) in (("mismatch", found[:3]), ("off_policy", found[3:])):
            metrics[f"{name}/tokens_total"].append(count)
            if count:
                metrics[f"{name}/kl"].append((divergence, count))
                if name == "mismatch":
                    metrics["mismatch/bits"].append((bits, count))
        metrics["off_policy/staleness_max"].append(float(staleness))


def _sums(chosen: Tensor, apart: Tensor, differing: Tensor) -> list[float]:
    return [apart[chosen].sum().item(), differing[chosen].sum().item(), float(chosen.sum())]


class KnownSamples:
    """The trainer's queue, without samples of weights that are not the trainer's."""

    def __init__(self, own: Any, rollout: AsyncRollout) -> None:
        self._own, self._rollout = own, rollout

    def get(self, timeout: float | None = None) -> Any:
        """The next sample. Raises queue.Empty where none comes in time."""
        while True:
            sample = self._own.get(timeout=timeout)
            if self._rollout.admits(sample):
                return sample

    def qsize(self) -> int:
        """Samples that wait."""
        return int(self._own.qsize())
