"""Functions for captured graphs: one for every sort of argument that an op may have."""

import itertools

import torch

from toolkit.ops.linear import linear, linear_group
from toolkit.ops.lora_linear import lora_add
from toolkit.ops.rms_norm import rms_norm

WEIGHT = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(48, generator=torch.Generator().manual_seed(2))
LIBRARY = torch.library.Library("executor_test", "DEF")
LIBRARY.define("in_python(Tensor x, float factor, int[]? shape=None, *, bool flip=False) -> (Tensor, Tensor[])")
LIBRARY.impl(
    "in_python",
    lambda x, factor, shape=None, *, flip=False: (x * factor, [x.flip(0) if flip else x + 1, x - 1]),
    "CPU",
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_python(x):
    product, (first, second) = torch.ops.executor_test.in_python(x, 2, None, flip=True)
    return product + first * second


def writing(x):
    total = torch.zeros_like(x)
    total.add_(x, alpha=2)
    total[1:].mul_(0.5)
    return total + x.clamp(min=0)


def of_lists(x):
    a, b = x.split([1, x.shape[0] - 1])
    parts = torch.cat([b, WEIGHT[:2], a, WEIGHT[:1] * 2])
    return torch.stack([parts, parts.neg()]).sum([0]) + parts.view(-1, 32).sum(-1, keepdim=True)


def adapted(x, scales=(None, None), count=2):
    """Rows with adapters of two ranks, and one without."""
    ids = (torch.arange(x.shape[0]) % (count + 1) - 1).clamp_max(count - 1)
    a, b = [WEIGHT[:3], WEIGHT[3:8]][:count], [WEIGHT[:, :3], WEIGHT[:, 3:8]][:count]
    base = x.repeat(1, 2)[:, :48]
    return lora_add(base, x, a, b, [2, 0.5][:count], ids, column_scales=list(scales)[:count], bias=BIAS)


FUNCTIONS = {
    "adapters": adapted,
    "adapters with scales": lambda x: adapted(x, (None, BIAS)),
    "no adapters": lambda x: adapted(x, count=0),
    "numbers": lambda x: torch.add(x, 1, alpha=2).to(torch.float64).mul(3).float().pow(2).mean(-1),
    "linear with and without bias": lambda x: linear(x, WEIGHT, BIAS) + linear(x, WEIGHT, None),
    "group": lambda x: torch.cat(linear_group(x, [WEIGHT, WEIGHT[:8], WEIGHT[8:]], [BIAS, None, None]), -1),
    "group without biases": lambda x: torch.cat(linear_group(x, [WEIGHT, WEIGHT[:8]], [None, None]), -1),
    "norms": lambda x: rms_norm(x, None, 1e-6) * rms_norm(x, BIAS[:32], 1, 1),
    "indices": lambda x: x[torch.arange(x.shape[0]).flip(0)][:, None].expand(-1, 2, -1).reshape(-1, 32),
    "index of two": lambda x: x[:, torch.tensor([3, 1])] + x[torch.zeros(x.shape[0], dtype=torch.int64), :2],
    "empty lists": lambda x: x.sum().view([]) + x,
    "where": lambda x: torch.where(x > 0, x, torch.tensor(-1.0)).softmax(-1).argmax(-1),
    "a kernel in Python": of_python,
    "writes": writing,
    "lists": of_lists,
    "an input": lambda x: x,
}


def before_sampling(graph):
    """The nodes of a decode step's graph that compute logits."""
    return list(itertools.takewhile(lambda node: node.op is not torch.ops.toolkit.sample.default, graph.nodes))
