"""What the recipes of tests/recipes read: a tiny base model with a chat template, and data in the usual formats."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COLOURS = ("red", "blue", "green", "gold", "grey", "pink")
LINES = 96


def write_base(folder: Path, seed: int = 0) -> None:
    """A Llama of random weights, and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.testing.models import tiny_tokenizer

    tokenizer = tiny_tokenizer(259)
    tokenizer.bos_token = None  # TRL's ORPOTrainer puts one before every text, where there is one
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.08, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _chat(at: int, colour: str, other: str) -> dict[str, Any]:
    turns = [user(f"say {colour}"), assistant(f"{colour} {colour}")]
    return {"messages": turns if at % 3 else [*turns, user(f"and {other}"), assistant(f"{other} {other}")]}


def _alpaca(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"instruction": f"repeat {at}", "input": colour, "output": f"{colour} {other}"}


def _completion(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"question": f"{at} {colour} or {other}:", "answer": f" {colour}" * (1 + at % 3)}


def _text(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"content": f"row {at}: the {colour} box holds {at % 7} {other} pens."}


def _preference(at: int, colour: str, other: str) -> dict[str, Any]:
    rejected = [assistant(f"{at} {other.upper()} {at}")]
    return {"prompt": [user(f"name {colour}")], "chosen": [assistant(f"a {colour} one")], "rejected": rejected}


def _pair(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"prompt": f"name {colour}:", "chosen": f" a {colour} one", "rejected": f" {other.upper()} {at}"}


def _labelled(at: int, colour: str, other: str) -> dict[str, Any]:
    label = at % 2 == 0
    return {"prompt": f"name {colour}:", "completion": f" a {colour}" if label else f" {other.upper()}", "label": label}


def _question(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"prompt": [user(f"{at} {colour}")], "target": other}


def _hint(at: int, colour: str, other: str) -> dict[str, Any]:
    return {"prompt": [user(f"{at} {colour}")], "privileged_context": f"say {other} {other}"}


def _steps(at: int, colour: str, other: str) -> dict[str, Any]:
    right = [(at * step) % 3 > 0 for step in range(1, 2 + at % 3)]
    steps = [f"a {colour} one" if one else f"{other.upper()} {at}" for one in right]
    return {"prompt": f"name {colour}:", "completions": steps, "labels": right}


FILES: dict[str, Callable[[int, str, str], dict[str, Any]]] = {
    "chat": _chat, "alpaca": _alpaca, "completion": _completion, "text": _text, "preference": _preference,
    "pairs": _pair, "labelled": _labelled, "questions": _question,
    "hints": _hint, "steps": _steps,
}  # fmt: skip


def write_data(folder: Path) -> None:
    """A json lines file of each format."""
    for name, make in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _lines(make)))


def _lines(make: Callable[[int, str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    chance = random.Random(3)
    for at in range(LINES):
        yield make(at, chance.choice(COLOURS), chance.choice(COLOURS))
