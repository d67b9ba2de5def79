"""Bounds of every element, and bitwise comparisons, of outputs and gradients.

Tensors are made on the default device, which the fixture ``impl`` sets.
"""

import torch

from benchmarks.common import as_tuple

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Rounding errors of float32 sums, as a share of the largest result.
NOISE = 32 * UNIT[torch.float32]


def noise(*shape, dtype=torch.float32, scale=1.0, seed=0):
    """Normal numbers, the same ones on every device."""
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return values.to(torch.get_default_device(), dtype)


def integers(low, high, *shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(torch.get_default_device())


def rounded(x, dtype):
    """x in float64 as if it had been stored in ``dtype``; the gradient passes through."""
    return x + (x.to(dtype).double() - x).detach()


def evaluate(call, rows, params, cotangents, still=0):
    """(outputs, gradients to rows, gradients to params); the last ``still`` of rows take none, nor do integers."""
    leaves = []
    for index, x in enumerate((*rows, *params)):
        moves = x.is_floating_point() and not len(rows) - still <= index < len(rows)
        leaves.append(x.detach().requires_grad_(moves))
    outputs = as_tuple(call(*leaves))
    wanted = [x for x in leaves if x.requires_grad]
    grads = list(torch.autograd.grad(outputs, wanted, cotangents)) if wanted else []
    of_rows = sum(x.requires_grad for x in leaves[: len(rows)])
    return [y.detach() for y in outputs], grads[:of_rows], grads[of_rows:]


def assert_near(value, exact, extra=NOISE, units=1.0):
    """Every element: ``units`` roundings to its dtype, and ``extra`` of the largest element for sums before it."""
    assert value.shape == exact.shape, (value.shape, exact.shape)
    exact = exact.detach()
    if value.numel():
        bound = units * UNIT[value.dtype] * exact.abs() + extra * exact.abs().max().clamp_min(1e-30)
        # A subnormal is rounded to the spacing of subnormals.
        bound += torch.finfo(value.dtype).smallest_normal * torch.finfo(value.dtype).eps
        excess = (value.double() - exact).abs() / bound
        assert bool((excess <= 1.0).all()), f"{float(excess.nan_to_num(nan=float('inf')).max()):.3g} of the bound"


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def subsets(rows, seed=0):
    """Some rows of ``rows``: one, few, many, a run, in any order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(rows, generator=generator, device="cpu").to(torch.get_default_device())
    return [order[:1], order[:5], order[: 2 * rows // 3], torch.arange(rows // 2, rows)]


def doubles(*values):
    return [x.double() if x.is_floating_point() else x for x in values]


def matrix_noise(dtype):
    """Errors of a float32 sum on matrix units, which truncate, as a share of the largest result."""
    return NOISE if dtype == torch.float32 else 8 * NOISE


def assert_all_near(got, exact, **allowed):
    for values, wanted in zip(got, exact, strict=True):
        for value, one in zip(values, wanted, strict=True):
            assert_near(value, one, **allowed)
