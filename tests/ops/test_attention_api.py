"""How attention is registered, and what it refuses."""

import pytest
import torch

from toolkit.ops.attention import attention
from toolkit.ops.registry import has_native

needs_native = pytest.mark.skipif(not has_native("attention"), reason="the native CPU library is not built")


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def test_operator_registration():
    plan = offsets([5, 9]), torch.tensor([0, 5]), torch.tensor([5, 9])
    shapes = (15, 2, 8), (15, 1, 8), (15, 1, 4)  # one row of padding
    q, k, v = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes)
    args = (q, k, v, *plan, None, 0, 0.3, 4, 0.0)
    torch.library.opcheck(torch.ops.toolkit.attention.default, args)
    out, lse = attention(q, k, v, *plan)
    detached = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.toolkit.attention_backward.default, (*detached, *plan, 0.3, 4, 0.0))
    compiled = torch.compile(lambda *x: attention(*x, *plan)[0].sin(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attention(q, k, v, *plan)[0].sin())


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(9, 3, 8)}, "q and k the same width"),
        ({"q": torch.zeros(9, 4, 8, dtype=torch.int32)}, "dtype"),
        ({"query_offsets": torch.tensor([0, 9], dtype=torch.int32)}, "query_offsets"),
        ({"query_offsets": torch.tensor([0, 99])}, "query_offsets"),
        ({"kv_lengths": torch.tensor([10])}, "9 rows"),
        ({"block_tables": torch.tensor([[0, 7, 1]]), "block_size": 3}, "page 7"),
        ({"block_tables": torch.tensor([[0]]), "block_size": 3}, "kv_lengths"),
        ({"block_tables": torch.tensor([[0]])}, "block_size"),
    ],
)
def test_bad_input(change, message):
    args = {"q": torch.zeros(9, 4, 8), "k": torch.zeros(9, 2, 8), "v": torch.zeros(9, 2, 8)}
    args |= {"query_offsets": offsets([9]), "kv_offsets": torch.tensor([0]), "kv_lengths": torch.tensor([9])}
    with pytest.raises(RuntimeError, match=message):
        attention(**(args | change))
