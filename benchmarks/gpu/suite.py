"""GPU checks, then GPU benchmarks: ``python -m benchmarks.gpu`` (under eight minutes).

Runs the tests of the kernels first, one process per file, and reports no speed of what a failing test covers. Every
section has a budget of seconds; one that fails is reported without stopping the others. Without a CUDA device it says
so and exits with 2.
``--dry-run`` runs every section at tiny sizes on CPU tensors in Triton's interpreter, untimed, and writes nothing.
"""

import argparse
import copy
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe, interleaved, print_table, qwen3, summary, write_json
from benchmarks.gpu.device import DEVICE, DRY, HALF, Budget, median, peak, triton_on_cpu

ROOT = Path(__file__).parents[2]
SECONDS = 3600.0 if DRY else 465.0  # for everything
GATE_SECONDS = 210.0
# A few layers of a Qwen3-4B: large enough to fill the device, few enough to leave time.
SHALLOW = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
}
if DRY:
    SHALLOW = dict.fromkeys(SHALLOW, 16) | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    SHALLOW |= {"head_dim": 16, "vocab_size": 61}

# Section -> the tests whose failure withholds its measurements: file -> pattern of names.
LINEAR = r"test_linear(_keeps|_past|\[|$)"
SHARED = {"test_bounds_attention": "", "test_bounds_rowwise": "", "test_bounds_gemm": ""}
WATCHED: dict[str, dict[str, str]] = {
    "attention": {"test_bounds_attention": ""},
    "linear": {"test_bounds_gemm": LINEAR},
    "linear_logprob": {"test_bounds_linear_logprob": ""},
    "lora_linear": {"test_bounds_gemm": f"test_lora|{LINEAR}"},
    "sample": {"test_bounds_sample": ""},
    "memory_bound": {"test_bounds_rowwise": ""},
    "moe": {"test_bounds_moe": ""},
    "training": SHARED | {"test_bounds_linear_logprob": "", "test_gpu_model": "step|trains_like|greedy"},
    "generation": SHARED | {"test_bounds_sample": "", "test_gpu_model": "trains_like|greedy"},
}


def gate() -> dict[str, Any]:
    """Run tests/gpu and tests/ops/test_bounds_*, one process per file, all at once: compilers take most of their time.

    Returns counts, failures and what tests recorded.

    A file whose process ends without a report, or takes too long, counts as one failure named ``crashed``.
    """
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    start = time.perf_counter()
    running = {}
    tests = ROOT / "tests"
    for path in sorted([*(tests / "ops").glob("test_bounds_*.py"), *(tests / "gpu").glob("test_*.py")]):
        report, log = results / f"{path.stem}.xml", results / f"{path.stem}.log"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", str(path), "-m", "gpu", "-ra", "--tb=short", "--durations=5"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, f"--junitxml={report}"], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
            )
        running[path.stem] = (process, report, log)
    outcome: dict[str, Any] = {"tests": 0, "skipped": 0, "failed": [], "recorded": {}, "seconds_of": {}}
    for file, (process, report, log) in running.items():
        try:
            process.wait(max(1.0, GATE_SECONDS - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the compiler's helpers
            process.wait()
        print(f"{file}:", *log.read_text().splitlines()[-60:], sep="\n")
        read_report(file, report, outcome)
        log.unlink()
    ran = outcome["tests"] - outcome["skipped"]
    green = ran > 0 and not outcome["failed"]
    return {"green": green, **outcome, "seconds": time.perf_counter() - start}


def read_report(file: str, report: Path, outcome: dict[str, Any]) -> None:
    """Add what a JUnit report says to ``outcome``."""
    if not report.exists():
        outcome["failed"].append([file, "crashed"])
        return
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    outcome["tests"] += int(suite.get("tests", 0))
    outcome["skipped"] += int(suite.get("skipped", 0))
    outcome["seconds_of"][file] = float(suite.get("time", 0.0))
    for case in suite.iter("testcase"):
        name = case.get("name", "") if case.get("classname") else "crashed"  # a file that could not be imported
        if case.find("failure") is not None or case.find("error") is not None:
            outcome["failed"].append([file, name])
        for found in case.iter("property"):
            outcome["recorded"][f"{name} {found.get('name')}"] = found.get("value")
    report.unlink()


def withheld(section: str, failed: list[list[str]]) -> list[str]:
    """The failing tests that keep a section from being timed."""
    watched = WATCHED.get(section, {})
    return [
        f"{file}: {name}"
        for file, name in failed
        if file in watched and (name == "crashed" or re.search(watched[file], name))
    ]


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes/s of a large copy, FLOP/s of a large 16-bit product on random data."""
    size, side = (64, 8) if DRY else (2**30, 8192)
    source = torch.randn(size, device=DEVICE, dtype=HALF)
    target = torch.empty_like(source)
    copied = median(lambda: target.copy_(source), 200)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=HALF) for _ in range(2))
    product = median(lambda: a @ b, 200)
    return {"copy_bytes_per_s": 2 * source.nbytes / copied, "bf16_flops_per_s": 2 * side**3 / product}


def bench_attention(budget: Budget, limits: dict[str, float]) -> dict[str, Any]:
    """Prefill, decode and backward against SDPA, bf16, 32 heads on 8, head_dim 128, pages of 16."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from toolkit.ops.attention.triton import attention
    from toolkit.ops.attention.triton_backward import attention_backward

    heads, kv_heads, d, page = (4, 2, 16, 4) if DRY else (32, 8, 128, 16)
    cases = (
        {"prefill": (2, 8, 8), "decode": (2, 1, 8)}
        if DRY
        else {
            "prefill 4x2048": (4, 2048, 2048),
            "decode 64x2048": (64, 1, 2048),
            "decode 1x8192": (1, 1, 8192),
        }
    )
    result: dict[str, Any] = {}
    for name, (batch, queries, keys) in cases.items():
        if not budget.allows(name, 4.0):
            continue
        q = torch.randn(batch * queries, heads, d, device=DEVICE, dtype=HALF)
        k, v = (torch.randn(batch * keys, kv_heads, d, device=DEVICE, dtype=HALF) for _ in range(2))
        order = torch.randperm(batch * keys // page, device=DEVICE)
        tables = order.view(batch, -1)
        slots = (order[:, None] * page + torch.arange(page, device=DEVICE)).flatten()
        k_pool, v_pool = torch.empty_like(k), torch.empty_like(v)
        k_pool[slots], v_pool[slots] = k, v
        offsets = torch.arange(batch + 1, device=DEVICE) * queries
        lengths = torch.full((batch,), keys, device=DEVICE)
        starts = torch.arange(batch, device=DEVICE) * keys
        dense_q = q.view(batch, queries, heads, d).transpose(1, 2)
        dense_k, dense_v = (x.view(batch, keys, kv_heads, d).transpose(1, 2) for x in (k, v))

        def paged(q=q, k=k_pool, v=v_pool, offsets=offsets, starts=starts, lengths=lengths, tables=tables) -> Any:
            return attention(q, k, v, offsets, starts, lengths, tables, page, d**-0.5, 0, 0.0)

        def stock(q=dense_q, k=dense_k, v=dense_v, causal=queries > 1) -> Any:
            return sdpa(q, k, v, is_causal=causal, enable_gqa=True)

        out, lse = paged()
        expected = stock().transpose(1, 2).reshape(out.shape)
        error = float((out.double() - expected.double()).norm() / expected.double().norm())
        if not error < 2e-2:
            raise RuntimeError(f"attention {name} is {error:.1e} from SDPA")
        entry = {"error": error, "paged_s": median(paged), "sdpa_s": median(stock)}
        if queries == keys:
            grad = torch.randn_like(out)
            leaves = [x.detach().requires_grad_() for x in (dense_q, dense_k, dense_v)]
            made = stock(*leaves)
            upstream = torch.randn_like(made)
            ours = (grad, q, k, v, out, lse, offsets, starts, lengths, d**-0.5, 0, 0.0)
            entry["backward_s"] = median(partial(attention_backward, *ours))
            gradient = partial(torch.autograd.grad, made, leaves, upstream, retain_graph=True)
            entry["sdpa_backward_s"] = median(gradient)
        pairs = queries * keys - (queries * (queries - 1) // 2)
        entry["flops"] = 4 * batch * heads * d * pairs
        entry["bytes"] = 2 * q.nbytes + k.nbytes + v.nbytes
        result[name] = entry
    return result


def times(calls: dict[str, Callable[..., Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """``interleaved`` on this device; dry: once."""
    return interleaved(calls, 1, 0) if DRY else interleaved(calls, repeats, warmup, synchronize=True)


def bench_training(budget: Budget, limits: dict[str, float]) -> dict[str, Any]:
    """A bf16 training step of a shallow Qwen3, patched against unpatched: seconds and peak bytes."""
    import toolkit

    rows, length = (1, 4) if DRY else (4, 1024)
    stock = qwen3(**SHALLOW).to(DEVICE, HALF).train()
    models = {"patched": copy.deepcopy(stock), "patched, bitwise": copy.deepcopy(stock), "unpatched": stock}
    toolkit.patch(models["patched"], numerics="fast")
    toolkit.patch(models["patched, bitwise"], numerics="bitwise")
    ids = torch.randint(0, SHALLOW["vocab_size"], (rows, length), device=DEVICE)
    losses: dict[str, float] = {}
    steps: dict[str, Callable[..., None]] = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(name: str = name, model: Any = model, optimizer: Any = optimizer) -> None:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.setdefault(name, float(loss.detach()))

        steps[name] = step
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak(step)
    for name, loss in losses.items():
        if not abs(loss - losses["unpatched"]) < 1e-2 * abs(losses["unpatched"]):
            raise RuntimeError(f"The first loss of {name} must be within 1 % of {losses['unpatched']}, got {loss}.")
    timings = {name: summary(t) for name, t in times(steps, 10, 2).items()}
    return {"tokens": rows * length, "losses": losses, "timings": timings, "peak_above_state_bytes": peaks}


def bench_generation(budget: Budget, limits: dict[str, float]) -> dict[str, Any]:
    """The engine against ``generate`` on the same bf16 model, greedy, at two batch sizes."""
    from benchmarks.end_to_end.serve import Engine, Generate, make_prompts

    batch, length, new_tokens = (2, 3, 2) if DRY else (32, 128, 64)
    stock = qwen3(**SHALLOW).to(DEVICE, torch.float32 if DRY else HALF).eval()
    engine, generate = Engine(copy.deepcopy(stock), batch, length + new_tokens), Generate(stock)
    result: dict[str, Any] = {}
    for count in (batch, 1):
        if not budget.allows(f"batch {count}", 15.0):
            continue
        prompts = make_prompts(count, length, SHALLOW["vocab_size"])
        calls = {
            "toolkit": lambda p=prompts: engine(p, new_tokens),
            "generate": lambda p=prompts: generate(p, new_tokens),
        }
        timings = {name: summary(t) for name, t in times(calls, 3).items()}
        speed = {name: count * new_tokens / t["median_s"] for name, t in timings.items()}
        result[str(count)] = {"timings": timings, "tokens_per_s": speed}
    return result


def show(result: dict[str, Any]) -> None:
    """The measurements that were made, as tables."""
    from benchmarks.gpu import moe, ops, tile_invariance

    limits = result["ceilings"]
    print_table(
        "Ceilings of this device", ["what", "reached"],
        [["copy, TB/s", limits["copy_bytes_per_s"] / 1e12],
         ["bf16 product, TFLOP/s", limits["bf16_flops_per_s"] / 1e12]],
    )  # fmt: skip
    rows: list[list[Any]] = []
    for name, entry in result.get("attention", {}).items():
        floor = max(entry["flops"] / limits["bf16_flops_per_s"], entry["bytes"] / limits["copy_bytes_per_s"])
        rows.append([name, entry["paged_s"] * 1e3, entry["sdpa_s"] * 1e3, floor * 1e3])
        if "backward_s" in entry:
            rows.append(
                [
                    f"{name} backward",
                    entry["backward_s"] * 1e3,
                    entry["sdpa_backward_s"] * 1e3,
                    2.5 * floor * 1e3,
                ]
            )
    if rows:
        print_table("Attention, bf16, 32 heads on 8, head_dim 128", ["case", "paged ms", "SDPA ms", "floor ms"], rows)
    if "tile_invariance" in result:
        tile_invariance.show(result["tile_invariance"])
    ops.show(result)
    moe.show(result)
    if training := result.get("training"):
        rows = [
            [
                side,
                t["median_s"] * 1e3,
                training["tokens"] / t["median_s"],
                training["peak_above_state_bytes"][side] / 2**30,
            ]
            for side, t in training["timings"].items()
        ]
        print_table("Training step, bf16 Qwen3, 4 layers", ["side", "ms", "tok/s", "peak GiB above state"], rows)
    rows = [
        [count, speed["toolkit"], speed["generate"], f"{speed['toolkit'] / speed['generate']:.2f}x"]
        for count, entry in result.get("generation", {}).items()
        for speed in [entry["tokens_per_s"]]
    ]
    if rows:
        print_table("Generation, bf16 Qwen3, 4 layers", ["batch", "engine tok/s", "generate tok/s", "ratio"], rows)


def sections() -> dict[str, tuple[Callable[[Budget, dict[str, float]], dict[str, Any]], float]]:
    """name -> (what measures it, seconds it may take), in the order in which they run."""
    from benchmarks.gpu import moe, ops, tile_invariance

    return {
        "attention": (bench_attention, 25.0),
        "tile_invariance": (tile_invariance.bench_tile_invariance, 50.0),
        **ops.SECTIONS,
        "moe": (moe.bench_moe, 45.0),
        "training": (bench_training, 40.0),
        "generation": (bench_generation, 60.0),
    }


def measure(chosen: list[str], result: dict[str, Any], whole: Budget) -> None:
    """Run sections into ``result``; what failed, was withheld or did not fit is said there."""
    result["ceilings"] = ceilings()
    for name in chosen:
        bench, seconds = sections()[name]
        if why := withheld(name, result["tests"]["failed"]):
            result["failed"][name] = f"withheld, since tests failed: {', '.join(why[:8])}"
            continue
        if not whole.allows(name, min(seconds, 15.0)):
            continue
        budget = Budget(whole.left() if DRY else min(seconds, whole.left()))
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            with budget.enforced():
                result[name] = bench(budget, result["ceilings"])
        except (
            Exception
        ):  # device time is scarce: the other figures are kept, and the exit code says that one is missing
            result["failed"][name] = traceback.format_exc()
            traceback.print_exc()
        result["failed"] |= {f"{name}, {one}": why for one, why in budget.failed.items()}
        result["seconds_of"][name] = time.perf_counter() - start
        result["left_out"] += [f"{name}: {one}" for one in budget.left_out]
        if not DRY:
            gc.collect()  # models are full of cycles
            torch.cuda.empty_cache()
            write_json("gpu", result)  # what is there outlives a crash of the next one
    result["left_out"] += whole.left_out


def rehearse() -> None:
    """Start this program again with the interpreter in place of a device; Triton reads that when it is imported."""
    environment = os.environ | {"TOOLKIT_GPU_TESTS": "cpu", "TRITON_INTERPRET": "1", "TOOLKIT_NATIVE": "off"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on CPU, untimed; nothing is written")
    parser.add_argument("--only", nargs="+", choices=[*WATCHED, "tile_invariance"], help="these sections alone")
    arguments = parser.parse_args()
    if arguments.dry_run and not DRY:
        rehearse()
    if not DRY and not torch.cuda.is_available():
        print("No CUDA device here: the GPU tests and benchmarks need one.", file=sys.stderr)
        raise SystemExit(2)
    whole = Budget(SECONDS)
    if DRY:
        triton_on_cpu()
    result: dict[str, Any] = {"failed": {}, "left_out": [], "seconds_of": {}}
    result["tests"] = {"green": True, "failed": []} if DRY else gate()
    measure(arguments.only or list(sections()), result, whole)
    result["seconds"] = SECONDS - whole.left()
    show(result)
    if DRY:
        json.dumps({**describe(), **result})
        print(f"{result['seconds']:.0f} s; a dry run of {', '.join(result['seconds_of'])}")
    else:
        print(f"{result['seconds']:.0f} s; written to {write_json('gpu', result)}")
    for line in result["left_out"]:
        print(f"skipped, out of time: {line}")
    for file, name in result["tests"]["failed"]:
        print(f"test failed: {file} {name}", file=sys.stderr)
    for name, why in result["failed"].items():
        print(f"{name}: {why.strip().splitlines()[-1]}", file=sys.stderr)
    if result["failed"] or not result["tests"]["green"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
