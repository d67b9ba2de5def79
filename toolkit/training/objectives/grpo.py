"""Group-relative policy optimisation: the engine rolls out from the live weights, a task's reward judges."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.base import Count
from toolkit.config.objective import OnPolicySection, Positive
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.on_policy import OnPolicyObjective
from toolkit.training.prompts import Judged
from toolkit.training.samples import MicroBatch, Sample, filler, pack

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine.outputs import Completion


class GRPOSection(OnPolicySection):
    """GRPO and its relatives; fields have the names of TRL's ``GRPOConfig``.

    GRPO (DeepSeekMath, 2024) by default. Dr. GRPO (Liu et al., 2025): ``scale_rewards: none, loss_type: dr_grpo``.
    DAPO (Yu et al., 2025): ``epsilon_high: 0.28, dynamic_sampling: true, loss_type: dapo``.
    GSPO (Zheng et al., 2025): ``importance_sampling_level: sequence, epsilon: 3e-4, epsilon_high: 4e-4``.
    """

    kind: Literal["grpo"] = "grpo"
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt."""
    num_iterations: Count = 1
    """Optimizer updates on each batch of rollouts."""
    scale_rewards: Annotated[
        Literal["group", "batch", "none"],
        BeforeValidator(lambda v: {True: "group", False: "none"}[v] if isinstance(v, bool) else v),
    ] = "group"
    """Advantages are divided by the standard deviation of their group's rewards, of all rewards of the step (as in
    REINFORCE++ with a baseline; Hu et al., 2025), or not. true is group, false none."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Of several ``reward_funcs``. normalize_then_sum (GDPO; Liu et al., 2026): each function's rewards are normalised
    in their group, then summed by their weights, then normalised over the step; ``scale_rewards`` has no part in it."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo"] = "grpo"
    """grpo: mean over the tokens of a completion, then over completions. dapo: mean over all tokens. bnpo: over
    those of each process. dr_grpo: sum over tokens, divided by ``rollout.max_completion_length``, mean over
    completions. cispo (MiniMax, 2025): as dapo, but ratios are bounded by ``epsilon_high`` and weigh the
    log-probability."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Each token's ratio, or the geometric mean over its completion."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Ratios are clipped to 1 - epsilon .. 1 + epsilon_high."""
    epsilon_high: Annotated[float, Field(ge=0)] | None = None
    """null is ``epsilon``. Of cispo the largest ratio itself, e.g. 5.0."""
    delta: Positive | None = None
    """Ratios are bounded by it on the other side, too, where the advantage is negative (INTELLECT-2); null does not."""
    mask_truncated_completions: bool = False
    """Completions that ``rollout.max_completion_length`` cut count in their group's mean and not in the loss."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, and roll out others in their place."""
    max_rounds: Count = 4
    """Most rounds of rollouts per step with ``dynamic_sampling``; what is there then is used."""
    importance_sampling_clip_max: Positive | None = None
    """Weigh tokens by min(p_train / p_rollout, this), without gradient; for fast numerics. null does not."""
    replay_routing: bool = False
    """Of an MoE model: train every token through the experts that it was rolled out with."""
    replay_selection: bool = False
    """Of a model with sparse attention: train every token over the keys that it was rolled out with."""
    environment: str | dict[str, Any] | None = None
    """Answers completions, for several turns: ``package.module:Class`` or a name, or a mapping of ``name`` and the
    fields of the class (``toolkit.training.environments``). Its answers are not trained on."""
    environment_factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """As in TRL: ``module:Class`` of objects whose public methods are tools, with ``reset``, and ``get_reward`` where
    they judge."""
    tools: list[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = Field(default_factory=list)
    """As in TRL: functions by ``module:function`` that the model may call; results are not trained on."""
    max_turns: Count | None = None
    """Most turns of the model in a conversation; null is the environment's own number, of tools 10."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the initial model (after the warm-up); above 0 keeps a copy of that."""

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> Self:
        if self.rollout.temperature != 1.0:
            raise ValueError(
                "objective.rollout.temperature must be 1.0 with objective.kind 'grpo', which trains the distribution "
                f"that it samples from, got {self.rollout.temperature}"
            )
        several = self.environment_factory is not None or bool(self.tools)
        if self.environment is not None and several:
            raise ValueError(
                "objective.environment must be null with objective.environment_factory or objective.tools, got "
                f"{self.environment!r}"
            )
        if self.max_turns is not None and self.environment is None and not several:
            raise ValueError(
                "objective.max_turns must be null without objective.environment, objective.environment_factory and "
                f"objective.tools, got {self.max_turns}"
            )
        if (several or self.environment is not None) and self.rollout.structured_outputs is not None:
            raise ValueError("objective.rollout.structured_outputs must be null with several turns")
        if self.multi_objective_aggregation != "sum_then_normalize" and not self.reward_funcs:
            raise ValueError(
                "objective.multi_objective_aggregation must be 'sum_then_normalize' without objective.reward_funcs, "
                f"got '{self.multi_objective_aggregation}'"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("objective.epsilon_high must be given with objective.loss_type 'cispo', got null")
        if self.delta is not None and (self.loss_type == "cispo" or self.delta <= 1.0 + self._epsilon_high):
            raise ValueError(
                "objective.delta must be > 1 + objective.epsilon_high, and null with objective.loss_type 'cispo', got "
                f"{self.delta}"
            )
        return self

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class GRPO(OnPolicyObjective[GRPOSection]):
    """GRPO and its relatives: see ``GRPOSection``. Behaviour log-probabilities are the engine's own."""

    primary_metric = "reward"

    @property
    def sequence_ratio(self) -> Literal["none", "mean", "product"]:
        """What the ratios of a completion's tokens become: they stay, or each is their mean or product."""
        return "mean" if self.section.importance_sampling_level == "sequence" else "none"

    def bind(self, context: RunContext) -> None:
        from toolkit.training.model import Reference

        super().bind(context)
        self.reference: Reference | None = None
        if self.section.beta:
            self.reference = Reference(context.initial_model(), self.recipe.model, context.device)

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        self.begin()
        groups = self._groups(step)
        self._weigh([sample for group in groups for sample in group])
        groups = [kept for group in groups if (kept := [sample for sample in group if not sample.masked])]
        if self.reference is None:
            # A group whose rewards are all equal has no gradient: it counts in the mean and needs no forward.
            groups = [group for group in groups if any(sample.advantage for sample in group)]
        micros = pack(groups, self.recipe.train.batch_tokens)
        count = self.context.reduce_max(len(micros))
        if not micros and count:  # every process gives as many micro-batches, of padding if need be
            padding = Sample([self.context.tokenizer.eos_token_id], [self.context.tokenizer.eos_token_id], [0.0])
            micros = [MicroBatch([padding])]
        micros += [MicroBatch([filler(micros[0].samples[0])]) for _ in range(count - len(micros))]
        self._remember_reference(micros)
        for update in range(self.section.num_iterations if count else 0):
            for micro in micros:
                micro.first = update == 0
            yield micros

    def _groups(self, step: int) -> list[list[Sample]]:
        """The groups to train on, with advantages; with dynamic sampling, rounds until there are enough."""
        import torch

        section, wanted = self.section, self.prompts_per_step
        groups: list[list[Sample]] = []
        dropped, rounds = 0, 0
        while rounds < (section.max_rounds if section.dynamic_sampling else 1):
            problems, completions = self.roll_out(step, section.num_generations, rounds)
            rounds += 1
            judged = self.count(problems, completions)
            rewards = torch.tensor(judged.rewards, dtype=torch.float64)
            if section.multi_objective_aggregation == "normalize_then_sum":
                advantages = self._sum_of_normalised(judged)
            else:
                advantages = self.advantages(rewards, completions)
            for group, scored, values in zip(completions, (~rewards.isnan()).tolist(), advantages.tolist()):
                # Completions without a reward are as if they had not been sampled; one alone has nothing beside it.
                if sum(scored) < 2 or (section.dynamic_sampling and not any(values)):
                    dropped += 1
                    continue
                kept = [(one, value) for one, has, value in zip(group, scored, values) if has]
                groups.append([self._sample(one, advantage) for one, advantage in kept])
            missing = max(wanted - len(groups), 0)
            if not self.context.reduce_max(missing):  # all processes continue, or none does
                break
        self.sums.add(groups=min(len(groups), wanted), groups_dropped=dropped, rounds=rounds)
        return groups[:wanted]

    def _sample(self, one: "Completion", advantage: float) -> Sample:
        return Sample(
            one.prompt_token_ids,
            one.token_ids,
            one.logprobs,
            advantage,
            masked=self.section.mask_truncated_completions and one.finish_reason == "length",
            routing=one.routed_experts,
            selection=one.selected_keys,
            rotary_length=one.rotary_length,
            sampled=getattr(one, "sampled", None),
        )

    def _sum_of_normalised(self, judged: Judged) -> "Tensor":
        """[groups, n] advantages by ``normalize_then_sum``; 0 where there is no reward."""
        import torch

        from toolkit.training.losses import sum_of_normalised

        rewards = torch.tensor(judged.rewards, dtype=torch.float64)
        each = torch.tensor(list(judged.by_function.values()), dtype=torch.float64).reshape(-1, *rewards.shape)
        functions = self.prompts.functions  # an environment's too, which are not in the recipe's weights
        assert functions is not None
        weights = functions.weights or [1.0] * len(each)
        sums = sum_of_normalised(each.masked_fill(rewards.isnan(), math.nan), weights)
        mean, deviation = self.moments(sums)
        return ((sums - mean) / (deviation + 1e-4)).nan_to_num(0.0)

    def advantages(self, rewards: "Tensor", completions: Sequence[Sequence["Completion"]]) -> "Tensor":
        """[groups, n] of the rewards of this process's completions; 0 where the reward is NaN."""
        from toolkit.training.losses import group_advantages

        advantages = group_advantages(rewards, scaled=self.section.scale_rewards == "group")
        return advantages / (self.moments(rewards)[1] + 1e-4) if self.section.scale_rewards == "batch" else advantages

    def moments(self, values: "Tensor") -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of numbers of all processes, without those that are NaN."""
        known = values[~values.isnan()]
        count, total = self.context.reduce_sum([known.numel(), known.sum().item()])
        mean = total / max(count, 1.0)
        (squares,) = self.context.reduce_sum([(known - mean).square().sum().item()])
        return mean, math.sqrt(squares / max(count - 1.0, 1.0))

    def _weigh(self, samples: list[Sample]) -> None:
        """Each token's weight, so that the loss is the asked-for mean over the samples of all processes."""
        trained = sum(len(sample.behaviour) for sample in samples if not sample.masked)
        count, tokens = self.context.reduce_sum([len(samples), trained])
        for sample in samples:
            if self.section.loss_type in ("dapo", "cispo"):
                weight = 1.0 / max(tokens, 1.0)
            elif self.section.loss_type == "bnpo":
                weight = 1.0 / (max(trained, 1) * self.context.world_size)
            elif self.section.loss_type == "grpo":
                weight = 1.0 / (count * max(len(sample.behaviour), 1))
            else:
                weight = 1.0 / (count * self.section.rollout.max_completion_length)
            sample.weight = weight * self.context.world_size  # gradients are averaged over the processes

    def _remember_reference(self, micros: Sequence[MicroBatch]) -> None:
        if self.reference is not None:
            for micro in micros:
                values = self.reference.logprobs(micro.sequences, micro.lengths, micro.rotary_lengths)
                for sample, value in zip(micro.samples, values):
                    sample.reference = sample.of_sampled(value)

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        import torch

        from toolkit.training.losses import divergence_estimate, importance_weight, policy_loss

        section, samples = self.section, micro.samples
        lengths = micro.trained_lengths
        given = {name: getattr(micro, name) for name in ("routing", "selection", "rotary_lengths")}
        values = forward(micro.sequences, last=micro.lengths, **given)
        logprob = torch.cat([sample.of_sampled(one) for sample, one in zip(samples, values)])
        device = logprob.device

        def spread(values: list[float]) -> "Tensor":
            """[samples] numbers to the tokens of each."""
            given = torch.tensor(values, dtype=logprob.dtype, device=device)
            return torch.cat([one.expand(length) for one, length in zip(given, lengths)])

        rolled = torch.tensor(
            [value for sample in samples for value in sample.behaviour], dtype=torch.float64, device=device
        )
        counted = spread([float(sample.weight > 0.0) for sample in samples])
        if micro.first:
            self._compare(logprob.detach(), rolled, counted)
        behaviour, weight = rolled.to(logprob.dtype), spread([sample.weight for sample in samples])
        if section.importance_sampling_clip_max is not None:
            if micro.first:
                for sample, own in zip(samples, logprob.detach().split(lengths)):
                    sample.train = own
            train = torch.cat([cast("Tensor", sample.train) for sample in samples])
            weight = weight * importance_weight(train, behaviour, section.importance_sampling_clip_max)
            behaviour = train  # the ratio is between weights, the importance weight between engines
        reference = torch.cat([cast("Tensor", s.reference) for s in samples]) if self.reference is not None else None
        result = policy_loss(
            logprob,
            behaviour,
            spread([sample.advantage for sample in samples]),
            epsilon=section.epsilon,
            epsilon_high=section._epsilon_high,
            delta=section.delta,
            bounded_ratio=section.loss_type == "cispo",
            reference=reference,
            beta=section.beta,
            lengths=lengths if self.sequence_ratio != "none" else None,
            summed=self.sequence_ratio == "product",
        )
        self.sums.add(clipped=(result.clipped * counted).sum().item(), trained=counted.sum().item())
        if reference is not None:
            distance = divergence_estimate(reference - logprob.detach())
            self.sums.add(kl=(distance * counted).sum().item())
        return (result.loss * weight).sum()

    def rows(self, micro: MicroBatch) -> int:
        return sum(len(sample.sequence) for sample in micro.samples if sample.weight)

    def _compare(self, train: "Tensor", rolled: "Tensor", counted: "Tensor") -> None:
        """The training forward against the engine, under the same weights: nats, and bits."""
        import torch

        from toolkit.training.losses import divergence_estimate

        difference = (train.double() - rolled) * counted
        # The engine returns float32 values; a difference in any bit counts, the sign of a zero too.
        other = train.float().view(torch.int32) != rolled.float().view(torch.int32)
        self.sums.add(
            compared=counted.sum().item(),
            mismatch=divergence_estimate(difference).sum().item(),
            bits=(other & (counted > 0)).sum().item(),
        )

    def finish(self) -> tuple[int, dict[str, float]]:
        """Beside ``OnPolicyObjective.metrics``: engine against training forward, and what was clipped or dropped."""
        names = ("compared", "mismatch", "bits", "clipped", "trained", "kl")
        self.sums.add(**dict.fromkeys(names, 0.0))  # a process, or a step, may have had nothing to train on
        got = self.take()
        self.trained_tokens = int(got["trained"])
        compared, trained = max(got["compared"], 1.0), max(got["trained"], 1.0)
        values = {
            **self.metrics(got),
            "mismatch_kl": got["mismatch"] / compared,
            "mismatch_bits": int(got["bits"]),
            "clip_ratio/region_mean": got["clipped"] / trained,
            "groups": int(got["groups"]),
            "groups_dropped": int(got["groups_dropped"]),
            "rounds": got["rounds"] / got["processes"],
        }
        if self.reference is not None:
            values["kl"] = got["kl"] / trained
        return self.trained_tokens, values
