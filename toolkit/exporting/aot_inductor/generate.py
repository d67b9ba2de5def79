"""Greedy generation by an AOTInductor package: torch alone is needed, neither this package nor the model's code.

A copy of this file lies in every export: ``python generate.py '[[1, 2, 3]]' --max-tokens 16`` prints lists of token
ids. ``program.json`` beside it says what the step takes: S sequences with T new tokens, R rows whose logits are
wanted, block tables of W columns and B blocks of state. Every size is at least 2.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 2
FOLDER = Path(__file__).resolve().parent


class Program:
    """A step of the model, and the state of its sequences.

    Args:
        folder: of the export.
        sequences: most of them.
        length: most tokens of one.
    """

    def __init__(self, folder: Path = FOLDER, sequences: int = 8, length: int = 4096) -> None:
        self.about = json.loads((folder / "program.json").read_text())
        self._library = load_ops(folder, self.about["ops"])
        self.step = torch._inductor.aoti_load_package(str(folder / "step.pt2"))
        self.sequences = max(sequences, SMALLEST)
        self.columns = max(-(-length // self.about["block_size"]), SMALLEST)
        self.state: dict[str, Tensor] = {}
        for one in self.about["inputs"]:
            if one["name"].startswith("state."):
                group = int(one["sizes"][0].removeprefix("B"))
                blocks = self.sequences * (1 if group in self.about["snapshot_groups"] else self.columns)
                shape = (blocks, *one["sizes"][1:])
                self.state[one["name"]] = torch.zeros(shape, dtype=getattr(torch, one["dtype"]))

    def logits(self, new: list[list[int]], past: list[int]) -> Tensor:
        """[number of new tokens, V] logits, one sequence after the other.

        Args:
            new: the next token ids of each sequence; those of a prompt may be given at once, or in several calls.
            past: how many tokens of each were given before.
        """
        size = self.about["block_size"]
        count, sequences = sum(map(len, new)), max(len(new), SMALLEST)
        extra, empty = max(SMALLEST - count, 0), sequences - len(new)
        positions = [[before + at for at in range(len(tokens))] for tokens, before in zip(new, past)]
        ends = torch.tensor([0, *map(len, new), *[0] * empty]).cumsum(0)
        columns = {
            "tokens": torch.tensor([token for tokens in new for token in tokens] + [0] * extra),
            "positions": torch.tensor([at for row in positions for at in row] + [0] * extra),
            "query_offsets": ends,
            "kv_lengths": torch.tensor([before + len(tokens) for tokens, before in zip(new, past)] + [0] * empty),
            "rows": torch.arange(count + extra),
            # Sequence s has the blocks s * columns, s * columns + 1, ...; a stored state is block s.
            "block_tables": torch.arange(sequences * self.columns).view(sequences, self.columns),
            "slot_mapping": torch.tensor(
                [s * self.columns * size + at for s, row in enumerate(positions) for at in row] + [-1] * extra
            ),
            "load_blocks": torch.tensor([s if before else -1 for s, before in enumerate(past)] + [-1] * empty),
            "store_rows": torch.cat([ends[1 : len(new) + 1] - 1, ends[len(new)].expand(empty) - 1]),
            "store_blocks": torch.tensor([*range(len(new)), *[-1] * empty]),
        }
        inputs = [one["name"] for one in self.about["inputs"]]
        given = [self.state[name] if name in self.state else columns[name.split(".")[0]] for name in inputs]
        output: Tensor = self.step(*given)
        return output[:count]

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """``max_tokens`` greedy tokens of each prompt, end-of-text tokens included; all prompts run together."""
        outputs: list[list[int]] = [[] for _ in prompts]
        new, past = [list(prompt) for prompt in prompts], [0] * len(prompts)
        for _ in range(max_tokens):
            last = torch.tensor([0, *map(len, new)]).cumsum(0)[1:] - 1
            chosen = self.logits(new, past)[last].argmax(-1).tolist()
            past = [before + len(tokens) for before, tokens in zip(past, new)]
            new = [[token] for token in chosen]
            for output, token in zip(outputs, chosen):
                output.append(token)
        return outputs


def load_ops(folder: Path, schemas: list[str]) -> torch.library.Library | None:
    """Load the ops' library, and define them unless that was done; the definitions live as long as the result."""
    missing = [one for one in schemas if not hasattr(torch.ops.toolkit, one.split("(")[0])]
    if not missing:
        return None
    library = torch.library.Library("toolkit", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    torch.ops.load_library(str(folder / "ops.so"))
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Print greedy tokens of prompts.")
    parser.add_argument("prompts", help="lists of token ids, as JSON")
    parser.add_argument("--max-tokens", type=int, default=16, help="of each (16)")
    args = parser.parse_args()
    prompts = json.loads(args.prompts)
    length = max(map(len, prompts)) + args.max_tokens
    print(json.dumps(Program(sequences=len(prompts), length=length).generate(prompts, args.max_tokens)))


if __name__ == "__main__":
    main()
