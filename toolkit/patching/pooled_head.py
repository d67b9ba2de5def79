"""Heads with one output a sequence (classes, scores, rewards), and heads of each token, on hidden states at hand.

A head is what a model's own forward does behind its hidden states: which token it reads, its pooler, its layers. So
that forward is run, once for each sequence, with the hidden states of a ragged batch in the place of the part that
computes them. It is proven before it is used.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from toolkit.errors import ToolkitError, first_line
from toolkit.modules.elementwise import row_invariant
from toolkit.numerics import Numerics
from toolkit.patching.adapters import inner_model, vocabulary_size
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import hidden_states
from toolkit.patching.probe import device_of, distance, generator
from toolkit.patching.ragged_call import hidden_part, takes
from toolkit.patching.record import report_of
from toolkit.patching.skeleton import FEW_TOKENS, skeleton
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

LENGTHS = (6, 1, 11)
# Relative norms of outputs; two float32 forwards of a few layers differ by 1e-6.
_NEAR = 1e-3


class _Computed(nn.Module):
    """Stands for the part without a head: returns ``output``, and has the attributes of the part."""

    def __init__(self, part: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(part=part, output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["part"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["output"]


def _with_hidden(model: nn.Module, path: str, output: Any) -> nn.Module:
    """A model of the same modules, except that the part at ``path`` returns ``output``. The model does not change."""
    found: nn.Module = object.__new__(type(model))
    modules = {**model._modules, path: _Computed(model.get_submodule(path), output)}
    found.__dict__.update({**model.__dict__, "_modules": modules})
    return found


def has_head(model: nn.Module) -> bool:
    """Whether a model has a part without a head, and so a head."""
    return bool(hidden_part(inner_model(model)))


def head_outputs(model: nn.Module, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The logits of one sequence by the model's own head: [N] of the sequence, or [n, N] of its tokens.

    Args:
        model: a patched model with a head.
        tokens: int64 [n] of the sequence.
        hidden: [n, H] its last hidden states (``hidden_states``).
    """
    model = inner_model(model)
    path = hidden_part(model)
    report = report_of(model)
    invariant = report is not None and report.numerics is Numerics.BITWISE and hidden.is_cpu
    with row_invariant() if invariant else nullcontext():
        part, rows = model.get_submodule(path), hidden[None]
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=rows, pooler_output=_pooled(part, rows))
        found: Tensor = type(model).forward(_with_hidden(model, path, output), input_ids=tokens[None]).logits[0]
    return found


def _pooled(part: Any, rows: Tensor) -> Tensor | None:
    """What the part makes of its hidden states [1, n, H] beside them, for heads that read it; None for nothing."""
    pooler = getattr(part, "pooler", None)
    if pooler is None:
        return None
    activation = getattr(part, "pooler_activation", None)
    found: Tensor = pooler(rows) if activation is None else activation(pooler(rows[:, 0]))
    return found


def check_head(model: nn.Module) -> bool:
    """Whether the model's head has an output for each token; it is proven on a copy with random parameters.

    Raises:
        ToolkitError: the head computes something else on hidden states of a ragged batch than in an ordinary forward.
    """
    model = inner_model(model)
    name = type(model).__name__
    try:
        try:
            copied = skeleton(model, random=True)
            error, of_tokens = _error(copied)
        except ToolkitError:
            raise
        except Exception:  # layers that cannot be copied or left out
            error, of_tokens = _error(model)
    except ToolkitError:
        raise
    except Exception as problem:
        raise ToolkitError(
            f"head of {name} must read hidden states and tokens alone, got {first_line(problem, with_class=True)}."
        ) from None
    if error > (5e-2 if next(model.parameters()).dtype.itemsize == 2 else _NEAR):
        raise ToolkitError(
            f"head of {name} must compute on the hidden states of a ragged batch what it does in an ordinary forward, "
            f"got a relative difference of {error:.1e}."
        )
    return of_tokens


def _error(model: Any) -> tuple[float, bool]:
    """The largest relative difference over a few texts, and whether there is an output for each token."""
    device = device_of(model)
    count = min(vocabulary_size(model), FEW_TOKENS)
    special = {value for name, value in vars(model.config).items() if name.endswith("token_id")}
    ordinary = torch.tensor([one for one in range(count) if one not in special])
    source = generator(torch.device("cpu"), 19)
    texts = [ordinary[torch.randint(len(ordinary), (length,), generator=source)].to(device) for length in LENGTHS]
    kept = {"use_cache": False} if takes(type(model).forward, "use_cache") else {}
    with torch.no_grad(), eval_mode(model):
        alone = [model(input_ids=text[None], **kept).logits[0] for text in texts]
        hidden = hidden_states(model, DenseContext(RaggedBatch.from_sequences(texts, device, share=False)))
        got = [head_outputs(model, *one) for one in zip(texts, hidden.split(LENGTHS), strict=True)]
    if any(one.shape != other.shape for one, other in zip(got, alone)):
        return float("inf"), False
    error = max(distance(one.float(), other.float()) for one, other in zip(got, alone))
    return error, alone[0].dim() == 2
