"""The unmodified tinker client, which knows nothing of servers that die: rounds of training, with samples between.

Its arguments are the server's address, the model, a number of rounds and a file that counts them. The last line is
JSON: the path of a checkpoint, and all losses and samples.
"""

import json
import sys

import tinker
from tinker import types

URL, MODEL, ROUNDS, COUNT = sys.argv[1:]
service = tinker.ServiceClient(base_url=URL, api_key="tml-local")
training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=0).result()
losses, samples = [], []
for at in range(int(ROUNDS)):
    data = []
    for row in range(4):
        tokens = [5 + (7 * at + 11 * row + 3 * k) % 190 for k in range(10 + row)]
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    found = [training.forward_backward(part, "cross_entropy") for part in (data[:2], data[2:])]
    step = training.optim_step(types.AdamParams(learning_rate=3e-3))
    losses.append([one.result().metrics["loss:sum"] for one in found] + [step.result().metrics["grad_norm"]])
    if at % 3 == 2:
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=6, seed=at, stop=[])
        sampled = sampler.sample(types.ModelInput.from_ints([5, 6, 7]), num_samples=2, sampling_params=params)
        samples.append([[list(one.tokens), list(one.logprobs)] for one in sampled.result().sequences])
    with open(COUNT, "w") as file:
        file.write(str(at + 1))
print(json.dumps({"path": training.save_state("final").result().path, "losses": losses, "samples": samples}))
