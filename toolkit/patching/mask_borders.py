"""What a model's masks show around the borders of its windows and chunks, whose real sizes no probe is as long as.

transformers makes a mask of a function of (batch, head, query, key). Of one short forward the functions are kept, and
asked about pairs of tokens far behind each other, which costs nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from toolkit.patching.thresholds import around, thresholds

_MAKERS = ("eager", "sdpa")
_NEVER_LEFT_OUT = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
WINDOWS = ("sliding_window", "attention_window", "window_size", "attention_chunk_size")
"""Fields of a configuration, and attributes of a layer, that are windows or sizes of chunks."""
CAUSAL, CHUNKS, BOTH_SIDES = "causal attention", "attention in chunks", "attention to both sides"
Shows = Callable[..., Any]
"""Of batch, head, query and key, as integer tensors, whether the key is seen."""


@contextmanager
def kept_functions() -> Iterator[dict[int, tuple[Tensor, Shows]]]:
    """Inside, the masks that transformers makes, none of which it leaves out, and their functions, by the mask's id."""
    found: dict[int, tuple[Tensor, Shows]] = {}
    known: dict[str, Any] = {name: AttentionMaskInterface._global_mapping[name] for name in _MAKERS}

    def keeping(make: Any, *args: Any, **kwargs: Any) -> Any:
        mask = make(*args, **{**kwargs, **_NEVER_LEFT_OUT})
        if isinstance(mask, Tensor) and callable(kwargs.get("mask_function")):
            found[id(mask)] = mask, kwargs["mask_function"]
        return mask

    for name, make in known.items():
        AttentionMaskInterface.register(name, partial(keeping, make))
    try:
        yield found
    finally:
        for name, make in known.items():
            AttentionMaskInterface.register(name, make)


def border_reason(
    shows: Shows | None, window: int, config: Any, device: torch.device, kind: str = CAUSAL
) -> str | None:
    """Why masks are something else than ``kind`` with a window; None where they are that.

    A mask of whose function nothing is known must be one of the configuration: its windows were shortened in the
    probe, and what it shows changed with them.

    Queries lie on both sides of the window's end and of every number of the configuration that could be a length; keys
    lie on both sides of what they see, and of those numbers.

    Args:
        shows: the function of the mask, by the configuration as it is; None where there is none.
        window: tokens that a query sees, itself included; 0 for all.
        kind: ``CAUSAL``, ``CHUNKS`` (of ``window`` tokens, of which a query sees those before it) or ``BOTH_SIDES``.
    """
    if shows is None:
        return _unasked(window, config)
    sizes = sorted({window, *thresholds(config)} - {0})
    queries = sorted({0, *around(config), *(at for at in (window - 1, window, window + 1, 3 * window + 7) if at >= 0)})
    q = torch.tensor(queries, device=device)[:, None]
    far = {size + step for size in (0, *sizes) for step in (-1, 0, 1)}
    back = torch.tensor(sorted(far | {-one for one in far}), device=device)
    k = torch.cat([q - back, q.T.expand(len(q), -1)], 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        got = torch.as_tensor(shows(zero, zero, q, k.clamp_min(0)), device=device).expand(k.shape)
    except Exception:  # one that looks tokens up in a row as long as the text
        return _unasked(window, config)
    expected = torch.ones_like(k, dtype=torch.bool) if kind == BOTH_SIDES else k <= q
    if window:
        expected &= (k // window == q // window) if kind == CHUNKS else (k - q).abs() < window
    wrong = ((got.bool() != expected) & (k >= 0)).nonzero()
    if not len(wrong):
        return None
    row, column = wrong[0].tolist()
    query, key = int(q[row]), int(k[row, column])
    seen = "sees" if bool(got[row, column]) else "does not see"
    wanted = f"{kind} with a window of {window}" if window else kind
    return f"by its mask the token at {query} {seen} the one at {key}, which is not {wanted}"


def _unasked(window: int, config: Any) -> str | None:
    known = [value for name in WINDOWS if isinstance(value := getattr(config, name, None), int)]
    return None if window in (0, *known) else f"its window of {window} is none of the configuration, whose masks it has"
