"""The ops on a GPU against their peers, part of ``python -m benchmarks.gpu``.

Every measurement comes with a check of results and gradients on a small slice against float64. Times are medians by
device events, with L2 cold and operands of 64 MiB and more; memory is the peak that a forward and backward allocate
above their inputs. Peers: ``torch.compile`` of the plain formula, cuBLAS GEMMs, and Liger's kernels where installed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import both_ways, geomean, print_table
from benchmarks.gpu import device
from benchmarks.gpu.device import (
    DEVICE,
    DRY,
    GATE,
    HALF,
    doubles,
    median,
    normal,
    upcast,
)
from benchmarks.gpu.section import Section
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.lora_linear import lora_linear
from toolkit.ops.sample import reference as sampling
from toolkit.ops.sample import sample

# A Qwen3-4B: (K, N) of queries, keys or values, attention out, gate or up, down.
PROJECTIONS = (
    [(48, 40)] if DRY else [(2560, 4096), (2560, 1024), (4096, 2560), (2560, 9728), (9728, 2560)]
)  # fmt: skip
FEW, MANY = ([1], [24]) if DRY else ([1, 8, 64], [4096, 8192])
STREAM_BYTES = (
    (8 << 10) if DRY else (256 << 20)
)  # weights that are this large together come from memory each time, as in a model
BETWEEN: list[int] = [] if DRY else [512]
HEAD = {"tokens": 24, "depth": 32, "vocabulary": 90} if DRY else {"tokens": 8192, "depth": 2560, "vocabulary": 151936}
LORA = (20, 32, 40, 4, 3) if DRY else (4096, 2560, 4096, 16, 8)  # rows, K, N, rank, adapters
DECODE_LORA = (4, 32, 40, 4, 3) if DRY else (64, 2560, 4096, 16, 32)
SAMPLES = [(3, 70)] if DRY else [(1, 151936), (64, 151936)]


def bench_linear(section: Section) -> None:
    """``linear`` in bitwise mode against cuBLAS: ratios by rows and shape, above 1 ours is faster."""
    ratios: dict[int, list[float]] = {}
    result = section.result
    seconds: dict[str, dict[str, float]] = {}
    result |= {"gate": 0.0, "seconds": seconds}
    for depth, outputs in PROJECTIONS:
        for rows in [*FEW, *MANY, *BETWEEN]:
            label = f"{rows} x {depth} -> {outputs}"
            if not section.allows(label, 1.0):
                continue
            with section.trying(label), torch.no_grad():
                # Few rows take microseconds: several weights in turn, from a graph. Many keep the device busy.
                copies = 1 if rows in MANY else max(1, STREAM_BYTES // (depth * outputs * HALF.itemsize))
                weights = [normal(outputs, depth, scale=depth**-0.5) for _ in range(copies)]
                x, some = normal(rows, depth), slice(max(0, rows - 8), rows)
                exact = x[some].double() @ weights[0].double().T
                error = section.check(label, [linear(x, weights[0])[some]], [exact], GATE[HALF])
                result["gate"] = max(result["gate"], error)
                taken = {}
                for side, function in (("ours", linear), ("cublas", F.linear)):
                    calls = [partial(function, x, weight) for weight in weights]
                    taken[side] = median(calls[0], 60) if rows in MANY else device.replayed(calls)
                ratios.setdefault(rows, []).append(taken["cublas"] / taken["ours"])
                seconds[label] = {**taken, "flops_per_s": 2 * rows * depth * outputs / taken["ours"]}
    result |= {
        "ratios": {str(rows): values for rows, values in sorted(ratios.items())},
        "few_rows": geomean([r for rows in FEW for r in ratios.get(rows, [])]),
        "many_rows": geomean([r for rows in MANY for r in ratios.get(rows, [])]),
    }


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor, size: int = 1024) -> Tensor:
    """Cross-entropy a chunk of tokens at a time, logits computed again in the backward: how TRL saves memory."""
    from torch.utils.checkpoint import checkpoint

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(upcast(F.linear(h, weight)), y, reduction="sum")

    parts = zip(hidden.split(size), targets.split(size))
    total = torch.stack([checkpoint(part, h, y, use_reentrant=False) for h, y in parts])
    return total.sum() / targets.shape[0]


def liger_head() -> Callable[..., Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        made = LigerFusedLinearCrossEntropyFunction.apply(x, w, y)
        return made[0] if isinstance(made, tuple) else made

    return loss


def dense_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def measure_loss(loss: Callable[..., Tensor], leaves: list[Tensor], targets: Tensor) -> dict[str, float]:
    """The loss, seconds of its forward alone and with the backward, and the bytes that both allocate."""

    def step() -> Any:
        return torch.autograd.grad(loss(*leaves, targets), leaves)

    value = float(loss(*leaves, targets).detach())
    step()  # what is compiled is compiled now
    return {
        "loss": value,
        "peak_bytes": device.peak(step),
        "forward_s": median(lambda: loss(*leaves, targets), 100),
        "forward_and_backward_s": median(step, 200),
    }


def bench_head(section: Section) -> None:
    """Head and loss, forward and backward: time and peak memory, and the loss of every side."""
    tokens, depth, size = HEAD.values()
    hidden, weight = normal(tokens, depth), normal(size, depth, scale=depth**-0.5)
    targets = torch.randint(size, (tokens,), device=DEVICE)

    def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -linear_logprob(x, w, y).logprob.mean()

    rows, words = slice(0, 64), slice(0, min(size, 4099))
    small, y = [hidden[rows], weight[words]], targets[rows] % (words.stop or size)
    one = torch.ones((), device=DEVICE)
    exact = both_ways(lambda x, w: dense_loss(x, w, y), doubles(small), [one.double()])
    error = section.check("linear_logprob", both_ways(lambda x, w: ours(x, w, y), small, [one]), exact, GATE[HALF])
    sides: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "ours": lambda: ours,
        "chunked, checkpointed": lambda: chunked_loss,
        "F.linear, F.cross_entropy": lambda: dense_loss,
        "torch.compile of it": lambda: device.compiled(dense_loss),
        "liger": liger_head,
    }
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    result = section.result
    result |= {"gate": error, "logits_bytes": tokens * size * HALF.itemsize, "sides": {}}
    for side, maker in sides.items():
        if not section.allows(side, 3.0):
            continue
        try:
            result["sides"][side] = measure_loss(maker(), leaves, targets)
        except ModuleNotFoundError:
            continue  # a peer that is not installed
        except Exception as problem:
            if side == "ours":
                raise
            result["sides"][side] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    expected = result["sides"]["ours"]["loss"]
    for side, entry in result["sides"].items():
        if "loss" in entry:
            near = abs(entry["loss"] - expected) <= 1e-2 * abs(expected)
            section.expect(side, near, f"the loss must be within 1 % of {expected}, got {entry['loss']}")


def lora_loop(x: Tensor, weight: Tensor, *factors: Tensor, scaling: list[float], adapters: Tensor) -> Tensor:
    """Adapters one after another on cuBLAS GEMMs."""
    y, count = F.linear(x, weight), len(scaling)
    for index, factor in enumerate(scaling):
        own = (adapters == index).nonzero().squeeze(-1)
        low = F.linear(F.linear(x[own], factors[index]), factors[count + index])
        y = y.index_add(0, own, low * factor)
    return y


def lora_ours(
    x: Tensor, weight: Tensor, *factors: Tensor, scaling: list[float], adapters: Tensor, fast: bool
) -> Tensor:
    count = len(scaling)
    return lora_linear(x, weight, None, factors[:count], factors[count:], scaling, adapters, fast=fast)


def bench_lora(section: Section) -> None:
    """Several adapters in one batch against a loop over adapters on cuBLAS GEMMs."""
    result = section.result
    for name, (rows, depth, outputs, rank, count) in {"training": LORA, "decode": DECODE_LORA}.items():
        if not section.allows(f"lora_linear {name}", 4.0):
            continue
        x, weight = normal(rows, depth), normal(outputs, depth, scale=depth**-0.5)
        ranks = [max(1, rank >> index % 3) for index in range(count)]
        factors = [normal(one, depth, scale=depth**-0.5) for one in ranks]
        factors += [normal(outputs, one, scale=one**-0.5) for one in ranks]
        scaling = torch.linspace(0.5, 2.0, count).tolist()
        adapters = torch.randint(-1, count, (rows,), device=DEVICE)

        few = slice(0, 32)
        small, grad = [x[few], weight, *factors], normal(min(rows, 32), outputs)
        first: dict[str, Any] = {"scaling": scaling, "adapters": adapters[few]}
        exact = both_ways(partial(lora_loop, **first), doubles(small), [grad.double()])
        got = both_ways(partial(lora_ours, **first, fast=False), small, [grad])
        error = section.check(f"lora_linear {name}", got, exact, GATE[HALF])
        entry = result[name] = {"gate": error, "sides": {}}
        leaves = [t.requires_grad_() for t in (x, weight, *factors)]
        whole: dict[str, Any] = {"scaling": scaling, "adapters": adapters}
        sides = {
            "ours, bitwise": partial(lora_ours, **whole, fast=False),
            "ours, fast": partial(lora_ours, **whole, fast=True),
            "loop": partial(lora_loop, **whole),
        }
        for side, call in sides.items():
            entry["sides"][side] = device.measure(call, leaves, [normal(rows, outputs)])


def torch_sample(logits: Tensor, temperature: float = 0.8, top_k: int = 50, top_p: float = 0.9) -> Tensor:
    """Temperature, top-k, top-p by sorting, and a multinomial: what engines write in plain torch."""
    z = logits.float() / temperature
    kept = torch.topk(z, min(top_k, z.shape[-1]), dim=-1).values[:, -1:]
    ordered, ids = torch.softmax(z.masked_fill(z < kept, -torch.inf), -1).sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(ordered, 1))


def torch_multinomial(logits: Tensor, temperature: float = 0.8) -> Tensor:
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1)


def bench_sample(section: Section) -> None:
    """Sampling with top-k and top-p, and by temperature alone, against plain torch."""
    result = section.result
    for rows, size in SAMPLES:
        logits = normal(rows, size, dtype=torch.float32, scale=3.0)
        one = torch.ones(rows, device=DEVICE)
        for name, (top_k, top_p) in {"top-k 50, top-p 0.9": (50, 0.9), "temperature": (0, 1.0)}.items():
            label = f"{rows} x {size}, {name}"
            if not section.allows(label, 1.0):
                continue
            columns = [0.8 * one, (top_k * one).long(), top_p * one, 0 * one, one.long(), one.long().cumsum(0)]
            few = slice(0, 4)
            wanted = sampling.sample(logits[few].cpu(), *(c[few].cpu() for c in columns))
            right = torch.equal(sample(logits, *columns)[0][few].cpu(), wanted[0])
            section.expect(label, right, "the tokens must be those of the reference")
            plain = torch_sample if top_k else torch_multinomial
            result[label] = {
                "ours_s": median(partial(sample, logits, *columns), 50),
                "torch_s": median(partial(plain, logits), 50),
            }


def ratio(entry: dict[str, Any], side: str, what: str) -> str:
    """How many times the time (or memory) of ours a side takes; what a failed side says."""
    other, ours = entry["sides"].get(side), next(iter(entry["sides"].values()))
    if other is None:
        return ""
    return "failed" if "failed" in other else f"{other[what] / ours[what]:.2f}x" if ours.get(what) else ""


def show_linear(entry: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [[label, s["ours"] * 1e3, f"{s['cublas'] / s['ours']:.2f}x", s["flops_per_s"] / 1e12]
            for label, s in entry["seconds"].items()]  # fmt: skip
    title = f"linear, bitwise, over F.linear: few rows {entry['few_rows']:.2f}x, many {entry['many_rows']:.2f}x"
    print_table(title, ["rows x K -> N", "ours ms", "over F.linear", "TFLOP/s"], rows)


def show_head(entry: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [
        [side, "failed", "", "", ""] if "failed" in s else
        [side, s["forward_s"] * 1e3, s["forward_and_backward_s"] * 1e3,
         ratio(entry, side, "forward_and_backward_s"), s["peak_bytes"] / 2**30]
        for side, s in entry["sides"].items()
    ]  # fmt: skip
    title = "Head and loss, {tokens} tokens x vocabulary size {vocabulary} x {depth}".format(**HEAD)
    print_table(title, ["", "forward ms", "both ms", "over ours", "peak GiB"], rows)


def show_lora(entries: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [[name, side, s["forward_s"] * 1e3, s["backward_s"] * 1e3, s["peak_bytes"] / 2**20]
            for name, entry in entries.items() for side, s in entry["sides"].items()]  # fmt: skip
    print_table("lora_linear", ["batch", "side", "forward ms", "backward ms", "peak MiB"], rows)


def show_sample(entries: dict[str, Any], ceilings: dict[str, float]) -> None:
    rows = [[label, s["ours_s"] * 1e3, s["torch_s"] * 1e3, f"{s['torch_s'] / s['ours_s']:.2f}x"]
            for label, s in entries.items()]  # fmt: skip
    print_table("sample", ["rows x vocabulary size", "ours ms", "torch ms", "ratio"], rows)
