"""GRPO in plain sight: sample a group per prompt, score it, take the policy gradient, step. No trainer class.

    python examples/grpo_loop.py [STEPS]

The task is synthetic and learnable in a minute on two cores: answer a random prompt with even tokens.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import toolkit

NUM_GENERATIONS, PROMPTS, COMPLETION = 8, 8, 12
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
)
toolkit.patch(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
params = toolkit.SamplingParams(n=NUM_GENERATIONS, max_tokens=COMPLETION, temperature=1.0, ignore_eos=True)


def reward(tokens: list[int]) -> float:
    """The share of even tokens in a completion."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


first = last = 0.0
with toolkit.Engine(model, max_num_seqs=PROMPTS * NUM_GENERATIONS, seed=0) as engine:
    for step in range(steps):
        # 1. Rollout, from the parameters that are being trained.
        prompts = torch.randint(0, 64, (PROMPTS, 6)).tolist()
        completions = engine.generate(prompts, params)

        # 2. Advantages: each reward against the mean and standard deviation of its prompt's group.
        rewards = torch.tensor([reward(one.token_ids) for one in completions]).view(PROMPTS, NUM_GENERATIONS)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)

        # 3. The training forward. A group shares its prompt, which is computed once, forward and backward.
        sequences = [[*one.prompt_token_ids, *one.token_ids] for one in completions]
        logprobs = torch.stack([one[-COMPLETION:] for one in toolkit.token_logprobs(model, sequences)])

        # 4. The behaviour policy is what the engine returned: the ratio is exactly 1 before the step.
        behaviour = torch.tensor([one.logprobs for one in completions])
        ratio = (logprobs - behaviour).exp()
        assert torch.equal(logprobs.detach(), behaviour)
        clipped = ratio.clamp(0.8, 1.2)
        weight = advantages.flatten()[:, None]
        loss = -torch.minimum(ratio * weight, clipped * weight).mean()

        # 5. Step. The engine notices that the weights changed and drops its cached prefixes.
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = rewards.mean().item()
        first = first or last
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:3d}  reward {last:.3f}  loss {loss.item():+.4f}")
if steps >= 30:
    assert last > first + 0.2, (first, last)
