"""The unmodified tinker client: supervised steps, a loop of reinforcement on sums, custom losses, saving and resuming.

Its arguments are the server's address and the model. The last line is JSON with what it saw.
"""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import tinker
from tinker import types

URL, MODEL = sys.argv[1:]
PROBLEMS = [(f"{a}+{b}=", str(a + b)) for a in range(1, 5) for b in range(1, 5)]


def there(given):
    """What a client's call gives: older versions return it, newer ones a future of it."""
    return given.result() if hasattr(given, "result") else given


def datum(tokens, prompt_length, **inputs):
    """A sequence whose inputs are 0 in the prompt."""
    rows = {name: [0.0] * (prompt_length - 1) + [float(one) for one in values] for name, values in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:], **rows}
    )


def supervised(training, tokenizer, steps, learning_rate):
    """The mean loss of a sum's token at each step."""
    data = []
    for problem, total in PROBLEMS:
        prompt, whole = tokenizer.encode(problem), tokenizer.encode(problem) + tokenizer.encode(total)
        data.append(datum(whole, len(prompt), weights=[1.0] * (len(whole) - len(prompt))))
    count = sum(sum(one.loss_fn_inputs["weights"].data) for one in data)
    losses = []
    for _ in range(steps):
        found = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
        losses.append(found.result().metrics["loss:sum"] / count)
    return losses


def reinforced(training, tokenizer, steps, group, learning_rate):
    """(mean rewards, largest |sampled - trained| log-probability) of each step."""
    rewards, differences = [], []
    for step in range(steps):
        sampler = there(training.save_weights_and_get_sampling_client())
        pending = []
        for at, (problem, total) in enumerate(PROBLEMS):
            prompt = tokenizer.encode(problem)
            params = types.SamplingParams(max_tokens=len(tokenizer.encode(total)), seed=1000 * step + at, stop=[])
            future = sampler.sample(types.ModelInput.from_ints(prompt), num_samples=group, sampling_params=params)
            pending.append((prompt, total, future))
        data, sampled, of_step = [], [], []
        for prompt, total, future in pending:
            sequences = future.result().sequences
            scores = np.array([float(tokenizer.decode(one.tokens) == total) for one in sequences])
            of_step.append(scores.mean())
            for one, advantage in zip(sequences, scores - scores.mean()):
                inputs = {"logprobs": one.logprobs, "advantages": [advantage] * len(one.tokens)}
                data.append(datum(prompt + list(one.tokens), len(prompt), **inputs))
                sampled.append(np.array(one.logprobs, np.float32))
        found = training.forward_backward(data, "importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
        trained = [one["logprobs"].to_numpy() for one in found.result().loss_fn_outputs]
        differences.append(max(float(np.abs(row[-len(one) :] - one).max()) for row, one in zip(trained, sampled)))
        rewards.append(float(np.mean(of_step)))
    return rewards, differences


def resumed(service, training, tokenizer):
    """Losses behind a checkpoint, of the client that saved it and of one that resumes from it."""
    path = training.save_state("before").result().path
    again = there(service.create_training_client_from_state_with_optimizer(path))
    return [supervised(one, tokenizer, 2, 1e-3) for one in (training, again)]


def downloaded(path):
    """The files that ``tinker checkpoint download`` writes; None where this client downloads in another way."""
    if not hasattr(training, "save_weights_external"):
        return None
    command = [sys.executable, "-m", "tinker.cli", "checkpoint", "download", path, "--output", "downloads"]
    subprocess.run(command, check=True, env=os.environ | {"TINKER_BASE_URL": URL, "TINKER_API_KEY": "tml-secret"})
    return sorted(one.name for one in pathlib.Path("downloads").glob("**/*") if one.is_file())


service = tinker.ServiceClient(base_url=URL, api_key="tml-secret")
training = there(service.create_lora_training_client(base_model=MODEL, rank=16, seed=0))
tokenizer = training.get_tokenizer()
seen = {"version": tinker.__version__, "supervised": supervised(training, tokenizer, 4, 1e-2)}
seen["rewards"], seen["differences"] = reinforced(training, tokenizer, 20, 8, 2e-3)


def squares(data, logprobs):
    loss = sum((one**2).sum() for one in logprobs)
    return loss, {"squares": float(loss.detach())}


try:
    import torch  # noqa: F401

    one = datum(tokenizer.encode("1+1=2"), 2, weights=[1.0] * (len(tokenizer.encode("1+1=2")) - 2))
    seen["custom"] = training.forward_backward_custom([one], squares).result().metrics
    training.optim_step(types.AdamParams(learning_rate=0.0)).result()
except ImportError:
    seen["custom"] = None
seen["resumed"] = resumed(service, training, tokenizer)
path = training.save_weights_for_sampler("last").result().path
sampler = there(service.create_sampling_client(model_path=path))
seen["scored"] = sampler.compute_logprobs(types.ModelInput.from_ints(tokenizer.encode("2+2=4"))).result()
kinds = inspect.signature(training.save_weights_and_get_sampling_client).parameters
kind = {"kind": "inflight"} if "kind" in kinds else {}
inflight = there(training.save_weights_and_get_sampling_client(**kind))
seen["inflight"] = bool(kind)
params = types.SamplingParams(max_tokens=4, temperature=0)
asked = (types.ModelInput.from_ints(tokenizer.encode("2+2=")), 1, params)
seen["same"] = [list(one.sample(*asked).result().sequences[0].tokens) for one in (sampler, inflight)]
rest, run = service.create_rest_client(), training.model_id
listed = there(rest.list_checkpoints(run)).checkpoints
seen["listed"] = sorted(one.checkpoint_id for one in listed)
seen["runs"] = [one.training_run_id for one in there(rest.list_training_runs()).training_runs]
there(rest.set_checkpoint_ttl_from_tinker_path(path, 7200))
expires = {one.tinker_path: one.expires_at for one in there(rest.list_user_checkpoints()).checkpoints}
seen["expiring"] = [name for name, at in expires.items() if at is not None]
seen["downloaded"] = downloaded(f"tinker://{run}/weights/before")
there(rest.delete_checkpoint_from_tinker_path(path))
seen["left"] = sorted(one.checkpoint_id for one in there(rest.list_checkpoints(run)).checkpoints)
print(json.dumps(seen))
