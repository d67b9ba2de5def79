"""Held-out measures between steps: which was the best, and when there is no hope for a better one."""

import math
from collections.abc import Mapping
from typing import Any

from toolkit.config.outputs import EvaluateSection
from toolkit.errors import ToolkitError


class Measures:
    """The best of a run's measures, and how many have come since without a better one.

    Args:
        section: ``evaluate`` of the recipe.
        metric: the objective's own, for a recipe that names none.

    Attributes:
        best_step: the step of the best measure; None before the first.
        stopped: whether ``early_stopping_patience`` is at its end.
    """

    def __init__(self, section: EvaluateSection, metric: str) -> None:
        name = section.metric_for_best_model or metric
        self.metric = name if name.startswith("eval_") else f"eval_{name}"
        less = self.metric.endswith("loss") or "bits_per_byte" in self.metric
        self._sign = 1.0 if (not less if section.greater_is_better is None else section.greater_is_better) else -1.0
        self._section = section
        self._best = -math.inf
        self.best_step: int | None = None
        self._waited, self._last = 0, 0

    @property
    def stopped(self) -> bool:
        patience = self._section.early_stopping_patience
        return patience is not None and self._waited >= patience

    def due(self, step: int) -> bool:
        """Whether to measure after a step."""
        every = self._section.eval_steps
        return self._section.do_eval and every is not None and step % every == 0

    def owed(self, step: int) -> bool:
        """Whether a step was to be measured and a signal ended the run before that."""
        return step > self._last and self.due(step)

    def describe(self) -> str:
        """The best measure."""
        return f"{self.metric} {self._sign * self._best:.4f} at step {self.best_step}"

    def add(self, step: int, measured: Mapping[str, Any]) -> bool:
        """Take a measure; whether it is the best so far.

        Raises:
            ToolkitError: it has no such metric, where the recipe compares by it.
        """
        self._last = step
        if not (self._section.load_best_model_at_end or self._section.early_stopping_patience):
            return False
        if not isinstance(measured.get(self.metric), (int, float)):
            known = ", ".join(name for name, value in measured.items() if isinstance(value, float)) or "none"
            raise ToolkitError(
                f"evaluate.metric_for_best_model must be a metric of the evaluation, got '{self.metric}'; there are "
                f"{known}."
            )
        value = self._sign * float(measured[self.metric])
        # As transformers: patience asks for more than the threshold, the best model for any improvement.
        improved = value > self._best
        patient = improved and (value - self._best > self._section.early_stopping_threshold)
        self._waited = 0 if patient else self._waited + 1
        if improved:
            self._best, self.best_step = value, step
        return improved

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        best = None if self.best_step is None else self._best
        return {"best": best, "best_step": self.best_step, "waited": self._waited, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.best_step, self._waited, self._last = state["best_step"], state["waited"], state["last"]
        self._best = -math.inf if self.best_step is None else state["best"]
