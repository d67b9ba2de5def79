"""What the tests of an MoE layer of experts share: routings, plans, and a dense oracle that knows of neither."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find

# kind, gated, biased, score_position, transposed, interleaved
LAYOUTS = [
    ("silu", True, False, "activation", False, False),
    ("silu", True, True, "combine", False, True),
    ("gelu_tanh", True, True, "activation", True, False),
    ("clamped_swiglu", True, True, "activation", True, True),
    ("clamped_swiglu", True, False, "combine", False, False),
    ("silu", True, False, "input", True, False),
    ("silu", True, True, "input", False, False),
    ("relu2", False, True, "activation", False, False),
    ("gelu", False, False, "combine", True, False),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return values.to(torch.get_default_device(), dtype)


def routing(tokens: int, slots: int, experts: int, *, skipped: bool = True, seed: int = 0) -> Tensor:
    """[T, K] ids; the second expert has no row, and some slots are skipped."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(0, experts + 1 if skipped else experts, (tokens, slots), generator=generator)
    return torch.where(ids == 1, 0, ids) if experts > 1 else ids


def layer(
    experts: int,
    hidden: int,
    inner: int,
    gated: bool,
    biased: bool,
    transposed: bool,
    dtype: torch.dtype,
    seed: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """up, up_bias, down, down_bias."""
    up_outputs = inner * (2 if gated else 1)
    up = normal(experts, up_outputs, hidden, dtype=dtype, scale=hidden**-0.5, seed=seed)
    down = normal(experts, hidden, inner, dtype=dtype, scale=inner**-0.5, seed=seed + 1)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    if not biased:
        return up, None, down, None
    biases = [normal(experts, size, dtype=dtype, seed=seed + 2) for size in (up_outputs, hidden)]
    return up, biases[0], down, biases[1]


def dense_experts(
    x: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, ids: Tensor,
    kind: str, score_position: str, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    """Every slot with a copy of its expert's weights, differentiable by autograd."""
    count = up.shape[0]
    there, own = (ids >= 0) & (ids < count), ids.clamp(0, count - 1)
    if transposed:
        up, down = up.mT, down.mT
    weight = torch.where(there, scores, 0.0)[..., None]
    source = x[:, None].expand(-1, ids.shape[1], -1)
    z = torch.einsum("tkh,tknh->tkn", source * weight if score_position == "input" else source, up[own])
    z = z if up_bias is None else z + up_bias[own]
    function = find(kind).value
    if up.shape[1] == down.shape[2]:
        a = function(z)
    else:
        gate, rest = (z[..., ::2], z[..., 1::2]) if interleaved else z.tensor_split(2, -1)
        a = function(gate, rest) if find(kind).arguments == 2 else function(gate) * rest
    y = torch.einsum("tki,tkhi->tkh", a, down[own])
    y = y if down_bias is None else y + down_bias[own]
    return (y * (there[..., None] if score_position == "input" else weight)).sum(1)


def exact_gradients(inputs: list[Tensor | None], grad: Tensor, ids: Tensor, *flags) -> list[Tensor | None]:
    """Of ``dense_experts`` in float64: to x, scores, up, up_bias, down, down_bias."""
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs]
    out = dense_experts(*leaves, ids, *flags)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad.double()))
    return [None if t is None else next(found) for t in leaves]
