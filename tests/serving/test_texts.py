"""Chats to prompts: nothing that a client sends is lost without a word."""

import pytest

from toolkit.serving.protocol import Message, RequestError
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
