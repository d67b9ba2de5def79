"""The libraries of one machine: what AVX-512 computes faster has the bits of AVX2, bfloat16 where it widens."""

import os
import subprocess
import sys

import pytest
import torch

from toolkit.ops import native

PRODUCTS = """
import sys
import torch
from toolkit.ops import native
from toolkit.ops.attention import attention
from toolkit.ops.dispatch_plan import dispatch_plan
from toolkit.ops.grouped_linear import grouped_linear
from toolkit.ops.linear import linear
from toolkit.ops.linear_logprob import linear_logprob
from toolkit.ops.lora_linear import lora_add

torch.manual_seed(0)
results = [native.load()]
SIZES = ((1, 32, 256), (3, 33, 64), (8, 64, 32), (9, 65, 257), (67, 31, 300), (500, 96, 1024), (5, 7, 3))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for rows, outputs, depth in SIZES:
        x = torch.randn(rows, depth).to(dtype).requires_grad_()
        weight = torch.randn(outputs, depth).to(dtype).requires_grad_()
        bias = torch.randn(outputs).to(dtype).requires_grad_()
        y = linear(x, weight, bias)
        results += [y.detach(), *torch.autograd.grad(y, (x, weight, bias), torch.randn(y.shape).to(dtype))]
for outputs in (1, 15, 16, 17, 47, 48, 49, 63, 64, 65, 97, 112, 113):  # panels of one, two and three vectors
    for rows in (3, 21):
        results.append(linear(torch.randn(rows, 70), torch.randn(outputs, 70), None))
hidden = torch.randn(77, 96, requires_grad=True)
head = torch.randn(301, 96, requires_grad=True)
value = linear_logprob(hidden, head, torch.randint(301, (77,))).logprob
results += [value.detach(), *torch.autograd.grad(value.sum(), (hidden, head))]
long, words = torch.randn(500, 96, requires_grad=True), torch.randn(700, 96, requires_grad=True)
value = linear_logprob(long, words, torch.randint(700, (500,))).logprob  # block of k after block of k, not row by row
results += [value.detach(), *torch.autograd.grad(value.sum(), (long, words))]
ranks, ids = (9, 32, 1), torch.randint(-1, 3, (500,))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    rows, under = (t.to(dtype).detach().requires_grad_() for t in (long, torch.randn(500, 120)))
    a = [torch.randn(rank, 96).to(dtype).requires_grad_() for rank in ranks]
    b = [torch.randn(120, rank).to(dtype).requires_grad_() for rank in ranks]
    scale, shift = torch.randn(2, 120).to(dtype).requires_grad_().unbind()
    y = lora_add(under, rows, a, b, [2.0, 0.5, 1.0], ids, column_scales=[scale, None, None], bias=shift)
    wanted = (under, rows, scale, shift, *a, *b)
    results += [y.detach(), *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(dtype))]
    results += [lora_add(under, rows, a, b, [2.0, 0.5, 1.0], ids).detach()]
plan = dispatch_plan(torch.randint(5, (77, 2)), 5)
for transposed in (False, True):
    weight = torch.randn(*((5, 96, 40) if transposed else (5, 40, 96)), requires_grad=True)
    y = grouped_linear(hidden, weight, None, plan, gather=True, transposed=transposed)
    results += [y.detach(), *torch.autograd.grad(y, (hidden, weight), torch.randn(y.shape))]
plan = dispatch_plan(torch.zeros(1100, 1, dtype=torch.int64), 2)  # more rows than one block of a sum, and none
many = torch.randn(1100, 40, requires_grad=True)
for outputs in (5, 65, 97):
    weight = torch.randn(2, outputs, 40, requires_grad=True)
    y = grouped_linear(many, weight, None, plan, gather=True)
    results += [y.detach(), *torch.autograd.grad(y, (many, weight), torch.randn(y.shape))]
starts = torch.tensor([0, 67, 200, 201])
for dtype in (torch.float32, torch.float64):
    for depth in (24, 64, 72, 100):
        q, k, v = (torch.randn(201, heads, depth, dtype=dtype, requires_grad=True) for heads in (6, 2, 2))
        out = attention(q, k, v, starts, starts[:-1].contiguous(), starts.diff())[0]
        results += [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, dtype=dtype))]
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(native.load() != "avx512", reason="needs a machine with AVX-512")
def test_avx512_has_the_bits_of_avx2(tmp_path):
    kept = []
    for capability in ("avx2", "avx512"):
        out = tmp_path / f"{capability}.pt"
        subprocess.run(
            [sys.executable, "-c", PRODUCTS, str(out)],
            check=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "TOOLKIT_BFLOAT16": "widen"},
        )
        name, *results = torch.load(out)
        assert name == capability
        kept.append(results)
    assert len(kept[0]) == len(kept[1]) > 100
    for avx2, avx512 in zip(*kept):
        assert torch.equal(avx2, avx512)
