"""The recipe's section of GRPO and its relatives."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from toolkit.config.base import Count
from toolkit.config.objective import OnPolicySection, Positive, SyncedReferenceSection


class GRPOSection(SyncedReferenceSection, OnPolicySection):
    """GRPO and its relatives; fields have the names of TRL's ``GRPOConfig``.

    GRPO (DeepSeekMath, 2024) by default. Dr. GRPO (Liu et al., 2025): ``scale_rewards: none, loss_type: dr_grpo``.
    DAPO (Yu et al., 2025): ``epsilon_high: 0.28, dynamic_sampling: true, loss_type: dapo``.
    GSPO (Zheng et al., 2025): ``importance_sampling_level: sequence, epsilon: 3e-4, epsilon_high: 4e-4``.
    """

    unused_fields: ClassVar[Sequence[str]] = ()
    """That a derived kind does not read."""

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
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"] = "grpo"
    """grpo: mean over the tokens of a completion, then over completions. dapo: mean over all tokens. bnpo: over
    those of each process. dr_grpo: sum over tokens, divided by ``rollout.max_completion_length``, mean over
    completions. cispo (MiniMax, 2025): as dapo, but ratios are bounded by ``epsilon_high`` and weigh the
    log-probability. sapo (Gao et al., 2025): as grpo, with a soft gate in the place of clipping. luspo (2026): sum over
    tokens, mean over completions; for ``importance_sampling_level: sequence``. vespo (Shen et al., 2026): as dapo,
    completions are weighed by a function of the product of their ratios."""
    sapo_temperature_pos: Positive = 1.0
    """Of sapo, for tokens with advantages above 0."""
    sapo_temperature_neg: Positive = 1.05
    """For the others."""
    vespo_k_pos: Annotated[float, Field(ge=0)] = 2.0
    """Of vespo, for completions with advantages of 0 and above: the power of the product of their ratios."""
    vespo_lambda_pos: Positive = 3.0
    """And how fast its exponential falls."""
    vespo_k_neg: Annotated[float, Field(ge=0)] = 3.0
    """For the others."""
    vespo_lambda_neg: Positive = 2.0
    """For the others."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Each token's ratio, or the geometric mean over its completion."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Ratios are clipped to 1 - epsilon .. 1 + epsilon_high."""
    epsilon_high: Annotated[float, Field(ge=0)] | None = None
    """null is ``epsilon``. Of cispo the largest ratio itself, e.g. 5.0."""
    delta: Positive | None = None
    """Ratios are bounded by it on the other side, too, where the advantage is negative (INTELLECT-2); null does not."""
    off_policy_mask_threshold: Positive | None = None
    """Leave out completions with a negative advantage whose mean of ``log p_rollout - log p`` is above it
    (DeepSeek-V3.2); null leaves none out."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those with the highest entropy in a forward of all processes, that the first term of the
    loss is of (Wang et al., 2025); 1 is all."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean entropy of the tokens, in nats, that is taken off the loss; the same for every ``loss_type``.
    With ``use_adaptive_entropy`` where it begins."""
    use_adaptive_entropy: bool = False
    """Move the coefficient by ``entropy_coef_delta`` after every update: up where the entropy is at or below
    ``entropy_target``, down elsewhere. It acts only in updates after one with such an entropy (Skywork-OR1; He et al.,
    2025)."""
    entropy_coef_min: Annotated[float, Field(ge=0)] = 0.0
    entropy_coef_max: Annotated[float, Field(ge=0)] = 1.0
    entropy_coef_delta: Positive = 0.005
    entropy_target: Annotated[float, Field(ge=0)] = 0.2
    """Nats a token."""
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
    environment_timeout: Positive | None = None
    """Seconds that one answer of the environment, or one call of a tool, may take. A conversation whose environment
    takes longer is dropped, and counted; of a tool the model is told. null is no bound."""
    episode_timeout: Positive | None = None
    """Seconds after which no conversation of a step is given another turn: it ends as one that is too long does. null
    is no bound."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the initial model (after the warm-up); above 0 keeps a copy of that."""
    use_bias_correction_kl: bool = False
    """Ratios weigh that divergence, too (DeepSeek-V3.2)."""
    rollout_func: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """As in TRL: a function by ``module:function`` that makes the completions, called with the prompts, each
    ``num_generations`` times, and a trainer. It returns a mapping of ``prompt_ids``, ``completion_ids`` and
    ``logprobs``, may add ``env_mask`` (1 for tokens of the model, 0 for an environment's) and columns for reward
    functions. ``infer_patches.ray:rollout_func`` is one. Held-out measures sample with this process's engine."""

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> Self:
        if self.rollout.temperature != 1.0 and self.rollout.structured_outputs is not None:
            raise ValueError(
                "objective.rollout.temperature must be 1.0 with objective.rollout.structured_outputs, got "
                f"{self.rollout.temperature}"
            )
        if self.sync_ref_model and not self.beta:
            raise ValueError("objective.beta must be > 0 with objective.sync_ref_model, got 0")
        if self.entropy_coef_min > self.entropy_coef_max:
            raise ValueError(
                f"objective.entropy_coef_min must be <= objective.entropy_coef_max, which is {self.entropy_coef_max}, "
                f"got {self.entropy_coef_min}"
            )
        by_tools = self.environment_factory is not None or bool(self.tools)
        several_turns = by_tools or self.environment is not None
        if self.environment is not None and by_tools:
            raise ValueError(
                "objective.environment must be null with objective.environment_factory or objective.tools, got "
                f"{self.environment!r}"
            )
        for name in ("max_turns", "environment_timeout", "episode_timeout"):
            if getattr(self, name) is not None and not several_turns:
                raise ValueError(
                    f"objective.{name} must be null without objective.environment, objective.environment_factory and "
                    f"objective.tools, got {getattr(self, name)}"
                )
        if several_turns and self.rollout.structured_outputs is not None:
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
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise ValueError(
                "objective.importance_sampling_level must be 'sequence' with objective.loss_type 'luspo', got "
                f"'{self.importance_sampling_level}'"
            )
        if self.loss_type == "vespo" and self.importance_sampling_clip_max is not None:
            raise ValueError(
                "objective.importance_sampling_clip_max must be null with objective.loss_type 'vespo', got "
                f"{self.importance_sampling_clip_max}"
            )
        if self.rollout_func is not None and (several_turns or self.replay_routing or self.replay_selection):
            raise ValueError(
                "objective.rollout_func must be null with an environment, tools, replay_routing or replay_selection, "
                f"got '{self.rollout_func}'"
            )
        for name in self.unused_fields:
            default = type(self).model_fields[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"objective.{name} must be {default!r} with objective.kind '{self.kind}', got "
                    f"{getattr(self, name)!r}"
                )
        return self

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
