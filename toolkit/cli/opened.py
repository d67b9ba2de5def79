"""A model and its engine as the options of ``toolkit serve`` and ``toolkit batch`` describe them."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.cli.options import (
    add_engine_options,
    add_model_options,
    add_runner_options,
    add_sampling_options,
    load,
    load_images,
    load_sampling_defaults,
    make_engine,
    make_pooling_engine,
)
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from toolkit.engine import Engine
    from toolkit.engine.pooling import PoolingEngine


def add_served_options(parser: argparse.ArgumentParser, flag: bool = False) -> None:
    """Options of the model and its engine; with ``flag`` the model is ``--model``."""
    add_model_options(parser, flag=flag)
    add_runner_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser)


@contextmanager
def opened(
    args: argparse.Namespace, runner: str, settings: Any, template: str | None = None
) -> Iterator[tuple["Engine | PoolingEngine", dict[str, Any]]]:
    """The engine, until the end of the block, and the arguments of ``ServerConfig`` that follow from the model.

    Args:
        args: the options.
        runner: "generate" or "pooling".
        settings: of a pooling model.
        template: chat template in the place of the model's.
    """
    model, tokenizer = load(args, runner)
    if runner == "pooling":
        pooling = make_pooling_engine(args, model, settings)
        yield (
            pooling,
            {"tokenizer": tokenizer, "max_model_len": pooling.max_model_len, "vocab_size": pooling.vocab_size},
        )
        return
    processor = load_images(args)
    _set_template(tokenizer, template)
    if processor is not None and template is not None:
        processor.chat_template = template
    defaults = load_sampling_defaults(args, model)
    with make_engine(args, model, tokenizer) as engine:
        served = {
            "tokenizer": tokenizer,
            "processor": processor,
            "max_model_len": engine.max_sequence_len,
            "vocab_size": engine.vocab_size,
            "default_sampling_params": defaults,
        }
        yield engine, served


def _set_template(tokenizer: Any, template: str | None) -> None:
    if template is None:
        return
    if tokenizer is None:
        raise ToolkitError("--chat-template must be left out for a model without a tokenizer.")
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise ToolkitError(f"--chat-template must be a Jinja template: line {error.lineno}: {reason}.") from None
    except (TemplateError, TypeError, ValueError):
        pass  # it may ask for other messages than these
