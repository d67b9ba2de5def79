"""A GRPO step against TRL's ``GRPOTrainer`` on the same work: loss and gradients first, then time, then peak memory.

``python -m benchmarks.grpo``: a prompt, a group of completions, a reward, one update. Both sides start from the same
weights; on the completions that TRL sampled, both must give the same loss and the same norm of the gradient. Times are
of whole steps, rollout included, in turns in one process. Peak memory is that of the training part alone, each side in
a fresh process.
"""

import argparse
import copy
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import MODELS, in_fresh_process, peak_rss, print_table, relative_error, summary, write_json

VOCABULARY = 8192
EOS = VOCABULARY - 1
LIMIT = 1e-4  # of the gradient norm's relative difference, float32 both
MEMORY_WAYS = ("shared", "unshared", "unpatched")


def make_tokenizer() -> Any:
    """A word a token, ``t0`` to ``t8191``: prompts of exact length in both programs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{EOS}", pad_token=f"t{EOS}")


def make_prompt(length: int) -> list[int]:
    source = random.Random(0)
    return [source.randrange(1, EOS) for _ in range(length)]


def reward(tokens: Sequence[int]) -> float:
    """Part of the tokens that are even: something to judge by, in no time."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


class Ours:
    """The engine rolls out from the training weights; the group is trained on as a prefix tree."""

    def __init__(self, model: Any, prompt: list[int], group: int, completion: int) -> None:
        import toolkit

        toolkit.patch(model)
        self.model, self.prompt, self.group, self.completion = model, prompt, group, completion
        self.engine = toolkit.Engine(model, max_num_seqs=group, max_model_len=len(prompt) + completion, seed=0)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.step_number = 0
        self.rollout_s: list[float] = []
        self.differing = 0

    def loss(self, completions: Sequence[Sequence[int]], behaviour: Sequence[Tensor] | None = None) -> Tensor:
        from toolkit.patching import token_logprobs
        from toolkit.training.losses import group_advantages, policy_loss

        advantages = group_advantages(torch.tensor([[reward(one) for one in completions]]))[0]
        lengths = [len(one) for one in completions]
        train = token_logprobs(self.model, [[*self.prompt, *one] for one in completions], last=lengths)
        parts = []
        for at, (values, advantage) in enumerate(zip(train, advantages)):
            rolled = values.detach() if behaviour is None else behaviour[at]
            self.differing += int((rolled != values.detach()).sum())
            parts.append(policy_loss(values, rolled, advantage).loss.mean())
        return torch.stack(parts).mean()

    def step(self) -> None:
        from toolkit import SamplingParams

        self.step_number += 1
        begun = time.perf_counter()
        params = SamplingParams(
            n=self.group, max_tokens=self.completion, temperature=1.0, ignore_eos=True, seed=self.step_number
        )
        samples = self.engine.generate([self.prompt], params)
        self.rollout_s.append(time.perf_counter() - begun)
        loss = self.loss([one.token_ids for one in samples], [torch.tensor(one.logprobs) for one in samples])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_trl(model: Any, prompt: list[int], group: int, completion: int, micro: int, steps: int) -> dict[str, Any]:
    """Steps of TRL with its default generation: seconds of each; of the first, completions, loss and gradient."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen: dict[str, Any] = {"seconds": [], "completions": [], "loss": 0.0}

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seen["begun"] = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if "gradient" not in seen:
                seen["gradient"] = gradient_norm(model)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen["seconds"].append(time.perf_counter() - seen["begun"])

    class Trainer(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            if not seen["seconds"]:  # the first step: what both sides must agree on
                ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
                seen["completions"] += [row[kept].tolist() for row, kept in zip(ids, mask)]
                seen["loss"] += float(loss.detach())
            return loss

    def rewards(completion_ids: Any, **_: Any) -> list[float | None]:
        return [reward(ids) for ids in completion_ids]

    tokenizer = make_tokenizer()
    text = tokenizer.decode(prompt)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=steps, num_generations=group, per_device_train_batch_size=micro,
            gradient_accumulation_steps=group // micro, max_completion_length=completion,
            temperature=1.0, beta=0.0, loss_type="grpo", learning_rate=1e-6, max_grad_norm=1e9, use_cpu=True,
            bf16=False, gradient_checkpointing=False, generation_kwargs={"min_new_tokens": completion},
            logging_strategy="no", save_strategy="no", report_to=[], seed=0, disable_tqdm=True,
            lr_scheduler_type="constant", shuffle_dataset=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=config, processing_class=tokenizer, callbacks=[Watch()],
            train_dataset=Dataset.from_list([{"prompt": text}] * (steps * group)),
            reward_funcs=rewards,
        )  # fmt: skip
        trainer.train()
    return seen


def gradient_norm(model: Any) -> float:
    grads = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(grads).norm())


def check(model: Any, prompt: list[int], group: int, completion: int, trl: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient norm on TRL's first completions, from the same weights."""
    ours = Ours(model, prompt, group, completion)
    loss = ours.loss(trl["completions"])
    loss.backward()
    ours.engine.close()
    gradient = gradient_norm(model)
    error = relative_error(torch.tensor(gradient), torch.tensor(trl["gradient"]))
    result = {
        "loss": float(loss.detach()),
        "trl_loss": trl["loss"],
        "gradient": gradient,
        "trl_gradient": trl["gradient"],
    }
    green = error <= LIMIT and abs(result["loss"] - result["trl_loss"]) <= 1e-6 and len(trl["completions"]) == group
    return {**result, "gradient_error": error, "limit": LIMIT, "green": green}


def measure_memory(arguments: argparse.Namespace) -> None:
    """In this process alone: forward and backward of a group; prints JSON as the last line."""
    model = MODELS["llama"]()
    source = random.Random(1)
    prompt = make_prompt(arguments.prompt)
    samples = [prompt + [source.randrange(EOS) for _ in range(arguments.completion)] for _ in range(arguments.group)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    count = arguments.completion
    run: Callable[[], Tensor]
    if arguments.memory_of == "unpatched":

        def run() -> Tensor:
            """TRL's way: a micro-batch after the other, each with its backward."""
            total = torch.zeros((), requires_grad=True)
            for ids in torch.tensor(samples).split(arguments.micro):
                logits = model(ids, logits_to_keep=count + 1, use_cache=False).logits[:, :-1]
                loss = logits.log_softmax(-1).gather(2, ids[:, -count:, None]).mean()
                (-loss).backward()
            return total
    else:
        import toolkit

        toolkit.patch(model)
        toolkit.token_logprobs(model, [[1, 2, 3]])[0].sum().backward()  # what the first call sets up

        def run() -> Tensor:
            share = arguments.memory_of == "shared"
            return torch.stack(toolkit.token_logprobs(model, samples, share, [count] * len(samples))).mean()

    model.train()
    before = peak_rss()
    (-run()).backward()
    print(json.dumps({"before": before, "peak": peak_rss()}))


def case(prompt_tokens: int, group: int, completion: int, micro: int, repeats: int, threads: int) -> dict[str, Any]:
    """Both sides at one size."""
    name = f"prompt {prompt_tokens}, group {group}, completion {completion}"
    prompt = make_prompt(prompt_tokens)
    model = MODELS["llama"]()
    peer = copy.deepcopy(model).train()
    begun = time.perf_counter()
    trl = run_trl(peer, prompt, group, completion, micro, 1 + repeats)
    print(f"{name}: TRL ran {1 + repeats} steps in {time.perf_counter() - begun:.0f} s")
    gate = check(copy.deepcopy(model).train(), prompt, group, completion, trl)
    print(
        f"gate: loss {gate['loss']:.2e} and {gate['trl_loss']:.2e}, gradient norm {gate['gradient']:.6f} and "
        f"{gate['trl_gradient']:.6f} (relative difference {gate['gradient_error']:.1e}, limit {LIMIT:.0e})"
    )
    if not gate["green"]:
        print("the gate failed: no speed is reported", file=sys.stderr)
        raise SystemExit(1)
    ours = Ours(model.train(), prompt, group, completion)
    seconds = []
    for _ in range(2 + repeats):  # the first two record programs and fill caches
        start = time.perf_counter()
        ours.step()
        seconds.append(time.perf_counter() - start)
    ours.engine.close()
    timings = {"toolkit": summary(seconds[2:]), "trl": summary(trl["seconds"][1:])}
    common = ["--prompt", str(prompt_tokens), "--num-generations", str(group), "--completion", str(completion)]
    common += ["--micro", str(micro), "--threads", str(threads)]
    memory = {way: in_fresh_process("benchmarks.end_to_end.grpo", "--memory-of", way, *common) for way in MEMORY_WAYS}
    used = {way: one["peak"] - one["before"] for way, one in memory.items()}
    ratios = {
        "speed": timings["trl"]["median_s"] / timings["toolkit"]["median_s"],
        # At small sizes the peak is that of loading, and there is nothing to compare.
        "memory_of_unshared": used["shared"] / used["unshared"] if used["unshared"] else math.nan,
        "memory_of_unpatched": used["shared"] / used["unpatched"] if used["unpatched"] else math.nan,
        "peak_of_unshared": memory["shared"]["peak"] / memory["unshared"]["peak"],
    }
    rollout = statistics.median(ours.rollout_s[2:])
    rows = [
        ["toolkit", timings["toolkit"]["median_s"], rollout, used["shared"] / 2**30],
        ["TRL", timings["trl"]["median_s"], "", used["unpatched"] / 2**30],
        [
            "TRL / toolkit",
            f"{ratios['speed']:.2f}x",
            "",
            f"{(used['unpatched'] / used['shared'] if used['shared'] else math.nan):.2f}x",
        ],
    ]
    print_table(f"{name}, 32 M Llama, fp32", ["side", "s a step", "of it rollout", "training GiB"], rows)
    print(
        f"training memory above weights and gradients: {ratios['memory_of_unshared']:.2f}x the unshared batch's, "
        f"{ratios['memory_of_unpatched']:.2f}x the unpatched model's; differing bits: {ours.differing}"
    )
    return {
        "prompt": prompt_tokens, "group": group, "completion": completion, "gate": gate, "timings": timings,
        "rollout_s": rollout, "memory_bytes": memory, "ratios": ratios, "differing": ours.differing,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--num-generations", dest="group", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--micro", type=int, default=8, help="TRL's samples per forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=MEMORY_WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        measure_memory(arguments)
        return
    result = case(
        arguments.prompt, arguments.group, arguments.completion, arguments.micro, arguments.repeats, arguments.threads
    )
    name = f"grpo-{arguments.prompt}x{arguments.group}x{arguments.completion}"
    print(f"written to {write_json(name, result)}")


if __name__ == "__main__":
    main()
