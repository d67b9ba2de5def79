"""Attention on a GPU: prefill, decode and backward against every backend of SDPA and flex_attention, by their kernels.

bf16, 32 heads on 8, head_dim 128, pages of 16. What a device cannot run is named with its reason.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import print_table
from benchmarks.gpu.device import DEVICE, DRY, HALF, compiled, median
from benchmarks.gpu.section import Section

HEADS, KV_HEADS, HEAD_DIM, PAGE = (4, 2, 16, 4) if DRY else (32, 8, 128, 16)
# name -> (sequences, queries, keys)
CASES = (
    {"prefill": (2, 8, 8), "decode": (2, 1, 8)}
    if DRY
    else {
        "prefill 4x4096": (4, 4096, 4096),
        "decode 64x8192": (64, 1, 8192),
        "decode 1x8192": (1, 1, 8192),
        "decode 64x2048": (64, 1, 2048),
        "prefill 1x16384": (1, 16384, 16384),
        "prefill 4x2048": (4, 2048, 2048),
    }
)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
LIMIT = 2e-2  # of the relative error to SDPA, bf16 both


class Case:
    """Random q, k, v of one case: in pages, and as SDPA takes them."""

    def __init__(self, batch: int, queries: int, keys: int) -> None:
        self.batch, self.queries, self.keys = batch, queries, keys
        self.q = torch.randn(batch * queries, HEADS, HEAD_DIM, device=DEVICE, dtype=HALF)
        self.k, self.v = (torch.randn(batch * keys, KV_HEADS, HEAD_DIM, device=DEVICE, dtype=HALF) for _ in range(2))
        order = torch.randperm(batch * keys // PAGE, device=DEVICE)
        self.tables = order.view(batch, -1)
        slots = (order[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()
        self.k_pool, self.v_pool = torch.empty_like(self.k), torch.empty_like(self.v)
        self.k_pool[slots], self.v_pool[slots] = self.k, self.v
        self.offsets = torch.arange(batch + 1, device=DEVICE) * queries
        self.lengths = torch.full((batch,), keys, device=DEVICE)
        self.starts = torch.arange(batch, device=DEVICE) * keys
        self.dense = [
            x.view(batch, -1, x.shape[1], HEAD_DIM).transpose(1, 2).contiguous() for x in (self.q, self.k, self.v)
        ]

    def paged(self) -> tuple[Tensor, Tensor]:
        from toolkit.ops.attention.triton import attention

        return attention(
            self.q, self.k_pool, self.v_pool, self.offsets, self.starts, self.lengths, self.tables, PAGE,
            HEAD_DIM**-0.5, 0, 0.0,
        )  # fmt: skip

    def sdpa(self, backend: SDPBackend | None, *leaves: Tensor) -> Tensor:
        """SDPA of the dense tensors, or of ``leaves`` in their place."""
        q, k, v = leaves or self.dense
        if backend is None:
            return scaled_dot_product_attention(q, k, v, is_causal=self.queries > 1, enable_gqa=True)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=self.queries > 1, enable_gqa=True)

    def flex(self) -> Callable[..., Tensor]:
        """flex_attention with a causal mask, compiled."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        past = self.keys - self.queries
        mask = create_block_mask(lambda b, h, q, k: q + past >= k, None, None, self.queries, self.keys, device=DEVICE)
        call = compiled(flex_attention)
        return lambda q, k, v: call(q, k, v, block_mask=mask, enable_gqa=True)

    def flops(self) -> int:
        pairs = self.queries * self.keys - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * HEADS * HEAD_DIM * pairs

    def nbytes(self) -> int:
        return 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes


def bench_attention(section: Section) -> None:
    """Every case, forward; with as many queries as keys the backward, too."""
    for name, sizes in CASES.items():
        if section.allows(name, 4.0):
            with section.trying(name):
                bench_case(section, name, Case(*sizes))


def bench_case(section: Section, name: str, case: Case) -> None:
    from toolkit.ops.attention.triton_backward import attention_backward

    out, lse = case.paged()
    expected = case.sdpa(None).transpose(1, 2).reshape(out.shape)
    error = section.check(name, [out], [expected], LIMIT)
    entry = section.result[name] = {"error": error, "flops": case.flops(), "bytes": case.nbytes(), "sides": {}}
    ours = entry["sides"]["ours"] = {"forward_s": median(case.paged, 60)}
    if case.queries == case.keys:
        grad = torch.randn_like(out)
        given = (grad, case.q, case.k, case.v, out, lse, case.offsets, case.starts, case.lengths)
        call = partial(attention_backward, *given, HEAD_DIM**-0.5, 0, 0.0)
        leaves = [x.detach().requires_grad_() for x in case.dense]
        exact = torch.autograd.grad(case.sdpa(None, *leaves), leaves, as_dense(grad, case))
        gradients = [as_dense(x, case) for x in call()[:3]]
        entry["backward_error"] = section.check(f"{name}, backward", gradients, exact, LIMIT)
        ours["backward_s"] = median(call, 60)
    sides: dict[str, Callable[[], Callable[..., Tensor]]] = {
        side: partial(partial, case.sdpa, backend) for side, backend in BACKENDS.items() if side != "math" or DRY
    }
    if not DRY and case.queries > 1:
        sides["flex_attention"] = case.flex
    for side, maker in sides.items():
        section.write()
        try:
            entry["sides"][side] = measure(maker(), case)
        except Exception as problem:  # a backend that this device, or these shapes, do not have
            entry["sides"][side] = {"failed": f"{type(problem).__name__}: {problem}"[:200]}


def as_dense(x: Tensor, case: Case) -> Tensor:
    return x.view(case.batch, -1, x.shape[-2], HEAD_DIM).transpose(1, 2)


def measure(call: Callable[..., Tensor], case: Case) -> dict[str, Any]:
    """Seconds of a peer's forward, and of its backward where the case has one."""
    taken = {"forward_s": median(partial(call, *case.dense), 60)}
    if case.queries == case.keys:
        leaves = [x.detach().requires_grad_() for x in case.dense]
        made = call(*leaves)
        upstream = torch.randn_like(made)
        taken["backward_s"] = median(partial(torch.autograd.grad, made, leaves, upstream, retain_graph=True), 60)
    return taken


def show(result: dict[str, Any], ceilings: dict[str, float]) -> None:
    """ms of each side, and the share of the device's ceiling that ours reaches."""
    rows = []
    for name, entry in result.items():
        for what, factor in (("forward_s", 1.0), ("backward_s", 2.5)):
            if what not in entry["sides"]["ours"]:
                continue
            by_flops = factor * entry["flops"] / ceilings["bf16_flops_per_s"]
            floor = max(by_flops, entry["bytes"] / ceilings["copy_bytes_per_s"])
            ours = entry["sides"]["ours"][what]
            peers = [
                f"{side} {taken[what] * 1e3:.4g}"
                for side, taken in entry["sides"].items()
                if side != "ours" and what in taken
            ]
            rows.append([f"{name} {what.removesuffix('_s')}", ours * 1e3, f"{floor / ours:.0%}", "; ".join(peers)])
    title = f"Attention, bf16, {HEADS} heads on {KV_HEADS}, head_dim {HEAD_DIM}"
    print_table(title, ["case", "ours ms", "of ceiling", "peers, ms"], rows)
