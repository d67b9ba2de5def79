"""What a request may ask of an output, and the sentences for what it may not."""

import sys
from dataclasses import FrozenInstanceError

import pytest

from tests.helpers.grammar import accepts
from tests.helpers.json_schemas import REFUSED
from tests.helpers.tokenizers import SlowTokenizer, make_tokenizer
from toolkit.engine.grammar import StructuredOutputsParams
from toolkit.engine.grammar.compiler import GrammarCompiler
from toolkit.errors import ToolkitError

EOS, VOCAB = 2, 352


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(make_tokenizer("byte_level"), VOCAB, frozenset([EOS]))


def test_a_schema_may_be_a_mapping_or_its_text_and_is_kept_as_text() -> None:
    schema = {"type": "object", "properties": {"ü": {"type": "integer"}}}
    given = StructuredOutputsParams(json=schema)
    assert given.json == '{"type": "object", "properties": {"ü": {"type": "integer"}}}'
    assert given == StructuredOutputsParams(json=given.json)
    assert hash(given) == hash(StructuredOutputsParams(json=given.json))
    assert given.kind == "json"
    with pytest.raises(FrozenInstanceError):
        given.json = None  # type: ignore[misc]


def test_an_object_of_the_class_a_mapping_and_none_are_read() -> None:
    given = StructuredOutputsParams(choice=["a", "b"])
    assert given.choice == ("a", "b")
    assert StructuredOutputsParams.read(given) is given
    assert StructuredOutputsParams.read({"choice": ["a", "b"]}) == given
    assert StructuredOutputsParams.read(None) is None


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({}, "must have one of json, regex, choice, grammar, json_object, structural_tag, got none."),
        ({"json_object": False}, "got none."),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice."),
        ({"regex": ""}, "structured_outputs.regex must be a string that is not empty or None, got ''."),
        ({"grammar": 3}, "structured_outputs.grammar must be a string that is not empty or None, got 3."),
        ({"choice": []}, "structured_outputs.choice must be a list of strings, at least one and none of them empty"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "ab"}, "structured_outputs.choice must be a list of strings"),
        ({"json": "{"}, "structured_outputs.json must be a JSON object or its text, got '{'"),
        ({"json": "[1]"}, "structured_outputs.json must be a JSON object or its text, got '[1]'."),
        ({"json": {"a": {1}}}, "structured_outputs.json must be a JSON object or its text"),
        ({"json": {"minimum": float("nan")}}, "structured_outputs.json must be a JSON object or its text"),
        ({"json_object": "yes"}, "structured_outputs.json_object must be True or False, got 'yes'."),
        ({"regex": "a", "disable_any_whitespace": True}, "must be given with json or json_object, got it with regex."),
        ({"choice": ["a"], "whitespace_pattern": " "}, "must be given with json or json_object, got it with choice."),
        (
            {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "structured_outputs.whitespace_pattern must be None with disable_any_whitespace, got ' '.",
        ),
        ({"regexp": "a"}, "StructuredOutputsParams has no argument 'regexp'; did you mean 'regex'?"),
    ],
)
def test_what_is_wrong_is_one_sentence(form: dict, sentence: str) -> None:
    with pytest.raises(ToolkitError) as raised:
        StructuredOutputsParams.read(form)
    assert sentence in str(raised.value)


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ToolkitError, match="must be a StructuredOutputsParams, a mapping of its fields or None"):
        StructuredOutputsParams.read("json")


@pytest.mark.parametrize(("schema", "name"), REFUSED, ids=[str(at) for at in range(len(REFUSED))])
def test_schemas_that_cannot_be_enforced_are_refused_by_name(
    compiler: GrammarCompiler, schema: dict, name: str
) -> None:
    with pytest.raises(ToolkitError) as raised:
        compiler.compile(StructuredOutputsParams(json=schema))
    assert name in str(raised.value)
    assert str(raised.value).startswith("structured_outputs")
    assert "\n" not in str(raised.value)


TAG = {"triggers": ["<f"], "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}]}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a)\\1"}, "backreferences"),
        ({"regex": "a{3"}, "structured_outputs.regex"),
        ({"grammar": "start: b"}, 'unknown name: "b"'),
        ({"grammar": 'start: "a'}, "structured_outputs.grammar"),
        ({"grammar": 'root :== "a"'}, "structured_outputs.grammar must be Lark or GBNF"),
        ({"grammar": "start: x\nx[temperature=0.5]: /a+/"}, "temperature"),
        ({"grammar": "start: <|nothing|>"}, "<|nothing|>"),
        ({"grammar": 'start: %json {"not": {}}'}, "'not'"),
        ({"grammar": 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'}, "'not'"),
        ({"structural_tag": {"format": {}}}, "structured_outputs.structural_tag must have 'triggers', 'structures'"),
        ({"structural_tag": {**TAG, "type": "tag"}}, "structural_tag.type must be 'structural_tag', got 'tag'."),
        ({"structural_tag": {**TAG, "triggers": []}}, "triggers must be a list of strings"),
        ({"structural_tag": {**TAG, "structures": []}}, "structures must be a list, not empty"),
        ({"structural_tag": {**TAG, "triggers": ["<g"]}}, "structures[0].begin must start with one of the triggers"),
        ({"structural_tag": {**TAG, "structures": [{"begin": "<f"}]}}, "structural_tag.structures[0] must have"),
        (
            {"structural_tag": {**TAG, "structures": [{"begin": "<f", "schema": {"not": {}}, "end": ""}]}},
            "'not'",
        ),
        (
            {"structural_tag": {**TAG, "structures": [{"begin": "<f", "schema": "{", "end": ""}]}},
            "structures[0].schema must be JSON",
        ),
        (
            {"structural_tag": {**TAG, "structures": [{"begin": "<f", "schema": [], "end": ""}]}},
            "must have the strings 'begin' and 'end' and the JSON schema 'schema'",
        ),
    ],
)
def test_forms_that_cannot_be_enforced_are_refused_by_name(compiler: GrammarCompiler, form: dict, name: str) -> None:
    with pytest.raises(ToolkitError) as raised:
        compiler.compile(StructuredOutputsParams(**form))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("depth", [200, 400, 900])
def test_a_schema_that_is_nested_too_deep_is_refused(compiler: GrammarCompiler, depth: int) -> None:
    deep: dict = {"type": "null"}
    for _ in range(depth):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ToolkitError, match="nested too deep"):
        compiler.compile(StructuredOutputsParams(json=deep))


def test_a_grammar_that_no_token_can_begin_is_refused() -> None:
    compiler = GrammarCompiler(make_tokenizer("unigram"), VOCAB, frozenset([EOS]))
    with pytest.raises(ToolkitError, match="no token of the vocabulary can continue it"):
        compiler.compile(StructuredOutputsParams(regex="€"))


def test_the_same_form_is_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.compile(StructuredOutputsParams(json={"type": "integer"}))
    assert compiler.compile(StructuredOutputsParams(json='{"type": "integer"}')) is first
    assert compiler.compile(StructuredOutputsParams(json={"type": "integer"}, disable_any_whitespace=True)) is not first


def test_whitespace_is_as_asked_for(compiler: GrammarCompiler) -> None:
    tokenizer = make_tokenizer("byte_level")

    def taken(text: str, **form: object) -> bool:
        return accepts(compiler, tokenizer, VOCAB, text, json={"type": "array"}, **form)

    assert taken("[1, 2]")
    assert taken("[1,\n\t2]")
    assert taken("[1,2]", disable_any_whitespace=True)
    assert not taken("[1, 2]", disable_any_whitespace=True)
    assert taken("[1,  2]", whitespace_pattern=" {0,2}")
    assert not taken("[1,   2]", whitespace_pattern=" {0,2}")


@pytest.mark.parametrize(
    ("tokenizer", "eos", "sentence"),
    [
        (None, [EOS], "structured_outputs needs a tokenizer, and the engine has none."),
        (make_tokenizer("wordpiece"), [EOS], "got one that decodes by WordPiece."),
        (make_tokenizer("byte_level"), [], "needs an end-of-text token"),
        (make_tokenizer("byte_level"), [VOCAB], "needs an end-of-text token"),
        (
            object(),
            [EOS],
            "needs a fast tokenizer, one of the library tokenizers, got object, which has no fast backend.",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read_are_refused(tokenizer: object, eos: list[int], sentence: str) -> None:
    with pytest.raises(ToolkitError) as raised:
        GrammarCompiler(tokenizer, VOCAB, frozenset(eos)).compile(StructuredOutputsParams(regex="a"))
    assert sentence in str(raised.value)


def test_a_tokenizer_in_python_is_refused() -> None:
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        vocab_size = 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "<eos>": 2}

    with pytest.raises(ToolkitError, match="got Slow, which has no fast backend"):
        GrammarCompiler(Slow(), 3, frozenset([EOS])).compile(StructuredOutputsParams(regex="a"))
    # What passes everything on to a fast one has its backend.
    GrammarCompiler(SlowTokenizer(make_tokenizer()), VOCAB, frozenset([EOS])).compile(
        StructuredOutputsParams(regex="a")
    )


def test_without_the_library_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ToolkitError, match=r"pip install train-infer-toolkit\[structured\]\.$"):
        GrammarCompiler(make_tokenizer(), VOCAB, frozenset([EOS])).compile(StructuredOutputsParams(regex="a"))
