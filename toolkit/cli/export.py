"""``toolkit export``: a plain checkpoint, reloaded by unpatched transformers and compared token by token."""

import argparse
from typing import Any

PROMPTS = 8
TOKENS = 64


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("export", help="write a checkpoint that other engines open, and check it")
    parser.add_argument("model", help="checkpoint folder or training run")
    parser.add_argument("target", help="new folder to write")
    parser.add_argument("--format", default="hf", help="hf: safetensors, config, tokenizer, manifest (default)")
    parser.add_argument("--no-check", action="store_true", help="do not reload the export and compare its tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the export was written and, unless --no-check is given, generates the same greedy tokens."""
    import random

    from toolkit.cli.verify import real_prompts
    from toolkit.engine import Engine, SamplingParams
    from toolkit.exporting import export
    from toolkit.loading import load_model
    from toolkit.patching.adapters import vocabulary_size

    model, tokenizer = load_model(args.model)
    with Engine(model, tokenizer) as engine:
        path = export(model, args.target, args.format, tokenizer)
        print(f"exported {args.model} to {path}")
        if args.no_check or args.format != "hf":
            return 0
        prompts = real_prompts(tokenizer, vocabulary_size(model), random.Random(0))[:PROMPTS]
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        ours = [completion.token_ids for completion in engine.generate(prompts, params)]
    same = sum(list(a) == list(b) for a, b in zip(ours, greedy_tokens(str(path), prompts)))
    print(f"unpatched transformers on the export: {same} of {PROMPTS} prompts give the same {TOKENS} greedy tokens")
    return 0 if same == PROMPTS else 1


def greedy_tokens(path: str, prompts: list[list[int]]) -> list[list[int]]:
    """What stock transformers generates from the checkpoint at ``path``: greedy, eager attention, prompt by prompt."""
    import torch
    from transformers import AutoConfig

    from toolkit.loading import auto_class

    opener = auto_class(AutoConfig.from_pretrained(path, local_files_only=True))
    model = opener.from_pretrained(path, attn_implementation="eager", local_files_only=True).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=0,
        )
        outputs.append(generated[0, len(prompt) :].tolist())
    return outputs
