"""Export a patched model and open the folder with unpatched transformers: same greedy tokens.

python examples/export_and_open.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toolkit

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4)
)
toolkit.patch(model)
prompt = [1, 5, 9, 13, 2]
with toolkit.Engine(model) as engine:
    ours = engine.generate([prompt], toolkit.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))[0].token_ids

folder = Path(tempfile.mkdtemp()) / "exported"
toolkit.export(model, folder)  # safetensors, config, generation config and a manifest; all of it or nothing is written
print("written:", ", ".join(sorted(path.name for path in folder.iterdir())))

# A separate process that never imports toolkit.
program = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokens = model.generate(torch.tensor([{prompt}]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
print(*tokens[0, {len(prompt)}:].tolist())
"""
done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
theirs = [int(token) for token in done.stdout.split()]
print("engine:      ", ours)
print("transformers:", theirs)
assert theirs == list(ours)
