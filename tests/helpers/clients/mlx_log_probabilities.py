"""MLX on a CPU opens a folder: log-probabilities of sequences, and greedy tokens after prompts.

Arguments: the folder; a JSON file of {"sequences": lists of tokens, "prompts": lists of tokens, "new_tokens": number};
a file of numpy for the log-probabilities (s0, s1, ... [tokens, vocabulary]).
The last line is {"generated": lists of tokens}.
"""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)
folder, asked, out = sys.argv[1:]
with open(asked) as file:
    work = json.load(file)
model, _ = load(folder)
found = {}
for at, sequence in enumerate(work["sequences"]):
    logits = model(mx.array([sequence]))[0].astype(mx.float32)
    found[f"s{at}"] = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
np.savez(out, **found)
generated = []
for prompt in work["prompts"]:
    steps = generate_step(mx.array(prompt), model, max_tokens=work["new_tokens"])
    generated.append([int(token) for token, _ in steps])
print(json.dumps({"generated": generated}))
