"""Sample from the model that is being trained; training computes the same log-probabilities, bit for bit.

python examples/rollout_and_verify.py
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import toolkit

torch.manual_seed(0)
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
)
toolkit.patch(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prompts = [torch.randint(0, 512, (length,)).tolist() for length in (5, 17, 40)]

# The engine holds the model's own parameters: it sees every optimizer step, and nothing is copied.
with toolkit.Engine(model, max_num_seqs=8, seed=0) as engine:
    for step in range(3):
        params = toolkit.SamplingParams(n=4, max_tokens=24, temperature=1.0)
        completions = engine.generate(prompts, params)

        sequences = [[*one.prompt_token_ids, *one.token_ids] for one in completions]
        trained = toolkit.token_logprobs(model, sequences)  # the training forward; shared prompts are computed once

        compared = differing = 0
        for completion, logprobs in zip(completions, trained):
            rollout = torch.tensor(completion.logprobs)
            training = logprobs[-len(completion.token_ids) :].detach()
            compared += len(rollout)
            differing += int((rollout != training).sum())
        print(f"step {step}: {differing} of {compared} sampled tokens differ in any bit")
        assert differing == 0

        # On-policy by construction: the ratio of the two policies is exactly 1, so no importance weights are needed.
        loss = -torch.cat([one[-8:] for one in trained]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
