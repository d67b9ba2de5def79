"""What a patch replaced and what it skipped, to be read by code or printed."""

from collections import Counter
from dataclasses import dataclass, field

from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, Skipped
from toolkit.state.rotary_regimes import RotaryRegimes


@dataclass
class RaggedUse:
    """What ragged batches of a patched model need, found when it was patched.

    Args:
        checked: whether a ragged forward was compared with ordinary ones.
        reason: why the model may have no ragged batch; None where it may.
        position_offset: the position of a sequence's first token, where the model itself does not count from 0.
        uncounted_token: a token that the model gives no position (padding), where a ragged batch does.
        makes_masks: the model makes its masks itself, and takes none but one of padding.
        hidden_part: the path of the part whose hidden states were compared, of a model without logits for each token
            (headless, or with one output a sequence); None for a model with them.
    """

    checked: bool = False
    reason: str | None = None
    position_offset: int = 0
    uncounted_token: int | None = None
    makes_masks: bool = False
    hidden_part: str | None = None


@dataclass(frozen=True, eq=False)
class PatchReport:
    """The result of patching one model.

    Args:
        numerics: mode of the patch.
        kv_cache_dtype: "int8" where keys and values are rounded to eight bits, in pages and elsewhere; else "auto".
        claims: replacements, with their probe errors.
        skipped: modules that looked like a role and keep their own forward, with the reason.
        ragged: what ragged batches need.
        join_weights: whether weights of linear layers of one input were to be placed together in memory; groups that
            were not are among those skipped.
    """

    numerics: Numerics
    kv_cache_dtype: str = "auto"
    claims: list[Claim] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    ragged: RaggedUse = field(default_factory=RaggedUse)
    join_weights: bool = False

    def roles(self) -> dict[str, int]:
        """Number of replaced modules of each role."""
        return dict(Counter(claim.role for claim in self.claims))

    def rotary_regimes(self) -> RotaryRegimes | None:
        """Which sequence lengths have the same rotary tables; None where all have."""
        return RotaryRegimes.merged(claim.rotary_regimes for claim in self.claims if claim.rotary_regimes is not None)

    @property
    def keeps_prompts(self) -> bool:
        """Whether tokens behind a prompt see others than those in it do: what a prompt is must then be known."""
        return any(claim.keeps_prompt for claim in self.claims)

    @property
    def bidirectional(self) -> bool:
        """Whether tokens see those after them (an encoder): a sequence then runs as a whole, and predicts nothing."""
        return any(claim.bidirectional for claim in self.claims)

    def worst_error(self) -> float:
        """Largest relative probe error, forward or backward, over all replacements."""
        return max((claim.error.worst() for claim in self.claims), default=0.0)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """One row per (role, op, path pattern): role, modules, count, op, forward error, backward error."""
        groups: dict[tuple[str, str, str], list[Claim]] = {}
        for claim in self.claims:
            groups.setdefault((claim.role, _pattern(claim.path), claim.op), []).append(claim)
        return [
            (
                role,
                pattern or "(model)",
                str(len(claims)),
                op,
                f"{max(claim.error.forward for claim in claims):.1e}",
                f"{max(claim.error.backward for claim in claims):.1e}",
            )
            for (role, pattern, op), claims in groups.items()
        ]

    def skipped_rows(self) -> list[tuple[str, str, str, str]]:
        """One row per (role, path pattern, reason): role, modules, count, reason."""
        groups = Counter((one.role, _pattern(one.path), one.reason) for one in self.skipped)
        return [(role, pattern or "(model)", str(n), reason) for (role, pattern, reason), n in groups.items()]

    def __str__(self) -> str:
        lines = [f"numerics: {self.numerics}"]
        lines += [f"keys and values: {self.kv_cache_dtype}"] if self.kv_cache_dtype != "auto" else []
        lines += ["weights of linear layers of one input: joined"] if self.join_weights else []
        lines += [f"  {' · '.join(row)}" for row in self.rows()]
        lines += [f"  skipped: {' · '.join(row)}" for row in self.skipped_rows()]
        lines += [f"  no ragged batches: {self.ragged.reason}"] if self.ragged.reason else []
        return "\n".join(lines)


def _pattern(path: str) -> str:
    """``layers.3.mlp`` and ``layers.4.mlp`` are one line of a report: ``layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
