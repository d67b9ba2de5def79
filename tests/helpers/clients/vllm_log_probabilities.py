"""vLLM on a CPU opens a folder, in this process: log-probabilities of the tokens of sequences.

Arguments: the folder; a JSON file of {"sequences": lists of tokens, "top": most probable tokens to show}.
vLLM's build for processors without AVX-512 lacks the op that multiplies by 4-bit weights (``cpu_gemm_wna16``). There it
is computed here, from the weights as vLLM has read and arranged them.
The last line is {"version": vLLM's, "own_op": whether that op is vLLM's, "prompt_logprobs": of each sequence the
positions behind its first token, {token: [log-probability, rank]} each}.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm
from vllm.platforms import current_platform

OP = "cpu_gemm_wna16"
current_platform.import_kernels()
OWN = hasattr(torch.ops._C, OP)


def multiply(x, weights, out, scales, zeros, bias, pack_factor: int, isa_hint: str) -> None:
    """``out`` [tokens, outputs]: codes lie in blocks of 16 outputs, 8 to a word, beside each other for each input."""
    assert zeros is None
    groups, outputs = scales.shape
    shifts = torch.arange(0, 32, 32 // pack_factor)
    codes = (weights.view(outputs // 16, -1, 16 // pack_factor, 1) >> shifts) & 15
    codes = codes.flatten(-2).permute(1, 0, 2).reshape(-1, outputs)
    values = (codes - 8).view(groups, -1, outputs) * scales.unsqueeze(1)
    out.copy_(x @ values.flatten(0, 1).to(x.dtype))
    if bias is not None:
        out.add_(bias)


if not OWN:
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        f"{OP}(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )
    library.impl(OP, multiply, "CPU")

folder, asked = sys.argv[1:]
with open(asked) as file:
    work = json.load(file)
model = vllm.LLM(
    model=folder, dtype="float32", max_model_len=256, max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=True
)
params = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=work["top"], detokenize=False)
found = model.generate([{"prompt_token_ids": one} for one in work["sequences"]], params)
shown = [
    [{token: [one.logprob, one.rank] for token, one in position.items()} for position in output.prompt_logprobs[1:]]
    for output in found
]
print()
print(json.dumps({"version": vllm.__version__, "own_op": OWN, "prompt_logprobs": shown}), flush=True)
