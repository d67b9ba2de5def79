"""The output of a model as reasoning, content and tool calls, for any protocol.

The contract::

    parser = reading.parser(prompt, tools, choice)     # a ``ReplyReading`` of the served model; one parser a completion
    for delta in deltas:
        for event in parser.feed(delta.text):          # text deltas of the engine, however they are cut
            ...
    for event in parser.finish():                      # once, at the end
        ...

An event is one of

- ``ReasoningText(text)``, ``ContentText(text)``: more of the reasoning or of the content.
- ``CallBegin(index, id, name)``: a tool call begins; its arguments follow.
- ``CallArguments(index, text)``: more of its arguments; all of them together are the JSON text of an object.
- ``CallEnd(index, complete)``: it ends. ``complete`` is False where the output stopped inside the arguments.

``Reply().add(events)`` collects them: ``reasoning`` (None for none), ``content`` ("" for none) and ``calls``
(``ToolCall(id, name, arguments)``). ``parse_reply(parser, text)`` does so with a whole text. What is no call in the
model's syntax is content: no text is lost, and no output raises. The engine must keep the special tokens that are
markers in the text: ``reading.markers``.

``tools``     (``toolkit.chat.tools``) tools, calls and the choice of them, in no protocol's form
``events``    events and the reply that they make
``parser``    reads reasoning and content, and hands calls to a format
``source``    text that comes in parts
``calls``     what formats of calls have
``json_calls``, ``tagged_calls``, ``literal_calls``  kinds of formats
``families``  formats by name, and how a model's is recognised
``shipped``   a format that the tokenizer has, read by transformers
"""

from toolkit.chat.reply.events import CallArguments, CallBegin, CallEnd, ContentText, Event, ReasoningText, Reply
from toolkit.chat.reply.parser import OutputParser, ReasoningFormat, ReplyParser, parse_reply
from toolkit.chat.reply.reading import ReplyReading, reading_of

__all__ = [
    "CallArguments",
    "CallBegin",
    "CallEnd",
    "ContentText",
    "Event",
    "OutputParser",
    "ReasoningFormat",
    "ReasoningText",
    "Reply",
    "ReplyParser",
    "ReplyReading",
    "parse_reply",
    "reading_of",
]
