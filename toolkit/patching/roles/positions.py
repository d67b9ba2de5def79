"""Tables of positions whose module counts positions by a token's place in its row, known by its arguments."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.positions import GIVEN, PAST, by_argument, by_table
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.conditions import error_of
from toolkit.patching.probe import device_of, generator
from toolkit.patching.probe_copy import probe_copy
from toolkit.patching.search import Candidate, search
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

LENGTHS, PASTS = (5, 4), (3, 9)  # of the probe's sequences, and the tokens before them
OFFSETS = range(4)


def _tables(module: nn.Module) -> list[str]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [name for name, tensor in own if tensor.is_floating_point() and tensor.dim() == 2]


def _batch(module: nn.Module) -> RaggedBatch:
    batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], device_of(module), share=False)
    starts = torch.tensor(PASTS, device=batch.positions.device)[batch.sequence_ids]
    return replace(batch, positions=batch.positions + starts)


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    """Two sequences in one batch, against the module's own forward of each."""
    own, device = type(module).forward, device_of(module)
    ids = [torch.randint(3, (1, length), generator=generator(device), device=device) for length in LENGTHS]
    copied = probe_copy(module)
    given = next(kind for kind in (_as_ids, _as_shape) if _runs(copied, kind(ids[0])))

    def separate(self: nn.Module) -> Tensor:
        rows = [own(self, given(one), past) for one, past in zip(ids, PASTS, strict=True)]
        return torch.cat(rows, -2)

    def together(self: nn.Module) -> Tensor:
        with set_forward_context(DenseContext(_batch(module))):
            found: Tensor = forward(self, given(torch.cat(ids, 1)), 0)
            return found

    return error_of(module, together, lambda copied: [[]], separate)


def _as_ids(ids: Tensor) -> Tensor:
    return ids


def _as_shape(ids: Tensor) -> torch.Size:
    return ids.shape


def _runs(module: nn.Module, given: Any) -> bool:
    try:
        with torch.no_grad():
            return isinstance(type(module).forward(module, given, 0), Tensor)
    except Exception:
        return False


def _forwards(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    own = type(module).forward
    if GIVEN in inspect.signature(own).parameters:
        for axes in (1, 2):
            yield "positions (of the batch, as an argument)", by_argument(own, axes)
    for table in _tables(module):
        for offset in OFFSETS:
            for axes in (2, 3):
                yield f"positions (of the batch, plus {offset}, in a table)", by_table(own, table, offset, axes)


def _candidates(module: nn.Module) -> list[Candidate] | None:
    if not _tables(module) or PAST not in inspect.signature(type(module).forward).parameters:
        return None
    return [(op, forward, partial(_probe, module, forward)) for op, forward in _forwards(module)]


def find(model: Any, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on tables of positions that are not handed the positions of a ragged batch."""
    return search(model, "positions", _candidates)
