import pytest
import torch

from toolkit.ops.take_rows import take_rows


@pytest.mark.parametrize("rows", [[], [2], [0, 1, 2, 3], [3, 3, 0, 3, 1, 0], [1] * 9])
def test_rows_and_their_gradient(rows):
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(take_rows(x, index), x[index])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index), (x,))


def test_repeated_rows_add_up_in_order_whatever_the_threads():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (5000,), generator=generator)
    grad = torch.randn(5000, 33, generator=generator) * 10 ** torch.randn(5000, 1, generator=generator)
    expected = torch.zeros(7, 33)
    for row, value in zip(index.tolist(), grad):  # one after the other
        expected[row] += value
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = torch.zeros(7, 33, requires_grad=True)
            take_rows(x, index).backward(grad)
            assert torch.equal(x.grad, expected)
    finally:
        torch.set_num_threads(before)
