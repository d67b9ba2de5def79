"""How much each input column of a matrix matters (llama.cpp's imatrix), read from a file or computed from a text.

The importance of column j of W in W x is the mean of x_j^2 over the tokens of a text. A format that rounds W chooses
its scales by sum_j importance_j (w_j - rounded_j)^2, the mean squared error of the products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError, first_line
from toolkit.exporting.gguf.formats import WEIGHTED
from toolkit.exporting.hf import stock_model

if TYPE_CHECKING:
    import numpy as np

    from toolkit.exporting.gguf.tensors import Names

FILE = "imatrix.gguf"
CHUNK = 512
"""Most tokens of a text that are run at once."""
_MAGIC = b"GGUF"


class Importance:
    """Importances by GGUF's names of tensors.

    Args:
        file: that they were read from, for error sentences.
        columns: of each tensor [columns], or of experts [experts * columns], float32.
    """

    def __init__(self, file: Path, columns: "dict[str, np.ndarray]") -> None:
        self.file, self.columns = file, columns

    def of(self, name: str, shape: tuple[int, ...]) -> "np.ndarray | None":
        """[matrices, columns] of a tensor of this shape; None where the file has none.

        Raises:
            ToolkitError: it is of a tensor of another shape.
        """
        found = self.columns.get(name)
        if found is None:
            return None
        matrices = shape[0] if len(shape) == 3 else 1
        if found.size != matrices * shape[-1]:
            raise ToolkitError(
                f"imatrix must be of this model, got '{self.file}' with {found.size} columns of {name}, which has "
                f"{matrices * shape[-1]}."
            )
        return found.reshape(matrices, shape[-1])


def check_importance(file: Path, form: str | None, target: str) -> None:
    """Raise ToolkitError for a file that is not there, and for a format that has no use for it."""
    if form not in WEIGHTED:
        raise ToolkitError(
            f"imatrix must not be given for quantise {form!r} of {target!r}, got '{file}'; it is for "
            f"{', '.join(WEIGHTED)}."
        )
    if not file.is_file():
        raise ToolkitError(f"imatrix must be a GGUF file of importances or a text file, got '{file}'.")
    if is_gguf(file):
        read_importance(file)
    else:
        _read_text(file)


def is_gguf(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_MAGIC)) == _MAGIC


def read_importance(file: Path) -> Importance:
    """The importances in a file of llama.cpp's ``llama-imatrix``, or of ``write_importance``."""
    import libgguf

    try:
        return Importance(file, libgguf.load_imatrix(file))
    except ValueError as error:
        raise ToolkitError(f"imatrix must hold importances, got '{file}' ({first_line(error)}).") from None


def write_importance(text: Path, checkpoint: Path, tokenizer: Any, names: "Names", file: Path) -> None:
    """Run the model over a text, and write the importances of its linear layers but the head.

    Args:
        text: UTF-8. It is cut into chunks of ``CHUNK`` tokens, each with the tokens that begin a text.
        checkpoint: folder of the model, which stock transformers opens.
        names: GGUF's of its tensors.
        file: written in llama.cpp's format: sums of squares, and how many tokens they are of.

    Raises:
        ToolkitError: the text has no two tokens.
    """
    from gguf import GGUFWriter

    model = stock_model(checkpoint, dtype=torch.float32)
    size = min(CHUNK, getattr(model.config, "max_position_embeddings", None) or CHUNK)
    chunks = _chunks(_read_text(text), tokenizer, size)
    if not chunks:
        raise ToolkitError(f"imatrix must be a text of two tokens or more, got '{text}'.")
    with torch.no_grad(), _summed_squares(model) as sums:
        for chunk in chunks:
            model(torch.tensor([chunk]), use_cache=False)
    tokens = float(sum(map(len, chunks)))
    writer = GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text.name])
    writer.add_uint32("imatrix.chunk_count", len(chunks))
    writer.add_uint32("imatrix.chunk_size", size)
    for path, squares in sums.items():
        for name in names.parts(f"{path}.weight"):
            writer.add_tensor(f"{name}.in_sum2", squares.float().numpy()[None])
            writer.add_tensor(f"{name}.counts", torch.tensor([[tokens]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _summed_squares(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside the block sums of squares [columns], float64, of the inputs of each linear layer but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, Tensor] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[path] = torch.zeros(module.in_features, dtype=torch.float64)

            def add(module: nn.Module, inputs: tuple[Tensor], path: str = path) -> None:
                found[path] += inputs[0].flatten(0, -2).double().square().sum(0)

            hooks.append(module.register_forward_pre_hook(add))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ToolkitError(
            f"imatrix must be a GGUF file of importances or a text in UTF-8, got '{file}', which is neither."
        ) from None


def _chunks(text: str, tokenizer: Any, size: int) -> list[list[int]]:
    """Token ids of the text in runs of at most ``size``; a last one of a single token is left out."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    around = tokenizer("", verbose=False)["input_ids"]
    begin = around[:1] if around and around[0] == tokenizer.bos_token_id else []
    step = size - len(begin)
    chunks = [begin + ids[at : at + step] for at in range(0, len(ids), step)]
    return [chunk for chunk in chunks if len(chunk) > 1]
