"""``toolkit train RECIPE [key=value ...]``."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``train`` command."""
    parser = subparsers.add_parser(
        "train",
        help="train a model as a recipe says",
        description="Train a model as a recipe says. Prints the resolved recipe, saves it with the run.",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as 'pretrain'")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=100 optimizer.learning_rate=3e-4"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run's latest checkpoint (resume_from_checkpoint=true)"
    )
    parser.add_argument("--check", action="store_true", help="print the resolved recipe and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 when trained, 130 when interrupted. The caller prints ToolkitError."""
    from toolkit.config import dump, load_recipe

    overrides = [*args.overrides, *(["resume_from_checkpoint=true"] if args.resume else [])]
    recipe = load_recipe(args.recipe, overrides)
    if args.check:
        print(dump(recipe), end="")
        return 0
    from toolkit.training.loop import train

    try:
        train(recipe)
    except KeyboardInterrupt:
        dropped = ("overwrite", "resume_from_checkpoint")
        kept = [override for override in args.overrides if override.partition("=")[0] not in dropped]
        print(f"\nInterrupted; resume with: toolkit train {' '.join([args.recipe, *kept, '--resume'])}")
        return 130
    return 0
