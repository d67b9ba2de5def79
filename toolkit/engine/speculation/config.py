"""``Engine(speculative_config=...)``: vLLM's names, checked."""

from dataclasses import dataclass, fields
from typing import Any

from toolkit.engine.checks import check_bool, check_int, check_names
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.sentences import shown

METHODS = ("prediction", "ngram", "suffix", "draft_model", "mtp")
MOST_TOKENS = 65_536
"""Bounds what is drafted and looked for: memory is taken for each of as many tokens."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are drafted. In any method what a request predicts is first: ``SamplingParams.predicted_token_ids``.

    Args:
        method: "prediction" (that alone), "ngram" (what followed the same tokens earlier in the sequence), "suffix"
            (that, and what followed them in finished sequences), "draft_model" (what a smaller model with the same
            vocabulary samples) or "mtp" (what the multi-token prediction layer of the model's own checkpoint samples).
        num_speculative_tokens: most tokens of a draft.
        adaptive: draft as many of them as are estimated to bring the most tokens per second, none where plain decoding
            is faster; False: always as many as there are.
        prompt_lookup_max: "ngram": most tokens of context that are looked for.
        prompt_lookup_min: "ngram" and "suffix": fewest.
        suffix_decoding_max_tree_depth: "suffix": most tokens of context that are looked for.
        suffix_decoding_max_cached_tokens: "suffix": tokens of finished sequences that are kept at most.
        model: "draft_model": a Hugging Face causal language model, or a backend.

    Raises:
        ToolkitError: for an unknown field or a bad value.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 5
    adaptive: bool = True
    prompt_lookup_max: int = 8
    prompt_lookup_min: int = 2
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_tokens: int = 200_000
    model: Any = None

    @classmethod
    def check(cls, given: Any) -> "SpeculativeConfig":
        """The configuration of a dictionary or of one. Raises ToolkitError."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise ToolkitError(
                f"speculative_config must be a dictionary such as {{'method': 'ngram'}} or None, got {shown(given)}."
            )
        check_names("speculative_config", given, tuple(field.name for field in fields(cls)))
        return cls(**given)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ToolkitError(must_be_one_of("method of speculative_config", self.method, METHODS))
        for field in fields(self):
            if field.type is int:
                most = None if field.name == "suffix_decoding_max_cached_tokens" else MOST_TOKENS
                check_int(f"{field.name} of speculative_config", getattr(self, field.name), 1, most)
        check_bool("adaptive of speculative_config", self.adaptive)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ToolkitError(
                f"prompt_lookup_min of speculative_config must be <= prompt_lookup_max ({self.prompt_lookup_max}), got "
                f"{self.prompt_lookup_min}."
            )
        if (self.model is not None) != (self.method == "draft_model"):
            wanted = "a model" if self.method == "draft_model" else "None"
            raise ToolkitError(
                f"model of speculative_config must be {wanted} with method '{self.method}', got "
                f"{self.model if self.model is None else type(self.model).__name__}."
            )
