"""Rotary tables: modules with inverse frequencies that turn positions into cosines and sines."""

import torch
from torch import nn

from toolkit.modules.rotary import rotary_tables_forward
from toolkit.numerics import Numerics
from toolkit.patch.claim import Claim, ProbeError, Refusal
from toolkit.patch.probe import compare, device_of, random_input, required_arguments, twin, with_forward
from toolkit.patch.roles.search import Candidate, search


def _probe(module: nn.Module, forward) -> ProbeError:
    # One twin each: a table that grows rewrites its own frequencies, which the candidate must not see.
    copied, pristine = twin(module), twin(module)
    x = random_input(1, 1, 8, like=copied)
    longest = int(getattr(module, "max_seq_len_cached", 2048))
    near = torch.tensor([[0, 1, 2, 5, 31], [7, 100, 3, 0, longest - 1]], device=device_of(copied))
    # Beyond the trained length, tables that change with the sequence give themselves away.
    far = torch.tensor([[0, 4 * longest + 3]], device=device_of(copied))

    return compare(
        lambda positions: with_forward(pristine, forward)(x, positions),
        lambda positions: with_forward(copied, type(copied).forward)(x, positions),
        [[near], [far], [near]],
    )


def _candidates(module: nn.Module) -> list[Candidate] | None:
    if not isinstance(getattr(module, "inv_freq", None), torch.Tensor):
        return None
    if "position_ids" not in required_arguments(module):
        return None
    forward = rotary_tables_forward(float(getattr(module, "attention_scaling", 1.0)))
    return [("rotary_tables", forward, lambda: _probe(module, forward))]


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Refusal]:
    return search(model, "rotary", _candidates)
