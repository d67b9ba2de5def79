"""``toolkit schema``."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``schema`` command."""
    parser = subparsers.add_parser(
        "schema",
        help="print the JSON schema of recipes",
        description="Print the JSON schema of recipes. Editors complete and check a recipe whose first line is "
        "'# yaml-language-server: $schema=FILE'; toolkit init writes both.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0."""
    from toolkit.config.json_schema import schema_text

    print(schema_text(), end="")
    return 0
