"""Bodies and queries of admin requests, and bodies of their responses."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from toolkit.serving.body import Body

WAKE_TAGS = ("weights", "kv_cache", "scheduling")


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
