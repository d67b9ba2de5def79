"""Exports of a model to targets of programs, each run by its runtime beside the model, teacher-forced.

Arguments: a family of ``exported_models``, or ``smollm2``; an empty folder; the number of tokens; the stated bound of a
difference; targets. The last line is a number or a sentence of each: {target: ...}.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.helpers.exported_models import exported_model
from tests.helpers.smollm2 import TEXT, load_smollm2
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, TARGETS, export
from toolkit.exporting.hf import generate_greedily
from toolkit.exporting.programs import ProgramLoop

PROMPT, NEW_TOKENS = 4, 8


def measured(model: Any, tokenizer: Any, target: str, sequences: list[list[int]], bound: float, folder: Path) -> Any:
    """How far the runtime's log-probabilities are from the model's, and what the manifest proves."""
    begun = time.monotonic()
    prompts = [sequence[:length] for sequence, length in zip(sequences * 3, (PROMPT, 9, 3))]
    try:
        path = export(model, folder / target, target, tokenizer, prompts=prompts, max_tokens=NEW_TOKENS)
    except ToolkitError as error:
        return {"refused": str(error)}
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    written = time.monotonic() - begun
    parts = TARGETS.find("target", target)().runners(path)
    largest, positions, decided, other = 0.0, 0, 0, 0
    for sequence in sequences:
        with torch.no_grad():
            ours = model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        loop = ProgramLoop(parts, path)
        for at in range(PROMPT - 1, len(sequence) - 1):
            ids = sequence[:PROMPT] if at == PROMPT - 1 else sequence[at : at + 1]
            theirs = loop.logits(ids).double().log_softmax(-1)
            largest = max(largest, (theirs - ours[at]).abs().max().item())
            top = ours[at].topk(2)
            positions += 1
            if (top.values[0] - top.values[1]).item() > 10 * bound:
                decided += 1
                other += theirs.argmax().item() != top.indices[0].item()
    return {
        "consumer": proof["consumer"],
        "largest": largest,
        "positions": positions,
        "decided": decided,
        "other_argmax": other,
        "tokens_equal": proof["outputs"] == generate_greedily(model, prompts, NEW_TOKENS),
        "seconds": round(written, 1),
    }


def main(family: str, folder: str, tokens: str, bound: str, *targets: str) -> None:
    chance = random.Random(0)
    if family == "smollm2":
        model, tokenizer = load_smollm2()
        sequences = [tokenizer(TEXT)["input_ids"][: int(tokens)]]
    else:
        model, tokenizer = exported_model(family)
        sequences = [[chance.randrange(len(tokenizer)) for _ in range(int(tokens))] for _ in range(3)]
    found = {}
    for target in targets:
        found[target] = measured(model, tokenizer, target, sequences, float(bound), Path(folder))
        print(family, target, found[target], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
