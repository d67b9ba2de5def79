"""Sliding-window attention: keys and values of the last tokens. Blocks that left the window are freed."""

from toolkit.state.kinds import StateSpec
from toolkit.state.kinds.full import FullAttention


class WindowAttention(FullAttention, kind="window"):
    """As ``full``, for a layer whose queries see ``spec.window`` tokens, themselves included."""

    @classmethod
    def lookback(cls, spec: StateSpec) -> int:
        return max(1, spec.window - 1)  # the next query sees itself and these
