"""A tower's attention layer on trial: a probe copy of it through the attention interface, against its eager attention.

No forward of text calls such a layer, so its arguments are made from its signature: hidden states, tables of rotary
positions, masks of every kind that towers make, or the offsets of images in one packed row. A layer that asks for
something else is refused.
"""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from toolkit.patching import attention_interface
from toolkit.patching.attention_probe import LENGTH, LENGTHS, ROWS, registered
from toolkit.patching.calls import MASK, Call
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.probe import device_of, generator, random_input, with_forward
from toolkit.patching.probe_copy import probe_copy
from toolkit.patching.skeleton import HIDDEN

PACKED = "cu_seqlens"
"""The argument by which a layer knows where each image begins in its rows [T, N]."""


class UnfitError(Exception):
    """A layer that no probe can call, or that is something else; the message is why it is skipped."""


@dataclass(frozen=True)
class Mask:
    """One mask in the two forms that a layer may be handed. name: for a skip reason.

    Args:
        added: to the scores, as eager attention takes it.
        handed: as the interface takes it.
    """

    name: str
    added: Tensor | None
    handed: Tensor | None


class EncoderProbe:
    """Runs a probe copy of an attention layer that sees tokens ahead.

    Args:
        call: how the layer is called; None to find it out.

    Raises:
        UnfitError: nothing that is known is a call of it, it does not dispatch through the interface, or is causal.
    """

    def __init__(self, module: nn.Module, condition: Condition = UNIT, call: Call | None = None) -> None:
        self.module = module
        self.copied: Any = probe_copy(module, own_values=condition.own_values, dtype=condition.dtype or torch.float32)
        self.copied.train(condition.training)
        drop_nothing(self.copied)
        self.copied.__dict__[attention_interface.IMPLEMENTATION] = attention_interface.NAME
        if call is None:
            self.call = self._call()
            self._look()
        else:
            self.call = call.within(condition.dtype)

    def _call(self) -> Call:
        problem: Exception | None = None
        with torch.no_grad():
            for call in _calls(self.copied):
                self.call = call
                try:
                    self.run("eager", None, call.arguments[call.hidden])
                except Exception as failed:  # of other shapes; the last are the closest
                    problem = failed
                else:
                    return call
        raise UnfitError(f"no arguments that a probe knows fit its forward ({problem})")

    def _look(self) -> None:
        """One call with a recording function registered as the interface."""
        calls: list[tuple[nn.Module, bool]] = []

        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **kwargs: Any) -> Any:
            own, given = getattr(module, "is_causal", True), kwargs.get("is_causal")
            calls.append((module, bool(own if given is None else given)))
            handed = kwargs.pop(MASK, None) if not mask else mask[0]
            return attention_interface.proven_attention(module, query, key, value, handed, **kwargs)

        with registered("toolkit_probe", record), torch.no_grad():
            self.run("toolkit_probe", None, self._hidden())
        if not calls:
            raise UnfitError("it does not dispatch through the attention interface")
        if any(module is not self.copied for module, _ in calls):
            raise UnfitError("it must call the attention interface for itself, got another module")
        if any(causal for _, causal in calls):
            raise UnfitError("it must see tokens ahead, got causal attention")

    def run(self, implementation: str, mask: Tensor | None, hidden: Tensor) -> Tensor:
        self.copied.config._attn_implementation = implementation
        arguments = self.call.with_arguments(**{self.call.hidden: hidden, MASK: mask})
        output = with_forward(self.copied, type(self.copied).forward)(**arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _hidden(self) -> Tensor:
        return random_input(*self.call.arguments[self.call.hidden].shape, like=self.copied)

    def masks(self) -> Iterator[Mask]:
        """None, padding on both sides, holes, and images side by side in one row, as far as the layer takes a mask."""
        yield Mask("", None, None)
        if MASK not in self.call.arguments:
            return
        device, dtype = device_of(self.copied), next(self.copied.parameters()).dtype
        packed = PACKED in self.call.arguments
        if not packed:
            for name, tokens in ((" with padding", _PADDING), (" with holes between tokens", _HOLES)):
                known = torch.tensor(tokens, dtype=torch.bool, device=device)
                handed = attention_interface.mask_function(
                    ROWS, LENGTH, LENGTH, attention_mask=known, mask_function=bidirectional_mask_function,
                    allow_is_causal_skip=False, device=device,
                )  # fmt: skip
                yield Mask(name, _added(known[:, None, None].expand(-1, 1, LENGTH, -1), dtype), handed)
        lengths = LENGTHS if packed else _IMAGES
        image = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        blocks = _added((image[:, None] == image).expand(1 if packed else ROWS, 1, -1, -1), dtype)
        if not packed or self._runs(blocks):
            yield Mask(" with images side by side", blocks, blocks)

    def _runs(self, mask: Tensor) -> bool:
        """Whether eager attention takes ``mask``: a packed row that the layer splits has masks of its parts."""
        try:
            with torch.no_grad():
                self.run("eager", mask, self.call.arguments[self.call.hidden])
        except Exception:
            return False
        return True

    def error(self) -> ProbeError:
        """Against the layer's own eager attention: outputs and all gradients, under every condition and mask."""

        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
            probe = self if condition is UNIT else EncoderProbe(source, condition, self.call)
            return probe.copied, map(probe._trial, probe.masks())

        return worst_error(self.module, build)

    def _trial(self, mask: Mask) -> Trial:
        got, expected = (
            partial(self.run, name, one)
            for name, one in ((attention_interface.NAME, mask.handed), ("eager", mask.added))
        )
        return Trial(got, expected, [[self._hidden()]], mask.name)


_PADDING = [[1] * 5 + [0] * 2, [0] * 3 + [1] * 4]
_HOLES = [[1, 1, 0, 1, 1, 0, 0], [1] * 7]
_IMAGES = (3, 4)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _calls(module: Any) -> Iterator[Call]:
    """What may be calls of a layer: every combination of shapes for the arguments of its forward that are known.

    Raises:
        UnfitError: the forward takes no hidden states, or asks for something that is not known.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    taken = {name: one for name, one in list(parameters.items())[1:] if one.kind not in kinds}
    first = next(iter(taken), "")
    if first not in HIDDEN:
        raise UnfitError(f"its forward must take hidden states first, got {first or 'nothing'}")
    total = sum(LENGTHS)
    for rows in ((total,), (1, total)) if PACKED in taken else ((ROWS, LENGTH),):
        made = {name: values for name, values in _known(module, rows).items() if name in taken}
        unknown = [n for n, one in taken.items() if one.default is one.empty and n not in (first, MASK, *made)]
        if unknown:
            raise UnfitError(f"its forward asks for {', '.join(unknown)}, which a probe does not know")
        for name, values in made.items():  # with positions before without
            if taken[name].default is not inspect.Parameter.empty:
                values.append(taken[name].default)
        masks = {MASK: None} if MASK in taken else {}
        for width in dict.fromkeys(one.shape[1] for one in module.parameters() if one.dim() == 2):
            hidden = random_input(*rows, width, like=module)
            for combined in itertools.product(*made.values()):
                yield Call({first: hidden, **dict(zip(made, combined, strict=True)), **masks}, 0)


def _known(module: Any, rows: tuple[int, ...]) -> dict[str, list[Any]]:
    """Values of the arguments beside hidden states ``rows`` and masks that towers hand their layers."""
    device = device_of(module)
    tokens = rows[-1]
    at = torch.arange(tokens, device=device).expand(rows)
    found: dict[str, list[Any]] = {
        PACKED: [torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)],
        "max_seqlen": [max(LENGTHS)],
        "position_ids": [torch.stack([at % 3, at // 3], -1), at],
    }
    head = _head_dim(module)
    if head is not None:

        def angles(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator(device, 9), device=device)

        besides: list[tuple[int, ...]] = [(), (1,), rows[:-1]]
        shapes = [(*beside, tokens, size) for size in (head, head // 2) for beside in besides]
        tables = [angles(*shape) for shape in dict.fromkeys(shapes)]
        found["position_embeddings"] = [(one.cos(), one.sin()) for one in tables]
        turns = angles(tokens, 1, head // 2)
        found["freqs_ci"] = [torch.polar(torch.ones_like(turns), turns)]
    return found


def _head_dim(module: Any) -> int | None:
    for holder in (module, module.config):
        size = getattr(holder, "head_dim", None)
        if isinstance(size, int):
            return size
    return None
