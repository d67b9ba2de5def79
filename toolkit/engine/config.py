"""The engine's configuration, checked when it is made."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from toolkit.engine.checks import check_bool, check_float, check_int, check_names
from toolkit.engine.speculation.config import SpeculativeConfig
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

GIB = 1 << 30
AUTO = "auto"
"""``max_model_len`` of as many tokens as the blocks hold."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at once. The fields are the keyword arguments of ``Engine``, which documents them.

    They are the options of ``toolkit serve`` too, with these texts as help.
    """

    max_num_seqs: Annotated[int, "sequences in a step"] = 64
    max_num_batched_tokens: Annotated[int, "tokens in a step"] = 2048
    max_model_len: Annotated[int | str | None, "tokens of prompt and completion together; auto: as many as fit"] = None
    block_size: Annotated[int, "tokens of state in a block"] = 16
    num_blocks: Annotated[int | None, "blocks of state"] = None
    swap_space: Annotated[float | None, "GiB of host memory for preempted sequences"] = 0
    enable_prefix_caching: Annotated[bool, "reuse the state of common prefixes"] = True
    kv_host_space: Annotated[float | None, "GiB of host memory for cached prefixes without room in the blocks"] = 0
    kv_disk_space: Annotated[float | None, "GiB of disk for those without room in kv_host_space"] = 0
    kv_disk_folder: Annotated[str | None, "folder of kv_disk_space"] = None
    encoder_cache_size: Annotated[int, "tokens of encoded pictures that are kept"] = 16384
    media_space: Annotated[float | None, "GiB of pictures of requests that wait or run"] = 4
    enable_return_routed_experts: Annotated[bool, "keep the experts of each token"] = False
    enable_return_selected_keys: Annotated[bool, "keep the keys that each token attends, of sparse attention"] = False
    kinds: Annotated[dict[str, str] | None, "state kinds in the place of others"] = None
    kv_cache_dtype: Annotated[str, "auto, or int8: keys and values in eight bits"] = "auto"
    speculative_config: Annotated[dict[str, Any] | None, "how tokens are drafted"] = None
    max_loras: Annotated[int | None, "adapters in the model at a time, of those loaded while it runs"] = None
    max_cpu_loras: Annotated[int | None, "such adapters in memory; others are read again when they are needed"] = None
    async_scheduling: Annotated[bool | None, "launch steps ahead of the host; None: on a GPU"] = None
    numerics: Annotated[str | None, "numerics mode"] = None
    seed: Annotated[int | None, "seed of requests without one"] = None

    @property
    def swap_bytes(self) -> int | None:
        """``swap_space`` in bytes."""
        return _bytes(self.swap_space)

    @property
    def kv_bytes(self) -> tuple[int | None, int | None]:
        """``kv_host_space`` and ``kv_disk_space`` in bytes."""
        return _bytes(self.kv_host_space), _bytes(self.kv_disk_space)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """``speculative_config``, checked."""
        return None if self.speculative_config is None else SpeculativeConfig.check(self.speculative_config)

    @property
    def keeps_hidden(self) -> bool:
        """Whether last hidden states are kept beside other state: a multi-token prediction layer reads them."""
        return self.speculation is not None and self.speculation.method == "mtp"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of all fields."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def check(cls, **given: Any) -> "EngineConfig":
        """The configuration of these arguments. Raises ToolkitError for an unknown name or a bad value."""
        check_names("Engine", given, ("model", "tokenizer", *cls.names()))
        return cls(**given)

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_int("block_size", self.block_size, 1)
        check_int("encoder_cache_size", self.encoder_cache_size, 0)
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_bool("enable_return_routed_experts", self.enable_return_routed_experts)
        check_bool("enable_return_selected_keys", self.enable_return_selected_keys)
        if self.async_scheduling is not None:
            check_bool("async_scheduling", self.async_scheduling)
        from toolkit.state.rounding import checked_kv_dtype  # torch, which a command's --help does not load

        checked_kv_dtype(self.kv_cache_dtype)
        _ = self.speculation
        if not (isinstance(self.max_model_len, str) and self.max_model_len == AUTO) and self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 2, also=", 'auto' or None")
        bounds = {"num_blocks": 1, "seed": 0, "max_loras": 1, "max_cpu_loras": 1}
        for name, low in bounds.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low, also=" or None")
        loras, most = self.max_loras, self.max_cpu_loras
        if loras is not None and most is not None and most < loras:
            raise ToolkitError(f"max_cpu_loras must be >= max_loras ({loras}), got {most}.")
        for name in ("swap_space", "media_space", "kv_host_space", "kv_disk_space"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), 0, float("inf"))
        for name in ("kv_host_space", "kv_disk_space"):
            if getattr(self, name) != 0 and not self.enable_prefix_caching:
                raise ToolkitError(f"{name} must be 0 without enable_prefix_caching, got {getattr(self, name)}.")
        kinds = self.kinds
        if kinds is not None and not (isinstance(kinds, dict) and all(isinstance(one, str) for one in kinds.values())):
            raise ToolkitError(f"kinds must be a dictionary of state kinds or None, got {shown(kinds)}.")
        folder = self.kv_disk_folder
        if folder is not None and not (isinstance(folder, str) and folder):
            raise ToolkitError(f"kv_disk_folder must be the path of a folder or None, got {shown(folder)}.")
        if (folder is None) != (self.kv_disk_space == 0):
            wanted = "None without" if self.kv_disk_space == 0 else "the path of a folder with"
            raise ToolkitError(f"kv_disk_folder must be {wanted} kv_disk_space, got {folder!r}.")


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
