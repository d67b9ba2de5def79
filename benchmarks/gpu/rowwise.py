"""Memory-bound ops on a GPU: as a share of a copy's bandwidth, and against ``torch.compile`` and Liger.

Part of ``benchmarks.gpu.ops``, which says what is measured and how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import as_tuple, both_ways, print_table
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
from benchmarks.gpu.ops import ratio
from benchmarks.gpu.section import Section
from toolkit.ops.activation import activation
from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.rms_norm import add_rms_norm, rms_norm
from toolkit.ops.rotary import rotary
from toolkit.ops.state_write import state_write
from toolkit.ops.token_logprob import token_logprob

EPS = 1e-6
ROWS, WIDTH = (6, 32) if DRY else (32768, 4096)  # 256 MiB of bf16
LOGITS = (4, 70) if DRY else (1536, 151936)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HEADS, HEAD_DIM = (2, 16) if DRY else (32, 128)


@dataclass(frozen=True)
class Bound:
    """An op bound by memory: ``ours`` and the ``plain`` formula, of ``rows`` and ``params``.

    Traffic is counted in bytes that have to move: each operand once. ``still``: row tensors without a gradient.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    rows: list[Tensor]
    forward: int
    backward: int
    params: list[Tensor] = field(default_factory=list)
    liger: Callable[[], Callable[..., Any]] | None = None
    still: int = 0


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    values = upcast(x)
    return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def plain_add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return plain_rms(total, weight), total


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    c, s, values = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype), x
    return values * c + torch.cat([-values[..., half:], values[..., :half]], -1) * s


def plain_logprob(logits: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(upcast(logits), targets, reduction="none")


def liger_rms() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def liger_layer() -> Callable[..., Any]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)


def liger_gated() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def bound_cases(dtype: torch.dtype) -> dict[str, Callable[[], Bound]]:
    """name -> a maker of the case, so that one at a time is in memory."""

    def matrices(count: int) -> tuple[list[Tensor], int]:
        made = [normal(ROWS, WIDTH, dtype=dtype) for _ in range(count)]
        return made, made[0].nbytes

    def row() -> Tensor:
        return 1 + 0.1 * normal(WIDTH, dtype=dtype)

    def rms() -> Bound:
        rows, size = matrices(1)
        return Bound(lambda x, w: rms_norm(x, w, EPS), plain_rms, rows, 2 * size, 3 * size, [row()], liger_rms)

    def add_rms() -> Bound:
        rows, size = matrices(2)
        return Bound(lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add_rms, rows, 4 * size, 4 * size, [row()])

    def layer() -> Bound:
        rows, size = matrices(1)
        return Bound(
            lambda x, w, b: layer_norm(x, w, b, EPS),
            lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS),
            rows, 2 * size, 3 * size, [row(), row()], liger_layer,
        )  # fmt: skip

    def turn() -> Bound:
        tokens = ROWS * WIDTH // (HEADS * HEAD_DIM)
        angles = torch.rand(tokens, HEAD_DIM // 2, device=DEVICE) * 6
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        x = normal(tokens, HEADS, HEAD_DIM, dtype=dtype)
        moved = 2 * x.nbytes + cos.nbytes + sin.nbytes
        return Bound(rotary, plain_rotary, [x, cos, sin], moved, moved, still=2)

    def silu() -> Bound:
        rows, size = matrices(1)
        return Bound(lambda x: activation(x, "silu"), F.silu, rows, 2 * size, 3 * size)

    def gated() -> Bound:
        rows, size = matrices(2)
        return Bound(
            lambda g, u: gated_activation(g, u, "silu"),
            lambda g, u: F.silu(upcast(g)).to(g.dtype) * u,
            rows, 3 * size, 5 * size, liger=liger_gated,
        )  # fmt: skip

    def logprob() -> Bound:
        logits = normal(*LOGITS, dtype=dtype, scale=3.0)
        targets = torch.randint(LOGITS[1], LOGITS[:1], device=DEVICE)
        size = logits.nbytes
        return Bound(lambda x, y: token_logprob(x, y)[0], plain_logprob, [logits, targets], size, 2 * size, still=1)

    return {
        "rms_norm": rms, "gated_activation": gated, "rotary": turn, "add_rms_norm": add_rms, "token_logprob": logprob,
        "layer_norm": layer, "activation": silu,
    }  # fmt: skip


def bench_bound(section: Section, case: Bound, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One memory-bound op: a check, then all sides."""
    still = len(case.rows) - case.still
    leaves = [
        x.detach().requires_grad_(x.is_floating_point() and not still <= i < len(case.rows))
        for i, x in enumerate((*case.rows, *case.params))
    ]
    few = slice(0, 16)
    fixed = [x[few] for x in case.rows[still:]]

    def on_slice(function: Callable[..., Any], tensors: Sequence[Tensor], held: Sequence[Tensor]) -> Any:
        return lambda *moving: function(*moving[:still], *held, *moving[still:])

    small = [*(x[few] for x in case.rows[:still]), *case.params]
    outputs = as_tuple(case.ours(*(x[few] for x in case.rows), *case.params))
    grads = [normal(*y.shape, dtype=y.dtype) for y in outputs]
    exact = both_ways(on_slice(case.plain, small, doubles(fixed)), doubles(small), doubles(grads))
    error = section.check(name, both_ways(on_slice(case.ours, small, fixed), small, grads), exact, GATE[dtype])
    result: dict[str, Any] = {"gate": error, "sides": {}}
    cotangents = [normal(*y.shape, dtype=y.dtype) for y in as_tuple(case.ours(*leaves))]
    sides: dict[str, Callable[[], Callable[..., Any]]] = {
        "ours": lambda: case.ours,
        "torch.compile": lambda: device.compiled(case.plain),
    }
    if case.liger is not None:
        sides["liger"] = case.liger
    for side, maker in sides.items():
        try:
            result["sides"][side] = device.measure(maker(), leaves, cotangents)
        except ModuleNotFoundError:
            continue  # a peer that is not installed
        except Exception as problem:
            if side == "ours":
                raise
            result["sides"][side] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    ours = result["sides"]["ours"]
    copy = section.ceilings["copy_bytes_per_s"]
    result["forward_of_copy"] = case.forward / ours["forward_s"] / copy
    result["backward_of_copy"] = case.backward / ours["backward_s"] / copy
    return result


def bench_memory_bound(section: Section) -> None:
    """Row-wise ops, forward and backward, as a share of a copy's bandwidth and against their peers."""
    result = section.result
    with device.reusable_graphs():
        for dtype in (HALF, torch.float32):
            for name, maker in bound_cases(dtype).items():
                label = f"{name} {SHORT[dtype]}"
                if section.allows(label, 4.0):
                    with section.trying(label):
                        result[label] = bench_bound(section, maker(), label, dtype)
    if section.allows("state_write", 2.0):
        with section.trying("state_write"):
            result["state_write"] = bench_state_write(section)


def bench_state_write(section: Section) -> dict[str, Any]:
    """Rows of keys into random slots of a pool, against ``index_copy_``."""
    tokens = ROWS * WIDTH // (8 * 128) if not DRY else 6
    pool, new = normal(2 * tokens, 8, 128), normal(tokens, 8, 128)
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
    state_write(pool, new, slots)
    section.expect("state_write", torch.equal(pool[slots], new), "the rows must be written")
    taken = median(lambda: state_write(pool, new, slots), 50)
    other = median(lambda: pool.index_copy_(0, slots, new), 50)
    sides = {"ours": {"forward_s": taken}, "index_copy_": {"forward_s": other}}
    return {
        "gate": 0.0,
        "sides": sides,
        "forward_of_copy": 2 * new.nbytes / taken / section.ceilings["copy_bytes_per_s"],
    }


def show(entries: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Shares of a copy's bandwidth, and the peers' time and memory over ours."""
    rows = [
        [name, entry["sides"]["ours"]["forward_s"] * 1e3, f"{entry['forward_of_copy']:.0%}",
         f"{entry['backward_of_copy']:.0%}" if "backward_of_copy" in entry else "",
         *(ratio(entry, side, what) for side in ("torch.compile", "liger")
           for what in ("forward_s", "backward_s", "peak_bytes") if what != "peak_bytes" or side != "liger")]
        for name, entry in entries.items()
    ]  # fmt: skip
    header = ["op", "forward ms", "of copy", "backward of copy", "compile: forward", "backward", "memory"]
    print_table("Memory-bound ops; peers' time and memory over ours", [*header, "liger: forward", "backward"], rows)
