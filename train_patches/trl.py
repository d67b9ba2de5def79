"""TRL's trainers that generate, with the engine as their rollout, on the live weights.

SFT and DPO need nothing but a patched model.

    trainer = GRPOTrainer(model=model, args=GRPOConfig(...), ...)
    with engine_rollout(trainer, max_model_len=1024) as engine:
        trainer.train()

Methods of the trainer are replaced on the instance, those that it has, and no code of TRL is copied:
``_generate_single_turn`` (completions and their log-probabilities; tools and environments call it too),
``_get_per_token_logps_and_entropies`` (the training forward, over prefix trees of samples that share their prompts),
``_compute_loss`` (which logs the mismatch) and ``_calculate_rewards`` (which must be finite).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit import Engine, SamplingParams
from toolkit.engine.outputs import Completion
from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob.deferred import token_statistics
from toolkit.patching import choose_rotary_lengths, patch, report_of, unpatch, weight_version
from toolkit.patching.logprobs import predictions
from toolkit.state import RaggedBatch
from toolkit.training.losses import divergence_estimate

if TYPE_CHECKING:
    from trl import DistillationTrainer, GRPOTrainer, RLOOTrainer

# Trainers with ``_generate_single_turn``, and whether it returns log-probabilities beside the tokens.
_TRAINERS = {"GRPOTrainer": True, "RLOOTrainer": False, "DistillationTrainer": False}

# Supported keys of ``GRPOConfig.generation_kwargs``, and those that GRPOTrainer adds.
_SUPPORTED_KWARGS = {
    "max_new_tokens", "min_new_tokens", "do_sample", "pad_token_id", "bos_token_id", "eos_token_id", "temperature",
    "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation",
}  # fmt: skip


def engine_rollout(
    trainer: "GRPOTrainer | RLOOTrainer | DistillationTrainer",
    *,
    share: bool = True,
    engine: Callable[..., Engine] = Engine,
    **engine_args: Any,
) -> Engine:
    """The engine that ``trainer`` generates with from now on, on its own model, which is patched if it is not yet.

    The engine reads the live weights: an optimizer step copies nothing, and no prefix of older weights is hit. It
    sleeps while the trainer computes its loss.

    Logs ``mismatch/kl`` (mean of ``e^d - d - 1``, with d the trainer's minus the engine's log-probability, in nats per
    token) and ``mismatch/bits`` (fraction of tokens whose two float32 values differ in any bit), for batches that are
    trained under the weights of their rollout. At temperature 1 both are 0 in bitwise mode with ``share``. At another
    temperature they compare the tempered distributions. ``DistillationTrainer`` has neither: it takes no
    log-probability of a sampled token.

    A reward that is infinite is an error, for it would leave its whole group without a finite advantage. None and NaN
    are TRL's: a function that does not apply is left out of the sum, and a completion to which none applies has no
    advantage.

    Args:
        share: compute the trainer's log-probabilities in a forward in which samples share their prompt; False keeps
            TRL's padded forward and its own head.
        engine: makes the engine, as ``Engine(model, **engine_args)`` does; ``infer_patches.ray.RayEngine`` is another.
        engine_args: its arguments. ``seed`` defaults to the trainer's plus the rank.

    Raises:
        ToolkitError: a trainer of another class, another rollout (``use_vllm``,
            ``use_transformers_continuous_batching``, ``rollout_func``), images, sharded parameters, a generation
            setting that the engine does not have, a model whose rotary tables depend on the length of the sequence on
            another path than the shared one in one process, or of GRPO a temperature other than 1 with top_p, top_k,
            min_p or repetition_penalty, whose log-probabilities the trainer does not compute. The trainer is unchanged
            then.
    """
    own: Any = trainer
    returns_logprobs = _returns_logprobs(own)
    _check(own, returns_logprobs)
    _patch(own, engine_args.get("numerics"), share and hasattr(own, "_get_per_token_logps_and_entropies"))
    engine_args = {"seed": own.args.seed + own.accelerator.process_index} | engine_args
    if _regex(own) is not None:
        engine_args = {"tokenizer": own.processing_class} | engine_args
    rollout = Rollout(own, engine(own.model, **engine_args), returns_logprobs, own._compute_loss)
    own._generate_single_turn = rollout.generate
    own._compute_loss = rollout.compute_loss
    if hasattr(own, "_get_per_token_logps_and_entropies"):
        rollout.own = own._get_per_token_logps_and_entropies
        own._get_per_token_logps_and_entropies = rollout.shared if share else rollout.padded
    if hasattr(own, "_calculate_rewards"):
        rollout.rewards = own._calculate_rewards
        own._calculate_rewards = rollout.finite_rewards
    return rollout.engine


def _regex(trainer: Any) -> str | None:
    """What completions must match; TRL's name is that of its other engine."""
    return getattr(trainer.args, "vllm_structured_outputs_regex", None)


def _returns_logprobs(trainer: Any) -> bool:
    """Of the trainer's class, or the one that it is derived from."""
    for base in type(trainer).__mro__:
        if base.__name__ in _TRAINERS and hasattr(trainer, "_generate_single_turn"):
            return _TRAINERS[base.__name__]
    raise ToolkitError(
        f"trainer must be one of TRL's {', '.join(_TRAINERS)} or derived from one, got {type(trainer).__name__}; a "
        "trainer of another class trains a model that toolkit.patch has patched, with its own generation."
    )


def _patch(trainer: Any, numerics: str | None, shared: bool) -> None:
    """Patch the trainer's model. Raises ToolkitError where rows of a padded forward would have other rotary tables."""
    patched, processes = report_of(trainer.model) is not None, trainer.accelerator.num_processes
    report = patch(trainer.model, numerics=numerics)
    if report.rotary_regimes() is None:
        return
    padded_loss = getattr(trainer, "aux_loss_enabled", False)  # the auxiliary loss needs TRL's own forward
    if shared and processes == 1 and not padded_loss:
        if getattr(trainer, "ref_model", None) is not None:
            patch(trainer.ref_model, numerics=numerics)
        return
    if not patched:
        unpatch(trainer.model)
    raise ToolkitError(
        "a model whose rotary tables depend on the length of the sequence needs share=True, a trainer with "
        "_get_per_token_logps_and_entropies, no auxiliary loss and one process, since a padded forward has the tables "
        f"of its longest row; got {type(trainer).__name__} with {processes} processes."
    )


def _check(trainer: Any, returns_logprobs: bool) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    batching = "use_transformers_continuous_batching"
    settings = trainer.generation_config.to_diff_dict() if not trainer.use_vllm else {}
    unknown = sorted(set(trainer.args.generation_kwargs or {}) - _SUPPORTED_KWARGS)
    truncating = [name for name, off in _OFF.items() if settings.get(name, off) not in (off, None)]
    unsupported = {
        "args.use_vllm": (trainer.use_vllm, "False"),
        f"args.{batching}": (getattr(trainer, batching, False), "False"),
        "rollout_func": (getattr(trainer, "rollout_func", None) is not None, "None"),
        "processing_class": (trainer._is_vlm, "a tokenizer"),
        "distributed_type": (
            trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            "one without sharded parameters",
        ),
        "args.generation_kwargs": (bool(unknown), f"a dict with keys of {', '.join(sorted(_SUPPORTED_KWARGS))}"),
        "args.temperature": (
            returns_logprobs and trainer.temperature != 1.0 and bool(truncating),
            f"1.0 together with {', '.join(truncating)}",
        ),
    }
    for name, (present, required) in unsupported.items():
        if present:
            holder = trainer.args if name.startswith("args.") else trainer
            holder = trainer.accelerator if name == "distributed_type" else holder
            raise ToolkitError(f"{name} must be {required}, got {getattr(holder, name.rpartition('.')[2])!r}.")


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class Rollout:
    """The methods that replace the trainer's.

    Args:
        trainer: of a class in ``_TRAINERS``.
        engine: generates the completions.
        returns_logprobs: whether the trainer takes log-probabilities from its generation, and hands them to its loss.
        loss: the trainer's own ``_compute_loss``.
        own: the trainer's own ``_get_per_token_logps_and_entropies``, where it has one.
        rewards: the trainer's own ``_calculate_rewards``, where it has one.
        version: weight version of the last rollout.
        seen: [B, C] log-probabilities of the current loss, detached.
        rolled: log-probabilities of the last rollout by (prompt, completion), where the trainer does not take them.
    """

    trainer: Any
    engine: Engine
    returns_logprobs: bool
    loss: Callable[..., Any]
    own: Callable[..., Any] | None = None
    rewards: Callable[..., Tensor] | None = None
    version: int = -1
    seen: Tensor | None = None
    rolled: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = field(default_factory=dict)

    def params(self, count: int) -> SamplingParams:
        """The trainer's generation settings, for ``count`` completions of a prompt."""
        config = self.trainer.generation_config
        regex = _regex(self.trainer)
        return SamplingParams(
            n=count,
            max_tokens=config.max_new_tokens,
            min_tokens=config.min_new_tokens or 0,
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=_or(config.top_p, 1.0),
            top_k=_or(config.top_k, 0),
            min_p=_or(config.min_p, 0.0),
            repetition_penalty=_or(config.repetition_penalty, 1.0),
            ignore_eos=True,  # stop_token_ids has the trainer's list
            stop_token_ids=self.trainer.eos_token_ids,
            structured_outputs=None if regex is None else {"regex": regex},
        )

    def generate(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """TRL's ``_generate_single_turn``: token ids of one completion per prompt, and log-probabilities if wanted.

        Consecutive equal prompts are one request with several completions.
        """
        self.engine.wake()
        groups = [(list(prompt), len(list(same))) for prompt, same in groupby(prompt_ids, key=tuple)]
        params = [self.params(count) for _, count in groups]
        completions = self.engine.generate([prompt for prompt, _ in groups], params)
        for one in completions:
            if one.finish_reason == "error":
                raise ToolkitError(f"prompt {one.prompt_index} of the rollout failed: {one.error}")
        self.version = weight_version(self.trainer.model)
        tokens, logprobs = [one.token_ids for one in completions], [self._comparable(one) for one in completions]
        if self.returns_logprobs:
            return tokens, logprobs
        if self.trainer.model.training:
            keys = zip(map(tuple, prompt_ids), map(tuple, tokens))
            self.rolled = dict(zip(keys, logprobs))
        return tokens

    def _comparable(self, completion: Completion) -> list[float]:
        """The log-probabilities of the trainer's distribution."""
        return completion.logprobs if self.trainer.temperature == 1.0 else completion.sampling_logprobs

    def finite_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's ``_calculate_rewards``: [samples, functions], NaN where a function does not apply."""
        assert self.rewards is not None
        rewards = self.rewards(*args, **kwargs)
        for sample, function in rewards.isinf().nonzero().tolist():
            name = self.trainer.reward_func_names[function]
            raise ToolkitError(
                f"the rewards of '{name}' must be finite, or None where it does not apply, got "
                f"{rewards[sample, function].item()} for completion {sample}."
            )
        return rewards

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        """TRL's ``_compute_loss``; logs the mismatch between its log-probabilities and the engine's."""
        self.engine.sleep()
        self.seen = None
        loss = self.loss(model, inputs, *args)
        rolled = self._rolled(inputs) if self.seen is not None else None
        fresh = self.version == weight_version(self.trainer.model) and self.trainer.model.training
        if self.seen is not None and rolled is not None and fresh:
            mask = inputs["completion_mask"]
            self._compare(self.seen, rolled, mask if "tool_mask" not in inputs else mask * inputs["tool_mask"])
        return loss

    def _rolled(self, inputs: dict[str, Any]) -> Tensor | None:
        """[B, C] log-probabilities of the engine for a batch of the trainer, None where some are not known."""
        if self.returns_logprobs:
            return inputs.get("sampling_per_token_logps")
        mask = inputs["completion_mask"].bool()
        values: list[float] = []
        for prompt, shown, completion, kept in zip(
            inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], mask
        ):
            key = tuple(prompt[shown].tolist()), tuple(completion[kept].tolist())
            if key[1] and key not in self.rolled:
                return None
            values += self.rolled.get(key, [])
        given = torch.tensor(values, dtype=torch.float32, device=mask.device)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, given)

    def _compare(self, train: Tensor, rolled: Tensor, mask: Tensor) -> None:
        counted = mask.bool()
        train, rolled = train[counted].float(), rolled[counted].float()
        differing = train.view(torch.int32) != rolled.view(torch.int32)
        apart = divergence_estimate(train.double() - rolled.double())
        sums = torch.stack([apart.sum(), differing.sum().double(), counted.sum().double()])
        divergence, bits, count = self.trainer.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self.trainer._metrics["train"]
        metrics["mismatch/kl"].append(divergence / max(count, 1.0))
        metrics["mismatch/bits"].append(bits / max(count, 1.0))

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's own log-probabilities, which are recorded for the mismatch."""
        assert self.own is not None
        result = self.own(*args, **kwargs)
        self.seen = result[0].detach()
        return result

    def shared(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **media: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's ``_get_per_token_logps_and_entropies``: [B, C] each, 0 after the end of a completion.

        A reference model, a wrapped model (DDP relies on its own forward) and an auxiliary loss take TRL's path; the
        reference takes this one where its rotary tables depend on the length of the sequence.
        """
        if not self._runs_ragged(model) or compute_aux_loss or any(one is not None for one in media.values()):
            settings = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss, **media}
            padded: tuple[Tensor, Tensor | None, Tensor | None] = self.padded(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **settings
            )
            return padded
        kept = attention_mask.bool()
        parts = [
            self._statistics(model, rows.cpu(), mask.cpu(), logits_to_keep)
            for rows, mask in zip(input_ids.split(batch_size or len(kept)), kept.split(batch_size or len(kept)))
        ]
        ended = kept[:, -logits_to_keep:]
        logprobs, entropies = (
            torch.zeros(ended.shape, dtype=values.dtype, device=values.device).masked_scatter(ended, values)
            for values in (torch.cat([part[at] for part in parts]) for at in (0, 1))
        )
        self.seen = logprobs.detach()
        return logprobs, entropies if compute_entropy else None, None

    def _statistics(self, model: Any, ids: Tensor, kept: Tensor, count: int) -> tuple[Tensor, ...]:
        """Log-probability and entropy (nats) of the unmasked among the last ``count`` tokens, row after row."""
        sequences: Sequence[Tensor] = [row[mask] for row, mask in zip(ids, kept)]
        temperature = self.trainer.temperature

        def read(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logprob, _, entropy, _ = token_statistics(logits if temperature == 1.0 else logits / temperature, targets)
            return logprob, entropy

        lengths = [len(sequence) for sequence in sequences]
        given = [max(one, length) for one, length in zip(self._declared(kept, count), lengths, strict=True)]
        rotary = choose_rotary_lengths(model, lengths, given)
        device = next(model.parameters()).device
        batch = RaggedBatch.from_sequences(sequences, device, rotary_lengths=rotary)
        return predictions(model, batch, sequences, kept[:, -count:].sum(1).tolist(), read)

    def _runs_ragged(self, model: Any) -> bool:
        if model is not getattr(self.trainer, "ref_model", None):
            return model is self.trainer.model
        report = None if model is None else report_of(model)
        return report is not None and report.rotary_regimes() is not None

    def _declared(self, kept: Tensor, count: int) -> list[int]:
        """The lengths that the engine was given for rows [B, L] whose last ``count`` tokens are completions."""
        most = self.trainer.generation_config.max_new_tokens
        return [min(length + most, self.engine.max_model_len) for length in kept[:, :-count].sum(1).tolist()]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
