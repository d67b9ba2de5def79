"""Attention layers whose indexer selects keys pool by pool: recognised by its parts, proven by what it selects.

The role ``attention`` finds the layers; this is how one of them is proven.
"""

import inspect
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, eager_mask

from toolkit.modules.elementwise import row_invariant
from toolkit.modules.pooled_selection import TABLES, GatedPools, MeanPools, PoolingIndexer, pooled_forward
from toolkit.modules.sparse_attention import CACHE, HIDDEN, MASK, RESID
from toolkit.patching.attention_interface import IMPLEMENTATION, NAME
from toolkit.patching.calls import Call
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import OWN, UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.probe import device_of, generator, random_input
from toolkit.patching.report import PatchReport
from toolkit.patching.roles.sparse_attention import indexer_of
from toolkit.patching.search import prove
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.state.pools import select_pools

UP = "kv_b_proj"
SELECTION = "prev_topk_indices"
_GATED = {"wq_b", "wk", "k_norm", "weights_proj", "index_kpool_compress_gate", "index_kpool_compress_ape"}
_MEAN = {"index_qk_proj", "q_layernorm", "k_layernorm"}
_FORMS: tuple[tuple[set[str], tuple[str, ...], PoolingIndexer, str], ...] = (
    (_GATED, ("index_kpool", "index_topk", "n_heads", "head_dim", "softmax_scale", "layer_idx"), GatedPools(), "gated"),
    (_MEAN, ("compress_ratio", "block_topk", "index_n_heads", "index_head_dim", "layer_idx"), MeanPools(), "mean"),
)
_COUNT = 2  # pools that a probe selects
_POOLS = 7  # complete pools of the longest sequence of a probe
_RUNS = 8  # random inputs whose selections are compared


def pooling_indexer_of(layer: nn.Module) -> tuple[str, PoolingIndexer, str] | None:
    """Of a layer's child that selects keys pool by pool its name, form, and what the form is called."""
    for name, child in layer.named_children():
        parts = {part for part, _ in (*child.named_children(), *child.named_parameters(recurse=False))}
        for wanted, settings, form, kind in _FORMS:
            if wanted <= parts and all(hasattr(child, one) for one in settings):
                return name, form, kind
    return None


def indexers_of(report: PatchReport) -> list[nn.Module]:
    """The modules that select the keys of a patched model's sparse attention layers, key by key or pool by pool."""
    found = []
    for layer in (claim.module for claim in report.claims if claim.role == "attention"):
        pooling = pooling_indexer_of(layer)
        name = indexer_of(layer) if pooling is None else pooling[0]
        if name is not None:
            found.append(getattr(layer, name))
    return found


class _Probe:
    """Runs a probe copy of a layer over sequences that are longer than what it selects."""

    def __init__(self, layer: nn.Module, call: Call, condition: Condition = UNIT) -> None:
        self.copied: Any = condition.copy_of(layer)
        drop_nothing(self.copied)
        self.dtype = condition.dtype or torch.float32
        # In 16 bits all pools: rounding selects others, and what an indexer selects is proven in float32.
        self.count = _COUNT if condition.dtype is None else _POOLS + 1
        for part in self.copied.modules():
            part.__dict__[IMPLEMENTATION] = NAME
        self.name: str | None = None
        self.form: PoolingIndexer | None = None
        found = pooling_indexer_of(layer)
        if found is not None:
            self.name, self.form, _ = found
        self.indexer: Any = None if self.name is None else getattr(self.copied, self.name)
        self.size = 2
        if self.indexer is not None:
            self.size = self._few_pools()
        self.call, self.width, self.device = call, call.arguments[HIDDEN].shape[-1], device_of(self.copied)
        self.lengths = (_POOLS * self.size + 1, 2 * self.size, 1)
        names = inspect.signature(type(self.copied).forward).parameters
        unknown = [
            name
            for name, one in names.items()
            if one.default is one.empty
            and one.kind is not one.VAR_KEYWORD
            and name not in ("self", HIDDEN, MASK, CACHE, TABLES, SELECTION)
        ]
        if unknown:
            raise RuntimeError(f"it takes {unknown[0]}, which no such layer is known to take")
        self.names = set(names)

    def _few_pools(self) -> int:
        """Lets the copied indexer select ``count`` pools; the tokens of a pool."""
        module = self.indexer
        if isinstance(self.form, GatedPools):
            if not getattr(module, "index_kpool_always_select_tail", True):
                raise RuntimeError("its first tokens see nothing")
            module.index_topk = self.count * module.index_kpool
            return int(module.index_kpool)
        module.block_topk, module.token_budget = self.count, self.count * module.compress_ratio
        return int(module.compress_ratio)

    def tables(self, length: int, seed: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [1, length, R] of random angles, each twice, as wide as those that the layer was handed."""
        recorded = self.call.arguments.get(TABLES)
        if recorded is None:
            return None
        if not all(torch.equal(*one.chunk(2, -1)) for one in recorded):
            raise RuntimeError("its rotary tables do not have every frequency twice")
        half = recorded[0].shape[-1] // 2
        angles = torch.rand(1, length, half, device=self.device, generator=generator(self.device, seed)) * 6.3
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def mask(self, length: int, hidden: int = 0) -> Tensor:
        """As the layer was handed one: of padding, or added to the scores; ``hidden`` first tokens are padding."""
        seen = torch.arange(length, device=self.device) >= hidden
        if self.call.arguments[MASK].dim() == 2:
            return seen[None]
        causal = eager_mask(1, length, length, mask_function=causal_mask_function, dtype=self.dtype, device=self.device)
        return causal.masked_fill(~seen, torch.finfo(self.dtype).min)

    def selection(self, length: int) -> Tensor:
        """[1, length, 2] positions that each token sees, -1 behind the last one: its own, and a random one."""
        own = torch.arange(length, device=self.device)
        random = torch.rand(length, device=self.device, generator=generator(self.device, 4))
        other = (random * own).long()
        second = torch.where(other < own, own, -1)
        return torch.stack([torch.minimum(other, own), second], -1)[None]

    def run(self, implementation: str, hidden: Tensor, mask: Any, tables: Any, forwards: Any, selection: Any) -> Tensor:
        """The layer's output; ``forwards`` of a candidate, by name, None for its own."""
        self.copied.config._attn_implementation = implementation
        if self.indexer is not None:
            chosen = type(self.indexer).forward if forwards is None else forwards[self.name]
            self.indexer.__dict__["forward"] = types.MethodType(chosen, self.indexer)
        given = {HIDDEN: hidden, MASK: mask, CACHE: None, TABLES: tables, SELECTION: selection}
        function = type(self.copied).forward if forwards is None else forwards[""]
        # Of equal scores both take the lower position, which torch's topk leaves open.
        with row_invariant():
            arguments = {name: value for name, value in given.items() if name in self.names}
            output: Tensor = types.MethodType(function, self.copied)(**arguments)[0]
        return output

    def differing(self) -> float:
        """The part of tokens for which the form selects other keys than the indexer."""
        assert self.form is not None
        module, length, wrong = self.indexer, self.lengths[0], 0.0
        names = inspect.signature(type(module).forward).parameters
        for run in range(_RUNS):
            source = generator(self.device, 20 + run)
            given: dict[str, Any] = {HIDDEN: torch.randn(1, length, self.width, device=self.device, generator=source)}
            if RESID in names:
                width = module.wq_b.in_features
                given[RESID] = torch.randn(1, length, width, device=self.device, generator=source)
            given |= {TABLES: self.tables(length, 40 + run)} if TABLES in names else {}
            with torch.no_grad(), row_invariant():
                own = type(module).forward(module, **given, **{MASK: self.mask(length), CACHE: None})
                q, rows, weights = self.form.project(module, given)
                ends = torch.tensor([0, length], device=self.device)
                plan = ends, ends[:1], ends[1:], None, 1
                found = select_pools(q, rows, weights, plan, self.form.pools(module))
            shape = (length, length + 1)
            mine = torch.zeros(shape, dtype=torch.bool, device=self.device).scatter(1, found % (length + 1), True)
            if own.dtype != torch.bool:
                own = own[0].long()
                own = torch.zeros(shape, dtype=torch.bool, device=self.device).scatter(1, own % (length + 1), True)
            theirs = own.view(length, -1)[:, :length]
            wrong += float((mine[:, :length] != theirs).any(1).float().mean()) / _RUNS
        return wrong

    def trials(self, forwards: dict[str, Any]) -> Iterator[Trial]:
        """Against eager attention: sequences in one ragged batch, and ordinary calls with and without padding."""
        yield self._ragged(forwards)
        length = self.lengths[0]
        inputs = [[random_input(1, length, self.width, like=self.copied)]]
        tables = self.tables(length, 9)
        selection = None if self.indexer is not None else self.selection(length)
        for hidden in (0, self.size + 1):
            kept = (torch.arange(length, device=self.device) >= hidden + self.size)[None, :, None]
            mask = self.mask(length, hidden)
            given = mask >= 0 if mask.dim() == 4 else mask

            def candidate(x: Tensor, given: Tensor = given, kept: Tensor = kept) -> Tensor:
                return self.run(NAME, x, given, tables, forwards, selection) * kept

            def original(x: Tensor, mask: Tensor = mask, kept: Tensor = kept) -> Tensor:
                return self.run("eager", x, mask, tables, None, selection) * kept

            yield Trial(candidate, original, inputs)

    def _ragged(self, forwards: dict[str, Any]) -> Trial:
        """Several sequences in one ragged batch, against each one's own way."""
        tables = [self.tables(length, 10 + at) for at, length in enumerate(self.lengths)]
        selections = [None if self.indexer is not None else self.selection(length) for length in self.lengths]
        whole = tuple(torch.cat(part, 1) for part in zip(*tables)) if tables[0] is not None else None
        selected = None if selections[0] is None else torch.cat([one for one in selections if one is not None], 1)
        batch = RaggedBatch.from_sequences([[0] * length for length in self.lengths], self.device, share=False)
        context = DenseContext(batch)

        def candidate(*sequences: Tensor) -> Tensor:
            with set_forward_context(context):
                return self.run(NAME, torch.cat(sequences, 1), None, whole, forwards, selected)

        def original(*sequences: Tensor) -> Tensor:
            parts = zip(sequences, tables, selections, strict=True)
            return torch.cat([self.run("eager", x, self.mask(x.shape[1]), own, None, sel) for x, own, sel in parts], 1)

        inputs = [random_input(1, length, self.width, like=self.copied) for length in self.lengths]
        return Trial(candidate, original, [inputs])


def prove_pooled(layer: nn.Module, call: Call) -> tuple[str, dict[str, Any], ProbeError] | str:
    """What takes the place of the layer's forward ("") and of its indexer's, by name, or why nothing does."""
    probe = _Probe(layer, call)
    forward = pooled_forward(type(layer).forward, UP, SELECTION)

    def error(forwards: dict[str, Any]) -> ProbeError:
        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
            made = probe if condition is UNIT else _Probe(source, call, condition)
            return made.copied, made.trials(forwards)

        return worst_error(layer, build)

    found = pooling_indexer_of(layer)
    if found is None:
        forwards = {"": forward}
        return prove([("sparse attention (another layer's pools)", forwards, partial(error, forwards))])
    name, form, kind = found
    differing = max(one.differing() for one in (probe, _Probe(layer, call, OWN)))
    if differing:
        return f"its indexer selects other pools than the known form: {100 * differing:.0f} % of tokens differ"
    forwards = {"": forward, name: form.make_forward(type(getattr(layer, name)).forward)}
    return prove([(f"sparse attention ({kind} pools)", forwards, partial(error, forwards))])
