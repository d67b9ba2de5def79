"""Rotary tables: modules with inverse frequencies that turn positions into cosines and sines."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.rotary import rotary_grids_forward, rotary_tables_forward
from toolkit.numerics import Numerics
from toolkit.patch.claim import Claim, ProbeError, Refusal
from toolkit.patch.probe import compare, device_of, random_input, required_arguments, twin, with_forward
from toolkit.patch.roles.search import Candidate, search


GRIDS = 3  # time, height, width


def _probe(module: nn.Module, forward: Callable[..., Any]) -> ProbeError:
    # One twin each: a table that grows rewrites its own frequencies, which the candidate must not see.
    copied, pristine = twin(module), twin(module)
    x = random_input(1, 1, 8, like=copied)
    longest = int(getattr(module, "max_seq_len_cached", 2048))
    near = torch.tensor([[0, 1, 2, 5, 31], [7, 100, 3, 0, longest - 1]], device=device_of(copied))
    # Beyond the trained length, tables that change with the sequence give themselves away.
    far = torch.tensor([[0, 4 * longest + 3]], device=device_of(copied))
    inputs = [[near], [far], [near]]
    if _takes_grids(module):
        inputs.append([torch.stack([near, near.flip(-1), near + 3])])
    return compare(
        lambda positions: with_forward(pristine, forward)(x, positions),
        lambda positions: with_forward(copied, type(copied).forward)(x, positions),
        inputs,
    )


def _tables(module: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    copied = twin(module)
    return type(copied).forward(copied, random_input(1, 1, 8, like=copied), positions)


def _takes_grids(module: nn.Module) -> bool:
    """Whether positions may be [grids, batch, tokens] and give one table, as in models that read images."""
    try:
        cos, _ = _tables(module, torch.ones(GRIDS, 2, 2, dtype=torch.int64, device=device_of(module)))
    except (RuntimeError, IndexError, ValueError):
        return False
    return cos.shape[:-1] == (2, 2)


def _grid_of(module: nn.Module, scaling: float) -> Tensor:
    """[2F] the grid whose position each column follows: told apart by one token with another position in each."""
    places = torch.tensor([1, 40, 900], device=device_of(module)).view(GRIDS, 1, 1)
    x, plain = random_input(1, 1, 8, like=module), rotary_tables_forward(scaling)
    single = torch.stack([torch.stack(plain(module, x, one)) for one in places])  # [grids, 2, 1, 1, 2F]
    mixed = torch.stack(_tables(module, places))
    return (single - mixed).abs().amax(1).argmin(0).flatten()


def _candidates(module: nn.Module) -> list[Candidate] | None:
    if not isinstance(getattr(module, "inv_freq", None), torch.Tensor):
        return None
    if "position_ids" not in required_arguments(module):
        return None
    scaling = float(getattr(module, "attention_scaling", 1.0))
    forward = rotary_tables_forward(scaling)
    if not _takes_grids(module):
        return [("rotary_tables", forward, lambda: _probe(module, forward))]
    of_grids = rotary_grids_forward(scaling, _grid_of(module, scaling))
    return [("rotary_tables (of grids)", of_grids, lambda: _probe(module, of_grids))]


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Refusal]:
    return search(model, "rotary", _candidates)
