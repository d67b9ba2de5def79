"""verl's rollout on this project's engine: a server per replica, token ids in and out, weights by the object store."""

import asyncio
import os
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from toolkit import SamplingParams
from toolkit.engine.outputs import Completion
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.training.rollout_worker import Weights, Worker, packed

_CHANGES = {
    "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "min_tokens": 0,
}  # fmt: skip
"""Parameters that change the distribution, with the values by which they do not."""
_PASSED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "stop_token_ids", "ignore_eos", "seed", "min_tokens",
)  # fmt: skip
"""Sampling parameters of verl that are this project's, by the same names."""
_UNUSED = ("logprobs", "n", "max_tokens", "max_new_tokens")


def server_name(replica_rank: int) -> str:
    """Of the actor of a replica's server."""
    return f"toolkit_server_{replica_rank}"


def check_parallel(config: Any) -> None:
    """Raise ToolkitError for a replica of several processes."""
    for name in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if getattr(config, name) != 1:
            raise ToolkitError(f"rollout.{name} must be 1 with rollout.name 'toolkit', got {getattr(config, name)}.")


class Server:
    """The actor of one replica.

    Args:
        config: verl's RolloutConfig.
        path: folder of the model.
        device: where it runs.
    """

    def __init__(self, config: Any, path: str, device: str) -> None:
        self._config, self._path, self._device = config, path, device
        self._worker = Worker()
        self._open = asyncio.Event()
        self._open.set()
        self._rejects = False
        self._steps: int | None = None

    async def launch(self) -> None:
        """Load the model and make the engine."""
        config = self._config
        model, _ = await asyncio.to_thread(load_model, self._path, str(config.dtype), self._device)
        self._longest = config.max_model_len or config.prompt_length + config.response_length
        engine_args = {
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": self._longest,
            "enable_prefix_caching": config.enable_prefix_caching,
            "enable_return_routed_experts": config.enable_rollout_routing_replay,
            **(config.engine_kwargs or {}).get("toolkit", {}),
        }
        self._worker.begin(model, None, engine_args, version=-1)

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], image_data: Any = None,
        video_data: Any = None, **media: Any,
    ) -> TokenOutput:  # fmt: skip
        """A sample of a prompt: its tokens, their log-probabilities, and the trainer's steps of its weights."""
        if image_data or video_data or any(media.values()):
            raise ToolkitError("image_data and video_data must be None with rollout.name 'toolkit', got some.")
        if not self._open.is_set():
            if self._rejects:
                return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", extra_fields=self._fields([]))
            await self._open.wait()
        (one,) = await self._worker.generate(list(prompt_ids), self._params(len(prompt_ids), sampling_params))
        if one.error is not None:
            raise ToolkitError(f"a rollout failed: {one.error.rstrip('.')}.")
        return TokenOutput(
            token_ids=one.token_ids,
            log_probs=one.logprobs if self._is_whole(sampling_params) else one.sampling_logprobs,
            routed_experts=None if one.routed_experts is None else one.routed_experts.numpy(),
            stop_reason="aborted" if one.finish_reason == "cancelled" else "completed",
            extra_fields=self._fields([one]),
        )

    def _params(self, prompt: int, given: dict[str, Any]) -> SamplingParams:
        unknown = next((name for name in given if name not in (*_PASSED, *_UNUSED)), None)
        if unknown is not None:
            raise ToolkitError(f"sampling_params must have fields of {', '.join(_PASSED)}, got {unknown!r}.")
        config = self._config
        most = given.get("max_tokens", given.get("max_new_tokens"))
        if most is None:
            most = min(config.response_length, config.prompt_length + config.response_length - prompt)
        fields = {name: given[name] for name in _PASSED if given.get(name) is not None}
        return SamplingParams(max_tokens=max(1, min(most, self._longest - prompt)), **fields)

    @staticmethod
    def _is_whole(given: dict[str, Any]) -> bool:
        """Whether tokens are sampled from the model's own distribution, whose log-probabilities training computes."""
        changed = given.get("top_k") not in (None, 0, -1)
        changed |= any(given.get(name, off) not in (None, off) for name, off in _CHANGES.items())
        return given.get("temperature", 1.0) == 1.0 and not changed

    def _fields(self, completions: list[Completion]) -> dict[str, Any]:
        versions = [version for one in completions for version in one.weight_versions]
        steps = [self._steps if version < 0 else version for version in versions] or [self._steps]
        return {
            "global_steps": steps[-1],
            "min_global_steps": steps[0],
            "max_global_steps": steps[-1],
            "num_cached_tokens": completions[0].num_cached_tokens if completions else None,
        }

    async def load(self, weights: Weights, global_steps: int | None) -> None:
        """Weights of a step of the trainer, written between two steps of the engine."""
        self._steps = global_steps
        await self._worker.load(-1 if global_steps is None else global_steps, weights)

    async def set_global_steps(self, global_steps: int) -> None:
        """The trainer's step of the weights that are there."""
        self._steps = global_steps

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End what runs, with what it has; further requests wait for ``resume_generation``, or are refused."""
        self._open.clear()
        self._rejects = reject_request
        return {"aborted_count": self._worker.abort()}

    async def resume_generation(self) -> None:
        """Take requests again."""
        self._rejects = False
        self._open.set()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory of state back; weights stay where they are all along."""
        if tags is None or "kv_cache" in tags:
            await asyncio.to_thread(self._worker.engine.wake)

    async def sleep(self) -> None:
        """Give the memory of state away; requests under way continue after ``wake_up``."""
        await asyncio.to_thread(self._worker.engine.sleep)

    async def release_kv_cache(self) -> None:
        """As ``sleep``."""
        await self.sleep()

    async def resume_kv_cache(self) -> None:
        """As ``wake_up``."""
        await self.wake_up()

    async def clear_kv_cache(self) -> None:
        """Forget cached prefixes; those of older weights are never hit in any case."""
        await asyncio.to_thread(self._worker.engine.call, self._worker.engine.engine.reset_prefix_cache)

    async def start_profile(self, **_: Any) -> None:
        """Nothing: the server has no profiler."""

    async def stop_profile(self) -> None:
        """Nothing."""


class Replica(RolloutReplica):
    """One server on the machine, and the GPU if there is one, of verl's worker."""

    async def launch_servers(self) -> None:
        """Start the server beside the worker. Raises ToolkitError for a replica of several processes."""
        check_parallel(self.config)
        (worker,) = self.workers
        node, gpus = await worker.__ray_call__.remote(_location)
        options: dict[str, Any] = {
            "name": server_name(self.replica_rank),
            "max_concurrency": self.max_concurrency,
            "scheduling_strategy": ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False),
            "num_cpus": 0,
        }
        if gpus:
            options["runtime_env"] = {
                "env_vars": {"CUDA_VISIBLE_DEVICES": gpus[0], "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            }
        path = self.model_config.local_path
        server = ray.remote(Server).options(**options).remote(self.config, path, "cuda" if gpus else "cpu")
        await server.launch.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = server_name(self.replica_rank)  # no HTTP: verl's agent loops call the actor


def _location(_: Any) -> tuple[str, list[str]]:
    """Of verl's worker, in its process: machine and GPUs."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids().get("GPU", [])


class Adapter(BaseRollout):
    """Brings weights of verl's actor to the server of its rank."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        check_parallel(self.config)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    @property
    def _server(self) -> Any:
        return ray.get_actor(server_name(self.replica_rank))

    async def resume(self, tags: list[str]) -> None:
        """Take memory back before the rollout."""
        if self.config.free_cache_engine:
            await self._server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Give memory away before training."""
        if self.config.free_cache_engine:
            await self._server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **_: Any
    ) -> None:
        """Send the actor's parameters, named as in checkpoints.

        Raises:
            ToolkitError: another ``wire_format``, or weights that do not fit the server's model.
        """
        if wire_format != "named_tensors":
            raise ToolkitError(f"wire_format must be 'named_tensors' with rollout.name 'toolkit', got {wire_format!r}.")
        state = {name: tensor.detach().cpu() async for name, tensor in ensure_async_iterator(weights)}
        await self._server.load.remote(ray.put(packed(state)), global_steps)
