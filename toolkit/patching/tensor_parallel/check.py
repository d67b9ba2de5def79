"""Is a model that was split over ranks the model that it was? A forward and a backward before and after."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import row_forward
from toolkit.patching.probe import device_of, distance, generator
from toolkit.patching.record import report_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

_LENGTHS = (7, 4)
_SMALL = 2**20
"""Elements of the largest parameter whose gradient is compared: of norms and routers, whose gradients pass all of the
layers behind them."""
_NEAR = {2: 5e-2, 4: 1e-3, 8: 1e-6}
"""Largest relative difference of gradients, and of fast mode's logits, by the bytes of an element."""


class Seen(NamedTuple):
    """What a model computes.

    Fields:
        logits: [T, V].
        gradients: of the small parameters that are whole on every rank.
    """

    logits: Tensor
    gradients: list[Tensor]


def look(model: nn.Module, whole: Sequence[nn.Parameter]) -> Seen:
    """What the model computes of a few tokens. All ranks must call it once the model is split.

    Args:
        whole: parameters that every rank holds whole.
    """
    device = device_of(model)
    report = report_of(model)
    count = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    source = generator(torch.device("cpu"), 29)
    texts = [torch.randint(count, (length,), generator=source) for length in _LENGTHS]
    small = [parameter for parameter in whole if parameter.numel() <= _SMALL and parameter.is_floating_point()]
    needed = [parameter.requires_grad for parameter in small]
    try:
        for parameter in small:
            parameter.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            if report is not None and report.ragged.reason is None:
                batch = RaggedBatch.from_sequences(texts, device, share=False)
                logits = row_forward(model, DenseContext(batch)) + 0
            else:
                logits = torch.cat([model(input_ids=text[None].to(device)).logits[0] + 0 for text in texts])
            upstream = torch.randn(logits.shape, generator=source).to(device, logits.dtype)
            gradients = torch.autograd.grad(logits, small, upstream, allow_unused=True) if small else ()
        found = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(small, gradients)]
        return Seen(logits.detach(), found)
    finally:
        for parameter, before in zip(small, needed):
            parameter.requires_grad_(before)


def difference(before: Seen, after: Seen, bitwise: bool) -> str | None:
    """In what the split model differs from the whole one; None where in nothing."""
    near = _NEAR[before.logits.dtype.itemsize]
    apart = distance(after.logits.float(), before.logits.float())
    if bitwise and not torch.equal(before.logits, after.logits):
        return f"its logits are not bitwise those of one process (relative difference {apart:.1e})"
    if not apart <= near:
        return f"its logits differ from those of one process by {apart:.1e}"
    largest = max((float(one.norm()) for one in before.gradients), default=0.0)
    for one, other in zip(before.gradients, after.gradients):
        error = float((other.double() - one.double()).norm())
        if not error <= near * max(float(one.norm()), 1e-3 * largest):
            return f"gradients differ from those of one process by {error / max(float(one.norm()), 1e-30):.1e}"
    return None


def check_equal(parameters: dict[str, nn.Parameter], ranks: dist.ProcessGroup) -> None:
    """Raise ToolkitError unless all ranks hold equal parameters, as far as two sums show."""
    sums = torch.stack([_sums(parameter) for parameter in parameters.values()])
    every = [torch.empty_like(sums) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(every, sums, group=ranks)
    for at, name in enumerate(parameters):
        if any(not torch.equal(one[at], every[0][at]) for one in every):
            raise ToolkitError(f"parameter {name} must be equal on all ranks before it is split, got different ones.")


def _sums(parameter: nn.Parameter) -> Tensor:
    values = parameter.detach().reshape(-1)
    middle = values[: (len(values) + 1) // 2]
    return torch.stack([values.sum(dtype=torch.float64), middle.sum(dtype=torch.float64)]).nan_to_num(0.0)
