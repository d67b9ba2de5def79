"""``toolkit verify``: returned log-probabilities against the training forward's, under random schedules."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="compare rollout and training log-probabilities bit for bit")
    parser.add_argument("model", nargs="?", help="checkpoint folder or training run")
    parser.add_argument("--random", metavar="FAMILY", action="append", help="a small random model instead (repeatable)")
    parser.add_argument("--tokens", type=int, default=2000, help="sampled tokens to compare at least (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the schedules (default 0)")
    parser.add_argument("--numerics", choices=["bitwise", "fast"], default=None, help="tier to verify")
    parser.add_argument("--no-cost", action="store_true", help="skip the timing of the bitwise tier against the fast one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the tier's promise holds: no differing token in the bitwise tier."""
    from rich.console import Console
    from rich.table import Table

    from toolkit.errors import ToolkitError
    from toolkit.testing.parity import bitwise_cost, check_parity

    if (args.model is None) == (not args.random):
        raise ToolkitError("verify takes either a model folder or --random FAMILY.")
    if args.tokens < 1:
        raise ToolkitError(f"--tokens is {args.tokens}; allowed are 1 and more.")
    subjects = list(_subjects(args))
    table = Table(title="rollout against training forward")
    for column in ("model", "tier", "tokens", "bits differ", "largest", "schedules", "prefix hits", "preempted", "forked"):
        table.add_column(column, justify="left" if column in ("model", "tier") else "right")
    broken = False
    console = Console()
    for name, model, prompts in subjects:
        parity = check_parity(model, prompts, min_tokens=args.tokens, seed=args.seed, numerics=args.numerics)
        broken |= parity.numerics == "bitwise" and parity.differing > 0
        table.add_row(
            name,
            parity.numerics,
            str(parity.tokens),
            str(parity.differing),
            f"{parity.largest:.1e}",
            str(parity.schedules),
            str(parity.prefix_hit_tokens),
            str(parity.preemptions),
            str(parity.forked),
        )
    console.print(table)
    if not args.no_cost:
        for name, model, prompts in subjects:
            cost = bitwise_cost(model, prompts[:8])
            console.print(
                f"{name}: the bitwise tier takes {cost.generate_ratio:.2f}x the fast tier's time to generate "
                f"and {cost.train_ratio:.2f}x to train a step"
            )
    return 1 if broken else 0


def _subjects(args: argparse.Namespace) -> Any:
    """Name, model and prompts (token ids) of everything to verify."""
    import random

    source = random.Random(args.seed)
    if args.random:
        from toolkit.testing.models import random_model

        for family in args.random:
            model = random_model(family, seed=args.seed)
            vocabulary = model.config.vocab_size
            prompts = [[source.randrange(3, vocabulary) for _ in range(source.randint(2, 90))] for _ in range(32)]
            yield f"random {family}", model, prompts
        return
    from toolkit.cli.loading import load_model

    model, tokenizer = load_model(args.model)
    yield args.model, model, real_prompts(tokenizer, model.get_input_embeddings().num_embeddings, source)


def real_prompts(tokenizer: Any, vocabulary: int, source: Any) -> list[list[int]]:
    """32 prompts of 8 to 96 tokens: cuttings of the standard library's ``argparse``, or random ids without a tokenizer."""
    if tokenizer is None:
        ids = [source.randrange(vocabulary) for _ in range(4096)]
    else:
        with open(argparse.__file__, encoding="utf-8") as file:
            ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    starts = [source.randrange(max(1, len(ids) - 96)) for _ in range(32)]
    return [ids[start : start + source.randint(8, 96)] for start in starts]
