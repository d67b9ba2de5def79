"""Routers of MoE layers: modules beside experts that return the experts of each token and their weights.

The settings are searched, not read: every combination that the module's attributes allow is compared with the module's
own topk_ids and topk_weights, and what agrees is proven with gradients.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.modules.elementwise import row_invariant
from toolkit.modules.router import Router
from toolkit.numerics import Numerics
from toolkit.ops.activation import plain_kinds
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.conditions import EXACT, UNIT, Condition, Trial, worst_error
from toolkit.patching.probe import generator, random_input, signature_key, with_forward
from toolkit.patching.roles.moe_layers import MoeLayer, matrix_rows, moe_layers
from toolkit.patching.roles.routing_layer import find_routing_layer
from toolkit.patching.roles.scaled_experts import is_router_of_scaled
from toolkit.patching.search import prove
from toolkit.patching.settings import Settings, guarded, settings_of

_TOKENS = 33
_AGREE = 1e-5  # relative; any other setting differs by more in at least one of the probe's batches
_EPS = (0.0, 1e-20, 1e-12, 1e-9, 1e-6)


@dataclass(frozen=True)
class Observation:
    """One batch through the module: logits as the GEMM with its matrix, and its own topk_weights and topk_ids."""

    logits: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def _sorted(topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """A token's experts in ascending order: some modules do not sort them by weight, so their order is ignored."""
    order = topk_ids.argsort(-1)
    return topk_weights.gather(-1, order), topk_ids.gather(-1, order)


class Probe:
    """A probe copy of one router, its own way and a candidate's."""

    def __init__(
        self, module: nn.Module, count: int, condition: Condition = UNIT, form: dict[str, str | None] | None = None
    ) -> None:
        self.copied: Any = condition.copy_of(module)
        self.count = count
        self.holder, plain = self._matrix()
        self.plain = replace(plain, **(form or {}))  # type: ignore[arg-type]
        self.extra = self._second_argument()

    def _matrix(self) -> tuple[nn.Module, Router]:
        """The module that holds the matrix [E, H], and a router that names the attribute."""
        own = dict(self.copied.named_parameters(recurse=False))
        weights = [name for name, p in own.items() if p.dim() == 2 and p.shape[0] == self.count]
        children = {
            name: child
            for name, child in self.copied.named_children()
            if isinstance(child, nn.Linear) and child.out_features == self.count
        }
        if len(weights) + len(children) != 1:
            raise RuntimeError(f"it has {len(weights) + len(children)} matrices with one row per expert; one is needed")
        for name, child in children.items():
            return child, Router(1, projection=name)
        biases = [n for n, p in own.items() if p.shape == (self.count,) and "bias" in n and "correction" not in n]
        return self.copied, Router(1, weight=weights[0], bias=biases[0] if len(biases) == 1 else None)

    def _second_argument(self) -> list[Tensor]:
        """A bias of the selection, where the forward takes one."""
        taken = list(inspect.signature(type(self.copied).forward).parameters.values())[1:]
        if len(taken) < 2 or taken[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return []
        return [random_input(self.count, like=self.copied, scale=0.3)]

    def run(self, *inputs: Tensor) -> Any:
        """The module's own outputs; some modules take [T, H], some only [B, S, H].

        Of equal scores, which its own parameters may give experts, the first is taken, as the op does.
        """
        original = with_forward(self.copied, type(self.copied).forward)
        with row_invariant():
            try:
                return original(*inputs)
            except ValueError:
                return original(inputs[0][None], *inputs[1:])

    def _logits(self, x: Tensor) -> Tensor:
        """The logits, computed by torch."""
        bias = getattr(self.holder, self.plain.bias or "bias", None)
        return F.linear(self.plain.projected(self.copied, x), self._weight(), bias)

    def _weight(self) -> Tensor:
        weight: Tensor = getattr(self.holder, self.plain.weight)
        return weight

    def hidden(self) -> Tensor:
        """[T, H] hidden states."""
        return random_input(_TOKENS, self._weight().shape[1], like=self.copied)

    def trial(self, router: Router, batches: Sequence[Sequence[Tensor]]) -> Trial:
        """Outputs and gradients of ``router`` against the module's own, a token's experts in ascending order."""
        at = {name: index for index, name in enumerate(router.outputs)}

        def ordered(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            weights, ids = _sorted(outputs[at["topk_weights"]], outputs[at["topk_ids"]])
            return weights, ids, *(outputs[at[name]] for name in ("logits", "scores") if name in at)

        candidate = with_forward(self.copied, router.make_forward())
        return Trial(partial(ordered, candidate), partial(ordered, self.run), batches)

    def selected(self, router: Router, inputs: Sequence[Tensor]) -> Tensor:
        """[T, K] the experts of the module's own choice, ascending."""
        with torch.no_grad():
            outputs = self.run(*inputs)
        return outputs[router.outputs.index("topk_ids")].sort(-1).values  # type: ignore[no-any-return]


class Observed(Probe):
    """A probe with random parameters and biases of the selection, and what the module makes of a few batches."""

    def __init__(self, module: nn.Module, count: int, form: dict[str, str | None]) -> None:
        super().__init__(module, count, form=form)
        for stream, buffer in enumerate(self.copied.buffers()):
            if buffer.is_floating_point():
                # Most of them negative, which tells experts excluded by 0 from those excluded by -inf.
                source = generator(buffer.device, 500 + stream)
                buffer.copy_(torch.rand(buffer.shape, generator=source, device=buffer.device) - 0.9)
        self.batches = [[x, *self.extra] for x in self._inputs()]
        self.outputs, self.observed = self._observe()
        self.float32_outputs = self._float32_outputs(module)
        if "scores" in self.outputs and self.float32_outputs and "scores" not in self.float32_outputs:
            raise RuntimeError("it rounds the scores of all experts")

    def _inputs(self) -> Iterator[Tensor]:
        """Plain inputs, and inputs with all logits far below zero, where an eps added to the sum of scores shows."""
        matrix, plain = self._weight().detach(), self.hidden()
        yield plain
        yield plain.flip(0) * 3.0
        below = torch.linalg.pinv(matrix) @ matrix.new_ones(self.count)
        for shift in (9.0, 30.0):
            yield plain - shift * below

    def _observe(self) -> tuple[tuple[str, ...], list[Observation]]:
        """The names of the module's outputs, and their values for each batch."""
        order: tuple[str, ...] = ()
        observed = []
        for inputs in self.batches:
            with torch.no_grad():
                logits = self._logits(inputs[0])
                found = self._named(self.run(*inputs), logits)
                self.copied.train()
                again = self._named(self.run(*inputs), logits)
                self.copied.eval()
            if {"topk_weights", "topk_ids"} - set(found):
                raise RuntimeError("its forward does not return topk_weights and topk_ids")
            if any(not torch.equal(found[name], again[name]) for name in found):
                raise RuntimeError("its forward differs in training mode")
            order = tuple(found)
            observed.append(Observation(logits, *_sorted(found["topk_weights"], found["topk_ids"])))
        return order, observed

    def _named(self, outputs: Any, logits: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for value in outputs if isinstance(outputs, tuple) else (outputs,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if len(shape) != 2 or shape[0] != _TOKENS:
                raise RuntimeError("its forward returns something other than logits, topk_weights and topk_ids")
            if not value.is_floating_point():
                name = "topk_ids"
            elif shape == tuple(logits.shape) and torch.allclose(value, logits, rtol=1e-4, atol=1e-4):
                name = "logits"
            elif shape == tuple(logits.shape) and torch.allclose(value, logits.softmax(-1), rtol=1e-4, atol=1e-6):
                name = "scores"
            else:
                name = "topk_weights"
            if name in found:
                raise RuntimeError(
                    f"its forward returns {name} twice, or something that is neither logits, topk_weights nor topk_ids"
                )
            found[name] = value
        return found

    def _float32_outputs(self, module: nn.Module) -> tuple[str, ...]:
        """Outputs that stay float32 when all else is bfloat16."""
        half = Probe(module, self.count)
        half.copied.to(torch.bfloat16)
        inputs = [x.to(torch.bfloat16) for x in self.batches[0]]
        with torch.no_grad():
            try:
                outputs = half.run(*inputs)
            except RuntimeError:  # a module that needs float32 parameters
                return ()
        return tuple(name for name, value in zip(self.outputs, outputs) if value.dtype == torch.float32)

    def expert_biases(self) -> Iterator[tuple[str | None, Tensor | None]]:
        """What may be added to the scores for the selection: nothing, an argument, or a vector [E]."""
        if self.extra:
            yield "", self.extra[0]
        yield None, None
        for name, tensor in (*self.copied.named_parameters(), *self.copied.named_buffers()):
            if tensor.numel() == self.count and tensor.dim() <= 2 and name != self.plain.bias:
                yield name, tensor.detach()

    def settings(self) -> Iterator[Router]:
        """Every setting that reproduces the module's topk_ids and topk_weights from its logits."""
        top_k = self.observed[0].topk_ids.shape[1]
        numbers = sorted({v for v in self.copied.__dict__.values() if type(v) is int and 1 <= v <= self.count})
        grouped = [
            (n_group, topk_group, per_score)
            for n_group, topk_group, per_score in combinations(numbers, numbers, (1, 2))
            if n_group > 1 and self.count % n_group == 0 and topk_group < n_group and per_score <= self.count // n_group
            and top_k <= topk_group * (self.count // n_group)
        ]  # fmt: skip
        scoring_funcs = ["softmax", *sorted(plain_kinds(), key=lambda kind: kind != "sigmoid")]
        for scoring_func, (name, bias), (n_group, topk_group, per_score) in combinations(
            scoring_funcs, self.expert_biases(), [(1, 1, 1), *grouped]
        ):
            plain = replace(
                self.plain,
                top_k=top_k,
                scoring_func=scoring_func,
                expert_bias=name,
                n_group=n_group,
                topk_group=topk_group,
                experts_per_group_score=per_score,
                outputs=self.outputs,
                float32_outputs=self.float32_outputs,
            )
            routed = [_sorted(*plain.route(one.logits, bias)) for one in self.observed]
            if not all(torch.equal(ids, one.topk_ids) for (_, ids), one in zip(routed, self.observed)):
                continue
            yield from self._weighted(plain, bias)

    def _weighted(self, plain: Router, bias: Tensor | None) -> Iterator[Router]:
        """For a setting with the right topk_ids: how the weights follow from the scores."""
        own = [v for v in self.copied.__dict__.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        small = [float(v) for v in own if isinstance(v, float) and 0.0 < v < 1e-2]
        scales = dict.fromkeys([1.0, 1.0 / plain.top_k, *(float(v) for v in own)])
        for eps in (None, *dict.fromkeys([*_EPS, *small])):
            known = replace(plain, norm_topk_prob=eps is not None, eps=eps or 0.0)
            routed = [self._scaled(known, *_sorted(*known.route(one.logits, bias))) for one in self.observed]
            first = routed[0]
            ratio = float((self.observed[0].topk_weights * first).sum() / (first * first).sum())
            scale = sorted(scales, key=lambda own, ratio=ratio: abs(own - ratio))[0]  # type: ignore[misc]
            if all(_near(weights * scale, one.topk_weights) for weights, one in zip(routed, self.observed)):
                yield replace(known, routed_scaling_factor=scale)

    def _scaled(self, router: Router, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """The weights, times each expert's own factor."""
        if router.expert_scale is None:
            return topk_weights
        factors: Tensor = getattr(self.copied, router.expert_scale).detach()
        return topk_weights * factors[topk_ids]

    def error(self, router: Router, module: nn.Module) -> ProbeError:
        """Of ``router`` against ``module``, of which this is a probe, under every condition."""

        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, list[Trial]]:
            if condition is UNIT:
                return self.copied, [self.trial(router, self.batches)]
            probe = Probe(source, self.count, condition)
            inputs = [probe.hidden(), *probe.extra]
            if condition.dtype is not None:  # tokens that rounding sends to other experts say nothing
                exact, narrow = Probe(probe.copied, self.count, EXACT), [x.to(condition.dtype) for x in inputs]
                same = exact.selected(router, [x.float() for x in narrow]) == probe.selected(router, narrow)
                if not bool(same.all(-1).any()):
                    raise RuntimeError(f"every token has other experts{condition.name}")
                inputs = [inputs[0][same.all(-1)], *inputs[1:]]
            return probe.copied, [probe.trial(router, [inputs])]

        return worst_error(module, build)


def forms(module: nn.Module, count: int) -> Iterator[dict[str, str | None]]:
    """What a router may do before its matrix and behind its selection, as fields of ``Router``: nothing first."""
    yield {}
    own = dict(module.named_parameters(recurse=False))
    children = {name: child for name, child in module.named_children() if type(child) is not nn.Linear}
    widths = {p.shape[1] for child in module.children() for p in child.parameters() if p.dim() == 2}
    scales = [name for name, p in own.items() if p.dim() == 1 and p.shape[0] in widths]
    factors = [name for name, value in module.__dict__.items() if type(value) is float]
    behind = [name for name, p in own.items() if p.shape == (count,) and "bias" not in name]
    for prelude in children:
        for scale, factor, expert_scale in combinations([None, *scales], [None, *factors], [None, *behind]):
            yield {
                "prelude": prelude, "input_scale": scale, "input_factor": factor, "expert_scale": expert_scale
            }  # fmt: skip


def _near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= _AGREE * expected.norm())


def _name(router: Router) -> str:
    """The name of a setting in the report."""
    words = [router.scoring_func, f"top {router.top_k}"]
    words += [f"in {router.topk_group} of {router.n_group} groups"] * (router.n_group > 1)
    words += ["expert bias"] * (router.expert_bias is not None) + ["normalised"] * router.norm_topk_prob
    words += [f"x {router.routed_scaling_factor:g}"] * (router.routed_scaling_factor != 1.0)
    return f"route ({', '.join(words)})"


def _verdict(module: nn.Module, count: int) -> tuple[str, Router, ProbeError, Settings] | str:
    reason = "no known scoring function, selection and normalisation reproduce its topk_weights and topk_ids"
    for at, form in enumerate(forms(module, count)):
        try:
            probe = Observed(module, count, form)
            found = list(probe.settings())
        except Exception as problem:
            reason = reason if at else first_line(problem)
            continue
        if found:
            break
    else:
        return reason
    options = [(_name(router), router, partial(probe.error, router, module)) for router in found]
    proven = prove(options)
    return proven if isinstance(proven, str) else (*proven, settings_of(module))


def _looks_like(module: nn.Module, moe: MoeLayer) -> bool:
    """Whether a module beside experts has a matrix with one row per expert. A plain linear layer is not a router."""
    return type(module) is not nn.Linear and moe.num_experts in matrix_rows(module)


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every router whose settings are proven. The others keep their own forward."""
    found: list[Claim | Skipped] = []
    proven: dict[Any, tuple[str, Router, ProbeError, Settings] | str] = {}
    proven_layers: dict[Any, Any] = {}
    for moe in moe_layers(model):
        if moe.flat:
            found.append(find_routing_layer(model, moe, proven_layers))
            continue
        for path, module in moe.siblings.items():
            if not _looks_like(module, moe) or is_router_of_scaled(module, moe):
                continue
            key = signature_key(module)
            if key not in proven:
                proven[key] = _verdict(module, moe.num_experts)
            verdict = proven[key]
            if isinstance(verdict, str):
                found.append(Skipped("router", path, verdict))
                continue
            op, router, error, settings = verdict
            forward = guarded(replace(router, layer=moe.layer).make_forward(), settings)
            found.append(Claim("router", path, module, op, error, replace_forward(module, forward)))
    return found
