"""Routers of mixtures: modules beside experts that return which of them a token goes to, and with which weights.

The settings are looked for, not read: every combination of what the module's attributes could mean is compared with
its own choices, and what agrees is proven with gradients.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.modules.router import Router
from toolkit.numerics import Numerics
from toolkit.ops.activation import plain_kinds
from toolkit.patching.claim import Claim, ProbeError, Skipped, replace_forward
from toolkit.patching.probe import compare, generator, probe_copy, random_input, signature_key, with_forward
from toolkit.patching.roles.mixtures import Mixture, matrix_rows, mixtures
from toolkit.patching.search import prove

_TOKENS = 33
_AGREE = 1e-5  # relative; another setting is further away in at least one of the probe's batches
_EPS = (0.0, 1e-20, 1e-12, 1e-9, 1e-6)


@dataclass(frozen=True)
class Seen:
    """What the module made of one batch: logits as the product of its matrix, and its own weights and ids."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


def _sorted(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Slots in ascending order of experts: their order says nothing where the original sorts nothing."""
    order = ids.argsort(-1)
    return weights.gather(-1, order), ids.gather(-1, order)


class Probe:
    """A probe copy of one router, with random corrections, and what it made of a few batches."""

    def __init__(self, module: nn.Module, count: int) -> None:
        self.copied: Any = probe_copy(module)
        self.count = count
        for stream, buffer in enumerate(self.copied.buffers()):
            if buffer.is_floating_point():
                # Most of them negative: what is left out of a choice as 0 is told from what is left out as -inf.
                source = generator(buffer.device, 500 + stream)
                buffer.copy_(torch.rand(buffer.shape, generator=source, device=buffer.device) - 0.9)
        self.holder, self.plain = self._matrix()
        self.parameters = list(self.copied.parameters())
        self.extra = self._second_argument()
        self.batches = [[x, *self.extra] for x in self._inputs()]
        self.outputs, self.seen = self._look()
        self.wide = self._wide_outputs()

    def _matrix(self) -> tuple[nn.Module, Router]:
        """What holds the matrix [E, H], and a router that says where it is."""
        own = dict(self.copied.named_parameters(recurse=False))
        weights = [name for name, p in own.items() if p.dim() == 2 and p.shape[0] == self.count]
        children = {
            name: child
            for name, child in self.copied.named_children()
            if isinstance(child, nn.Linear) and child.out_features == self.count
        }
        if len(weights) + len(children) != 1:
            raise RuntimeError(f"it has {len(weights) + len(children)} matrices of a row for each expert, not one")
        for name, child in children.items():
            return child, Router(1, projection=name)
        biases = [n for n, p in own.items() if p.shape == (self.count,) and "bias" in n and "correction" not in n]
        return self.copied, Router(1, weight=weights[0], bias=biases[0] if len(biases) == 1 else None)

    def _second_argument(self) -> list[Tensor]:
        """A bias of the choice, where the forward takes one."""
        taken = list(inspect.signature(type(self.copied).forward).parameters.values())[1:]
        if len(taken) < 2 or taken[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return []
        return [random_input(self.count, like=self.copied, scale=0.3)]

    def _run(self, *inputs: Tensor, module: Any = None) -> Any:
        """The module's own outputs; some take [T, H], some [B, S, H] alone."""
        original = with_forward(module or self.copied, type(self.copied).forward)
        try:
            return original(*inputs)
        except ValueError:
            return original(inputs[0][None], *inputs[1:])

    def _product(self, x: Tensor) -> Tensor:
        """The logits by torch."""
        bias = getattr(self.holder, self.plain.bias or "bias", None)
        return F.linear(x, self._weight(), bias)

    def _weight(self) -> Tensor:
        return getattr(self.holder, self.plain.weight)

    def _inputs(self) -> Iterator[Tensor]:
        """Plain ones, and ones with all logits far below zero, where what is added to a sum of scores shows."""
        matrix = self._weight().detach()
        plain = random_input(_TOKENS, matrix.shape[1], like=self.copied)
        yield plain
        yield plain.flip(0) * 3.0
        below = torch.linalg.pinv(matrix) @ matrix.new_ones(self.count)
        for shift in (9.0, 30.0):
            yield plain - shift * below

    def _look(self) -> tuple[tuple[str, ...], list[Seen]]:
        """The names of the module's outputs, and what they were for each batch."""
        order: tuple[str, ...] = ()
        seen = []
        for inputs in self.batches:
            with torch.no_grad():
                logits = self._product(inputs[0])
                found = self._named(self._run(*inputs), logits)
                self.copied.train()
                again = self._named(self._run(*inputs), logits)
                self.copied.eval()
            if {"weights", "ids"} - set(found):
                raise RuntimeError("its forward does not return weights and ids of the chosen experts")
            if any(not torch.equal(found[name], again[name]) for name in found):
                raise RuntimeError("its forward computes something else in training")
            order = tuple(found)
            seen.append(Seen(logits, *_sorted(found["weights"], found["ids"])))
        return order, seen

    def _named(self, outputs: Any, logits: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for value in outputs if isinstance(outputs, tuple) else (outputs,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if len(shape) != 2 or shape[0] != _TOKENS:
                raise RuntimeError("its forward returns something beside logits, weights and ids")
            if not value.is_floating_point():
                name = "ids"
            elif shape == tuple(logits.shape) and torch.allclose(value, logits, rtol=1e-4, atol=1e-4):
                name = "logits"
            else:
                name = "weights"
            if name in found:
                raise RuntimeError(f"its forward returns {name} twice, or something that they are not")
            found[name] = value
        return found

    def _wide_outputs(self) -> tuple[str, ...]:
        """Outputs that stay float32 when all else is bfloat16."""
        narrow = probe_copy(self.copied).to(torch.bfloat16)
        inputs = [x.to(torch.bfloat16) for x in self.batches[0]]
        with torch.no_grad():
            try:
                outputs = self._run(*inputs, module=narrow)
            except RuntimeError:  # a module that needs float32 parameters
                return ()
        return tuple(name for name, value in zip(self.outputs, outputs) if value.dtype == torch.float32)

    def corrections(self) -> Iterator[tuple[str | None, Tensor | None]]:
        """What may be added to the scores for the choice: nothing, an argument, a vector of one number an expert."""
        if self.extra:
            yield "", self.extra[0]
        yield None, None
        for name, tensor in (*self.copied.named_parameters(), *self.copied.named_buffers()):
            if tensor.numel() == self.count and tensor.dim() <= 2 and name != self.plain.bias:
                yield name, tensor.detach()

    def settings(self) -> Iterator[Router]:
        """Every setting that makes the module's choices and weights out of its logits."""
        k = self.seen[0].ids.shape[1]
        numbers = sorted({v for v in self.copied.__dict__.values() if type(v) is int and 1 <= v <= self.count})
        grouped = [
            (groups, kept, best)
            for groups, kept, best in combinations(numbers, numbers, (1, 2))
            if groups > 1 and self.count % groups == 0 and kept < groups and best <= self.count // groups
            and k <= kept * (self.count // groups)
        ]  # fmt: skip
        scores = ["softmax", *sorted(plain_kinds(), key=lambda kind: kind != "sigmoid")]
        for score, (name, bias), (groups, kept, best) in combinations(
            scores, self.corrections(), [(1, 1, 1), *grouped]
        ):
            plain = replace(
                self.plain, k=k, score=score, correction=name, groups=groups, kept_groups=kept, group_best=best,
                outputs=self.outputs, wide=self.wide,
            )  # fmt: skip
            made = [_sorted(*plain.choose(one.logits, bias)) for one in self.seen]
            if not all(torch.equal(ids, one.ids) for (_, ids), one in zip(made, self.seen)):
                continue
            yield from self._weighted(plain, bias)

    def _weighted(self, plain: Router, bias: Tensor | None) -> Iterator[Router]:
        """Of the right choice: how the weights come out of the scores."""
        own = [v for v in self.copied.__dict__.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        small = [float(v) for v in own if isinstance(v, float) and 0.0 < v < 1e-2]
        scales = dict.fromkeys([1.0, 1.0 / plain.k, *(float(v) for v in own)])
        for eps in (None, *dict.fromkeys([*_EPS, *small])):
            known = replace(plain, normalise=eps is not None, eps=eps or 0.0)
            made = [_sorted(*known.choose(one.logits, bias))[0] for one in self.seen]
            first = made[0]
            ratio = float((self.seen[0].weights * first).sum() / (first * first).sum())
            scale = sorted(scales, key=lambda own, ratio=ratio: abs(own - ratio))[0]  # type: ignore[misc]
            if all(_near(weights * scale, one.weights) for weights, one in zip(made, self.seen)):
                yield replace(known, scale=scale)

    def error(self, router: Router) -> ProbeError:
        """Outputs and gradients of ``router`` against the module's own, slots in the order of their experts."""
        at = {name: place for place, name in enumerate(self.outputs)}

        def ordered(function: Any) -> Any:
            def run(*inputs: Tensor) -> tuple[Tensor, ...]:
                outputs = function(*inputs)
                weights, ids = _sorted(outputs[at["weights"]], outputs[at["ids"]])
                return weights, ids, *([outputs[at["logits"]]] if "logits" in at else [])

            return run

        return compare(
            ordered(with_forward(self.copied, router.make_forward())), ordered(self._run), self.batches, self.parameters
        )


def _near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= _AGREE * expected.norm())


def _name(router: Router) -> str:
    """What the report calls a setting."""
    words = [router.score, f"top {router.k}"]
    words += [f"in {router.kept_groups} of {router.groups} groups"] * (router.groups > 1)
    words += ["corrected"] * (router.correction is not None) + ["normalised"] * router.normalise
    words += [f"x {router.scale:g}"] * (router.scale != 1.0)
    return f"route ({', '.join(words)})"


def _verdict(module: nn.Module, count: int) -> tuple[str, Router, ProbeError] | str:
    try:
        probe = Probe(module, count)
        found = list(probe.settings())
    except Exception as problem:
        return first_line(problem)
    if not found:
        return "no score, choice and normalisation that are known make its weights and ids of its logits"
    options = [(_name(router), router, partial(probe.error, router)) for router in found]
    return prove(options)


def _looks_like(module: nn.Module, mixture: Mixture) -> bool:
    """A module beside experts with a matrix of a row for each; a plain linear layer leaves routing to its parent."""
    return type(module) is not nn.Linear and mixture.count in matrix_rows(module)


def find(model: nn.Module, numerics: Numerics) -> list[Claim | Skipped]:
    """A claim on every router whose settings are proven. One that is not keeps its own forward."""
    found: list[Claim | Skipped] = []
    proven: dict[Any, tuple[str, Router, ProbeError] | str] = {}
    for mixture in mixtures(model):
        for path, module in mixture.siblings.items():
            if not _looks_like(module, mixture):
                continue
            key = signature_key(module)
            if key not in proven:
                proven[key] = _verdict(module, mixture.count)
            verdict = proven[key]
            if isinstance(verdict, str):
                found.append(Skipped("router", path, verdict))
                continue
            op, router, error = verdict
            forward = replace(router, layer=mixture.layer).make_forward()
            found.append(Claim("router", path, module, op, error, replace_forward(module, forward)))
    return found
