"""AdamW with moments in 8 bits against the same formula in float64, with codes found by trying all values."""

import math
from typing import Any

import pytest
import torch

from tests.helpers.implementations import Implementation, impl_and
from toolkit.errors import ToolkitError
from toolkit.ops.adamw_8bit import BLOCK, adamw_8bit, new_moments
from toolkit.ops.adamw_8bit.reference import dequantise
from toolkit.ops.dynamic_map import dynamic_map, thresholds

SETTINGS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(), (1,), (255,), (256,), (3, 257), (16, 128)]


def gradients(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    """Of magnitudes over several decades; a whole block of zeros in the third."""
    source = torch.Generator(device="cpu").manual_seed(0)
    found = []
    for step in range(steps):
        noise = torch.randn(shape, generator=source, device="cpu")
        found.append(noise * torch.exp(3 * torch.randn(shape, generator=source, device="cpu")))
        if step == 2:
            found[-1].view(-1)[:BLOCK] = 0
    return found


def nearest(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """``scale * map[code]`` of float64 values [numel], by trying every code."""
    rounded = []
    for block in values.split(BLOCK):
        scale = block.abs().max()
        table = dynamic_map(signed).double()
        share = block / scale if scale > 0 else torch.zeros_like(block)
        found = table[(share[:, None] - table).abs().argmin(1)]
        if not signed:  # what is above 0 stays above 0
            found = torch.where(share > 0, found.clamp(min=float(table[1])), found)
        rounded.append(found * scale)
    return torch.cat(rounded) if rounded else values


@impl_and("shape", SHAPES, fast=[(3, 257)])
def test_against_float64(impl: Implementation, shape: tuple[int, ...]) -> None:
    weight = torch.linspace(-1, 1, math.prod(shape)).view(shape).clone()
    exact, mean, square = (weight.cpu().double().view(-1), *torch.zeros(2, weight.numel(), dtype=torch.float64))
    state = new_moments(weight)
    for step, grad in enumerate(gradients(shape, 5), 1):
        adamw_8bit(weight, grad.to(weight.device), **state, step=step, impl=impl.option, **SETTINGS)
        g = grad.double().view(-1)
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
        root = (square / (1 - 0.95**step)).sqrt() + 1e-8
        exact = exact * (1 - 1e-3) - 1e-2 / (1 - 0.9**step) * mean / root
        mean, square = nearest(mean, True), nearest(square, False)
        for name, wanted, signed in (("exp_avg", mean, True), ("exp_avg_sq", square, False)):
            got = dequantise(state[name].cpu(), state[f"{name}_scale"].cpu(), signed).double().view(-1)
            bound = float(wanted.abs().max()) if len(wanted) else 0.0
            # A value in the middle of two may round either way: then it is as near as the other.
            apart = (got - wanted).abs() > 1e-6 * bound
            assert int(apart.sum()) <= 1
            mean, square = (got, square) if signed else (mean, got)
        torch.testing.assert_close(weight.cpu().double().view(-1), exact, rtol=2e-5, atol=2e-6)


@impl_and("numel", [5000], fast=[])
def test_moments_have_the_bits_of_the_reference(impl: Implementation, numel: int) -> None:
    results = []
    for option in (impl.option, "reference"):
        weight = torch.linspace(-1, 1, numel)
        state = new_moments(weight)
        for step, grad in enumerate(gradients((numel,), 4), 1):
            adamw_8bit(weight, grad.to(weight.device), **state, step=step, impl=option, **SETTINGS)
        results.append((weight, state))
    (ours, kept), (wanted, reference) = results
    assert all(torch.equal(kept[name], reference[name]) for name in reference)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=3e-7)


def test_the_map_is_that_of_dynamic_trees() -> None:
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    assert all(values.diff().min() > 0 for values in (signed, unsigned))
    assert [signed[127], unsigned[0], signed[255], unsigned[255]] == [0, 0, 1, 1]
    assert torch.equal(-signed[:127].flip(0), signed[128:255])
    # The top decade: 64 and 128 middles of [0.1, 1]; the lowest: one, two.
    torch.testing.assert_close(signed[191:255], 0.1 + 0.9 * (torch.arange(64) + 0.5) / 64)
    torch.testing.assert_close(unsigned[127:255], 0.1 + 0.9 * (torch.arange(128) + 0.5) / 128)
    assert [float(signed[128]), float(unsigned[1])] == pytest.approx([0.55e-6, 0.325e-6], rel=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_neighbours_change_no_bit(threads: int) -> None:
    """Blocks alone, all together, and on several threads."""
    numel, before = 200 * BLOCK + 7, torch.get_num_threads()
    grads = gradients((numel,), 3)
    try:
        torch.set_num_threads(threads)
        whole = torch.linspace(-1, 1, numel)
        state = new_moments(whole)
        for step, grad in enumerate(grads, 1):
            adamw_8bit(whole, grad, **state, step=step, **SETTINGS)
    finally:
        torch.set_num_threads(before)
    for first in (0, 17 * BLOCK, 200 * BLOCK):
        part = torch.linspace(-1, 1, numel)[first : first + BLOCK].clone()
        alone = new_moments(part)
        for step, grad in enumerate(grads, 1):
            adamw_8bit(part, grad[first : first + BLOCK].clone(), **alone, step=step, **SETTINGS)
        assert torch.equal(part, whole[first : first + BLOCK])
        assert torch.equal(alone["exp_avg"], state["exp_avg"][first : first + BLOCK])


def test_what_is_not_a_number_makes_the_block_not_a_number() -> None:
    weight, grad = torch.zeros(3 * BLOCK), torch.ones(3 * BLOCK)
    grad[BLOCK] = math.nan
    state = new_moments(weight)
    adamw_8bit(weight, grad, **state, step=1, **SETTINGS)
    assert state["exp_avg_scale"].isnan().tolist() == [False, True, False]
    assert weight.isnan().nonzero().tolist() == [[BLOCK]]


def test_errors() -> None:
    weight = torch.zeros(8, 4)
    state = new_moments(weight)
    with pytest.raises(ToolkitError, match="contiguous float32"):
        adamw_8bit(weight.t(), weight.t(), **state, step=1, **SETTINGS)
    with pytest.raises(ToolkitError, match="contiguous float32"):
        adamw_8bit(weight.double(), weight, **state, step=1, **SETTINGS)
    with pytest.raises(ToolkitError, match="step must be at least 1, got 0"):
        adamw_8bit(weight, weight, **state, step=0, **SETTINGS)


def test_operator_registration() -> None:
    weight = torch.linspace(-1, 1, 300)
    tables = [table(signed) for signed in (True, False) for table in (dynamic_map, thresholds)]
    arguments = (weight, weight.clone(), *new_moments(weight).values(), 1e-2, 0.9, 0.95, 1e-8, 0.1, 1, *tables)
    torch.library.opcheck(torch.ops.toolkit.adamw_8bit.default, arguments)
