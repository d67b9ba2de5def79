"""The figures of the first page: the README's table and picture, from the committed results.

``python -m benchmarks.picture`` prints the table and plots ``docs/picture.svg``; nothing is measured here.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import RESULTS

PICTURE = Path(__file__).parent.parent / "docs" / "picture.svg"


class Row(NamedTuple):
    """One comparison: what was measured, ours and the best peer's figure with units, how many times faster, where."""

    metric: str
    ours: str
    peer: str
    ratio: float
    hardware: str


def rows(folder: Path = RESULTS) -> list[Row]:
    """The comparisons of the first page, the largest ratio first."""
    serve, train, moe, grpo = (_read(folder, name) for name in ("serve-llama", "train-llama", "moe", "grpo-512x8x64"))
    batch = serve["batches"]["16"]["tokens_per_s"]
    generation, training = moe["generation"], moe["training"]
    found = [
        Row(
            "GRPO step, 32 M Llama, prompt 512, 8 generations of 64",
            f"{grpo['timings']['toolkit']['median_s']:.1f} s",
            f"{grpo['timings']['trl']['median_s']:.1f} s, TRL `GRPOTrainer`",
            grpo["ratios"]["speed"],
            _hardware(grpo),
        ),
        Row(
            "Generation, 32 M Llama, 16 × (128 + 128) tokens, greedy",
            f"{batch['toolkit']:,.0f} tok/s",
            f"{batch['generate']:,.0f} tok/s, transformers `generate`",
            batch["toolkit"] / batch["generate"],
            _hardware(serve),
        ),
        Row(
            "Generation, 89 M Qwen3-MoE, 16 × (128 + 128) tokens, greedy",
            f"{generation['tokens_per_s']['engine']:,.0f} tok/s",
            f"{generation['tokens_per_s'][generation['best']]:,.0f} tok/s, transformers, its fastest experts",
            generation["ratio"],
            _hardware(moe),
        ),
        Row(
            "Training step, 89 M Qwen3-MoE, 4 × 512 tokens",
            f"{training['tokens_per_s']['patched']:,.0f} tok/s",
            f"{training['tokens_per_s']['grouped_mm']:,.0f} tok/s, transformers `grouped_mm`",
            training["ratios"]["grouped_mm"],
            _hardware(moe),
        ),
        Row(
            "Training step, 32 M Llama, 4 × 512 tokens",
            f"{train['tokens_per_s']['patched']:,.0f} tok/s",
            f"{train['tokens_per_s']['unpatched']:,.0f} tok/s, the same model unpatched",
            1 / train["ratios"]["time"],
            _hardware(train),
        ),
    ]
    return sorted(found, key=lambda row: -row.ratio)


def table(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| metric | ours | best peer | ratio | hardware |", "|---|---|---|---|---|"]
    lines += [f"| {one.metric} | {one.ours} | {one.peer} | **{one.ratio:.2f}×** | {one.hardware} |" for one in found]
    return "\n".join(lines)


def plot(found: list[Row], path: Path = PICTURE) -> Path:
    """Plot the ratios as bars; the same rows give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "toolkit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.6, 2.9))
    names = [one.metric.split(",")[0] + "\n" + one.metric.split(",")[1].strip() for one in found]
    axes.barh(names, [one.ratio for one in found], color="#2b6cb0", height=0.62)
    for index, one in enumerate(found):
        label = f"{one.ratio:.1f}×   {one.ours} against {one.peer.replace('`', '')}"
        axes.text(one.ratio + 0.05, index, label, va="center", fontsize=8)
    axes.axvline(1, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, max(one.ratio for one in found) * 1.75)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("times faster than the peer (dashed: equal), two CPU cores", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _read(folder: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return value


def _hardware(result: dict[str, Any]) -> str:
    machine = result["machine"]
    name = machine["processor"].replace("(R)", "").replace(" Processor", "")
    return f"{machine['cores']} cores, {name}, {machine['cpu_capability'].replace('AVX512', 'AVX-512')}"


def main() -> None:
    found = rows()
    print(table(found))
    print(f"written: {plot(found)}")


if __name__ == "__main__":
    main()
