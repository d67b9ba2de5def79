"""Programs of other runtimes, by transformers' exporters: a prefill and a decode step with a cache between them."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from toolkit.errors import ToolkitError, first_line
from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.hf import check_causal, check_whole_model, stock_model, write_checkpoint
from toolkit.exporting.manifest import installed_version
from toolkit.loading.model import quiet_transformers

GENERATION_CONFIG = "generation_config.json"


class ProgramTarget(ExportTarget):
    """What the targets of transformers' exporters have in common. Weights keep their dtype.

    The model is saved and opened by stock transformers first: what is traced is its own code, not a patch.
    """

    exporter: ClassVar[str]
    """transformers' name of the exporter."""
    runtime: ClassVar[str | None] = None
    """The module that runs the programs; None for torch."""
    options: ClassVar[dict[str, Any]] = {}
    """Of the exporter, beside dynamic shapes."""
    running: ClassVar[dict[str, Any]] = {}
    """Keywords of the runner."""

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)
        check_causal(job, self.target)

    def write(self, job: ExportJob, folder: Path) -> None:
        from transformers.exporters.auto import AutoExportConfig, get_exporter_class

        config = AutoExportConfig.from_dict({"export_format": self.exporter, "dynamic": True, **self.options})
        with TemporaryDirectory(prefix=".checkpoint.", dir=folder) as checkpoint:
            write_checkpoint(job, Path(checkpoint))
            program = exported_program(get_exporter_class(self.exporter)(), Path(checkpoint), config, self.target)
            program.save_pretrained(folder)
            if (Path(checkpoint) / GENERATION_CONFIG).is_file():
                (folder / GENERATION_CONFIG).write_bytes((Path(checkpoint) / GENERATION_CONFIG).read_bytes())
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder)

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        if self.runtime is not None and importlib.util.find_spec(self.runtime) is None:
            return None
        parts = self.runners(folder)
        name = self.runtime or "torch"
        outputs = [generated(ProgramLoop(parts, folder), prompt, max_tokens) for prompt in prompts]
        return ConsumerOutput(f"{name} {installed_version(name)}", outputs)

    def runners(self, folder: Path) -> Any:
        """The programs of an export, loaded by their runtime: "prefill" and "decode"."""
        from transformers.exporters.base import ExportedModel

        with quiet_torch_export():
            return ExportedModel.from_pretrained(str(folder), **self.running).runners


@contextmanager
def quiet_torch_export() -> Iterator[None]:
    """Keep off a warning of torch 2.13 about example inputs, whose arguments do not fit its text."""
    logger = logging.getLogger("torch._export.serde.serialize")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def exported_program(exporter: Any, checkpoint: Path, config: Any, target: str) -> Any:
    """transformers' export of the model in a folder.

    Raises:
        ToolkitError: the exporter cannot hold the model.
    """
    import torch

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stock_model(checkpoint)
        ids = torch.arange(3, 9).unsqueeze(0) % model.config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            return exporter.export_for_generation(model, inputs, config)
        except Exception as error:  # tracers and converters raise errors of every kind
            raise ToolkitError(
                f"An export to {target!r} cannot hold a {type(model).__name__} ({first_line(error, with_class=True)})."
            ) from None


class ProgramLoop:
    """One sequence through the programs: the prefill once, then the decode step, with the cache between them.

    Args:
        parts: runners of "prefill" and "decode".
        folder: with the model's configuration, which says what the cache of each layer is.
    """

    def __init__(self, parts: Any, folder: Path) -> None:
        from transformers import AutoConfig, DynamicCache

        self._parts, self._length = parts, 0
        self._past = DynamicCache(config=AutoConfig.from_pretrained(folder, local_files_only=True))

    def logits(self, ids: Sequence[int]) -> Any:
        """[vocabulary] behind ``ids``, which continue those given before.

        Args:
            ids: at first two token ids or more, since torch.export specialises programs for one; then one.
        """
        import torch

        positions = torch.arange(self._length, self._length + len(ids)).unsqueeze(0)
        run = self._parts["decode" if self._length else "prefill"]
        output = run(input_ids=torch.tensor([list(ids)]), position_ids=positions, past_key_values=self._past)
        self._length, self._past = self._length + len(ids), output.past_key_values
        return output.logits[0, -1]


def generated(loop: ProgramLoop, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """``max_tokens`` greedy tokens after a prompt of at least two token ids."""
    tokens: list[int] = []
    ids = list(prompt)
    while True:
        tokens.append(int(loop.logits(ids).argmax()))
        if len(tokens) == max_tokens:
            return tokens
        ids = tokens[-1:]
