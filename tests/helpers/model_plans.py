"""Plans of replies of a model by the family of its tool calls, and what their grammars allow."""

from types import SimpleNamespace

from tests.helpers.replies import family_of
from tests.helpers.tokenizers import make_tokenizer
from toolkit.engine.grammar import StructuredOutputsParams
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.serving.app import ServerConfig
from toolkit.serving.reply_plan import ReplyPlanner

TEMPLATES = {"mistral, named": "[TOOL_CALLS][ARGS]"}


class ModelPlans:
    """A planner of a model whose tokenizer has the given special tokens, and its grammars."""

    def __init__(self, case: str, *special: str, reasoning: str = "none", template: str = "") -> None:
        self.tokenizer = make_tokenizer(chat_template=template or TEMPLATES.get(case, "{{ messages }}"))
        if special:
            self.tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        self.compiler = GrammarCompiler(self.tokenizer, len(self.tokenizer), frozenset({2}))
        engine = SimpleNamespace(engine=SimpleNamespace(grammars=self.compiler))
        self.planner = ReplyPlanner(
            ServerConfig(
                "m", engine, tokenizer=self.tokenizer, tool_call_parser=family_of(case), reasoning_parser=reasoning
            )
        )

    def plan(self, tools, choice, prompt="", **given):
        return self.planner.plan(self.ids(prompt), tools, choice, given)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def matcher(self, plan):
        return self.compiler.compile(StructuredOutputsParams(**plan.params["structured_outputs"])).matcher([])

    def allows(self, plan, text):
        """Whether the whole output may be ``text``."""
        matcher, ids = self.matcher(plan), self.ids(text)
        if matcher.allowed_prefix(ids) < len(ids):
            return False
        for token in ids:
            matcher.accept(token)
        return matcher.may_end
