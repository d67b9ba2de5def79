"""Group-relative policy optimisation: the engine rolls out from the live weights, a task's reward judges."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.grpo_section import GRPOSection
from toolkit.training.objectives.on_policy import TRUNCATED, OnPolicyObjective
from toolkit.training.prompts import Judged
from toolkit.training.samples import MicroBatch, Sample, filler, pack

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine.outputs import Completion
    from toolkit.training.losses import KLEstimator, Surrogate
    from toolkit.training.reference import Reference


class GRPO(OnPolicyObjective[GRPOSection]):
    """GRPO and its relatives: see ``GRPOSection``. Behaviour log-probabilities are the engine's own."""

    primary_metric = "reward"
    least_scored = 2
    """Completions of a group with a reward: fewer have nothing beside them, and the group is dropped."""

    @property
    def kl_estimator(self) -> "KLEstimator":
        """Of the divergence in the loss."""
        return "k3"

    @property
    def sequence_ratio(self) -> Literal["none", "mean", "product"]:
        """What the ratios of a completion's tokens become: they stay, or each is their mean or product."""
        return "mean" if self.section.importance_sampling_level == "sequence" else "none"

    def bind(self, context: RunContext) -> None:
        from toolkit.training.entropy import EntropyTerm
        from toolkit.training.readings import Reading
        from toolkit.training.reference import Reference, ReferenceSync

        super().bind(context)
        self.reference: Reference | None = None
        if self.section.beta:
            self.reference = Reference(context.initial_model(), self.recipe.model, context.device)
            if self.section.sync_ref_model:
                self.synced = ReferenceSync(self.section, self.reference, context)
        self.entropy = EntropyTerm(self.section)
        self._temperature = self.section.rollout.temperature
        self._tokens = 0.0
        self._reading = Reading(self._temperature, self.entropy.wanted)

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        self.begin()
        groups = self._groups(step)
        self.finish_advantages(groups)
        self._weigh([sample for group in groups for sample in group])
        groups = [kept for group in groups if (kept := [sample for sample in group if not sample.masked])]
        if self.reference is None and not self.entropy.wanted:
            # A group whose rewards are all equal has no gradient: it counts in the mean and needs no forward.
            groups = [group for group in groups if any(any(sample.token_advantages) for sample in group)]
        micros = pack(groups, self.recipe.train.batch_tokens)
        count = self.context.reduce_max(len(micros))
        if not micros and count:  # every process gives as many micro-batches, of padding if need be
            padding = Sample([self.context.tokenizer.eos_token_id], [self.context.tokenizer.eos_token_id], [0.0])
            micros = [MicroBatch([padding])]
        micros += [MicroBatch([filler(micros[0].samples[0])]) for _ in range(count - len(micros))]
        if self.reference is not None:
            self.remember_reference(self.reference, micros)
        for update in range(self.section.num_iterations if count else 0):
            for micro in micros:
                micro.first = update == 0
            yield micros
            if self.entropy.wanted:
                self.entropy.finish_update(self.context)

    def roll_out(self, step: int, n: int, attempt: int = 0) -> "tuple[list[Any], Sequence[Sequence[Completion]]]":
        problems, groups = super().roll_out(step, n, attempt)
        if self._temperature != 1.0:  # what is trained is the distribution that was sampled from
            for one in (one for group in groups for one in group):
                one.logprobs = one.sampling_logprobs
        return problems, groups

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
                if sum(scored) < self.least_scored or (section.dynamic_sampling and not any(values)):
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
            masked=self.section.mask_truncated_completions and one.finish_reason in TRUNCATED,
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
        self._tokens = tokens
        for sample in samples:
            if self.section.loss_type in ("dapo", "cispo", "vespo"):
                weight = 1.0 / max(tokens, 1.0)
            elif self.section.loss_type == "bnpo":
                weight = 1.0 / (max(trained, 1) * self.context.world_size)
            elif self.section.loss_type in ("grpo", "sapo"):
                weight = 1.0 / (count * max(len(sample.behaviour), 1))
            elif self.section.loss_type == "luspo":
                weight = 1.0 / count
            else:
                weight = 1.0 / (count * self.section.rollout.max_completion_length)
            sample.weight = weight * self.context.world_size  # gradients are averaged over the processes

    def finish_advantages(self, groups: Sequence[Sequence[Sample]]) -> None:
        """What the advantages of this process's groups lack that is not of each group alone."""

    def remember_reference(self, reference: "Reference", micros: Sequence[MicroBatch]) -> None:
        """Give samples the log-probabilities of their sampled tokens under the reference."""
        for micro in micros:
            values = reference.logprobs(micro.sequences, micro.lengths, micro.rotary_lengths, self._temperature)
            for sample, value in zip(micro.samples, values):
                sample.reference = sample.of_sampled(value)

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        import torch

        from toolkit.training.losses import divergence_estimate, importance_weight, off_policy_mask, policy_loss

        section, samples = self.section, micro.samples
        lengths = micro.trained_lengths
        given = {name: getattr(micro, name) for name in ("routing", "selection", "rotary_lengths")}
        found = forward(micro.sequences, last=micro.lengths, reading=self._reading, **given)
        logprob, *entropy = (
            torch.cat([sample.of_sampled(one) for sample, one in zip(samples, values)]) for values in found
        )
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
        advantage = torch.tensor(
            [value for sample in samples for value in sample.token_advantages], dtype=logprob.dtype, device=device
        )
        factors: list[Tensor] = []
        if entropy:
            selected = self.entropy.selected(entropy[0], counted, self.context)
            factors.append(selected)
        if section.off_policy_mask_threshold is not None:
            threshold = section.off_policy_mask_threshold
            factors.append(off_policy_mask(logprob, behaviour, advantage, lengths, threshold))
        if section.importance_sampling_clip_max is not None:
            if micro.first:
                for sample, own in zip(samples, logprob.detach().split(lengths)):
                    sample.train = own
            train = torch.cat([cast("Tensor", sample.train) for sample in samples])
            factors.append(importance_weight(train, behaviour, section.importance_sampling_clip_max))
            behaviour = train  # the ratio is between weights, the importance weight between engines
        reference = torch.cat([cast("Tensor", s.reference) for s in samples]) if self.reference is not None else None
        own_surrogate = section.loss_type in ("cispo", "sapo", "vespo")
        result = policy_loss(
            logprob,
            behaviour,
            advantage,
            epsilon=section.epsilon,
            epsilon_high=section._epsilon_high,
            delta=section.delta,
            surrogate=cast("Surrogate", section.loss_type) if own_surrogate else "clipped",
            reference=reference,
            beta=section.beta,
            lengths=lengths if self.sequence_ratio != "none" or section.loss_type == "vespo" else None,
            summed=self.sequence_ratio == "product",
            sapo_temperatures=(section.sapo_temperature_pos, section.sapo_temperature_neg),
            vespo=(section.vespo_k_pos, section.vespo_lambda_pos, section.vespo_k_neg, section.vespo_lambda_neg),
            use_bias_correction_kl=section.use_bias_correction_kl,
            kl_estimator=self.kl_estimator,
            weights=math.prod(factors[1:], start=factors[0]) if factors else None,
        )
        self.sums.add(clipped=(result.clipped * counted).sum().item(), trained=counted.sum().item())
        if reference is not None:
            distance = divergence_estimate(reference - logprob.detach())
            self.sums.add(kl=(distance * counted).sum().item())
        loss = (result.loss * weight).sum()
        if entropy:
            share = counted.sum().item() * self.context.world_size / max(self._tokens, 1.0)
            loss = loss + self.entropy.loss(entropy[0], selected, share)
        return loss

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
        return self.trained_tokens, values | self.entropy.metrics() | self.divergence_metrics(got)

    def state_dict(self) -> dict[str, Any]:
        own = {"entropy": self.entropy.state_dict()} if self.section.use_adaptive_entropy else {}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.section.use_adaptive_entropy and "entropy" in state:
            self.entropy.load_state_dict(state["entropy"])

    def follow(self, states: Sequence[dict[str, Any]]) -> None:
        super().follow(states)
        if self.section.use_adaptive_entropy and "entropy" in states[0]:
            self.entropy.load_state_dict(states[0]["entropy"])

    def divergence_metrics(self, got: dict[str, float]) -> dict[str, float]:
        """The divergence from the initial model, where there is one, from the step's sums."""
        return {} if self.reference is None else {"kl": got["kl"] / max(got["trained"], 1.0)}
