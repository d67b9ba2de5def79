"""Direct preference optimisation and its relatives: preferences relative to a frozen reference."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolkit.config.objective import Positive
from toolkit.training.objectives.preference import Preference, PreferenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.training.preference_losses import Scores


_SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")


class DPOSection(PreferenceSection):
    """Direct preference optimisation. The reference is the initial model (after the warm-up)."""

    kind: Literal["dpo"] = "dpo"
    loss_type: Literal[
        "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop",
    ] = "sigmoid"  # fmt: skip
    """The loss of a pair, by TRL's names; ``toolkit/training/preference_losses.py`` has the formulas.
    aot and aot_unpaired sort the pairs of one forward: a ``train.batch_tokens`` that holds a step's sorts them all."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's sides are swapped; of sigmoid, sigmoid_norm, exo_pair (> 0), robust, aot and
    aot_unpaired."""
    discopop_tau: Positive = 0.05
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen completions' cross-entropy beside the preference (RPO), a mean over the step's tokens of
    them; TRL's ``loss_type: [sigmoid, sft]``."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> Self:
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("objective.label_smoothing must be > 0 for objective.loss_type 'exo_pair', got 0")
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(
                f"objective.label_smoothing must be 0 for objective.loss_type '{self.loss_type}', got "
                f"{self.label_smoothing}"
            )
        return self


class DPO(Preference[DPOSection]):
    """The reference is a frozen copy."""

    has_reference: ClassVar[bool] = True

    def preference_loss(self, scores: "Scores") -> "Tensor":
        from toolkit.training.preference_losses import WITH_REFERENCE, Settings

        section = self.section
        settings = Settings(section.beta, section.label_smoothing, section.discopop_tau)
        return WITH_REFERENCE[section.loss_type](scores, settings)

    def supervised_weight(self) -> float:
        return self.section.sft_weight
