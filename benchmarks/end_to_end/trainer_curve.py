"""transformers' ``Trainer`` with and without the patch, from one seed: two loss curves and how far they part.

``python -m benchmarks.trainer_curve``: a small Llama on number sequences, gradients accumulated over two batches with
uneven numbers of labels. Writes the curves and their plot; exits with 1 if two losses of a step are further apart than
the limit.
"""

import argparse
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, print_table, write_json

LIMIT = 1e-4
VOCABULARY = 331


def synthetic_sequences(count: int = 256, length: int = 24) -> list[dict[str, Tensor]]:
    """Arithmetic sequences over the vocabulary: the first two tokens determine the rest."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        start, stride, ignored = (int(torch.randint(1, high, (), generator=generator)) for high in (VOCABULARY, 8, 12))
        ids = (start + stride * torch.arange(length)) % VOCABULARY
        labels = torch.where(torch.arange(length) < ignored, -100, ids)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def loss_curve(patched: bool, steps: int, seed: int = 3, **options: Any) -> list[float]:
    """The loss of each step; the same weights and order of data in both cases."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from toolkit.testing.models import random_model
    from train_patches.trainer import patch_trainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=steps,
            logging_steps=1, learning_rate=2e-3, report_to=[], save_strategy="no", use_cpu=True, seed=seed,
            disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Trainer(
            model=random_model("llama", vocabulary=VOCABULARY, tie_word_embeddings=True),
            args=arguments,
            train_dataset=synthetic_sequences(),
        )
        trainer.remove_callback(PrinterCallback)
        if patched:
            patch_trainer(trainer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(steps: int, seed: int = 3) -> dict[str, Any]:
    """Both curves, and the largest difference of two losses of one step."""
    curves = {name: loss_curve(name == "patched", steps, seed) for name in ("patched", "unpatched")}
    apart = max(abs(one - other) for one, other in zip(curves["patched"], curves["unpatched"], strict=True))
    return {"steps": steps, "seed": seed, "curves": curves, "largest_difference": apart, "limit": LIMIT}


def plot(result: dict[str, Any], path: Any) -> None:
    """The curves on top of each other, and their difference below."""
    from matplotlib.figure import Figure

    patched, unpatched = result["curves"]["patched"], result["curves"]["unpatched"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(unpatched, color="0.6", linewidth=3, label="unpatched")
    above.plot(patched, color="tab:blue", linewidth=1, label="patched")
    above.set_ylabel("loss, nats a token")
    above.legend()
    below.plot([abs(one - other) for one, other in zip(patched, unpatched)], color="tab:red", linewidth=1)
    below.axhline(result["limit"], color="0.6", linestyle="--", linewidth=1)
    below.set(yscale="log", ylabel="difference", xlabel="optimizer step")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    result = compare(arguments.steps, arguments.seed)
    losses = [[name, curve[0], curve[-1]] for name, curve in result["curves"].items()]
    print_table("transformers' Trainer, 0.1 M Llama, fp32", ["model", "first loss", "last loss"], losses)
    print(f"largest difference of one step's losses: {result['largest_difference']:.1e} (limit {LIMIT:.0e})")
    print(f"written to {write_json('trainer-curve', result)}")
    plot(result, RESULTS / "trainer-curve.png")
    if result["largest_difference"] > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
