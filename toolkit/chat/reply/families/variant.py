"""A syntax of tool calls, and how a chat template that writes it is recognised."""

from typing import NamedTuple

from toolkit.chat.reply.calls import CallFormat


class Variant(NamedTuple):
    """A format, and texts that are all in the chat templates that write it; none where only its name chooses it."""

    format: CallFormat
    templates: tuple[str, ...] = ()
