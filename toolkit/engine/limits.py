"""The engine's limits, checked when it is made."""

from dataclasses import dataclass, fields
from typing import Any

from toolkit.engine.params import flag, refuse_unknown, whole


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an engine takes on at once.

    max_num_seqs: sequences in a step. max_num_batched_tokens: tokens in a step; also bounds the sequences, since each
    needs one. max_model_len: prompt and completion together (None: what the model was made for). block_size: tokens a
    page. num_blocks: pages of state (None: enough for max_num_seqs sequences of max_model_len, within a part of the
    device's memory). swap_bytes: host memory for the state of sequences that must make room for others; without room
    there it is computed again (None: any amount, 0: none). enable_prefix_caching: reuse the state of common prefixes.
    kinds: state kinds to put in the place of others, such as {"full": "int8"} (None: what the layers ask for).
    enable_return_routed_experts: keep the experts that each token goes to beside its other state, and return them
    (``Completion.routed_experts``). numerics: tier, see ``toolkit.numerics`` (None: the device's default, or the one
    already patched in). seed: of the sequence that seeds requests without one (None: from the operating system).
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    swap_bytes: int | None = 0
    enable_prefix_caching: bool = True
    kinds: dict[str, str] | None = None
    enable_return_routed_experts: bool = False
    numerics: str | None = None
    seed: int | None = None

    @classmethod
    def check(cls, **given: Any) -> "Limits":
        """The limits given, or a ToolkitError for an unknown name or a value that is not allowed."""
        refuse_unknown("Engine", given, ("model", "tokenizer", *(field.name for field in fields(cls))))
        return cls(**given)

    def __post_init__(self) -> None:
        whole("max_num_seqs", self.max_num_seqs, 1)
        whole("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        whole("block_size", self.block_size, 1)
        flag("enable_prefix_caching", self.enable_prefix_caching)
        flag("enable_return_routed_experts", self.enable_return_routed_experts)
        for name, low in (("max_model_len", 2), ("num_blocks", 1), ("swap_bytes", 0), ("seed", 0)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), low, also=", and None")
