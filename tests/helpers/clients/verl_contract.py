"""verl's own registry, classes and comparison with this project's rollout and actor; the last line is JSON.

Its argument is the folder of a model. The environment names ``train_patches.verl.plugin``, and asks for the check.
"""

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import ray
import torch
import verl
from tensordict import TensorDict
from verl.utils.debug import metrics
from verl.workers.config import RolloutConfig
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

import toolkit
from toolkit.errors import ToolkitError
from toolkit.loading import load_model
from toolkit.patching import report_of

FOLDER = sys.argv[1]
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
PROMPTS = [[5, 17, 80, 3], [9, 200, 41]]


class Trainer:
    """Stands for verl's worker, on whose machine the server starts."""


def config(**changes: Any) -> RolloutConfig:
    given = {
        "name": "toolkit", "mode": "async", "dtype": "float32", "max_model_len": 64, "prompt_length": 16,
        "response_length": 12, "max_num_seqs": 8, "max_num_batched_tokens": 512, "tensor_model_parallel_size": 1,
    }  # fmt: skip
    return RolloutConfig(**given | changes)


def sentence(call: Any) -> str:
    try:
        call()
    except ToolkitError as error:
        return str(error)
    return ""


async def rollout(found: dict[str, Any]) -> None:
    replica_class = get_rollout_replica_class("toolkit")
    adapter_class = get_rollout_class("toolkit", "async")
    folder = SimpleNamespace(local_path=FOLDER)
    found["parallel"] = sentence(
        lambda: adapter_class(config(tensor_model_parallel_size=2), folder, None, replica_rank=0)
    )
    replica = replica_class(replica_rank=0, config=config(), model_config=folder, gpus_per_node=1)
    replica.workers = [ray.remote(Trainer).options(num_cpus=0).remote()]
    await replica.launch_servers()
    server = replica.server_handle
    adapter = adapter_class(config(), folder, None, replica_rank=0)
    model, _ = load_model(FOLDER)
    found["equal"], found["steps"] = [], []
    with toolkit.Engine(model, max_model_len=64) as engine:
        for step in (None, 3):
            if step is not None:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.5)
                await adapter.release()
                await adapter.resume(tags=["weights"])
                await adapter.update_weights(iter(model.state_dict().items()), global_steps=step)
                await adapter.resume(tags=["kv_cache"])
            for at, prompt in enumerate(PROMPTS):
                output = await server.generate.remote(
                    request_id=str(at), prompt_ids=prompt, sampling_params=SAMPLING | {"seed": at}
                )
                (one,) = engine.generate([prompt], toolkit.SamplingParams(max_tokens=12, seed=at))
                found["equal"].append(output.token_ids == one.token_ids and output.log_probs == one.logprobs)
                found["steps"].append(output.extra_fields["global_steps"])
                assert output.stop_reason == "completed"

    long = SAMPLING | {"max_tokens": 40, "ignore_eos": True}
    running = [
        server.generate.remote(request_id=f"a{at}", prompt_ids=[7, at], sampling_params=long) for at in range(30)
    ]
    await asyncio.wait([asyncio.ensure_future(_value(running[0]))])  # others are under way, or wait
    await replica.abort_all_requests()
    held = server.generate.remote(request_id="held", prompt_ids=[7, 8], sampling_params=SAMPLING | {"seed": 1})
    outputs = await asyncio.gather(*running)
    found["aborted"] = sorted({one.stop_reason for one in outputs})
    assert all(len(one.token_ids) == 40 for one in outputs if one.stop_reason == "completed")
    assert all(len(one.token_ids) == len(one.log_probs) for one in outputs)
    found["waits"] = not ray.wait([held], timeout=0)[0]
    await replica.resume_generation()
    found["continued"] = (await held).stop_reason
    await replica.clear_kv_cache()
    await replica.sleep()
    await replica.wake_up()
    try:
        await server.generate.remote(request_id="b", prompt_ids=[5], sampling_params={"mood": 1})
    except ToolkitError as error:
        found["unknown"] = str(error.cause)
    try:
        await adapter.update_weights(iter(()), wire_format="delta_flush")
    except ToolkitError as error:
        found["wire"] = str(error)


async def _value(reference: Any) -> Any:
    return await reference


def comparison(found: dict[str, Any]) -> None:
    """verl's metric, with and without a differing bit; what the mask leaves out may differ."""
    from verl import DataProto

    actor = torch.randn(2, 5)
    rolled = actor.clone()
    rolled[1, 4] = 9.0
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 4] = 0
    names = {"old_log_probs": actor, "rollout_log_probs": rolled, "responses": mask, "response_mask": mask}
    found["metrics"] = metrics.calculate_debug_metrics(DataProto(batch=TensorDict(names, batch_size=2)))
    rolled[0, 1] = torch.nextafter(rolled[0, 1], torch.tensor(9.0))
    data = DataProto(batch=TensorDict(names, batch_size=2))
    found["differs"] = sentence(lambda: metrics.calculate_debug_metrics(data))
    rolled[0, 1] = float("nan")
    found["nan"] = sentence(lambda: metrics.calculate_debug_metrics(data))


def actor(found: dict[str, Any]) -> None:
    """What verl's engine builds once ``external_lib`` is imported."""
    from verl.utils.import_utils import import_external_libs
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    sys.modules["trl"] = None  # type: ignore[assignment]  # verl wants a class of an older one, and can be without any
    own = FSDPEngine._build_module
    import_external_libs("train_patches.verl.actor")
    import_external_libs("train_patches.verl.actor")
    assert FSDPEngine._build_module is not own
    model, _ = load_model(FOLDER)
    settings = {"use_remove_padding": False, "use_fused_kernels": False, "use_liger": False}
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            **settings, hf_config=model.config, local_path=FOLDER, trust_remote_code=False, model_type="language_model",
            fused_kernel_options={}, enable_gradient_checkpointing=False,
        ),
        engine_config=SimpleNamespace(model_dtype="fp32", forward_only=False), device_mesh=None,
        use_remove_padding=False, ulysses_sequence_parallel_size=1,
    )  # fmt: skip
    report = report_of(FSDPEngine._build_module(engine))
    found["numerics"] = None if report is None else report.numerics
    engine.model_config.use_remove_padding = True
    found["padding"] = sentence(lambda: FSDPEngine._build_module(engine))


if __name__ == "__main__":
    ray.init(include_dashboard=False)
    os.environ["RANK"] = "0"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {"version": verl.__version__}
    comparison(found)
    actor(found)
    asyncio.run(rollout(found))
    print(json.dumps(found))
