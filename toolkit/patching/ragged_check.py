"""May a patched model serve ragged batches? One ragged forward against ordinary ones of its sequences, one by one.

What differs is refused, with the reason: layers that mix the sequences of a batch, positions that do not come from
``position_ids``, quantities of the whole batch. Both are forwards of the model's skeleton with random parameters, so
that no weight that is 0 hides anything, and the model does not change.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.moe.observer import observing
from toolkit.patching.adapters import vocabulary_size
from toolkit.patching.attention_interface import MASKED, explicit_masks
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.float32_arithmetic import float32_arithmetic
from toolkit.patching.length_tables import regimes_of
from toolkit.patching.probe import device_of, distance, generator
from toolkit.patching.ragged_call import hidden_part, takes
from toolkit.patching.report import PatchReport
from toolkit.patching.skeleton import FEW_TOKENS, skeleton
from toolkit.patching.text_part import find_entry
from toolkit.patching.without_media import text_arguments
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import ForwardContext
from toolkit.state.dense import DenseContext

LENGTHS = (5, 1, 9)
# Relative norms of logits. Two float32 forwards of a few layers differ by 1e-6.
_NEAR = 1e-3
# What is added to positions that are counted from 0 and not from where the model's own are.
_OFFSETS = (1, 2, 3, 4)

Forward = Callable[[nn.Module, ForwardContext], Tensor]


class PassedOn(nn.Module):
    """Stands for a feed-forward layer that is proven to compute each token alone: returns its input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def check_ragged(model: Any, report: PatchReport, forward: Forward) -> None:
    """Write into ``report.ragged`` why the model may have no ragged batch, or what its positions begin at.

    Args:
        forward: ``row_forward``.
    """
    use = report.ragged
    if getattr(_running, "use", None) is use:  # a forward of the check itself
        return
    with _one_at_a_time:
        if use.checked:
            return
        _running.use = use
        use.reason, use.position_offset, use.uncounted_token, use.makes_masks = None, 0, None, False
        use.hidden_part = None
        try:
            with float32_arithmetic(device_of(model)):
                use.reason = _reason(model, report, forward)
            use.checked = True
        finally:
            _running.use = None


_one_at_a_time = threading.RLock()
_running = threading.local()


def _reason(model: Any, report: PatchReport, forward: Forward) -> str | None:
    rotary = _rotary_reason(model, report)
    if rotary is not None:
        return rotary
    tokenwise = [c.module for c in report.claims if c.path and c.role in ("mlp", "experts")]
    try:
        copied = skeleton(model, {module: PassedOn() for module in tokenwise}, random=True)
        return _checked(copied, report, forward)
    except Exception:  # a library's layers that cannot be copied, or layers that cannot be left out
        report.ragged.position_offset = 0
        try:
            return _checked(model, report, forward)
        except Exception as problem:
            return f"model {type(model).__name__} cannot run one: {first_line(problem, with_class=True)}."


def _checked(model: Any, report: PatchReport, forward: Forward) -> str | None:
    with torch.no_grad(), eval_mode(model), observing(None):
        return _Check(model, report, forward).reason()


def _ordinary(model: Any, text: Tensor, **arguments: Any) -> Any:
    """The output of an ordinary forward."""
    ids = text[None].to(device_of(model))
    masked = any(hasattr(module, MASKED) for module in model.modules())
    kept = {"use_cache": False} if takes(type(model).forward, "use_cache") else {}
    with explicit_masks() if masked else nullcontext():
        return model(input_ids=ids, **kept, **text_arguments(model, ids), **arguments)


class _Check:
    def __init__(self, model: Any, report: PatchReport, forward: Forward) -> None:
        self.model, self.report, self.forward = model, report, forward
        self.device = device_of(model)
        narrow = next(model.parameters()).dtype.itemsize == 2
        self.near = 5e-2 if narrow else _NEAR  # a model that is run itself, in its own dtype
        most = min(vocabulary_size(model), FEW_TOKENS)
        special = {value for name, value in vars(model.config).items() if name.endswith("token_id")}
        ordinary = torch.tensor([one for one in range(most) if one not in special])
        source = generator(torch.device("cpu"), 17)
        self.texts = [ordinary[torch.randint(len(ordinary), (length,), generator=source)] for length in LENGTHS]
        self.padding = next((one for one in self._padding() if one < most), None)
        self.part = model
        self._find_part()

    def _find_part(self) -> None:
        """The part whose rows are compared: the model, or what is before its head where there are no rows of logits."""
        logits = getattr(_ordinary(self.model, self.texts[0]), "logits", None)
        if logits is None or logits.dim() != 3 or logits.shape[1] != len(self.texts[0]):
            path = self.report.ragged.hidden_part = hidden_part(self.model)
            self.part = self.model.get_submodule(path)

    def alone(self, text: Tensor, **arguments: Any) -> Tensor:
        """[n, N] the rows of an ordinary forward of one sequence."""
        output = _ordinary(self.part, text, **arguments)
        rows: Tensor = output.logits if self.report.ragged.hidden_part is None else output.last_hidden_state
        return rows[0].float()

    def _padding(self) -> list[int]:
        found = [getattr(one, "padding_idx", None) for one in self.model.modules()]
        found.append(getattr(self.model.config, "pad_token_id", None))
        return sorted({one for one in found if isinstance(one, int) and one >= 0})

    def together(self, texts: Sequence[Tensor]) -> list[Tensor]:
        batch = RaggedBatch.from_sequences(list(texts), self.device, share=False)
        return list(self.forward(self.model, DenseContext(batch)).float().split([len(text) for text in texts]))

    def _first(self) -> list[Tensor]:
        """``together``, by a call without a mask where the model does not take the one without entries."""
        try:
            return self.together(self.texts)
        except (ValueError, RuntimeError, IndexError):
            self.report.ragged.makes_masks = True
            try:
                return self.together(self.texts)
            except Exception:
                self.report.ragged.makes_masks = False
            raise

    def apart(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        return max(distance(one, other) for one, other in zip(got, expected, strict=True))

    def reason(self) -> str | None:
        alone = [self.alone(text) for text in self.texts]
        error = self.apart(self._first(), alone)
        if error <= self.near:
            return None
        for offset in dict.fromkeys((*(one + 1 for one in self._padding()), *_OFFSETS)):
            if self._begins_at(offset, alone):
                self.report.ragged.position_offset = offset
                if self.apart(self.together(self.texts), alone) <= self.near:
                    self._find_unplaced(offset)
                    return None
                self.report.ragged.position_offset = 0
        return self._difference(error)

    def _begins_at(self, offset: int, alone: Sequence[Tensor]) -> bool:
        """Whether the model's own positions are counted from ``offset``."""
        given = []
        for text in self.texts:
            positions = torch.arange(offset, offset + len(text), device=self.device)[None]
            try:
                given.append(self.alone(text, position_ids=positions))
            except Exception:  # it takes none, or has no such position
                return False
        return self.apart(given, alone) <= self.near

    def _find_unplaced(self, offset: int) -> None:
        """A token that the model does not count, which a ragged batch would."""
        if self.padding is None:
            return
        text = self.texts[0].clone()
        text[1] = self.padding
        if self.apart(self.together([text]), [self.alone(text)]) > self.near:
            self.report.ragged.uncounted_token = self.padding

    def _difference(self, error: float) -> str:
        name, report = type(self.model).__name__, self.report
        last = torch.tensor([1, 2, 3])
        first, second, moved = (
            self.together([torch.full((count,), token), last])[1] for count, token in ((7, 0), (7, 3), (4, 0))
        )
        if self.apart([second], [first]) > self.near:
            skipped = sorted({f"{r.path} ({r.reason})" for r in report.skipped if r.role in ("attention", "mixer")})
            return (
                f"model {name} mixes the sequences of a batch in a layer that is not patched"
                f"{': ' + '; '.join(skipped[:3]) if skipped else ''}; a ragged batch needs every such layer patched."
            )
        if self.apart([moved], [first]) > self.near:
            return (
                f"model {name} computes positions from a token's row in the batch and not from position_ids; a ragged "
                "batch needs position_ids."
            )
        return (
            f"model {name} computes something else in a ragged batch than in an ordinary forward of each sequence "
            f"(relative difference of logits {error:.1e}), and none of its roles explains it."
        )


def _rotary_reason(model: nn.Module, report: PatchReport) -> str | None:
    """Where rotary tables depend on the longest sequence of a batch. A tower encodes one image at a time."""
    claimed = {claim.path for claim in report.claims if claim.role == "rotary"}
    entry = find_entry(model)
    text = None if entry is None else set(entry[1].modules())
    for path, module in model.named_modules():
        if path not in claimed and (text is None or module in text) and regimes_of(module):
            why = next((r.reason for r in report.skipped if r.role == "rotary" and r.path == path), "not asked for")
            return (
                f"{path} of {type(model).__name__} makes rotary tables by the longest sequence of a batch; role "
                f"'rotary' must be patched for a ragged batch, got {why}."
            )
    return None
