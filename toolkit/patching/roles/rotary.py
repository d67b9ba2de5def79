"""Rotary tables: modules that compute cosines and sines of positions from inverse frequencies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.rotary import LAYOUTS, rotary_tables_forward
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped
from toolkit.patching.probe import compare, device_of, probe_copy, random_input, required_arguments, with_forward
from toolkit.patching.search import Candidate, search

AXES = 3  # time, height, width
BUFFER = "inv_freq"


def _layer_types(module: nn.Module) -> list[str | None]:
    """The layer types that the module has frequencies for; [None] where they are for all layers, [] for none."""
    buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(BUFFER)]
    if BUFFER in buffers:
        return [None]
    return [name.removesuffix(f"_{BUFFER}") for name in buffers if not name.endswith(f"original_{BUFFER}")]


def _real(tables: Any) -> Any:
    return torch.view_as_real(tables) if isinstance(tables, Tensor) and tables.is_complex() else tables


def _call(module: nn.Module, forward: Callable[..., Any], layer_type: str | None) -> Callable[[Tensor], Any]:
    """The tables that ``forward`` on the module returns, as a function of the positions."""
    x, layer_types = random_input(1, 1, 8, like=module), () if layer_type is None else (layer_type,)
    return lambda positions: _real(with_forward(module, forward)(x, positions, *layer_types))


def _probe(module: nn.Module, forward: Callable[..., Any], along_axes: bool) -> ProbeError:
    # Two copies: a table that grows rewrites its frequencies, which the candidate must not see.
    copied, pristine = probe_copy(module), probe_copy(module)
    longest = int(getattr(module, "max_seq_len_cached", 2048))
    near = torch.tensor([[0, 1, 2, 5, 31], [7, 100, 3, 0, longest - 1]], device=device_of(copied))
    # Tables that change with the sequence length differ beyond the trained length.
    far = torch.tensor([[0, 4 * longest + 3]], device=device_of(copied))
    inputs = [[near], [far], [near]]
    if along_axes:
        inputs.append([torch.stack([near, near.flip(-1), near + 3])])
    errors = [
        compare(_call(pristine, forward, kind), _call(copied, type(copied).forward, kind), inputs)
        for kind in _layer_types(module)
    ]
    return ProbeError(max(e.forward for e in errors), max(e.backward for e in errors))


def _axes(module: nn.Module) -> Tensor | None:
    """[F] the axis of each frequency, where positions may be [axes, batch, tokens] and give one table; else None.

    Found by tokens with different positions along the axes.
    """
    positions = torch.tensor([1, 40, 900], device=device_of(module)).view(AXES, 1, 1).expand(AXES, 2, 2)
    try:
        mixed = _call(probe_copy(module), type(module).forward, None)(positions)
    except (RuntimeError, IndexError, ValueError):
        return None
    if not isinstance(mixed, tuple) or mixed[0].shape[:-1] != (2, 2):
        return None
    half = mixed[0].shape[-1] // 2
    single = [_call(probe_copy(module), rotary_tables_forward(), None)(one) for one in positions]
    distance = torch.stack([abs(cos - mixed[0]) + abs(sin - mixed[1]) for cos, sin in single])
    return distance[..., :half].amax((1, 2)).argmin(0)


def _candidates(module: nn.Module) -> list[Candidate] | None:
    kinds, needed = _layer_types(module), required_arguments(module)
    if not kinds or "position_ids" not in needed or len(needed) > (2 if kinds == [None] else 3):
        return None
    axes = _axes(module) if kinds == [None] else None
    options: list[Candidate] = []
    for layout in LAYOUTS:
        forward = rotary_tables_forward(layout, axes)
        named = "".join([f" ({layout})" * (layout != "twice"), " along axes" * (axes is not None)])
        options.append((f"rotary_tables{named}", forward, partial(_probe, module, forward, axes is not None)))
    return options


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on modules that compute rotary tables."""
    return search(model, "rotary", _candidates)
