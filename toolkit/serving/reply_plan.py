"""How the reply to a chat is sampled and read, in any protocol: reasoning, tool calls and the form of the content.

A protocol asks the ``ReplyPlanner`` of its ``Generation`` for a plan once it has the prompt, gives ``plan.params`` to
``SamplingParams`` with what the request gives, and reads each completion with a ``plan.parser()``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.chat.reply import OutputParser, ReplyReading, reading_of
from toolkit.chat.reply.harmony import content_head, harmony_start, open_message
from toolkit.chat.tools import Tool, ToolChoice
from toolkit.engine.grammar import StructuredOutputsParams
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.engine.grammar.specs import json_term
from toolkit.errors import ToolkitError
from toolkit.serving.base import ServerConfig
from toolkit.serving.errors import Json, RequestError

OF_JSON = ("json", "json_object")
"""Forms that a reply's content may have beside reasoning and calls; others are those of the whole output."""
TAIL = 512
"""Tokens at the end of a prompt that may say where its reply begins."""


@dataclass(frozen=True)
class ReplyPlan:
    """How one prompt's replies are sampled and read.

    Args:
        params: arguments of ``SamplingParams``, in the place of those that the request gives.
        reading: of the model's replies.
        prompt: the end of it.
        tools: of the request.
        choice: among them.
        plain: whether all of the output is content.
    """

    params: Json
    reading: ReplyReading
    prompt: str
    tools: Sequence[Tool]
    choice: ToolChoice
    plain: bool

    def parser(self) -> OutputParser:
        """Of one completion."""
        if self.plain:
            return ReplyReading().parser(self.prompt)
        return self.reading.parser(self.prompt, self.tools, self.choice)


class ReplyPlanner:
    """Plans replies of the served model.

    Args:
        config: what is served.

    Attributes:
        reading: of the model's replies.

    Raises:
        ToolkitError: for an unknown name of a parser.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        tokenizer = config.tokenizer
        self.reading = reading_of(tokenizer, _template(config), config.tool_call_parser, config.reasoning_parser)
        self._kept = self.reading.kept_tokens(tokenizer) if tokenizer is not None else ()

    def plan(
        self,
        prompt: Any,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        given: Mapping[str, Any] | None = None,
        continued: str = "",
    ) -> ReplyPlan:
        """How replies to a prompt are sampled and read.

        Args:
            prompt: token ids, or what a processor returned.
            tools: of the request; the prompt shows them.
            choice: among them; None is "auto".
            given: arguments of ``SamplingParams`` that the request gives.
            continued: what the prompt has of the reply already, where the reply continues a message.

        Raises:
            RequestError: calls that the model has no known syntax for, or that cannot be enforced.
        """
        given, choice = given or {}, choice or ToolChoice()
        allowed = choice.allowed(tools)
        if allowed and not self.reading.reads_calls:
            message = (
                "'tools' must be left out or 'tool_choice' be \"none\": the syntax of the model's tool calls is not "
                "known from its chat template; start the server with --tool-call-parser NAME."
            )
            raise RequestError(message, "tools")
        params: Json = {}
        end = self._end_of(prompt)
        marks = self.reading.reasoning
        if marks is not None and continued.rfind(marks.begin) > continued.rfind(marks.end):
            end += marks.begin  # the reply continues its reasoning
        form = StructuredOutputsParams.read(given.get("structured_outputs"))
        if form is not None and form.kind not in OF_JSON and allowed and choice.mode == "required":
            message = (
                f'\'tool_choice\' must be "auto" or "none" with structured_outputs.{form.kind}, which is the form of '
                "the whole output, got one that calls tools."
            )
            raise RequestError(message, "tool_choice")
        grammar = self._grammar(form, allowed, choice, end)
        if grammar is not None:
            params["structured_outputs"] = {"grammar": grammar}
        # A form that is enforced from the first token on leaves nothing else in the output.
        plain = form is not None and grammar is None
        if self._kept and not plain and (allowed or self.reading.reads_reasoning or self.reading.is_harmony):
            params["kept_special_tokens"] = self._kept
        return ReplyPlan(params, self.reading, end, allowed, choice, plain)

    def _end_of(self, prompt: Any) -> str:
        tokenizer = self._config.tokenizer
        if tokenizer is None:
            return ""
        ids = prompt["input_ids"][0].tolist() if isinstance(prompt, Mapping) else prompt
        backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        return str(backend.decode(list(ids[-TAIL:]), skip_special_tokens=False))

    def _grammar(
        self, form: StructuredOutputsParams | None, allowed: Sequence[Tool], choice: ToolChoice, end: str
    ) -> str | None:
        """A grammar in Lark in the place of ``form``; None where ``form`` stands, or nothing is enforced."""
        of_json = form is not None and form.kind in OF_JSON
        if form is not None and not of_json:
            return None
        marked = self.reading.reasoning is not None and not self.reading.reasoning.ended_by(end)
        strict = choice.mode == "auto" and self.reading.calls is not None and any(tool.strict for tool in allowed)
        if not (choice.mode == "required" or (of_json and (allowed or marked)) or strict):
            return None
        if form is not None:
            self._compiler.compile(form)  # alone: what is wrong with it is not about the tools
        if choice.mode == "required":
            form = None  # it is that of the content, of which there is none
        try:
            return self._written(form, allowed, choice, end)
        except ToolkitError as error:
            if not allowed:
                raise
            field = "tool_choice" if choice.mode == "required" and "needs " in str(error) else "tools"
            raise RequestError(str(error).replace("structured_outputs.grammar", field).replace(
                "structured_outputs", field), field) from None  # fmt: skip

    def _written(
        self, form: StructuredOutputsParams | None, allowed: Sequence[Tool], choice: ToolChoice, end: str
    ) -> str:
        calls = self.reading.calls
        if allowed and calls is None:
            raise RequestError(
                "'tool_choice' must be \"auto\" or \"none\", and 'strict' and 'response_format' be left out: the "
                "model's tokenizer alone describes its tool calls, and no grammar is made of that.",
                "tool_choice",
            )
        loose = choice.mode == "auto" and form is None
        bare = calls.bare if calls is not None else ""
        behind_text = loose and not bare and not self.reading.is_harmony
        terms = self._compiler.terms(calls.begins[0] if behind_text and calls is not None else None)
        bodies = []
        if allowed and calls is not None:
            shown = [tool if choice.mode == "required" or tool.strict or form else _loose(tool) for tool in allowed]
            bodies.append(calls.calls_grammar(shown, choice.parallel, terms))
        if form is not None:
            schema = json.loads(str(form.json)) if form.kind == "json" else {"type": "object"}
            bodies.append(json_term(schema, form))
            if self.reading.is_harmony and open_message(end) is None:
                bodies[-1] = f"{content_head(terms)} {bodies[-1]}"
        if self.reading.is_harmony:
            return self._checked(terms.grammar(harmony_start(terms, end, bodies, loose)))
        marks = self.reading.reasoning
        thought = ""
        if marks is not None and not marks.ended_by(end):
            thought = terms.until(marks.end)
            if not marks.begun_by(end):
                thought = f"{terms.until(marks.begin) if behind_text else terms.text(marks.begin)} {thought}"
        begun = marks is not None and marks.begun_by(end)
        if behind_text:
            before, inside = (f"{thought} ", "") if begun else ("", f" | {thought}" if thought else "")
            start = f"{before}({' | '.join(bodies)}{inside})* {terms.rule('ANY', '/(?s:.*)/')}"
        else:
            gap = r"/\n{0,2}/"
            before = thought and (f"{thought} {gap} " if begun else f"({thought} {gap})? ")
            if loose:  # a reply that does not begin as a call is any text
                bodies.append(terms.rule("ANY", rf"/\s*[^\s{re.escape(bare)}](?s:.*)/"))
            start = f"{before}({' | '.join(bodies)})" + "?" * loose
        return self._checked(terms.grammar(start))

    def _checked(self, grammar: str) -> str:
        self._compiler.compile(StructuredOutputsParams(grammar=grammar))
        return grammar

    @property
    def _compiler(self) -> GrammarCompiler:
        compiler: GrammarCompiler = self._config.engine.engine.grammars  # type: ignore[union-attr]
        return compiler


def _loose(tool: Tool) -> Tool:
    """The tool with arguments that are any object."""
    return Tool(tool.name, tool.description, {"type": "object"})


def _template(config: ServerConfig) -> str | None:
    """The text of the model's chat templates, all of them where it has several by name."""
    found = getattr(config.processor, "chat_template", None) or getattr(config.tokenizer, "chat_template", None)
    return "\n".join(map(str, found.values())) if isinstance(found, Mapping) else found
