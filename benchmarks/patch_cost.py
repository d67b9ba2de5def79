"""What ``toolkit.patch`` costs: seconds, and the most memory beside the weights, for models of real widths.

``python -m benchmarks.patch_cost`` patches each in a fresh process. Weights are zeros that a system maps when they are
written, so that a model whose weights do not fit is measured too: a probe makes its own, and few copies of a model's.
"""

import argparse
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import toolkit
from benchmarks.common import in_fresh_process, peak_rss, print_table, write_json
from toolkit.strict_json import strict_json

COMMON = {"num_key_value_heads": 8, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
# transformers' model type and settings.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.6 B (Qwen3-0.6B)": ("qwen3", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "1 B (Llama-3.2-1B)": ("llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "8 B (Llama-3.1-8B)": ("llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
    }),
    "Mixtral-8x7B's width, 2 layers": ("mixtral", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
    }),
}  # fmt: skip

WARM_UP = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8,
}  # fmt: skip


def lazy_model(model_type: str, settings: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A causal LM whose large parameters are zeros that nothing has written yet."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **COMMON, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    zeros: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in zeros:
                zeros[id(parameter)] = torch.nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, zeros[id(parameter)])
    # Rotary tables are buffers, which a meta device does not compute.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def measure(shape: str, dtype: str, numerics: str, device: str) -> dict[str, float]:
    """Seconds and bytes of one patch, in this process."""
    model = lazy_model(*SHAPES[shape], getattr(torch, dtype), device)
    toolkit.patch(lazy_model("llama", WARM_UP, torch.float32, device))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what there is now
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else _resident()
    began, cpu = time.perf_counter(), time.process_time()
    report = toolkit.patch(model, numerics=numerics)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_rss()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "weights_gib": weights / 2**30,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "extra_gib": (peak - before) / 2**30,
        "claims": len(report.claims),
        "skipped": len(report.skipped),
    }


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("The resident memory of a process must be in /proc/self/status, got no such line.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a shape's name")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--numerics", default="bitwise", choices=["bitwise", "fast"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write benchmarks/results/<JSON>.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(strict_json(measure(options.one, options.dtype, options.numerics, options.device)))
        return
    settings = ["--dtype", options.dtype, "--numerics", options.numerics, "--device", options.device]
    settings += ["--threads", str(options.threads)]
    found = {
        shape: in_fresh_process("benchmarks.patch_cost", "--one", shape, *settings)
        for shape in SHAPES
        if options.only in shape
    }
    print_table(
        f"toolkit.patch, {options.dtype}, {options.numerics}, {options.device}, threads: {options.threads}",
        ["model", "weights GiB", "seconds", "CPU seconds", "extra GiB", "claims", "skipped"],
        [[shape, *row.values()] for shape, row in found.items()],
    )
    if options.json:
        write_json(options.json, {"settings": vars(options), "rows": found})


if __name__ == "__main__":
    main()
