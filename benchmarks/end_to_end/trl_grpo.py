"""TRL's ``GRPOTrainer`` with the engine as its rollout against TRL with its own generation: the same trainer, twice.

``python -m benchmarks.trl_grpo``: a prompt, a group of completions, a reward, one update per step. First the gate:
greedy completions of both must be the same tokens, and on one batch both trainers must give the same loss and the
same norm of the gradient. Then times of whole steps in turns of runs, and the mismatch between rollout and training:
of the engine as ``train_patches.trl`` logs it, of TRL between the log-probabilities that ``generate`` computes and
those of its loss.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import MODELS, print_table, relative_error, summary, write_json
from benchmarks.end_to_end.grpo import EOS, gradient_norm, make_prompt, make_tokenizer, reward
from toolkit.training.losses import divergence_estimate

LIMIT = 1e-4  # of the relative difference of loss and gradient norm, float32 both
WARM = 1  # steps before the timed ones: programs are recorded, caches filled


class Steps:
    """Seconds of each step of a trainer."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        seconds: list[float] = []

        class Watch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.begun = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - self.begun)

        self.seconds, self.callback = seconds, Watch()


def make_trainer(model: Any, sizes: argparse.Namespace, folder: str, steps: int, **settings: Any) -> tuple[Any, Steps]:
    """A trainer on ``model`` whose every step is one group of completions of one prompt."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completion_ids: Any, **_: Any) -> list[float | None]:
        return [reward(ids) for ids in completion_ids]

    tokenizer, watch = make_tokenizer(), Steps()
    text = tokenizer.decode(make_prompt(sizes.prompt))
    generation = {"min_new_tokens": sizes.completion, **settings}
    config = GRPOConfig(
        output_dir=folder, max_steps=steps, num_generations=sizes.group, per_device_train_batch_size=sizes.group,
        max_completion_length=sizes.completion, temperature=1.0, top_k=0, beta=0.0, loss_type="grpo",
        learning_rate=1e-6, max_grad_norm=1e9, use_cpu=True, bf16=False, gradient_checkpointing=False,
        generation_kwargs=generation, logging_steps=1, save_strategy="no", report_to=[], seed=0, disable_tqdm=True,
        lr_scheduler_type="constant", shuffle_dataset=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[watch.callback], reward_funcs=rewards,
        train_dataset=Dataset.from_list([{"prompt": text}] * (steps * sizes.group)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, watch


def limits(sizes: argparse.Namespace) -> dict[str, Any]:
    return {"max_num_seqs": sizes.group, "max_model_len": sizes.prompt + sizes.completion}


def check(base: Any, sizes: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Greedy tokens, and loss and gradient norm on one batch, of both trainers from the same weights."""
    from train_patches.trl import engine_rollout

    source = torch.Generator().manual_seed(1)
    shape = (sizes.group, sizes.completion)
    ones = torch.ones(shape, dtype=torch.int64)
    prompts = torch.tensor([make_prompt(sizes.prompt)] * sizes.group)
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.randint(1, EOS, shape, generator=source), "completion_mask": ones,
        "advantages": torch.randn(sizes.group, generator=source), "num_items_in_batch": ones.sum(),
    }  # fmt: skip
    found = {}
    for name in ("trl", "engine"):
        trainer, _ = make_trainer(copy.deepcopy(base), sizes, folder, 1, do_sample=False)
        trainer.model.train()
        engine = engine_rollout(trainer, **limits(sizes)) if name == "engine" else None
        tokens, _ = trainer._generate_single_turn(prompts[:1].tolist(), None, {}, 1)
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        found[name] = {"tokens": tokens, "loss": float(loss.detach()), "gradient": gradient_norm(trainer.model)}
        if engine is not None:
            engine.close()
    one, other = found["engine"], found["trl"]
    error = relative_error(torch.tensor(one["gradient"]), torch.tensor(other["gradient"]))
    same = one["tokens"] == other["tokens"]
    green = same and error <= LIMIT and abs(one["loss"] - other["loss"]) <= LIMIT
    losses = {f"{name}_{key}": found[name][key] for name in found for key in ("loss", "gradient")}
    return {"greedy_tokens_equal": same, "gradient_error": error, **losses, "limit": LIMIT, "green": green}


def trl_mismatch(base: Any, sizes: argparse.Namespace, folder: str) -> tuple[float, float]:
    """(KL estimate, share of differing tokens) of one step of TRL's own: its generation against its loss."""
    trainer, _ = make_trainer(copy.deepcopy(base), sizes, folder, 1)
    generate, turn, loss = trainer.model.generate, trainer._generate_single_turn, trainer._compute_loss
    statistics_of = trainer._get_per_token_logps_and_entropies
    rolled: list[Tensor] = []
    trained: list[Tensor] = []
    compared: list[Tensor] = []

    def noting_generate(*args: Any, **kwargs: Any) -> Tensor:
        result = generate(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        logits = torch.stack(result.logits, 1)
        sampled = result.sequences[:, -logits.shape[1] :]
        rolled[:] = [logits.log_softmax(-1).gather(2, sampled[..., None]).squeeze(2)]
        return result.sequences

    def noting_statistics(*args: Any, **kwargs: Any) -> Any:
        result = statistics_of(*args, **kwargs)
        trained[:] = [result[0].detach()]
        return result

    def noting_loss(model: Any, inputs: Any) -> Tensor:
        value = loss(model, inputs)  # the trainer shuffles samples, and carries these numbers with them
        compared[:] = [trained[0].double() - inputs["sampling_per_token_logps"].double()]
        return value

    trainer.model.generate = noting_generate
    trainer._generate_single_turn = lambda *args: (turn(*args)[0], rolled[0].tolist())
    trainer._get_per_token_logps_and_entropies = noting_statistics
    trainer._compute_loss = noting_loss
    trainer.train()
    return float(divergence_estimate(compared[0]).mean()), float((compared[0] != 0.0).double().mean())


def measure(base: Any, sizes: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Seconds a step of both, and both mismatches."""
    from train_patches.trl import engine_rollout

    seconds: dict[str, list[float]] = {"engine": [], "trl": []}
    logged: dict[str, list[float]] = {"mismatch/kl": [], "mismatch/bits": []}
    for _ in range(sizes.turns):
        for name, times in seconds.items():
            trainer, watch = make_trainer(copy.deepcopy(base), sizes, folder, WARM + sizes.repeats)
            engine = engine_rollout(trainer, **limits(sizes)) if name == "engine" else None
            trainer.train()
            times += watch.seconds[WARM:]
            for key, values in logged.items():
                values += [entry[key] for entry in trainer.state.log_history if key in entry]
            if engine is not None:
                engine.close()
    divergence, bits = trl_mismatch(base, sizes, folder)
    return {
        "timings": {name: summary(times) for name, times in seconds.items()},
        "mismatch_kl": {"engine": statistics.fmean(logged["mismatch/kl"]), "trl": divergence},
        "mismatch_bits": {"engine": statistics.fmean(logged["mismatch/bits"]), "trl": bits},
    }


def run(sizes: argparse.Namespace) -> dict[str, Any]:
    """The gate and, where it is green, the measurement."""
    base = MODELS["llama"](num_hidden_layers=sizes.layers).train()
    with tempfile.TemporaryDirectory() as folder:
        gate = check(base, sizes, folder)
        result: dict[str, Any] = {**vars(sizes), "gate": gate}
        return result | measure(base, sizes, folder) if gate["green"] else result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--num-generations", dest="group", type=int, default=8)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8, help="of the Llama, hidden size 512; 8 make 32 M parameters")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    result = run(sizes)
    gate = result["gate"]
    print(
        f"gate: greedy tokens {'equal' if gate['greedy_tokens_equal'] else 'differ'}, loss {gate['engine_loss']:.3e} "
        f"and {gate['trl_loss']:.3e}, gradient norms differ by {gate['gradient_error']:.1e} (limit {LIMIT:.0e})"
    )
    if not gate["green"]:
        print("the gate failed: no speed is reported", file=sys.stderr)
        raise SystemExit(1)
    times = {name: one["median_s"] for name, one in result["timings"].items()}
    rows = [
        [label, times[name], f"{result['mismatch_kl'][name]:.1e}", f"{100 * result['mismatch_bits'][name]:.1f} %"]
        for name, label in (("engine", "engine"), ("trl", "TRL's own"))
    ]
    title = (
        f"GRPOTrainer, prompt {sizes.prompt}, group {sizes.group}, completion {sizes.completion}, {sizes.layers} layers"
    )
    print_table(title, ["rollout", "s a step", "mismatch KL", "differing tokens"], rows)
    print(f"a step takes {times['trl'] / times['engine']:.2f}x as long with TRL's own generation")
    print(f"written to {write_json(f'trl-grpo-{sizes.prompt}x{sizes.group}x{sizes.completion}', result)}")


if __name__ == "__main__":
    main()
