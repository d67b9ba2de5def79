"""Loss curves of two processes against one: DDP, FSDP2, ZeRO-1, 2 and 3 with CPU offload, patched and unpatched.

``python -m benchmarks.distributed``: a tiny Llama on the bytes of one of Python's modules, AdamW, clipped gradients.
The curve of one process of unpatched transformers on the joint batch is the reference; each other one must stay within
1e-4 of it at every step. Each framework is started by the launch lines of recipes/distributed. Writes JSON and a plot.
"""

import argparse
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import print_table, write_json

GATE, RATE, CLIP, ROWS, LENGTH = 1e-4, 1e-3, 1.0, 4, 64
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "distributed"
STAGES = (1, 2, 3)
ACCELERATE = "accelerate launch --main_process_port PORT --num_processes 2 --config_file recipes/distributed/"
LAUNCHERS = {
    "ddp": ACCELERATE + "ddp.yaml",
    "fsdp2": ACCELERATE + "fsdp2.yaml",
    "zero": "deepspeed --master_port PORT --num_accelerators 2 --no_local_rank",
}


def make_model(patched: bool) -> Any:
    """The same weights every time: two layers, hidden size 32, one token per byte."""
    import toolkit
    from toolkit.testing.models import random_model

    model = random_model("llama", hidden=32, vocabulary=256)
    with torch.no_grad():
        for parameter in model.parameters():  # as a model is begun: random weights of scale 1 would learn little
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
            else:
                parameter.fill_(1.0)
    if patched:
        toolkit.patch(model)
    return model.train()


def make_batches(steps: int) -> list[Tensor]:
    """Rows [4, 64] of bytes for every step."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8).long()
    chance = torch.Generator().manual_seed(5)
    starts = torch.randint(len(text) - LENGTH, (steps, ROWS), generator=chance)
    return [torch.stack([text[at : at + LENGTH] for at in row]) for row in starts.tolist()]


def curve(wrapped: nn.Module, step: Callable[[Tensor], None], steps: int) -> list[float]:
    """The mean loss over the processes at every step."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = []
    for ids in make_batches(steps):
        mine = ids.chunk(size)[rank]
        loss = wrapped(input_ids=mine, labels=mine, use_cache=False).loss
        step(loss)
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses


def plain_step(model: nn.Module) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def under_ddp(model: Any, _: int) -> tuple[nn.Module, Callable[[Tensor], None]]:
    wrapped = nn.parallel.DistributedDataParallel(model)
    return wrapped, plain_step(wrapped)


def under_fsdp2(model: Any, _: int) -> tuple[nn.Module, Callable[[Tensor], None]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, plain_step(model)


def under_zero(model: Any, stage: int) -> tuple[nn.Module, Callable[[Tensor], None]]:
    import deepspeed

    config = json.loads((RECIPES / f"zero{stage}.json").read_text())
    config["optimizer"]["params"]["lr"], config["gradient_clipping"] = RATE, CLIP
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # no parameter stays whole
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step


def framework_main(framework: str, steps: int, target: Path) -> None:
    """In each process that a launcher started: the framework's curves, written by the first."""
    torch.set_num_threads(1)
    if framework == "zero":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # gloo does not need it; it would be compiled first
        )
        deepspeed.init_distributed("gloo")
    else:
        from accelerate import PartialState

        PartialState(cpu=True)
    wrap = {"ddp": under_ddp, "fsdp2": under_fsdp2, "zero": under_zero}[framework]
    curves = {}
    for stage in STAGES if framework == "zero" else (0,):
        for patched in (False, True):
            wrapped, step = wrap(make_model(patched), stage)
            curves[_name(framework + (str(stage) if stage else ""), patched)] = curve(wrapped, step, steps)
    if dist.get_rank() == 0:
        target.write_text(json.dumps(curves))
    dist.barrier()
    os._exit(0)  # gloo's teardown aborts a process now and then


def _name(framework: str, patched: bool) -> str:
    return f"{framework} {'patched' if patched else 'unpatched'}"


def launch(framework: str, steps: int) -> dict[str, list[float]]:
    """The curves of a framework, from its own launcher."""
    with socket.socket() as free:
        free.bind(("", 0))
        program, *options = LAUNCHERS[framework].replace("PORT", str(free.getsockname()[1])).split()
    module = ["--module", "benchmarks.end_to_end.distributed"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "curves.json"
        subprocess.run(
            [str(Path(sys.executable).parent / program), *options, *module, "--framework", framework,
             "--steps", str(steps), "--target", str(target)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            check=True,
        )  # fmt: skip
        return json.loads(target.read_text())


def plot(curves: dict[str, list[float]], reference: list[float], path: Path) -> None:
    """The curves, one over the other, and how far each is from the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, losses in curves.items():
        above.plot(losses, linewidth=0.9, label=name)
        below.semilogy([max(abs(a - b), 1e-8) for a, b in zip(losses, reference)], linewidth=0.9)
    below.axhline(GATE, color="black", linestyle="--", linewidth=0.8)
    above.set(ylabel="loss (nats per token)", title="two processes (gloo, CPU) and one, the same joint batch")
    below.set(xlabel="step", ylabel="difference from one process, unpatched")
    above.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, format="png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--framework", choices=list(LAUNCHERS), help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    chosen, _ = parser.parse_known_args(arguments)
    if chosen.framework:
        framework_main(chosen.framework, chosen.steps, chosen.target)
    curves = {}
    for patched in (False, True):
        model = make_model(patched)
        curves[_name("one process", patched)] = curve(model, plain_step(model), chosen.steps)
    for framework in LAUNCHERS:
        curves |= launch(framework, chosen.steps)
    reference = curves["one process unpatched"]
    rows = {
        name: {
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "largest_difference": max(abs(a - b) for a, b in zip(losses, reference, strict=True)),
        }
        for name, losses in curves.items()
    }
    green = all(row["largest_difference"] <= GATE for row in rows.values())
    table = [[name, *(f"{value:.6g}" for value in row.values())] for name, row in rows.items()]
    print_table(f"{chosen.steps} steps", ["curve", "first loss", "last loss", "largest difference"], table)
    print(f"all within {GATE}: {'yes' if green else 'NO'}")
    losses = {name: " ".join(f"{loss:.7f}" for loss in values) for name, values in curves.items()}
    reading = {"steps": chosen.steps, "limit": GATE, "green": green, "curves": rows, "losses": losses}
    plot(curves, reference, write_json("distributed-curves", reading).with_suffix(".png"))
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
