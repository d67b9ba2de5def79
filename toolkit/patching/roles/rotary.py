"""Rotary tables: modules that compute cosines and sines of positions from inverse frequencies.

A module whose frequencies depend on the longest sequence of a call (LongRoPE, dynamic NTK) is asked for which lengths
they are the same, and gets a forward that goes by the length of each row's own sequence in ragged batches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.rotary import LAYOUTS, length_dependent_forward, rotary_tables_forward
from toolkit.numerics import Numerics
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.conditions import Condition, Trial, worst_error
from toolkit.patching.length_tables import BUFFER, Regimes, frequencies_of, fresh_copy, layer_types, regimes_of
from toolkit.patching.probe import device_of, random_input, with_forward
from toolkit.patching.probe_copy import probe_copy
from toolkit.patching.search import Candidate, prove, search
from toolkit.patching.thresholds import around
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.state.rotary_regimes import RotaryRegimes

AXES = 3  # time, height, width


def _real(tables: Any) -> Any:
    return torch.view_as_real(tables) if isinstance(tables, Tensor) and tables.is_complex() else tables


def _call(
    module: nn.Module, forward: Callable[..., Any], layer_type: str | None, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Any]:
    """The tables that ``forward`` on the module returns, as a function of the positions.

    Args:
        dtype: of the hidden states whose type they have; None for float32.
    """
    x = random_input(1, 1, 8, like=module).to(dtype or torch.float32)
    layer_types = () if layer_type is None else (layer_type,)
    return lambda positions: _real(with_forward(module, forward)(x, positions, *layer_types))


def _probe(module: nn.Module, forward: Callable[..., Any], along_axes: bool) -> ProbeError:
    longest = int(getattr(module, "max_seq_len_cached", 2048))
    near = torch.tensor([[0, 1, 2, 5, 31], [7, 100, 3, 0, longest - 1]], device=device_of(module))
    # Tables that change with the sequence length differ beyond the trained length.
    borders = around(getattr(module, "config", None))
    far = torch.tensor([[0, *borders, 4 * longest + 3]], device=device_of(module))
    inputs = [[near], [far], [near]]
    if along_axes:
        inputs.append([torch.stack([near, near.flip(-1), near + 3])])

    def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
        # Two copies: a table that grows rewrites its frequencies, which the candidate must not see.
        copied, pristine = condition.copy_of(source), condition.copy_of(source)
        return copied, (
            Trial(
                _call(pristine, forward, kind, condition.dtype),
                _call(copied, type(copied).forward, kind, condition.dtype),
                inputs,
            )
            for kind in layer_types(module)
        )

    return worst_error(module, build)


def _axes(module: nn.Module, kind: str | None, border: int = 1024) -> Tensor | None:
    """[F] the axis of each frequency, where positions may be [axes, batch, tokens] and give one table; else None.

    Found by tokens with different positions along the axes, which make no sequence longer than ``border``.
    """
    apart = (1, 40, 900) if border > 900 else (1, border // 4 + 1, border - 1)
    positions = torch.tensor(apart, device=device_of(module)).view(AXES, 1, 1).expand(AXES, 2, 2)
    try:
        mixed = _call(probe_copy(module), type(module).forward, kind)(positions)
    except (RuntimeError, IndexError, ValueError):
        return None
    if not isinstance(mixed, tuple) or mixed[0].shape[:-1] != (2, 2):
        return None
    half = mixed[0].shape[-1] // 2
    single = [_call(probe_copy(module), rotary_tables_forward(), kind)(one) for one in positions]
    distance = torch.stack([abs(cos - mixed[0]) + abs(sin - mixed[1]) for cos, sin in single])
    return distance[..., :half].amax((1, 2)).argmin(0)


def _candidates(module: nn.Module) -> list[Candidate] | None:
    kinds = layer_types(module)
    if not kinds:
        return None
    axes = _axes(module, kinds[0])
    options: list[Candidate] = []
    for layout, in_float32 in _FORMS:
        forward = rotary_tables_forward(layout, axes, in_float32)
        options.append((_name(layout, axes, in_float32), forward, partial(_probe, module, forward, axes is not None)))
    return options


_FORMS = [
    (layout, in_float32) for layout in LAYOUTS for in_float32 in ((False,) if layout == "complex" else (False, True))
]


def _name(layout: str, axes: Tensor | None, in_float32: bool) -> str:
    words = ["rotary_tables", f" ({layout})" * (layout != "twice"), " along axes" * (axes is not None)]
    return "".join([*words, " in float32" * in_float32])


def _length_dependent(module: nn.Module, regimes: Regimes) -> list[Candidate]:
    borders = [border for one in regimes.values() if one for border in (*one.borders, one.varies_after) if border]
    axes = _axes(module, None, min(borders)) if list(regimes) == [None] else None
    options: list[Candidate] = []
    for layout, in_float32 in _FORMS:
        # Frequencies that a module computes anew in its forward are those that it was made with.
        for source in (BUFFER, f"original_{BUFFER}"):
            given = frequencies_of(source), regimes, layout, axes, in_float32
            forward = length_dependent_forward(type(module).forward, *given)
            probe = partial(_length_probe, module, forward, regimes, axes is not None)
            options.append((f"{_name(layout, axes, in_float32)} by sequence length", forward, probe))
    return options


def _length_probe(module: nn.Module, forward: Callable[..., Any], regimes: Regimes, along_axes: bool) -> ProbeError:
    """Sequences of every regime in one ragged batch, against the module's own forward on each alone."""

    def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
        # Frequencies that a module computes anew are those of its configuration, which a copy of it shares.
        copied = fresh_copy(source).train(condition.training)
        return copied, _length_trials(copied, forward, regimes, along_axes, condition.dtype)

    return worst_error(module, build)


def _length_trials(
    module: nn.Module, forward: Callable[..., Any], regimes: Regimes, along_axes: bool, dtype: torch.dtype | None
) -> Iterator[Trial]:
    device = device_of(module)
    for kind, regime in regimes.items():
        borders = () if regime is None else (*regime.borders, *filter(None, [regime.varies_after]))
        lengths = sorted({2, 40, *(length for at in borders for length in (at, at + 1, at + 2, 3 * at + 7))})
        parts = [torch.tensor([0, 1, length // 2, length - 1], device=device) for length in lengths]
        batch = RaggedBatch.from_sequences(parts, device, share=False, rotary_lengths=lengths)
        own = _call(fresh_copy(module), type(module).forward, kind, dtype)
        ragged = _call(module, forward, kind, dtype)

        def separate(*positions: Tensor, own: Any = own) -> Any:
            tables = [own(one) for one in positions]
            one_tensor = isinstance(tables[0], Tensor)
            return torch.cat(tables, 1) if one_tensor else tuple(torch.cat(part, 1) for part in zip(*tables))

        def together(*positions: Tensor, ragged: Any = ragged, batch: RaggedBatch = batch) -> Any:
            with set_forward_context(DenseContext(batch)):
                return ragged(torch.cat(positions, -1))

        # The shortest first: a module that keeps the frequencies of the longest sequence so far has none yet.
        inputs = [[part[None] for part in parts]]
        if along_axes:
            inputs.append([torch.stack([part, part // 2, part // 3])[:, None] for part in parts])
        yield Trial(together, separate, inputs)


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """Claims on modules that compute rotary tables."""
    dependent = {module: regimes for module in model.modules() if (regimes := regimes_of(module))}
    found = search(model, "rotary", lambda module: None if module in dependent else _candidates(module))
    for path, module in model.named_modules():
        if module not in dependent:
            continue
        verdict = prove(_length_dependent(module, dependent[module]))
        if isinstance(verdict, str):
            found.append(Skipped("rotary", path, f"its tables depend on the length of the sequence, and {verdict}"))
        else:
            op, forward, error = verdict
            merged = RotaryRegimes.merged(filter(None, dependent[module].values()))
            found.append(Claim("rotary", path, module, op, error, replace_forward(module, forward), merged))
    return found
