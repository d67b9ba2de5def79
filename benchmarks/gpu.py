"""GPU checks, then GPU benchmarks: ``python -m benchmarks.gpu`` (under eight minutes).

Runs tests/gpu first and reports no speed on a red gate. Without a CUDA device it says so and exits with 2.
"""

import argparse
import copy
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

from benchmarks.common import interleaved, print_table, qwen3, summary, write_json

ROOT = Path(__file__).parent.parent
# A few layers of a Qwen3-4B: wide enough to fill the device, few enough to leave time.
WIDE = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
}


def gate() -> dict[str, Any]:
    """Run tests/gpu in a process of its own: counts, and what the tests recorded."""
    report = ROOT / "benchmarks" / "results" / "gpu-tests.xml"
    report.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-rA", f"--junitxml={report}"]
    start = time.perf_counter()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print("\n".join(finished.stdout.splitlines()[-60:]))
    if not report.exists():
        return {"green": False, "error": finished.stderr[-2000:]}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    recorded = {
        f"{case.get('name')} {p.get('name')}": p.get("value")
        for case in suite.iter("testcase")
        for p in case.iter("property")
    }
    report.unlink()
    ran = counts["tests"] - counts["skipped"]
    green = finished.returncode == 0 and ran > 0 and not counts["failures"] and not counts["errors"]
    return {"green": green, **counts, "recorded": recorded, "seconds": time.perf_counter() - start}


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes/s of a large copy, FLOP/s of a large bf16 product on random data."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = _median(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _median(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * source.nbytes / copied, "bf16_flops_per_s": 2 * 8192**3 / product}


def _median(call: Callable[[], Any]) -> float:
    """Median seconds of a call by device events."""
    import triton.testing

    return triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3


def bench_attention() -> dict[str, Any]:
    """Prefill, decode and backward against SDPA, bf16, 32 heads on 8, head_dim 128, pages of 16."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from toolkit.ops.attention.triton import attention
    from toolkit.ops.attention.triton_backward import attention_backward

    heads, kv_heads, d, page = 32, 8, 128, 16
    cases = {
        "prefill 4x2048": (4, 2048, 2048),
        "decode 64x2048": (64, 1, 2048),
        "decode 1x8192": (1, 1, 8192),
    }
    result: dict[str, Any] = {}
    for name, (batch, queries, keys) in cases.items():
        q = torch.randn(batch * queries, heads, d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch * keys, kv_heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        order = torch.randperm(batch * keys // page, device="cuda")
        tables = order.view(batch, -1)
        slots = (order[:, None] * page + torch.arange(page, device="cuda")).flatten()
        k_pool, v_pool = torch.empty_like(k), torch.empty_like(v)
        k_pool[slots], v_pool[slots] = k, v
        offsets = torch.arange(batch + 1, device="cuda") * queries
        lengths = torch.full((batch,), keys, device="cuda")
        starts = torch.arange(batch, device="cuda") * keys
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
        entry = {"error": error, "paged_s": _median(paged), "sdpa_s": _median(stock)}
        if queries == keys:
            grad = torch.randn_like(out)
            leaves = [x.detach().requires_grad_() for x in (dense_q, dense_k, dense_v)]
            made = stock(*leaves)
            upstream = torch.randn_like(made)
            ours = (grad, q, k, v, out, lse, offsets, starts, lengths, d**-0.5, 0, 0.0)
            entry["backward_s"] = _median(partial(attention_backward, *ours))
            gradient = partial(torch.autograd.grad, made, leaves, upstream, retain_graph=True)
            entry["sdpa_backward_s"] = _median(gradient)
        pairs = queries * keys - (queries * (queries - 1) // 2)
        entry["flops"] = 4 * batch * heads * d * pairs
        entry["bytes"] = 2 * q.nbytes + k.nbytes + v.nbytes
        result[name] = entry
    return result


def bench_training(rows: int = 4, length: int = 1024) -> dict[str, Any]:
    """A bf16 training step of a wide, shallow Qwen3, patched against unpatched: seconds and peak bytes."""
    import toolkit

    stock = qwen3(**WIDE).to("cuda", torch.bfloat16).train()
    patched = copy.deepcopy(stock)
    toolkit.patch(patched)
    ids = torch.randint(0, WIDE["vocab_size"], (rows, length), device="cuda")
    losses: dict[str, float] = {}
    steps: dict[str, Callable[..., None]] = {}
    for name, model in (("patched", patched), ("unpatched", stock)):
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
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        peaks[name] = torch.cuda.max_memory_allocated() - base
    apart = abs(losses["patched"] - losses["unpatched"]) / abs(losses["unpatched"])
    if not apart < 1e-2:
        raise RuntimeError(f"patched loss {losses['patched']} against {losses['unpatched']}")
    timings = {name: summary(t) for name, t in interleaved(steps, 10, warmup=2, synchronize=True).items()}
    return {"tokens": rows * length, "losses": losses, "timings": timings, "peak_above_state_bytes": peaks}


def bench_generation(batch: int = 32, length: int = 128, new_tokens: int = 64) -> dict[str, Any]:
    """The engine against ``generate`` on the same bf16 model, greedy, at two batch sizes."""
    from benchmarks.serve import Engine, Generate, make_prompts

    stock = qwen3(**WIDE).to("cuda", torch.bfloat16)
    engine, generate = Engine(copy.deepcopy(stock), batch, length + new_tokens), Generate(stock)
    result: dict[str, Any] = {}
    for count in (batch, 1):
        prompts = make_prompts(count, length, WIDE["vocab_size"])
        calls = {
            "toolkit": lambda p=prompts: engine(p, new_tokens),
            "generate": lambda p=prompts: generate(p, new_tokens),
        }
        timings = {name: summary(t) for name, t in interleaved(calls, 3, synchronize=True).items()}
        speed = {name: count * new_tokens / t["median_s"] for name, t in timings.items()}
        result[str(count)] = {"timings": timings, "tokens_per_s": speed}
    return result


def show(result: dict[str, Any]) -> None:
    """The figures that did come out, as tables."""
    limits = result["ceilings"]
    print_table(
        "Ceilings of this device", ["what", "reached"],
        [["copy, TB/s", limits["copy_bytes_per_s"] / 1e12],
         ["bf16 product, TFLOP/s", limits["bf16_flops_per_s"] / 1e12]],
    )  # fmt: skip
    rows = []
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
    print_table("Attention, bf16, 32 heads on 8, head_dim 128", ["case", "paged ms", "SDPA ms", "floor ms"], rows)
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
    print_table("Generation, bf16 Qwen3, 4 layers", ["batch", "engine tok/s", "generate tok/s", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: the GPU tests and benchmarks need one.", file=sys.stderr)
        raise SystemExit(2)
    start = time.perf_counter()
    result: dict[str, Any] = {"tests": gate()}
    if not result["tests"]["green"]:
        path = write_json("gpu", result)
        print(f"gate red: no speed is reported; written to {path}", file=sys.stderr)
        raise SystemExit(1)
    result["ceilings"] = ceilings()
    failed = []
    benches = {"attention": bench_attention, "training": bench_training, "generation": bench_generation}
    for name, bench in benches.items():
        try:
            result[name] = bench()
        except (
            Exception
        ):  # device time is scarce: the other figures are kept, and the exit code says that one is missing
            failed.append(name)
            result.setdefault("failed", {})[name] = traceback.format_exc()
            traceback.print_exc()
        torch.cuda.empty_cache()
    result["seconds"] = time.perf_counter() - start
    show(result)
    path = write_json("gpu", result)
    print(f"{result['seconds']:.0f} s; written to {path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
