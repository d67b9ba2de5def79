"""What cached state of a prefix depends on besides its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class PrefixKey(NamedTuple):
    """Prefixes are shared between sequences of equal keys only.

    Args:
        weights: version of the base weights, buffers included.
        adapter: name of the active adapter (several joined by "+"); None for the base model.
        adapter_version: of the adapter's weights and scaling.
        salt: ``SamplingParams.cache_salt``; None shares with every request that has none.
        rotary: ``Completion.rotary_length``, where rotary tables depend on a sequence's length; None elsewhere.
        prompt: tokens of the prompt, where tokens behind it see others than those in it; None elsewhere.
    """

    weights: int = 0
    adapter: str | None = None
    adapter_version: int = 0
    salt: str | None = None
    rotary: int | None = None
    prompt: int | None = None

    def outdates(self, other: "PrefixKey") -> bool:
        """Whether no sequence can have the key ``other`` any more, given that these weights are the current ones.

        Other base weights outdate everything; another version of an adapter outdates what that adapter computed.
        """
        if self.weights != other.weights:
            return True
        return self.adapter == other.adapter and self.adapter_version != other.adapter_version


@dataclass(frozen=True)
class WeightKeys:
    """The keys and versions of the weights of now.

    Args:
        active: key of what acts on rows that choose no adapter.
        version: of it.
        adapters: (key, version) of each adapter that rows may choose.
    """

    active: PrefixKey
    version: int
    adapters: Mapping[str, tuple[PrefixKey, int]] = field(default_factory=dict)

    def of(self, adapter: str | None) -> PrefixKey:
        """The key of rows that choose ``adapter``; None for those that choose none."""
        return self.active if adapter is None else self.adapters[adapter][0]

    def version_of(self, adapter: str | None) -> int:
        """The version of the weights of rows that choose ``adapter``."""
        return self.version if adapter is None else self.adapters[adapter][1]

    def outdates(self, other: PrefixKey) -> bool:
        """Whether no sequence can have the key ``other`` any more."""
        keys = [key for key, _ in self.adapters.values()]
        return any(key.outdates(other) for key in (self.active, *keys))
