"""Linear layers of one input as one MKL GEMM: the numbers, the gradients, and what the memory of weights is like."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.ops.joined_linear import adjoining, joined_linear, lie_together, placed_together
from toolkit.ops.registry import has_native

SIZES = (24, 8, 8)
IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not has_native("joined_linear"), reason="no library")),
]
native = pytest.mark.skipif(not has_native("joined_linear"), reason="no library")


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(inner=16, sizes=SIZES, dtype=torch.float64):
    return [numbers(size, inner, seed=at, dtype=dtype) for at, size in enumerate(sizes)]


def biases(sizes=SIZES, dtype=torch.float64):
    return [numbers(size, seed=10 + at, dtype=dtype) for at, size in enumerate(sizes)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 5, 16), (0, 16)])
def test_it_is_the_layers_outputs_side_by_side(impl, together, shape):
    x, own, shifts = numbers(*shape, seed=7), weights(), biases()
    moved = placed_together if together else list
    for given in ([], moved(shifts)):
        got = joined_linear(x, moved(own), given, impl=impl)
        wanted = [x @ w.T + (shifts[at] if given else 0.0) for at, w in enumerate(own)]
        for one, other in zip(got.split(SIZES, -1), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("with_biases", [True, False])
def test_gradients_are_those_of_separate_layers(together, with_biases):
    x, own, shifts = numbers(3, 5, 16, seed=7), weights(), biases() if with_biases else []
    upstream = [numbers(3, 5, size, seed=20 + size) for size in SIZES]

    def gradients(function, x, own, shifts):
        leaves = [one.detach().requires_grad_() for one in (x, *own, *shifts)]
        outputs = function(leaves[0], leaves[1:4], leaves[4:])
        return torch.autograd.grad(outputs, leaves, upstream)

    def separate(x, own, shifts):
        return [F.linear(x, w, b) for w, b in zip(own, shifts or [None] * 3)]

    wanted = gradients(separate, x, own, shifts)
    if together:
        own, shifts = placed_together(own), placed_together(shifts) if shifts else []
    got = gradients(lambda x, w, b: joined_linear(x, w, b).split(SIZES, -1), x, own, shifts)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_gradients_that_are_needed_are_given():
    x, own = numbers(4, 16, seed=7), placed_together(weights())
    own[1].requires_grad_()
    joined_linear(x, own).sum().backward()
    assert own[0].grad is None
    assert own[2].grad is None
    torch.testing.assert_close(own[1].grad, x.sum(0).expand(8, 16), rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_an_error_and_transforms_give_them():
    x, own = numbers(4, 16, seed=7).requires_grad_(), placed_together(weights())
    (slope,) = torch.autograd.grad(joined_linear(x, own).square().sum(), x, create_graph=True)
    with pytest.raises(Exception, match="joined_linear has no second derivative"):
        slope.sum().backward()
    hessian = torch.func.hessian(lambda x: joined_linear(x, own).square().sum())(numbers(16, seed=7))
    matrix = torch.cat(own)
    torch.testing.assert_close(hessian, 2 * matrix.T @ matrix, rtol=1e-12, atol=1e-12)


@native
def test_weights_that_lie_together_are_one_matrix_without_a_copy():
    own = weights()
    placed = placed_together(own)
    whole = adjoining(placed)
    assert torch.equal(whole, torch.cat(own))
    assert whole.data_ptr() == placed[0].data_ptr()
    with torch.no_grad():
        placed[1].fill_(3.0)
    assert whole[24:32].eq(3.0).all()


def test_each_part_has_a_storage_of_its_own_bytes():
    placed = placed_together(weights())
    for one in placed:
        assert one.untyped_storage().data_ptr() == one.data_ptr()
        assert one.untyped_storage().nbytes() == one.nbytes
    assert len({one.untyped_storage()._cdata for one in placed}) == 3


def test_a_part_keeps_the_memory_of_all_until_it_goes():
    last = placed_together(weights())[2]
    junk = [torch.full((64, 16), float("nan")) for _ in range(20)]  # would take freed memory
    assert torch.equal(last, weights()[2])
    assert junk[0].isnan().all()


@pytest.mark.parametrize(
    "move",
    [
        lambda placed: [placed[0], placed[2], placed[1]],  # another order
        lambda placed: [placed[0], placed[2]],  # a gap
        lambda placed: [placed[0], placed[1].clone(), placed[2]],
        lambda placed: [placed[0], placed[1].T.contiguous().T, placed[2]],
        lambda placed: [placed[0], placed[1].view(4, 32), placed[2]],
        lambda placed: [placed[0].float(), *placed[1:]],
        lambda placed: [placed[0], placed[1][:0], placed[2]],
        lambda placed: [one.to("meta") for one in placed],
    ],
)
def test_parts_that_do_not_follow_one_another_are_not_together(move):
    placed = placed_together(weights())
    assert lie_together(placed)
    moved = move(placed)
    assert not lie_together(moved)
    if not moved[0].is_meta:
        assert adjoining(moved) is None


@native
def test_what_does_not_fit_is_an_error():
    x, own = numbers(4, 16), weights()
    for wrong in ((x, own, biases()[:2]), (x[:, :8], own, []), (x, [], [])):
        with pytest.raises(RuntimeError):
            joined_linear(*wrong)


@pytest.mark.parametrize("together", [True, False])
def test_opcheck(together):
    x, own, shifts = numbers(3, 16, seed=7).requires_grad_(), weights(), biases()
    if together:
        own, shifts = placed_together(own), placed_together(shifts)
    own, shifts = ([one.requires_grad_() for one in some] for some in (own, shifts))
    torch.library.opcheck(torch.ops.toolkit.joined_linear.default, (x, own, shifts))
    torch.library.opcheck(torch.ops.toolkit.joined_linear.default, (x, own, []))
    grad, given = numbers(3, 40, seed=8), [one.detach() for one in own]
    torch.library.opcheck(torch.ops.toolkit.joined_linear_backward.default, (grad, x.detach(), given, True, True, True))
