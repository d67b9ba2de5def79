"""Chats to prompts: nothing that a client sends is lost without a word."""

import random

import pytest

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.serving.errors import RequestError
from toolkit.serving.openai.requests import Message
from toolkit.serving.texts import Texts
from toolkit.testing.models import tiny_tokenizer

SHOWN = "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
KNOWN = "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}" + SHOWN
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
FIRST_SYSTEM = "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + SHOWN
THOUGHTS = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] | upper }}{% endfor %}"


def prompt(template, *messages):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer.decode(Texts(tokenizer).chat([Message(role=role, content=text) for role, text in messages]))


def test_developer_is_system_to_a_template_that_knows_no_other():
    asked = ("developer", "answer in French"), ("user", "hi")
    assert prompt(KNOWN, *asked) == "[system]answer in French[user]hi"
    everything = KNOWN.replace("'system'", "'system', 'developer'")
    assert prompt(everything, *asked) == "[developer]answer in French[user]hi"


DOCUMENTS = "{% for d in documents or [] %}<{{ d.title }}: {{ d.text }}>{% endfor %}"
FIRST_DOCUMENT = "{% if documents %}<{{ documents[0].text }}>{% endif %}"


@pytest.mark.parametrize(("template", "at"), [(KNOWN, 0), (FIRST_DOCUMENT + KNOWN, 1), (DOCUMENTS + KNOWN, None)])
def test_a_document_that_the_template_does_not_show_is_an_error_that_names_it(template, at):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    texts, messages = Texts(tokenizer), [Message(role="user", content="hi")]
    documents = [{"title": "a", "text": "a page"}, {"title": "b", "text": "a block", "meta": {"of": ["x", 1]}}]
    for options in ({}, {"enable_thinking": False}):
        kwargs = {"documents": documents, **options}
        if at is None:
            assert texts.chat_text(messages, chat_template_kwargs=kwargs) == "<a: a page><b: a block>[user]hi"
            continue
        words = rf"'chat_template_kwargs.documents\[{at}\]' must be left out: the model's chat template shows nothing"
        with pytest.raises(RequestError, match=words) as raised:
            texts.chat_text(messages, chat_template_kwargs=kwargs)
        assert raised.value.param == f"chat_template_kwargs.documents[{at}]"
    assert texts.chat_text(messages, chat_template_kwargs={"documents": []}).endswith("[user]hi")


@pytest.mark.parametrize(
    "content", ["hello there", [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]]
)
@pytest.mark.parametrize("template", [KNOWN, PARTS])
def test_text_and_parts_arrive_in_templates_that_read_either(template, content):
    assert prompt(template, ("user", content)) == "[user]hello there"


@pytest.mark.parametrize(
    ("template", "messages", "at"),
    [
        (KNOWN, [("user", "hi"), ("tool", "42")], 1),
        (FIRST_SYSTEM, [("user", "hi"), ("system", "be brief"), ("user", "and now")], 1),
        (FIRST_SYSTEM, [("system", "be kind"), ("developer", "be brief"), ("user", "hi")], None),
        ("{{ messages[-1].content }}", [("user", "hi"), ("assistant", "yes"), ("user", "and now")], 0),
        (THOUGHTS, [("user", "hi"), ("assistant", "<think>x</think>yes"), ("user", "and now")], None),
        (KNOWN, [("tool", ""), ("user", "hi")], None),
    ],
)
def test_a_message_that_the_template_drops_is_an_error_that_names_it(template, messages, at):
    if at is None:
        assert "hi" in prompt(template, *messages).lower()
        return
    with pytest.raises(RequestError) as raised:
        prompt(template, *messages)
    assert raised.value.param == f"messages[{at}]"
    assert str(raised.value) == (
        f"The model's chat template shows nothing of 'messages[{at}]', whose role is '{messages[at][0]}'."
    )


class Chatty(type(tiny_tokenizer())):
    """A tokenizer that does more than the Rust one."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(f"say {text}", *args, **kwargs)


def test_prompts_have_the_tokenizers_own_tokens():
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    texts = Texts(tokenizer)
    for _ in range(50):
        text = "".join(rng.choices(["a", " ", "é", "😀", "</s>", "\n", "page"], k=12))
        assert texts.prompt(text) == tokenizer(text)["input_ids"]
    chatty = Chatty(tokenizer_object=tokenizer.backend_tokenizer)
    assert Texts(chatty).prompt("hi") == tokenizer("say hi")["input_ids"]
    truncating = tiny_tokenizer()
    truncating.backend_tokenizer.enable_truncation(2)
    assert Texts(truncating).prompt("a b c d") == tokenizer("a b c d")["input_ids"]


def test_a_prompt_that_is_too_long_is_not_made_a_list():
    texts = Texts(tiny_tokenizer(), max_model_len=8)
    with pytest.raises(ToolkitError, match=r"prompt must have <= 7 tokens, one below max_model_len, got 16\."):
        texts.prompt("é" * 8)


@pytest.mark.parametrize(("around", "before"), [("$A", []), ("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"])])
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_no_end_of_text_stands_behind_a_prompt(kind, around, before):
    tokenizer = make_tokenizer(kind, around=around)
    bare = tokenizer.convert_tokens_to_ids(before) + tokenizer("two plus", add_special_tokens=False)["input_ids"]
    assert Texts(tokenizer).prompt("two plus") == bare
    fits = Texts(tokenizer, len(bare) + 1)
    assert fits.prompt("two plus") == bare
    with pytest.raises(ToolkitError, match=f"prompt must have <= {len(bare) - 1} tokens"):
        Texts(tokenizer, len(bare)).prompt("two plus")


def test_special_tokens_are_split_where_the_tokenizer_says_so():
    seen = []
    for split in (False, True):
        tokenizer = tiny_tokenizer()
        tokenizer.split_special_tokens, tokenizer.chat_template = split, "{{ messages[0].content }}"
        message = Message(role="user", content="a</s>")
        tokens = [Texts(tokenizer).chat([message]), Texts(tokenizer).prompt("a</s>")]
        assert tokens == [tokenizer("a</s>")["input_ids"]] * 2
        seen += tokens
    assert seen[0] != seen[-1]


def test_a_name_that_a_template_shows_is_bounded_before_it_is_tokenised(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].name }}{{ messages[0].content }}"
    texts = Texts(tokenizer, 64)
    monkeypatch.setattr(texts, "_encode", lambda _: pytest.fail("tokenised"))
    with pytest.raises(ToolkitError, match=r"messages must have <= \d+ characters, which is all that fits, got 5002"):
        texts.chat([Message(role="user", content="hi", name="n" * 5000)])
