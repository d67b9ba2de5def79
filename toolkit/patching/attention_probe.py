"""An attention layer on trial: a probe copy of it, called as the model calls it, against candidates for its forward."""

import copy
import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import causal_mask_function, eager_mask

from toolkit.modules.row_positions import RowPositions
from toolkit.patching import attention_interface
from toolkit.patching.calls import MASK, Call, map_tensors
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.probe import device_of, random_input, with_forward
from toolkit.patching.probe_copy import probe_copy
from toolkit.patching.thresholds import around
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

ROWS, LENGTH = 2, 7
LENGTHS = (LENGTH, 4)  # of the sequences of a ragged batch
PROBE_WINDOW = 3  # small enough to mask tokens within the probe
FAR = 1 << 20  # beyond the length after which a layer scales its queries
CACHE = "past_key_values"


@dataclass(frozen=True)
class Seen:
    """What a layer passed to the attention interface in one call, and what it got back.

    Args:
        caller: the name in the layer of the module that calls the interface; "" for the layer itself.
        causal: what the call says, or else the module.
    """

    caller: str
    heads: int
    head_dim: int
    window: int
    softcap: float
    sinks: str | None
    output: Tensor
    causal: bool


class Probe:
    """Runs a probe copy of an attention layer, called as the model calls it, through eager attention and candidates.

    Args:
        condition: that of the copy.
        masked: whether masks are causal although the layer says otherwise (``MASKED``).
    """

    def __init__(self, module: nn.Module, call: Call, condition: Condition = UNIT, masked: bool = False) -> None:
        self.module, self.masked = module, masked
        self.copied: Any = probe_copy(module, own_values=condition.own_values, dtype=condition.dtype or torch.float32)
        self.copied.train(condition.training)
        drop_nothing(self.copied)
        for part in self.copied.modules():
            part.__dict__[attention_interface.IMPLEMENTATION] = attention_interface.NAME
            if masked:
                part.__dict__[attention_interface.MASKED] = "eager"
        self.call = call.within(condition.dtype)
        self.shape = call.arguments[call.hidden].shape
        self.paired = True
        self.seen = self.look()
        if self.seen.window:
            self._shorten_window()

    def _shorten_window(self) -> None:
        """Give the copy the window of the recorded masks; one that counts its own token beside its configuration's."""
        config: Any = self.copied.config
        own, given = (getattr(holder, "sliding_window", None) for holder in (self.copied, config))
        if own:
            self.copied.sliding_window = PROBE_WINDOW + (1 if given and own == given + 1 else 0)
        if given:
            config.sliding_window = PROBE_WINDOW

    def look(self) -> Seen:
        """One call with a recording function registered as the interface."""
        calls: list[Seen] = []

        def record(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
        ) -> Any:
            mask = kwargs.pop("attention_mask", mask)
            window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
            given = kwargs.get("s_aux")
            sinks = next((name for name, own in module.named_parameters(recurse=False) if own is given), None)
            output = attention_interface.proven_attention(module, query, key, value, mask, **kwargs)
            caller = next((name for name, part in self.copied.named_modules() if part is module), None)
            if caller is None:
                raise RuntimeError("it must call the attention interface for itself or a module inside it, got another")
            own, said = getattr(module, "is_causal", True), kwargs.get("is_causal")
            causal = bool(own if said is None else said)
            calls.append(Seen(caller, query.shape[1], query.shape[-1], window, softcap, sinks, output[0], causal))
            return output

        with registered("toolkit_probe", record), torch.no_grad():
            self.run("toolkit_probe", None, self._hidden().to(next(self.copied.parameters()).dtype))
        if not calls:
            raise RuntimeError("it does not dispatch through the attention interface")
        if len(calls) != 1:
            raise RuntimeError(f"it must call the attention interface once, got {len(calls)} calls")
        return calls[0]

    @property
    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines that the layer receives, [1 or B, S, D]."""
        given = self.call.arguments.get("position_embeddings")
        return given if isinstance(given, tuple) and len(given) == 2 else None

    @property
    def reads_cache(self) -> bool:
        """Whether the layer counts positions from the length of its cache.

        Raises what its forward raises with a cache that keeps nothing.
        """
        code = inspect.unwrap(type(self.copied).forward).__code__
        if not {"get_seq_length", "get_query_offset"} & set(code.co_names):
            return False
        hidden, mask = random_input(*self.shape, like=self.copied), self.call.arguments.get(MASK)
        with torch.no_grad():
            near, far = (self.run("eager", mask, hidden, past=past) for past in (0, FAR))
        return not torch.equal(near, far)

    def run(
        self,
        implementation: str,
        mask: Any,
        hidden: Tensor,
        forward: Any = None,
        past: int | None = None,
        **replaced: Any,
    ) -> Tensor:
        self.copied.config._attn_implementation = implementation
        function = with_forward(self.copied, forward or type(self.copied).forward)
        arguments = self.call.with_arguments(**{self.call.hidden: hidden, MASK: mask}, **replaced)
        if past is not None:
            arguments[CACHE] = RowPositions(past)
        output = function(**arguments)
        if forward is None:
            self.paired = isinstance(output, tuple)
        elif isinstance(output, tuple) != self.paired:
            raise RuntimeError("it must return a pair of outputs and weights")
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _hidden(self) -> Tensor:
        return random_input(*self.shape, like=self.copied)

    def _patched(self, forward: Any, **replaced: Any) -> Any:
        return lambda x: self.run(attention_interface.NAME, None, x, forward, **replaced)

    def _eager(self, **replaced: Any) -> Any:
        return lambda x: self.run("eager", self.call.arguments.get(MASK), x, **replaced)

    def _under(self, source: nn.Module, condition: Condition) -> "Probe":
        """This probe for its own condition and module, another for others."""
        return self if condition is UNIT else Probe(source, self.call, condition, self.masked)

    def error(self, forward: Any = None, thorough: bool = True) -> ProbeError:
        """Against eager attention with the mask that transformers made for it.

        Args:
            thorough: under every condition, and not the first alone.
        """

        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, list[Trial]]:
            probe = self._under(source, condition)
            return probe.copied, [Trial(probe._patched(forward), probe._eager(), [[probe._hidden()]])]

        return worst_error(self.module, build, None if thorough else [UNIT])

    def forward_error(self, forward: Any) -> ProbeError:
        """``error`` of another forward, as recorded and with further tensors that the layer is handed at other values.

        A layer may scale its queries by position: by 1 for the few tokens that were recorded.
        """
        worst = self.error(forward)
        return (
            worst.worse(worst_error(self.module, partial(self._others, forward), [UNIT])) if worst.passes() else worst
        )

    def _others(self, forward: Any, *_: Any) -> tuple[nn.Module, Iterator[Trial]]:
        hidden = [[self._hidden()]]
        return self.copied, (
            Trial(self._patched(forward, **others), self._eager(**others), hidden, gradients=at == 0)
            for at, others in enumerate(self.others())
        )

    def ragged_error(self, forward: Any, pasts: tuple[int, int] = (0, 0)) -> ProbeError:
        """Two sequences in one ragged batch, against eager attention on each, as recorded and with ``others``.

        Args:
            pasts: how many tokens each sequence's positions begin after.
        """

        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
            probe = self._under(source, condition)
            given = ({}, *self.others()) if condition is UNIT else ({},)
            return probe.copied, (probe._ragged(forward, pasts, others) for others in given)

        return worst_error(self.module, build)

    def _ragged(self, forward: Any, pasts: tuple[int, int], others: dict[str, Tensor]) -> Trial:
        given = {name: value for name, value in {**self.call.arguments, **others}.items() if name not in (MASK, CACHE)}
        del given[self.call.hidden]
        cut = [{name: _of_sequence(value, length) for name, value in given.items()} for length in LENGTHS]
        joined = {name: _joined([one[name] for one in cut]) for name in given}
        batch = RaggedBatch.from_sequences([[0] * length for length in LENGTHS], device_of(self.copied), share=False)
        starts = torch.tensor(pasts, device=batch.positions.device)[batch.sequence_ids]
        context = DenseContext(replace(batch, positions=batch.positions + starts))

        def together(*sequences: Tensor) -> Tensor:
            with set_forward_context(context):
                return self.run(attention_interface.NAME, None, torch.cat(sequences, 1), forward, **joined)

        def separate(*sequences: Tensor) -> Tensor:
            outputs = []
            for x, own, past in zip(sequences, cut, pasts, strict=True):
                length = x.shape[1]
                mask = eager_mask(1, length, length, mask_function=causal_mask_function, dtype=x.dtype, device=x.device)
                outputs.append(self.run("eager", mask, x, past=past or None, **own))
            return torch.cat(outputs, 1)

        return Trial(
            together, separate, [[random_input(1, length, self.shape[-1], like=self.copied) for length in LENGTHS]]
        )

    def others(self) -> list[dict[str, Tensor]]:
        """Other values of the tensors beside hidden states, tables and mask.

        Floating-point ones are random. Integers, which may be positions, are far beyond any context at first, and then
        on both sides of every number of the configuration that could be a length.
        """
        names = [
            name
            for name, value in self.call.arguments.items()
            if isinstance(value, Tensor) and name not in (self.call.hidden, MASK, "position_embeddings")
        ]
        given = {name: self.call.arguments[name] for name in names if self.call.arguments[name].dtype != torch.bool}
        if not given:
            return []
        random = {n: random_input(*v.shape, like=self.copied) for n, v in given.items() if v.is_floating_point()}
        integers = {name: value for name, value in given.items() if name not in random}
        found = [{**random, **{name: (value + 1) * FAR for name, value in integers.items()}}]
        borders = around(getattr(self.module, "config", None)) if integers else []
        count = max((value.shape[-1] for value in integers.values() if value.dim()), default=1)
        for begin in range(0, len(borders), count):
            few = torch.tensor((borders[begin : begin + count] * count)[:count], device=device_of(self.copied))
            placed = {
                n: few.to(v.dtype).expand(v.shape).clone() for n, v in integers.items() if v.shape[-1:] == (count,)
            }
            found.append({**random, **integers, **placed})
        return found


class registered:
    """Inside, an attention function is registered under ``name``."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __enter__(self) -> None:
        AttentionInterface.register(self.name, self.function)

    def __exit__(self, *_: object) -> None:
        AttentionInterface._global_mapping.pop(self.name, None)


def _of_sequence(value: Any, length: int) -> Any:
    """The first ``length`` tokens of one row of recorded tensors [B or 1, LENGTH, ...]; anything else as it is.

    What layers keep in a mapping for later ones has heads before tokens: [B, H, LENGTH, ...].
    """
    if isinstance(value, MutableMapping):
        return map_tensors(value, lambda kept: kept[:1, :, :length])
    if isinstance(value, tuple):
        return tuple(_of_sequence(one, length) for one in value)
    has_tokens = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == LENGTH
    return value[:1, :length] if has_tokens else value


def _joined(values: list[Any]) -> Any:
    """Several of ``_of_sequence``, one after the other."""
    if isinstance(values[0], MutableMapping):
        joined = copy.copy(values[0])
        for name in values[0]:
            joined[name] = tuple(torch.cat(kept, 2) for kept in zip(*(one[name] for one in values), strict=True))
        return joined
    if isinstance(values[0], tuple):
        return tuple(_joined(list(ones)) for ones in zip(*values, strict=True))
    has_tokens = isinstance(values[0], Tensor) and values[0].dim() > 1 and values[0].shape[1] == LENGTHS[0]
    return torch.cat(values, 1) if has_tokens else values[0]
