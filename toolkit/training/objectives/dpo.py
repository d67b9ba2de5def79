"""Direct preference optimisation and its relatives: preferences relative to a frozen reference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.base import Fraction
from toolkit.config.objective import Positive, SyncedReferenceSection
from toolkit.training.objectives.preference import Preference, PreferenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores
    from toolkit.training.readings import Reading


_SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
_DIVERGED = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip


class DPOSection(SyncedReferenceSection, PreferenceSection):
    """Direct preference optimisation. The reference is the initial model (after the warm-up)."""

    kind: Literal["dpo"] = "dpo"
    loss_type: LossType | Annotated[list[LossType], Field(min_length=1)] = "sigmoid"
    """The loss of a pair, by TRL's names, or several, which are added; formulas are in
    ``toolkit/training/preference_losses.py``. aot and aot_unpaired sort the pairs of one forward: a
    ``train.batch_tokens`` that holds a step's sorts them all."""
    loss_weights: list[float] | None = None
    """Of each of several ``loss_type``; null is 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's sides are swapped; of sigmoid, sigmoid_norm, exo_pair (> 0), robust, aot and
    aot_unpaired."""
    discopop_tau: Positive = 0.05
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence from the reference that is bounded (f-DPO); of sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust
    and discopop."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl."""
    ld_alpha: Fraction | None = None
    """Weight of the tokens by which one completion of a pair is longer than the other, in the sums of
    log-probabilities (LD-DPO; Liu et al., 2024); null is 1."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen completions' cross-entropy beside the preference (RPO), a mean over the step's tokens of
    them; TRL's ``loss_type: [sigmoid, sft]``."""

    use_weighting: bool = False
    """Weigh pairs by how probable their completions are under the model (WPO; Zhou et al., 2024): the product of both
    ``exp mean(log p - log sum_v p_v^2)``; not for aot and aot_unpaired."""

    @property
    def loss_types(self) -> Sequence[str]:
        """``loss_type`` as several."""
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    @property
    def losses(self) -> list[tuple[str, float]]:
        """Names and weights."""
        names = self.loss_types
        return list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        names = self.loss_types
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(
                f"objective.loss_weights must have a weight for each of {len(names)} objective.loss_type, got "
                f"{len(self.loss_weights)}"
            )
        for name in names:
            if self.use_weighting and name.startswith("aot"):
                raise ValueError(f"objective.use_weighting must be false with objective.loss_type '{name}', got true")
            if name == "exo_pair" and self.label_smoothing == 0:
                raise ValueError("objective.label_smoothing must be > 0 for objective.loss_type 'exo_pair', got 0")
            if self.label_smoothing and name not in _SMOOTHED:
                raise ValueError(
                    f"objective.label_smoothing must be 0 for objective.loss_type '{name}', got {self.label_smoothing}"
                )
            if self.f_divergence_type != "reverse_kl" and name not in _DIVERGED:
                raise ValueError(
                    f"objective.f_divergence_type must be 'reverse_kl' for objective.loss_type '{name}', got "
                    f"'{self.f_divergence_type}'"
                )
        return self


class DPO(Preference[DPOSection]):
    """The reference is a frozen copy."""

    has_reference: ClassVar[bool] = True

    def preference_loss(self, scores: "Scores") -> "Tensor":
        from toolkit.training.preference_losses import WITH_REFERENCE, Settings, diverged

        section = self.section
        settings = Settings(section.beta, section.label_smoothing, section.discopop_tau)
        scores = diverged(scores, section.f_divergence_type, section.f_alpha_divergence_coef)
        (name, weight), *others = section.losses
        found = WITH_REFERENCE[name](scores, settings) * weight
        for name, weight in others:
            found = found + WITH_REFERENCE[name](scores, settings) * weight
        return found

    def reading(self) -> "Reading":
        from toolkit.training.readings import Reading

        return Reading(collision=self.section.use_weighting)

    @property
    def longer_weight(self) -> float:
        return 1.0 if self.section.ld_alpha is None else self.section.ld_alpha

    def supervised_weight(self) -> float:
        return self.section.sft_weight
