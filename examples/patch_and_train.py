"""Patch a Hugging Face model once and train it in your own loop, with and without padding.

    python examples/patch_and_train.py [MODEL]

MODEL is a local folder or a name on the hub; without it a small random Llama is trained.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import toolkit

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)

batch = torch.randint(0, model.config.vocab_size, (4, 64))
with torch.no_grad():
    before = model(batch, labels=batch).loss

report = toolkit.patch(model)  # replaces forwards in place; `toolkit.unpatch(model)` takes them back
print(report)  # one line per role: what was replaced, with the largest error of its probe, and what was skipped and why

with torch.no_grad():
    after = model(batch, labels=batch).loss
print(f"loss before {before:.6f}, after {after:.6f}: the same model")
torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)

# The usual loop: the model keeps its class, its parameter names and its forward's signature.
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(10):
    loss = model(batch, labels=batch).loss  # taken from the hidden states: the logits are never stored
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.4f}")
assert loss < after

# Sequences of different lengths need no padding: one flat batch, common prefixes computed once.
prompt = batch[0, :32].tolist()
samples = [[*prompt, 7, 8, 9], [*prompt, 10], [1, 2, 3]]
logprobs = toolkit.token_logprobs(model, samples)  # one tensor [len - 1] per sequence, differentiable
print("tokens trained on:", [len(one) for one in logprobs])
