"""Bodies and queries of admin requests, and bodies of their responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toolkit.engine.weight_group import BUFFER_SIZE
from toolkit.serving.body import Body

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]


class Query(BaseModel):
    """Parameters behind the path; their values arrive as text."""

    model_config = ConfigDict(extra="forbid")


class PauseQuery(Query):
    """Parameters of ``/pause``.

    Args:
        mode: "abort" ends running requests, "wait" lets them finish first, "keep" freezes them until ``/resume``.
        clear_cache: whether cached prefixes are forgotten; with "keep" they stay.
        wait_for_inflight_requests: vLLM's older name of the mode "wait".
    """

    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True
    wait_for_inflight_requests: bool = False


class SleepQuery(Query):
    """Parameters of ``/sleep``.

    Args:
        level: 0 pauses alone; 1 and 2 give the memory of state back. Weights stay where they are at any level.
        mode: of running requests, as in ``/pause``.
    """

    level: int = Field(1, ge=0, le=2)
    mode: Literal["abort", "wait", "keep"] = "keep"


class WakeQuery(Query):
    """Parameters of ``/wake_up``.

    Args:
        tags: "kv_cache", "scheduling" or "weights", which never slept; none for all.
    """

    tags: list[Literal["weights", "kv_cache", "scheduling"]] = []


class InfoQuery(Query):
    """Parameters of ``/server_info``.

    Args:
        config_format: of ``vllm_config``; "text" is not offered.
    """

    config_format: Literal["json"] = "json"


class WorldQuery(Query):
    """Parameters of ``/get_world_size``.

    Args:
        include_dp: accepted and unused: there is one process.
    """

    include_dp: bool = True


class AbortRequest(Body):
    """The body of ``POST /abort_requests``.

    Args:
        request_ids: values of ``X-Request-Id``, or ids of responses.
        abort_all: every request.
    """

    request_ids: list[str] = Field([], max_length=4096)
    abort_all: bool = False


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Status(_Schema):
    status: Literal["paused", "resumed", "sleeping", "awake"]


class IsPaused(_Schema):
    is_paused: bool


class IsSleeping(_Schema):
    is_sleeping: bool


class Success(_Schema):
    success: bool


class Aborted(_Schema):
    num_aborted: int


class InitRequest(Body):
    """The body of ``POST /init_weight_transfer_engine``.

    Args:
        init_info: may have ``backend``, "folder" or "gloo" with the fields of ``GroupInfo``, and
            ``numerics_fingerprint``, the trainer's, as text or as an object.
    """

    init_info: dict[str, Any]


class GroupInfo(Body):
    """``init_info`` of the backend "gloo": a group of processes over ``torch.distributed``, into which rank 0 sends.

    Args:
        backend: "gloo".
        numerics_fingerprint: of the trainer.
        master_address: of the trainer, which is rank 0, as the server reaches it.
        master_port: of its store.
        rank_offset: the server's rank.
        world_size: processes of the group; the server is one.
        packed: whether tensors are packed into buffers; otherwise one is sent at a time.
        packed_buffer_size_bytes: a buffer ends with the tensor by which it has more.
    """

    backend: Literal["gloo"]
    numerics_fingerprint: Any = None
    master_address: str = Field(min_length=1, max_length=256)
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(1, ge=1)
    world_size: int = Field(2, ge=2)
    packed: bool = True
    packed_buffer_size_bytes: int = Field(BUFFER_SIZE, ge=0, le=2**40)

    @model_validator(mode="after")
    def _one_rank_is_the_server_s(self) -> "GroupInfo":
        if self.rank_offset >= self.world_size:
            raise ValueError(f"'rank_offset' must be < 'world_size', got {self.rank_offset} and {self.world_size}.")
        return self


class TensorsInfo(Body):
    """``update_info`` of tensors that come over a group, in this order.

    Args:
        names: of parameters, as in ``named_parameters`` of the model without adapters. Those not named stay.
        dtype_names: such as "bfloat16", of the tensors that are sent.
        shapes: of them.
        packed: accepted and unused: ``init_info`` says it.
    """

    ignored = ("packed",)
    names: list[str] = Field(min_length=1)
    dtype_names: list[DtypeName]
    shapes: list[list[Annotated[int, Field(ge=0)]]]

    @model_validator(mode="after")
    def _as_many_of_each(self) -> "TensorsInfo":
        for name in ("dtype_names", "shapes"):
            if len(getattr(self, name)) != len(self.names):
                found = len(getattr(self, name))
                raise ValueError(f"'{name}' must have {len(self.names)} items, as 'names' has, got {found}.")
        if len(set(self.names)) < len(self.names):
            raise ValueError("'names' must have each name once.")
        return self


class StartRequest(Body):
    """The body of ``POST /start_weight_update``.

    Args:
        is_checkpoint_format: must be true: weights are named and laid out as in checkpoints.
    """

    is_checkpoint_format: bool = True


class UpdateRequest(Body):
    """The body of ``POST /update_weights``; one of the fields.

    Args:
        weight_dir: a folder of safetensors files that the server can read.
        model_path: the same (SGLang's name).
        update_info: an object with one of these, or the fields of ``TensorsInfo`` (vLLM's form).
    """

    weight_dir: str | None = None
    model_path: str | None = None
    update_info: dict[str, Any] | None = None


class ExportRequest(Body):
    """The body of ``POST /export``.

    Args:
        path: a new or empty folder that the server can write.
        to: what opens it, as in ``toolkit export``.
        quantise: one of the formats of ``to``; null for its first.
    """

    path: str
    to: str = "hf"
    quantise: str | None = None


class Exported(_Schema):
    path: str
    to: str
    weight_version: int


class Message(_Schema):
    message: str


class Updated(_Schema):
    status: Literal["ok"]
    message: str
    weight_version: int


class WorldSize(_Schema):
    world_size: int


class ModelInfo(_Schema):
    model_path: str
    is_generation: bool
    weight_version: int
    max_model_len: int | None
    dtype: str


class Props(_Schema):
    """llama.cpp's description of a server.

    Args:
        default_generation_settings: ``n_ctx``, and the sampling parameters of a request that gives none.
        total_slots: sequences that run at the same time.
        model_path: of the model.
        chat_template: a Jinja template; "" for none.
        modalities: what prompts may have besides text.
        build_info: name and version.
    """

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_path: str
    chat_template: str
    modalities: dict[str, bool]
    build_info: str


class ServerInfo(BaseModel):
    """What is served, in vLLM's form, and what is this server's.

    Args:
        vllm_config: the parts of vLLM's configuration that its clients read.
        engine: the engine's configuration.
        numerics_fingerprint: what the bits of logprobs depend on.
        version: of toolkit.
        weight_version: of the weights.
    """

    vllm_config: dict[str, Any]
    engine: dict[str, Any]
    numerics_fingerprint: dict[str, str]
    version: str
    weight_version: int


class ReplaceAdapterRequest(Body):
    """The body of ``/load_lora_adapter``, which prime-rl calls after each step.

    Args:
        lora_name: by which requests choose it as their ``model``. An adapter of this name is replaced; requests under
            way continue under the new one.
        lora_path: a folder on the server with adapter_config.json and adapter_model.safetensors.
        base_model_name: accepted and unused; there is one.
    """

    ignored = ("base_model_name",)
    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)


class LoadAdapterRequest(ReplaceAdapterRequest):
    """The body of ``/v1/load_lora_adapter``.

    Args:
        lora_name: by which requests choose it as their ``model``.
        lora_path: a folder on the server with adapter_config.json and adapter_model.safetensors.
        load_inplace: whether it may take the place of an adapter of this name; requests under way continue under it.
        base_model_name: accepted and unused; there is one.
    """

    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    """The body of ``/v1/unload_lora_adapter``.

    Args:
        lora_name: of the adapter. Requests under way finish with it.
        lora_int_id: accepted and unused; names tell adapters apart.
    """

    ignored = ("lora_int_id",)
    lora_name: str = Field(min_length=1, max_length=256)
