"""A small model for the recipes of tinker-cookbook: its tokens are numbers, words and signs."""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

LARGEST_NUMBER = 1024
GAME = (
    "Your job is to guess a integer between 0 and 1024. You can output your guess with the format Guess: <guess> "
    "(without the angle brackets), and say nothing else. Then we will tell you whether you guess is too high, too low, "
    "or correct."
)
"""What the recipe ``guess_number`` tells the player."""
WORDS = "User Assistant System Player What is Guess Too low high Correct Failed to parse Please output in the format"
SIGNS = " \n.,:;?!+-*/=()<>'\""
PATTERN = r"\n\n|\d+|[A-Za-z]+|[\s\S]"


def arithmetic_tokenizer():
    """One token for each number up to 1024, each word of the recipes' prompts and each sign; any other is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(f"{WORDS} {GAME}".replace("<", " ").translate({ord(one): " " for one in SIGNS}).split()))
    names = ["<pad>", "<unk>", "</s>", *map(str, range(LARGEST_NUMBER + 1)), "\n\n", *SIGNS]
    names += [one for one in words if not one.isdigit()]
    tokenizer = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )  # fmt: skip


def sum_conversation(a: int, b: int) -> list[dict[str, str]]:
    """A question of the recipe ``math_rl``, and its answer."""
    return [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]


def text_of(messages: Iterable[dict[str, str]]) -> str:
    """As the cookbook's renderer ``role_colon`` writes messages."""
    return "".join(f"{one['role'].capitalize()}: {one['content']}\n\n" for one in messages)


def _game(chance: random.Random) -> list[dict[str, str]]:
    """Some guesses of a player who has no plan."""
    gold, turns = chance.randrange(LARGEST_NUMBER), [{"role": "system", "content": GAME}]
    for _ in range(chance.randint(0, 3)):
        guess = chance.randrange(LARGEST_NUMBER)
        turns.append({"role": "player", "content": f"Guess: {guess}"})
        turns.append({"role": "user", "content": "Too low" if guess < gold else "Too high"})
    return [*turns, {"role": "assistant", "content": f"Guess: {chance.randrange(LARGEST_NUMBER)}"}]


def write_arithmetic_model(folder: Path, loss_below: float, batch: int = 64) -> int:
    """Save a model and its tokenizer, trained until the mean loss of an answer's token is below a number; the steps.

    It knows the form of replies the better the lower the loss is, and which numbers are frequent, but not how to add.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, chance = arithmetic_tokenizer(), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    first, asks = sum_conversation(4, 5), tokenizer.convert_tokens_to_ids("Assistant")
    mean, step = 10.0, 0
    while mean > loss_below:
        step += 1
        if step % 10 == 0:
            texts = [text_of(_game(chance)) + "User:" for _ in range(batch // 16)]
        else:
            sums = ([*first, *sum_conversation(chance.randint(0, 100), chance.randint(0, 100))] for _ in range(batch))
            texts = [text_of(one) + "User:" for one in sums]
        rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)
        replies = (ids == asks).flip(1).cumsum(1).flip(1) == 0  # behind the last "Assistant"
        targets = ids[:, 1:].masked_fill(~replies[:, 1:] | (ids[:, 1:] == config.pad_token_id), -100)
        loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean += 0.2 * (float(loss.detach()) - mean)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return step
