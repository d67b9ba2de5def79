"""Attention layers whose cache keeps the prompt and a window of what was written after it (Unlimited OCR)."""

from collections.abc import Callable
from typing import Any

from torch import nn

from toolkit.state.active import KEYWORD, forward_context_of, set_forward_context
from toolkit.state.prompt_windows import PromptWindowContext


def prompt_window_forward(own: Callable[..., Any], window: int) -> Callable[..., Any]:
    """``own``, the forward of a layer that attends all keys, with those of prompt and window in a ragged batch."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = forward_context_of(kwargs)
        if context is None:
            return own(self, *args, **kwargs)
        narrow: Any = PromptWindowContext(context, window)
        with set_forward_context(narrow):
            return own(self, *args, **{**kwargs, KEYWORD: narrow} if KEYWORD in kwargs else kwargs)

    return forward
