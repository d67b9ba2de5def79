"""``toolkit generate``: continues prompts through the engine, all in one batch, streamed to the terminal."""

import argparse
import codecs
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from toolkit.cli.options import add_model_options, add_sampling_options, load, load_sampling_defaults, make_engine
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.engine import Completion, Engine, SamplingParams

MAX_TOKENS = 128
"""Of a prompt whose model has no other default."""
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters as text: what a model writes must not steer the terminal."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="continue prompts with a model")
    add_model_options(parser)
    parser.add_argument("prompts", nargs="*", help="texts to continue (default: one, from standard input)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"per prompt (default: {MAX_TOKENS})")
    parser.add_argument("--temperature", type=float, help="0 takes the most probable token (default: 1)")
    parser.add_argument("--top-p", type=float, help="probability mass to sample from (default: 1, off)")
    parser.add_argument("--top-k", type=int, help="most probable tokens to sample from (default: 0, off)")
    parser.add_argument("--seed", type=int, help="of every prompt's samples (default: a fresh one)")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 when a prompt's generation failed."""
    prompts = [_argument_text(prompt, at) for at, prompt in enumerate(args.prompts, 1)]
    if not prompts and not sys.stdin.isatty():
        prompts = [_standard_input()]
    if not any(prompts):
        raise ToolkitError("There is nothing to continue; give one or more prompts, or a text on standard input.")

    from toolkit.engine import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    SamplingParams(**given)  # wrong values are known before the model is read

    model, tokenizer = load(args)
    if tokenizer is None:
        raise ToolkitError(
            f"The model '{args.model}' has no tokenizer, and so cannot continue text; serve it, and send token ids."
        )
    params = SamplingParams(**{"max_tokens": MAX_TOKENS, **load_sampling_defaults(args, model), **given})
    with make_engine(args, model, tokenizer) as engine:
        return _show(engine, prompts, params, "max_tokens" in given)


def _argument_text(argument: str, number: int) -> str:
    """An argument as UTF-8 text; in a locale with another encoding Python has kept its bytes as lone surrogates."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:
        return _utf8(os.fsencode(argument), f"prompt {number}")


def _standard_input() -> str:
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if buffer is None else _utf8(buffer.read().removeprefix(codecs.BOM_UTF8), "standard input")


def _utf8(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ToolkitError(
            f"{name} must be UTF-8 text, got the byte 0x{text[error.start]:02x} at byte {error.start}; convert it "
            "first, such as with iconv."
        ) from None


def _show(engine: "Engine", prompts: list[str], params: "SamplingParams", exact: bool) -> int:
    """Stream the first prompt's text as it comes; the others, computed in the same batch, follow in order.

    exact: ``max_tokens`` is what was asked for; otherwise as many as fit do.
    """
    from rich.console import Console

    from toolkit.chat import prompt_token_ids
    from toolkit.engine.prompts import fit_max_tokens

    assert engine.tokenizer is not None
    ids = [prompt_token_ids(engine.tokenizer, prompt) for prompt in prompts]
    fitted = [params if exact else fit_max_tokens(params, len(one), engine.max_sequence_len) for one in ids]
    console = Console(highlight=False)
    started = time.perf_counter()
    order = engine.submit_batch(ids, fitted)
    unread = dict.fromkeys(order, "")
    done: dict[int, Completion] = {}
    shown = 0
    _head(console, prompts, 0)
    while len(done) < len(order):
        for delta in engine.step():
            if delta.request_id == order[min(shown, len(order) - 1)]:
                _write(console, delta.text)
            else:
                unread[delta.request_id] += delta.text
            if delta.finished is not None:
                done[delta.request_id] = delta.finished
        while shown < len(order) and order[shown] in done:
            _tail(console, done[order[shown]])
            shown += 1
            if shown < len(order):
                _head(console, prompts, shown)
                _write(console, unread.pop(order[shown]))
    seconds = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in done.values())
    many = f"{len(prompts)} prompts" if len(prompts) > 1 else "1 prompt"
    console.print(f"[dim]{tokens} tokens for {many} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s[/dim]")
    return int(any(completion.finish_reason == "error" for completion in done.values()))


def _write(console: "Console", text: str) -> None:
    """The model's text as it is: rich would expand tabs, by the offset in a chunk instead of the line."""
    console.file.write(text.translate(VISIBLE))
    console.file.flush()


def _head(console: "Console", prompts: list[str], index: int) -> None:
    if len(prompts) > 1:
        console.rule(f"prompt {index + 1} of {len(prompts)}", align="left", style="dim")
    console.out(prompts[index].translate(VISIBLE), end="", style="bold cyan")


def _tail(console: "Console", completion: "Completion") -> None:
    reason = completion.finish_reason
    console.out("")
    if reason == "error":
        console.out(f"(failed: {completion.error})", style="red")
    else:
        console.out(f"({len(completion.token_ids)} tokens, ended by {reason})\n", style="dim")
