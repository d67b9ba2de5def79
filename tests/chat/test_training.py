"""Training tokens: those of the whole text by stock tokenizers, and the turns as a model generates them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tokenizers import BACKENDS, CHATML, LLAMA2, SlowTokenizer, make_tokenizer
from toolkit.chat import ChatTemplateError, ChatTokenizer, hidden_parts, prompt_token_ids, render
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model

HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "<think>four</think>4"},
    {"role": "user", "content": "is it?"},
    {"role": "assistant", "content": "<think>it is</think>yes"},
]
THINKING = (
    "{% set last = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < last.query %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts of turns before the last question are dropped, as Qwen3 does it."""
GLM = (
    "{% for m in messages %}{{ {'user': '<|im_start|>', 'assistant': '<|im_end|>'}[m.role] }}{{ m.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
"""Nothing ends a turn but the token that opens the next one."""


def learnt(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([token for token, counts in zip(example.ids, example.mask) if counts])


def whole(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("question", " answer"), ("two plus two is ", "four"), ("a(", "b)"), ("x<|im_start|>assistant\n", "y<|im_end|>")],
)
def test_prompt_and_completion_are_one_text(kind: str, around: str, prompt: str, completion: str) -> None:
    tokenizer = make_tokenizer(kind, around=around)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (example,) = ChatTokenizer(tokenizer, eos_token_ids=[end]).completion(prompt, completion)
    stock = tokenizer(prompt + completion)["input_ids"]
    stock = stock[:-1] if stock[-1] == tokenizer.eos_token_id else stock
    assert example.ids == stock + ([] if stock[-1] == end else [tokenizer.eos_token_id])
    first = example.mask.index(True)
    assert all(example.mask[first:])
    # Every token before holds characters of the prompt alone, and the first that counts one of the completion.
    offsets = tokenizer(prompt + completion, return_offsets_mapping=True)["offset_mapping"]
    assert all(end <= len(prompt) for _, end in offsets[:first])
    assert offsets[first][1] > len(prompt) or prompt.endswith(" ")
    alone = prompt_token_ids(tokenizer, prompt)
    assert example.straddles == (example.ids[:first] != alone)
    (slow,) = ChatTokenizer(SlowTokenizer(tokenizer), eos_token_ids=[end]).completion(prompt, completion)
    assert slow.ids == example.ids
    assert kind in ("llama", "metaspace") or slow == example


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("template", [CHATML, LLAMA2])
def test_a_conversation_is_one_text(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, chat_template=template, around="<s> $A </s>")
    messages = [*HELLO, {"role": "user", "content": "is it"}, {"role": "assistant", "content": "yes"}]
    (example,) = ChatTokenizer(tokenizer).messages(messages)
    assert example.ids == whole(tokenizer, messages)
    kept = learnt(tokenizer, example)
    assert "world" in kept.replace(" ", "")
    assert "hello" not in kept
    assert kept.count("</s>" if template == LLAMA2 else "<|im_end|>") == 2


def test_special_tokens_and_the_end_of_turn_count() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    (example,) = ChatTokenizer(tokenizer).messages(HELLO)
    assert learnt(tokenizer, example) == "world<|im_end|>\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.turn_ends == (end,)  # generation would not stop there
    (example,) = ChatTokenizer(tokenizer, eos_token_ids=[end]).messages(HELLO)
    assert example.turn_ends == ()
    (example,) = ChatTokenizer(tokenizer, assistant_only_loss=False).messages(HELLO)
    assert (all(example.mask), example.turn_ends) == (True, (end,))


def test_a_token_that_opens_the_next_turn_ends_one_where_generation_stops_at_it() -> None:
    tokenizer = make_tokenizer(chat_template=GLM)
    messages = HELLO + HELLO
    user = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (example,) = ChatTokenizer(tokenizer, eos_token_ids=[user]).messages(messages)
    assert learnt(tokenizer, example) == "world<|im_start|>world"
    assert example.turn_ends == (None,)


def test_generation_markers_win() -> None:
    marked = "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{{ '\n' }}"
    tokenizer = make_tokenizer()
    template = CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}",
    )
    messages = [*HELLO, *HELLO]
    (example,) = ChatTokenizer(tokenizer, chat_template=template).messages(messages)
    stock = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.ids == stock["input_ids"]
    assert [int(counts) for counts in example.mask] == stock["assistant_masks"]
    assert learnt(tokenizer, example) == "worldworld"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (example,) = ChatTokenizer(tokenizer, chat_template=template, eos_token_ids=[end]).messages(messages)
    assert learnt(tokenizer, example) == "world<|im_end|>world<|im_end|>"


def test_a_rewritten_turn_is_an_example_as_it_is_generated() -> None:
    tokenizer = make_tokenizer(chat_template=THINKING)
    first, second = ChatTokenizer(tokenizer).messages(TWO_TURNS)
    assert learnt(tokenizer, first) == "<think>four</think>4<|im_end|>\n"
    assert learnt(tokenizer, second) == "<think>it is</think>yes<|im_end|>\n"
    for example, turns in ((first, 3), (second, 5)):
        prompt = whole(tokenizer, TWO_TURNS[: turns - 1], add_generation_prompt=True)
        assert example.ids[: example.mask.index(True)] == prompt  # what a model is asked with
        assert example.ids == whole(tokenizer, TWO_TURNS[:turns])
    (stable,) = ChatTokenizer(tokenizer, chat_template=CHATML).messages(TWO_TURNS)
    assert learnt(tokenizer, stable).count("<think>") == 2
    calls = [*TWO_TURNS[:3], {"role": "tool", "content": "4"}, {"role": "assistant", "content": "<think>ok</think>4"}]
    (one_query,) = ChatTokenizer(tokenizer).messages(calls)
    assert learnt(tokenizer, one_query).count("<think>") == 2


def test_trl_templates_of_thinking_models() -> None:
    """Qwen3's own template, and the variant of it that TRL trains with: the same last turn."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("needs trl")
    folder = Path(trl.origin).parent / "chat_templates"
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = (folder / "qwen3.jinja").read_text(encoding="utf-8")
    variant = (folder / "qwen3_training.jinja").read_text(encoding="utf-8")
    first, second = ChatTokenizer(tokenizer, chat_template=own, eos_token_ids=[end]).messages(TWO_TURNS)
    assert learnt(tokenizer, first) == "<think>\nfour\n</think>\n\n4<|im_end|>\n"
    assert learnt(tokenizer, second) == "<think>\nit is\n</think>\n\nyes<|im_end|>\n"
    (both,) = ChatTokenizer(tokenizer, chat_template=variant, eos_token_ids=[end]).messages(TWO_TURNS)
    assert learnt(tokenizer, both) == learnt(tokenizer, first) + learnt(tokenizer, second)


def test_a_prompt_that_opens_otherwise_is_told() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(chat_template=template)
    (example,) = ChatTokenizer(tokenizer).messages(HELLO)
    assert example.reopened
    assert learnt(tokenizer, example) == "world<|im_end|>\n"


def test_completion_only_and_assistant_only() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt, completion = [*HELLO, HELLO[0]], [HELLO[1], HELLO[0], HELLO[1]]
    expected = {
        (True, True): "world<|im_end|>\nworld<|im_end|>\n",
        (True, False): "world<|im_end|>\nworld<|im_end|>\nworld<|im_end|>\n",
        (False, True): "world<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nworld<|im_end|>\n",
    }
    for (assistant, completions), text in expected.items():
        format = ChatTokenizer(tokenizer, assistant_only_loss=assistant, completion_only_loss=completions)
        (example,) = format.completion(prompt, completion)
        assert learnt(tokenizer, example) == text
        assert example.ids == whole(tokenizer, prompt + completion)
    (example,) = ChatTokenizer(tokenizer, completion_only_loss=False).completion("a", "b")
    assert learnt(tokenizer, example) == "ab</s>"
    example = ChatTokenizer(make_tokenizer(around="<s> $A </s>")).text("a b")
    assert tokenizer.decode(example.ids) == "<s>a b</s>"
    assert learnt(tokenizer, example) == "a b</s>"


def test_preferences_share_their_prompt() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML, around="<s> $A </s>")
    format = ChatTokenizer(tokenizer)
    pair = format.preference("two plus ", "two", "the dog")
    assert tokenizer.decode(pair.prompt + pair.chosen) == "<s>two plus two</s>"
    assert tokenizer.decode(pair.prompt + pair.rejected) == "<s>two plus the dog</s>"
    assert pair.straddles
    pair = format.preference(HELLO[:1], HELLO[1:], [{"role": "assistant", "content": "no"}])
    assert pair.prompt == whole(tokenizer, HELLO[:1], add_generation_prompt=True)
    assert [tokenizer.decode(side) for side in pair[1:3]] == ["world<|im_end|>\n", "no<|im_end|>\n"]


def test_a_template_gets_tools_and_variables() -> None:
    tokenizer = make_tokenizer(chat_template="{{ tools }}{{ mood }}{{ place }}" + CHATML)
    format = ChatTokenizer(tokenizer, chat_template_kwargs={"mood": "sad", "place": "sea"})
    (example,) = format.messages(HELLO, [{"name": "get_weather"}], {"mood": "glad"})
    text = tokenizer.decode(example.ids)
    assert text.startswith("[{'name': 'get_weather'}]gladsea<|im_start|>")
    assert learnt(tokenizer, example) == "world<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "template", "expected"),
    [
        ([3], CHATML, "messages must hold mappings with 'role' and 'content', got 3."),
        ([{"role": "user"}], CHATML, "a message must have 'content' or 'tool_calls', got {'role': 'user'}."),
        (HELLO[:1], CHATML, "must have a message of role 'assistant', whose text is learnt, got 'user'."),
        (
            [*HELLO, *HELLO],
            CHATML.replace("in messages", "in messages[-2:]"),
            "it must not rewrite the messages before",
        ),
        (HELLO, "{{ raise_exception('no') }}", "The chat template must take the messages, but it does not: no."),
    ],
)
def test_what_cannot_be_learnt_is_one_sentence(messages: Any, template: str, expected: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        ChatTokenizer(make_tokenizer(chat_template=template)).messages(messages)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_markers_of_a_template_that_takes_whole_conversations_only() -> None:
    template = (
        "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    (example,) = ChatTokenizer(tokenizer).messages([*HELLO, *HELLO])
    assert learnt(tokenizer, example) == "world</s>world</s>"
    with pytest.raises(ChatTemplateError):
        render(tokenizer, HELLO)


@pytest.mark.sweep
@pytest.mark.parametrize("around", ["$A", "<s> $A"])
def test_the_labels_are_those_of_trl(tmp_path: Path, around: str) -> None:
    """Of TRL's ``SFTTrainer``, for its three formats, with and without masks."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    marked = "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    template = CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}",
    )
    tokenizer = make_tokenizer(chat_template=template, around=around)
    prompt, reply = HELLO[:1], HELLO[1:]
    for line, options in (
        ({"messages": [*HELLO, *HELLO]}, {"assistant_only_loss": True}),
        ({"messages": [*HELLO, *HELLO]}, {"assistant_only_loss": False}),
        ({"prompt": prompt, "completion": reply}, {"assistant_only_loss": False}),
        ({"prompt": "two plus two is", "completion": " four"}, {"assistant_only_loss": False}),
        ({"prompt": "two plus", "completion": " two"}, {"completion_only_loss": False, "assistant_only_loss": False}),
        ({"text": "two plus two"}, {"assistant_only_loss": False}),
    ):
        trainer = trl.SFTTrainer(
            model=random_model("llama", vocab_size=len(tokenizer)),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to=[], **options
            ),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([line]),
        )
        expected = trainer.train_dataset[0]
        format = ChatTokenizer(tokenizer, **options)
        if "messages" in line:
            (example,) = format.messages(line["messages"])
        elif "text" in line:
            example = format.text(line["text"])
        else:
            (example,) = format.completion(line["prompt"], line["completion"])
        assert example.ids == expected["input_ids"], line
        ours = [token if counts else -100 for token, counts in zip(example.ids, example.mask)]
        assert ours[1:] == expected["labels"][1:], line  # nothing comes before the first token


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'Be kind.\n' }}" + CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    ],
    ids=["other prompt, default system text", "text behind the last turn"],
)
def test_a_conversation_that_the_assistant_begins(template: str) -> None:
    """Its role is no more learnt than that of later turns, nor is what the template writes before it."""
    tokenizer = make_tokenizer(chat_template=template)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    examples = ChatTokenizer(tokenizer, eos_token_ids=[end]).messages([{"role": "assistant", "content": "yes"}, *HELLO])
    texts = [learnt(tokenizer, example) for example in examples]
    assert "".join(texts).replace("</s>", "") == "yes<|im_end|>\nworld<|im_end|>\n"


def test_parts_of_a_turn_that_the_template_leaves_out() -> None:
    tokenizer = make_tokenizer(chat_template=THINKING)
    assert hidden_parts(tokenizer, TWO_TURNS) == []  # earlier thoughts are shown where the turn is learnt
    without = THINKING.replace("and loop.index0 < last.query", "")
    assert hidden_parts(tokenizer, TWO_TURNS, chat_template=without) == [2, 4]
    reasons = [HELLO[0], HELLO[1] | {"reasoning_content": "it  is"}]
    assert hidden_parts(tokenizer, reasons) == [1]
    shown = THINKING.replace("{{ content }}", "<think>{{ m.reasoning_content }}</think>{{ content }}")
    assert hidden_parts(tokenizer, reasons, chat_template=shown) == []
