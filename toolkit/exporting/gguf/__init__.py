"""A GGUF file, which llama.cpp and Ollama open; ``Modelfile`` beside it."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.gguf.consumer import LlamaCpp
from toolkit.exporting.gguf.families import family_of
from toolkit.exporting.gguf.formats import FILE_TYPES, FORMATS, WEIGHTED, encoded, ggml_type, tensor_format
from toolkit.exporting.gguf.importance import FILE as IMPORTANCE
from toolkit.exporting.gguf.importance import (
    Importance,
    check_importance,
    is_gguf,
    read_importance,
    write_importance,
)
from toolkit.exporting.gguf.metadata import attention_interval, head_size_of, window_period, write_metadata
from toolkit.exporting.gguf.modelfile import modelfile
from toolkit.exporting.gguf.rotary import check_rotary
from toolkit.exporting.gguf.tensors import Names, named_tensors
from toolkit.exporting.gguf.vocabulary import ordered_ends, read_vocabulary, write_vocabulary
from toolkit.exporting.hf import check_whole_model, write_checkpoint
from toolkit.exporting.manifest import installed_version

FILE = "model.gguf"
MODELFILE = "Modelfile"


class Gguf(ExportTarget, name="gguf"):
    """Weights, tokenizer and chat template in one file. What llama.cpp does not compute is refused by name."""

    formats = FORMATS
    lossless = ("f32",)

    def packages(self, quantise: str | None) -> tuple[str, ...]:
        return ("gguf", "libgguf") if quantise in WEIGHTED else ("gguf",)

    def check_imatrix(self, file: Path, quantise: str | None) -> None:
        check_importance(file, quantise, self.target)

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)
        family = family_of(job.model, self.target)
        check_rotary(job.model.config, self.target, family.partial_rotary)
        if family.arch == "gemma3":
            window_period(job.model.config)
        elif family.arch == "qwen3next":
            attention_interval(job.model.config)
        read_vocabulary(job.tokenizer, job.model.config.vocab_size, self.target)
        ordered_ends(job.model, job.tokenizer, self.target)

    def write(self, job: ExportJob, folder: Path) -> None:
        # Original names, and experts one by one, are what save_pretrained writes.
        with TemporaryDirectory(prefix=".checkpoint.", dir=folder) as checkpoint:
            write_checkpoint(ExportJob(job.model), Path(checkpoint))
            importance = self._importance(job, Path(checkpoint), folder)
            write_gguf(job, Path(checkpoint), folder / FILE, self.target, importance)
        (folder / MODELFILE).write_text(modelfile(FILE, job.model, job.tokenizer), encoding="utf-8")

    def _importance(self, job: ExportJob, checkpoint: Path, folder: Path) -> Importance | None:
        """Those that the export was given, or has computed of a text, into ``folder``."""
        file = job.imatrix
        if file is None:
            return None
        if not is_gguf(file):
            names = Names(family_of(job.model, self.target), job.model.config.num_hidden_layers, self.target)
            text, file = file, folder / IMPORTANCE
            write_importance(text, checkpoint, job.tokenizer, names, file)
        return read_importance(file)

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        if not LlamaCpp.installed():
            return None
        with LlamaCpp(folder / FILE, max(map(len, prompts)) + max_tokens) as server:
            outputs = [server.generate(list(prompt), max_tokens) for prompt in prompts]
        return ConsumerOutput(f"xllamacpp {installed_version('xllamacpp')}", outputs)


def write_gguf(job: ExportJob, checkpoint: Path, file: Path, target: str, importance: Importance | None = None) -> None:
    """Write a checkpoint of a folder as a GGUF file, one tensor in memory at a time."""
    from gguf import GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    model: Any = job.model
    config, form = model.config, job.quantise or FORMATS[0]
    family, head_size = family_of(model, target), head_size_of(config)
    tensors = list(named_tensors(checkpoint, config, family, head_size, target))
    writer = GGUFWriter(file, family.arch)
    writer.add_type("model")
    writer.add_name(Path(getattr(model, "name_or_path", "") or config.model_type).name)
    writer.add_file_type(LlamaFileType[FILE_TYPES[form]])
    writer.add_quantization_version(2)
    feed_forward = next((one.shape[0] for one in tensors if one.name.endswith("ffn_up.weight")), 0)
    write_metadata(writer, config, family, feed_forward or config.intermediate_size)
    vocabulary = read_vocabulary(job.tokenizer, config.vocab_size, target)
    write_vocabulary(writer, vocabulary, job.tokenizer, model, target)
    forms = [tensor_format(one.name, one.shape, form, config.tie_word_embeddings) for one in tensors]
    for one, wanted in zip(tensors, forms):
        kind = ggml_type(wanted)
        size, dtype, shape = _layout(one.shape, wanted)
        raw = None if wanted in ("f32", "f16") else kind
        shape = one.shape if raw is None else quant_shape_to_byte_shape(one.shape, kind)
        writer.add_tensor_info(one.name, shape, dtype, size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one, wanted in zip(tensors, forms):
        columns = None if importance is None else importance.of(one.name, one.shape)
        writer.write_tensor_data(encoded(one.read(), wanted, columns))
    writer.close()


def _layout(shape: tuple[int, ...], form: str) -> tuple[int, Any, tuple[int, ...]]:
    """(bytes, NumPy's dtype, shape) of a tensor in a format."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[ggml_type(form)]
    count = int(np.prod(shape, dtype=np.int64))
    dtype = {"f32": np.float32, "f16": np.float16}.get(form, np.uint8)
    return count // block * size, np.dtype(dtype), shape
