"""Bodies of Tinker's routes that are JSON. A null is a field that is not given."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field

from toolkit.serving.body import Body

Item = TypeVar("Item")


class TinkerBody(Body):
    """Any body: ``type`` names it, and is not read."""

    model_config = ConfigDict(protected_namespaces=())
    ignored: ClassVar[tuple[str, ...]] = ("type", "user_metadata")
    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class CreateSession(TinkerBody):
    ignored: ClassVar[tuple[str, ...]] = (*TinkerBody.ignored, "tags", "sdk_version", "project_id", "display_name")


class Heartbeat(TinkerBody):
    session_id: str


class Retrieve(TinkerBody):
    """Args: request_id: of the promise."""

    ignored: ClassVar[tuple[str, ...]] = (*TinkerBody.ignored, "allow_metadata_only")
    request_id: str


class Lora(TinkerBody):
    rank: int
    seed: int | None = Field(None, ge=0, lt=2**63)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(TinkerBody):
    """The optimizer of a training client; "adamw" alone."""

    ignored: ClassVar[tuple[str, ...]] = ()
    type: str = Field("adamw", pattern="^adamw$")


class CreateModel(TinkerBody):
    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    lora_config: Lora | None = None
    optimizer_config: Optimizer | None = None


class OfModel(TinkerBody):
    model_id: str


class Adam(TinkerBody):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(OfModel):
    adam_params: Adam
    seq_id: int


SHORTEST_TTL, LONGEST_TTL = 3600, 10 * 366 * 24 * 3600
"""Seconds that a checkpoint may be kept: from an hour to ten years."""


class Ttl(TinkerBody):
    """Args: ttl_seconds: how long a checkpoint is kept from now; for ever without."""

    ttl_seconds: int | None = Field(None, ge=SHORTEST_TTL, le=LONGEST_TTL)


class SaveWeights(OfModel, Ttl):
    """Args: path: the checkpoint's name."""

    path: str | None = None
    seq_id: int
    overwrite: bool = False


class SaveExternal(OfModel, Ttl):
    """Args: path: the checkpoint's name."""

    path: str
    seq_id: int


class SaveForSampler(OfModel, Ttl):
    """Args: path: the checkpoint's name; without one a sampling session is made."""

    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str = Field("snapshot", pattern="^(snapshot|inflight)$")
    seq_id: int


class LoadWeights(TinkerBody):
    """Args: session_id, model_seq_id: of a new training client with the checkpoint, in the place of model_id."""

    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0)
    base_model: str | None = None
    path: str
    optimizer: bool
    optimizer_config: Optimizer | None = None


class Page(TinkerBody):
    """The parameters of a list. Args: limit: most items; offset: of the first one."""

    model_config = ConfigDict(strict=False)
    ignored: ClassVar[tuple[str, ...]] = (*TinkerBody.ignored, "access_scope", "project_id")
    limit: int = Field(100, ge=1, le=10_000)
    offset: int = Field(0, ge=0)

    def of(self, found: Sequence[Item]) -> Sequence[Item]:
        """Its items."""
        return found[self.offset : self.offset + self.limit]


class Link(TinkerBody):
    """What makes a link to a file good. Args: expires: seconds since the epoch."""

    model_config = ConfigDict(strict=False)
    expires: int
    signature: str


class FuturesTarget(TinkerBody):
    """Args: cloned_sampler_id: of the client; requests of the clone c are numbered from c * ``CLONE_NUMBERS``."""

    sampling_session_id: str
    cloned_sampler_id: int = 0


class RetrieveMany(TinkerBody):
    """Args:
    prev_cursor: of the last response; what it told is not told again.
    timeout: seconds that the response may wait for a result.
    retrieved_request_ids: promises whose results the client has.
    """

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = Field(None, ge=0)
    retrieved_request_ids: list[str] = Field(default_factory=list)


class WeightsInfo(TinkerBody):
    tinker_path: str


class CreateSampler(TinkerBody):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class Chunk(TinkerBody):
    """A part of a prompt: tokens alone."""

    ignored: ClassVar[tuple[str, ...]] = ()
    type: str = Field("encoded_text", pattern="^encoded_text$")
    tokens: list[int]


class ModelInput(TinkerBody):
    chunks: list[Chunk]

    @property
    def tokens(self) -> list[int]:
        """Of all chunks."""
        return [token for chunk in self.chunks for token in chunk.tokens]


class Sampling(TinkerBody):
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(TinkerBody):
    ignored: ClassVar[tuple[str, ...]] = (*TinkerBody.ignored, "record_stability_info")
    prompt: ModelInput
    sampling_params: Sampling
    num_samples: int = Field(1, ge=1)
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(0, ge=0)
    topk_sample_logprobs: int = Field(0, ge=0)
    prompt_logprobs_last_n: int | None = Field(None, ge=1)
    prompt_alt_tokens_k: int = Field(0, ge=0, le=0)
