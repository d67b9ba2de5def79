"""Decode steps of a random Qwen3-4B on a GPU: both numerics modes, eager and as a CUDA graph, against transformers.

Beside them the step of one prompt, which is captured as they are. A step reads every weight but the embedding once;
``of_streaming`` is the time of that at the copy rate over the step's. A profiler counts launches and the host's time.
The log-probabilities that the engine returns are compared with those of ``token_logprobs``: in bitwise mode none may
differ.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import toolkit
from benchmarks.common import print_table, qwen3
from benchmarks.end_to_end.serve import Generate, GenerateBatch, make_prompts
from benchmarks.gpu.device import DEVICE, DRY, HALF
from benchmarks.gpu.section import Section

WHOLE = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
if DRY:
    WHOLE = dict.fromkeys(WHOLE, 16) | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    WHOLE |= {"vocab_size": 61}
BATCHES = [2] if DRY else [1, 32, 256]
PROMPT, STEPS, WARMUP, PROFILED = (3, 1, 1, 1) if DRY else (128, 24, 4, 2)
PEER_TOKENS = 2 if DRY else 32
GRAPHS = ["eager"] if DRY else ["eager", "graph"]  # a CPU has no CUDA graphs


def make_model(**sizes: int) -> Any:
    """A Qwen3 with random weights, made on the device in 16 bits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(HALF)
    try:
        with torch.device(DEVICE):
            return qwen3(**sizes)
    finally:
        torch.set_default_dtype(before)


def streamed_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all but the embedding, of which it reads one row per token."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def bench_decode(section: Section) -> None:
    """Every mode and batch, then the peers on the unpatched model."""
    model = make_model(**WHOLE)
    section.result |= {"streamed_bytes": streamed_bytes(model), "steps": {}, "differing": {}, "peers": {}}
    for numerics in ("fast", "bitwise"):
        toolkit.patch(model, numerics=numerics)
        for kind in GRAPHS:
            with mock.patch.dict(os.environ, {"TOOLKIT_CUDA_GRAPHS": "on" if kind == "graph" else "off"}):
                for batch in BATCHES:
                    label = f"{numerics}, {kind}, batch {batch}"
                    if section.allows(label, 5.0):
                        with section.trying(label):
                            section.result["steps"][label] = time_steps(model, batch, section)
                with section.trying(f"{numerics}, {kind}, log-probabilities"):
                    compare_logprobs(section, model, numerics, kind)
        toolkit.unpatch(model)
    peers: dict[str, Callable[..., Any]] = {"generate": Generate, "generate_batch": GenerateBatch}
    if DRY:
        del peers["generate_batch"]  # it wants a GPU
    for name, maker in peers.items():
        for batch in BATCHES[:2]:
            label = f"{name}, batch {batch}"
            if section.allows(label, 8.0):
                with section.trying(label):
                    section.result["peers"][label] = time_peer(maker(model), batch)


def time_steps(model: Any, batch: int, section: Section) -> dict[str, Any]:
    """Seconds of a decode step of ``batch`` sequences, its launches, and the host's share."""
    total = STEPS + WARMUP + PROFILED + 8
    engine = toolkit.Engine(
        model, max_num_seqs=batch, max_model_len=PROMPT + total, max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    )  # fmt: skip
    with engine:
        params = toolkit.SamplingParams(max_tokens=total, temperature=0.0, ignore_eos=True)
        for prompt in make_prompts(batch, PROMPT, WHOLE["vocab_size"]):
            engine.submit(prompt, params)
        for _ in range(-(-batch * PROMPT // 4096) + WARMUP):  # the prompts, compilers, the recording
            engine.step()
        seconds = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            engine.step()  # returns tokens, so the device is done
            seconds.append(time.perf_counter() - begun)
        entry = profile(engine.step)
        entry["prompt_s"] = time_prompt(engine)
    entry["step_s"] = statistics.median(seconds)
    entry["tokens_per_s"] = batch / entry["step_s"]
    entry["bytes_per_s"] = section.result["streamed_bytes"] / entry["step_s"]
    entry["of_streaming"] = entry["bytes_per_s"] / section.ceilings["copy_bytes_per_s"]
    return entry


def time_prompt(engine: toolkit.Engine) -> float:
    """Seconds of the step that one prompt is, with nothing beside it."""
    for request in list(engine.requests.by_id):
        engine.cancel(request)
    params, seconds = toolkit.SamplingParams(max_tokens=1, temperature=0.0), []
    for prompt in make_prompts(1 if DRY else 6, PROMPT, WHOLE["vocab_size"], seed=3):
        engine.submit(prompt, params)
        begun = time.perf_counter()
        while engine.has_work:  # what was in flight is collected first
            engine.step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[len(seconds) // 3 :])


def profile(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels and launches of a step, and microseconds of kernels; the profiler slows the host, not the kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not DRY:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(PROFILED):
            step()
    kernels = launches = 0
    busy = 0.0
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels, busy = kernels + 1, busy + event.device_time
        launches += event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))
    return {"kernels": kernels / PROFILED, "launches": launches / PROFILED, "kernel_us": busy / PROFILED}


def compare_logprobs(section: Section, model: Any, numerics: str, kind: str) -> None:
    """Returned log-probabilities against those that training computes for the same tokens."""
    prompts, count = make_prompts(2, PROMPT, WHOLE["vocab_size"], seed=2), 2 if DRY else 16
    with toolkit.Engine(model, max_num_seqs=2, max_model_len=PROMPT + count) as engine:
        params = toolkit.SamplingParams(max_tokens=count, temperature=1.0, ignore_eos=True, seed=1)
        completions = engine.generate(prompts, params)
    texts = [[*one.prompt_token_ids, *one.token_ids] for one in completions]
    with torch.no_grad():
        trained = toolkit.token_logprobs(model, texts, last=[count] * len(texts))
    returned = [torch.tensor(one.logprobs, dtype=torch.float64) for one in completions]
    pairs = [(a, b.double().cpu()) for a, b in zip(returned, trained, strict=True)]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    label = f"{numerics}, {kind}"
    section.result["differing"][label] = {"differing": differing, "of": 2 * count, "largest": largest}
    if numerics == "bitwise":
        section.expect(label, differing == 0, f"{differing} of {2 * count} log-probabilities differ from training's")
    else:
        section.expect(label, largest < 0.2, f"a log-probability is {largest:.2g} nats from training's")


def time_peer(peer: Callable[..., Any], batch: int) -> dict[str, float]:
    """Seconds of a step of a peer: of a generation less those of one token, by the number of steps between."""
    prompts = make_prompts(batch, PROMPT, WHOLE["vocab_size"])
    peer(prompts, 2)
    taken = {}
    for count in (1, PEER_TOKENS):
        begun = time.perf_counter()
        peer(prompts, count)  # returns lists, so the device is done
        taken[count] = time.perf_counter() - begun
    step = (taken[PEER_TOKENS] - taken[1]) / (PEER_TOKENS - 1)
    return {"step_s": step, "tokens_per_s": batch / step}


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [
        [label, s["step_s"] * 1e3, s["tokens_per_s"], f"{s['of_streaming']:.0%}", s["kernels"], s["launches"],
         s["kernel_us"] / 1e3, s["prompt_s"] * 1e3]
        for label, s in result["steps"].items()
    ]  # fmt: skip
    rows += [[label, s["step_s"] * 1e3, s["tokens_per_s"], *[""] * 5] for label, s in result["peers"].items()]
    title = f"Decode step, Qwen3 of {result['streamed_bytes'] / 1e9:.2f} GB read a step, prompts of {PROMPT}"
    header = ["side", "step ms", "tok/s", "of weight streaming", "kernels", "launches", "kernels' ms", "a prompt, ms"]
    print_table(title, header, rows)
    for label, found in result["differing"].items():
        print(
            f"log-probabilities, {label}: {found['differing']} of {found['of']} differ, at most {found['largest']:.2g}"
        )
