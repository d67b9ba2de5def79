"""A row of the coverage: measured values by column, and the verdict that follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolkit.errors import first_line


class Column(NamedTuple):
    """What is measured.

    Attributes:
        name: of the column and of the value.
        meaning: what the value is.
        most: the largest number that is right; None for a value that must be true.
    """

    name: str
    meaning: str
    most: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a measured value is right. NaN is not; a text is, which says that the column is not for this row."""
        if isinstance(value, str):
            return True
        return bool(value) if self.most is None else value <= self.most

    @property
    def when(self) -> str:
        """When the column is right, in words."""
        if self.most is None:
            return "yes"
        return f"at most {self.most:g}" if self.most else "0"

    def shown(self, value: Any) -> str:
        """A value in the table; nothing for one that was not measured."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if self.most is None:
            return "yes" if value else "no"
        return str(value) if isinstance(value, int) else f"{value:.1e}"


@dataclass
class Row:
    """One architecture. A column that was not measured is not in ``values``, and ``reason`` says why.

    Attributes:
        model_type: of transformers.
        columns: of its kind of models.
        name: of its class.
        roles: modules patched, by role.
        probe_error: largest relative error of the probes.
        values: what was measured, by column.
        skipped: what the patch skipped, each with its reason.
        reason: what could not be measured, and why.
    """

    model_type: str
    columns: Sequence[Column]
    name: str = ""
    roles: dict[str, int] = field(default_factory=dict)
    probe_error: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    @property
    def covered(self) -> bool:
        """Something is patched, and every column was measured and is right."""
        return bool(self.roles) and self.right and all(column.name in self.values for column in self.columns)

    @property
    def right(self) -> bool:
        """No measured value is out of its limit."""
        return all(one.holds(self.values[one.name]) for one in self.columns if one.name in self.values)

    @property
    def verdict(self) -> str:
        """ "covered", "unsupported" (with a reason, nothing wrong) or "wrong"."""
        return "covered" if self.covered else "unsupported" if self.right and self.reason else "wrong"

    def failed(self, stage: str, problem: Exception) -> None:
        """Note what could not be measured; the first such thing is what the row tells."""
        self.reason = self.reason or f"{stage}: {first_line(problem)}"
