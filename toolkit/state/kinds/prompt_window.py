"""Keys and values of a layer whose tokens see the whole prompt, and a window of what was written after it."""

from toolkit.state.kinds.full import FullAttention


class PromptWindow(FullAttention, kind="prompt_window"):
    """As ``full``, the keys behind the window included: which ones are read goes by each sequence's prompt.

    How many there are follows from the lengths of the sequences, so a step over them is not captured.
    """

    capturable = False
