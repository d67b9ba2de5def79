"""What a patch does to each architecture that transformers registers, measured on a small random model of it.

Seven columns: roles patched, largest probe error, loss and gradient against the unpatched model, greedy generation by
the engine against ``generate``, tokens whose log-probability differs between engine and training, export and reload.
An architecture is covered when all hold, unsupported when the patch skipped what a ragged batch needs (the row says
why), and wrong when a measured number is out of its limit.
"""

import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.engine import Engine, SamplingParams
from toolkit.errors import ToolkitError, first_line
from toolkit.exporting import export
from toolkit.patching import patch, token_logprobs, unpatch
from toolkit.testing.architectures import small_model
from toolkit.testing.models import exact_attention
from toolkit.testing.parity import check_parity

LOSS_LIMIT = 1e-5  # relative, float32 both
GRADIENT_LIMIT = 1e-4  # relative norm of all gradients together, float32 both
NEW_TOKENS = 8
PARITY_TOKENS = 150
SECONDS = 120  # time limit per architecture


@dataclass
class Coverage:
    """One architecture's row. A column that was not reached is None, and ``reason`` says why."""

    model_type: str
    name: str = ""
    roles: dict[str, int] = field(default_factory=dict)
    probe_error: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    generated: bool | None = None
    differing: int | None = None
    exported: bool | None = None
    skipped: list[str] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    @property
    def covered(self) -> bool:
        """All seven columns hold."""
        return bool(self.roles) and bool(self.generated) and self.differing == 0 and bool(self.exported) and self.right

    @property
    def right(self) -> bool:
        """No measured number is out of its limit."""
        loss, gradient = self.loss_error or 0.0, self.gradient_error or 0.0
        numbers = loss <= LOSS_LIMIT and gradient <= GRADIENT_LIMIT
        return numbers and self.generated is not False and not self.differing and self.exported is not False

    @property
    def verdict(self) -> str:
        """ "covered", "unsupported" (with a reason, nothing wrong) or "wrong"."""
        return "covered" if self.covered else "unsupported" if self.right and self.reason else "wrong"


def _tokens() -> Tensor:
    """[2, 13] ids that are in the vocabulary of every small model."""
    return torch.randint(5, 300, (2, 13), generator=torch.Generator().manual_seed(3))


def _loss_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients in one vector, float64."""
    ids = _tokens()
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    parts = [
        p.grad.flatten().double() if p.grad is not None else torch.zeros(p.numel()).double() for p in model.parameters()
    ]
    model.zero_grad(set_to_none=True)
    return loss.detach().double(), torch.cat(parts)


def _generate(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """transformers' greedy completion of each prompt, one prompt per call."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def _agrees(model: Any, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> bool:
    """Whether the engine's greedy tokens are ``expected``."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with Engine(model, max_num_seqs=4) as engine:
        outputs = engine.generate([list(prompt) for prompt in prompts], params)
    for output in outputs:
        if output.error is not None:
            raise ToolkitError(output.error)
    return all(output.token_ids == list(tokens) for output, tokens in zip(outputs, expected, strict=True))


def _reloads(model: Any) -> bool:
    """Whether an export, loaded by unpatched transformers, computes the same logits."""
    ids = _tokens()
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, Path(folder) / "exported")
        attention = exact_attention(model.config)
        other = type(model).from_pretrained(path, dtype=torch.float32, **attention).eval()
    unpatch(model)
    with torch.no_grad():
        mine, theirs = (one(input_ids=ids, use_cache=False).logits for one in (model, other))
    return torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def measure(model_type: str) -> Coverage:
    """One architecture's row; an exception is the row's reason."""
    row, begun = Coverage(model_type), time.monotonic()
    stage = "no small model can be built"
    try:
        model = small_model(model_type)
        row.name = type(model).__name__
        stage = "the small model's unpatched forward fails"
        loss, gradient = _loss_and_gradient(model)
        if not math.isfinite(float(loss)):
            raise ToolkitError("the loss is not finite")
        stage = "patch"
        report = patch(model)
        row.roles = report.roles()
        row.probe_error = report.worst_error()
        row.skipped = [f"{role} {path}: {reason}" for role, path, _, reason in report.skipped_rows()]
        stage = "patched forward"
        got, patched = _loss_and_gradient(model)
        row.loss_error = float((got - loss).abs() / loss.abs().clamp_min(1e-30))
        row.gradient_error = float((patched - gradient).norm() / gradient.norm().clamp_min(1e-30))
        stage = "ragged batch"
        prompts = [_tokens()[0, :length].tolist() for length in (5, 11)]
        with torch.no_grad():
            token_logprobs(model, prompts)
        unpatch(model)
        stage = "transformers' generate"
        expected = _generate(model, prompts)
        patch(model)
        stage = "engine"
        row.generated = _agrees(model, prompts, expected)
        stage = "parity"
        row.differing = check_parity(model, [_tokens()[0].tolist()], min_tokens=PARITY_TOKENS).differing
        stage = "export"
        row.exported = _reloads(model)
    except Exception as problem:
        row.reason = f"{stage}: {first_line(problem)}"
    finally:
        row.seconds = round(time.monotonic() - begun, 1)
    return row


def _work(model_types: Sequence[str], connection: Any) -> None:
    """The worker process: sends one row after the other."""
    import logging

    from transformers.utils.logging import disable_progress_bar

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    torch.set_num_threads(1)
    for model_type in model_types:
        connection.send(asdict(measure(model_type)))
    connection.close()


def measure_all(
    model_types: Sequence[str],
    workers: int = 2,
    seconds: float = SECONDS,
    on_row: Callable[[Coverage], None] | None = None,
) -> list[Coverage]:
    """Rows of all architectures, in order, measured in separate processes.

    Args:
        workers: number of processes.
        seconds: time limit per architecture; one that exceeds it, or ends its process, gets a row that says so.
        on_row: called with each row as it is measured.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(model_types)
    rows: dict[str, Coverage] = {}
    running: list[_Worker] = []
    while waiting or running:
        while waiting and len(running) < workers:
            share, waiting = waiting[:8], waiting[8:]
            running.append(_Worker(context, share))
        for worker in list(running):
            for row in worker.rows(seconds):
                rows[row.model_type] = row
                if on_row is not None:
                    on_row(row)
            if worker.done:
                running.remove(worker)
                waiting = worker.left + waiting
        time.sleep(0.05)
    return [rows[model_type] for model_type in model_types]


class _Worker:
    """A process that measures some architectures. left: those without a row yet. done: whether it has ended."""

    def __init__(self, context: Any, share: list[str]) -> None:
        self.left = share
        self.done = False
        self._connection, other = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(share, other), daemon=True)
        self._process.start()
        other.close()
        self._since = time.monotonic()

    def rows(self, seconds: float) -> Iterator[Coverage]:
        """Rows that have arrived; a failed row for the current architecture if it is late or the process has ended."""
        try:
            while self._connection.poll():
                row = Coverage(**self._connection.recv())
                self.left = self.left[1:]
                self._since = time.monotonic()
                yield row
        except EOFError:
            self.done = True
        late = time.monotonic() - self._since > seconds
        if self.left and (late or self.done):
            self._process.kill()
            self.done = True
            failed, self.left = self.left[0], self.left[1:]
            yield Coverage(failed, reason=f"it took more than {seconds:.0f} s" if late else "its process ended")
        if self.done:
            self._process.join()
