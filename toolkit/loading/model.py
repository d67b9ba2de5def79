"""The weights of a source as a model: checked files, no random tensors, the wanted dtype and device."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError, first_line
from toolkit.loading.classes import auto_class, pooling_class
from toolkit.loading.quantised_base import quantise_base_of
from toolkit.loading.quantised_codes import read_codes
from toolkit.loading.quantised_files import is_readable, load_quantised
from toolkit.loading.source import ADAPTER, CONFIG, Source, find_source, read_json
from toolkit.loading.tensors import weight_files

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
GENERATION_CONFIG = "generation_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_KINDS = {
    "AutoModelForCausalLM": "causal language model",
    "AutoModel": "model without a head",
    "AutoModelForSequenceClassification": "classifier of sequences",
    "AutoModelForTokenClassification": "classifier of tokens",
}
_POOLER = "pooler."
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_weights(
    source: Source, dtype: str = "float32", device: str = "cpu", runner: str = "generate", config: Any = None
) -> Any:
    """The model of a source in eval mode: of the class that wrote it, towers included; adapters are merged into it.

    Args:
        dtype: one of ``DTYPES``.
        device: such as "cpu" or "cuda".
        config: in the place of the folder's ``config.json``.
        runner: "pooling" opens it for embeddings, scores and classes: with its head of those, else without a head.

    Raises:
        ToolkitError: what is missing, corrupt or does not fit; a tensor that the files lack.
    """
    if dtype not in DTYPES:
        raise ToolkitError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'.")
    if source.base is not None:
        return _merged(load_weights(source.base, dtype, device, runner, config), source.folder).to(device).eval()
    if source.gguf is None:
        config = read_config(source) if config is None else config
        _check_files(source.folder)
        _check_generation_config(source.folder / GENERATION_CONFIG)
    else:
        config = None
        if importlib.util.find_spec("gguf") is None:
            raise ToolkitError(f"Reading '{source.folder / source.gguf}' needs the package 'gguf': pip install gguf.")

    import torch

    target = _device(device)
    return _model(source, config, getattr(torch, dtype), target, runner).to(target).eval()


def _device(device: str) -> "torch.device":
    import torch

    try:
        target = torch.device(device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device was found")
    except RuntimeError as error:
        raise ToolkitError(f"device must be one that torch can use, got '{device}' ({first_line(error)}).") from None
    return target


def read_config(source: Source) -> Any:
    """The configuration of a folder. Raises ToolkitError for one that transformers does not read."""
    file = source.folder / CONFIG
    fields = read_json(file)
    if not isinstance(fields.get("model_type"), str):
        raise ToolkitError(f"'{file}' has no model_type.")

    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, **source.options)
    except Exception as error:
        raise ToolkitError(
            f"'{file}' is no configuration that transformers reads (model_type '{fields['model_type']}': "
            f"{first_line(error)})."
        ) from None


def _check_files(folder: Path) -> None:
    """Every safetensors file is there and whole: its header can be read and ends where the file does."""
    from safetensors import SafetensorError, safe_open

    for name in weight_files(folder):
        file = folder / name
        if not file.is_file():
            pickled = sorted(other.name for kind in PICKLED for other in folder.glob(kind))
            if pickled:
                raise ToolkitError(
                    f"'{folder}' has no {name}, only '{pickled[0]}'; pickled weights are not loaded, save the model as "
                    "safetensors."
                )
            raise ToolkitError(f"'{folder}' has no {name}.")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ToolkitError(f"'{file}' is not a whole safetensors file ({first_line(error)}).") from None


def _check_generation_config(file: Path) -> None:
    """Raise ToolkitError for a file that cannot be read: transformers passes over it, and so over its EOS tokens."""
    if not file.is_file():
        return
    read_json(file)

    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(file.parent)
    except Exception as error:  # a byte order mark, say
        raise ToolkitError(f"'{file}' is no configuration that transformers reads ({first_line(error)}).") from None


def _model(source: Source, config: Any, dtype: "torch.dtype", device: "torch.device", runner: str) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    opener = AutoModelForCausalLM if config is None else auto_class(config)
    if runner == "pooling":
        if config is None:
            raise ToolkitError(f"runner must be 'generate' for a GGUF file, got 'pooling' for '{source.gguf}'.")
        opener = pooling_class(config)
    options: dict[str, Any] = {**source.options, "dtype": dtype, "output_loading_info": True}
    if source.gguf is None:
        options |= {"config": config, "use_safetensors": True}
        if not (source.folder / CONFIG).is_file():  # transformers reads one of the two files in any case
            options["generation_config"] = GenerationConfig()
    if device.type != "cpu" and importlib.util.find_spec("accelerate") is not None:
        options["device_map"] = {"": device}
    name = source.folder if source.gguf is None else source.folder / source.gguf
    try:
        with quiet_transformers():
            loaded: Any
            if source.gguf is None and is_readable(config):
                loaded = load_quantised(opener, source.folder, options.pop("config"), options)
            else:
                loaded = opener.from_pretrained(source.folder, **options)
    except ToolkitError:
        raise
    except Exception as error:  # missing, truncated or foreign files all surface differently
        kind = _KINDS.get(opener.__name__, "model of images and text")
        raise ToolkitError(f"'{name}' cannot be loaded as a {kind} ({first_line(error)}).") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing and opener.__name__ == "AutoModel" and all(name.startswith(_POOLER) for name in missing):
        model.pooler, missing = None, []  # that a masked language model was trained without
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ToolkitError(f"The weights in '{name}' lack '{missing[0]}'{more}.")
    if source.gguf is not None:
        # transformers has dequantised the weights; what remains of the quantiser would keep the model from being saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.name_or_path = source.name
    if runner == "generate":
        read_codes(model, source.folder)
    return model


def load_with_adapters(name_or_path: str | Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """PEFT's model of a folder of adapters, beside the weights of their base model; arguments as for ``load_weights``.

    Raises:
        ToolkitError: no adapters, or what does not load.
    """
    source = find_source(name_or_path)
    if source.base is None:
        raise ToolkitError(f"model must be a folder of adapters, got '{name_or_path}', which has no {ADAPTER}.")
    base = load_weights(source.base, dtype, device)
    try:
        import peft

        _grow(base, source.folder)
        return peft.PeftModel.from_pretrained(base, str(source.folder)).eval()
    except Exception as error:
        raise ToolkitError(f"The adapters in '{source.folder}' cannot be loaded ({first_line(error)}).") from None


def _merged(model: Any, folder: Path) -> Any:
    try:
        import peft
        import transformers

        quantise_base_of(model, folder)
        _grow(model, folder)
        merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        if (folder / GENERATION_CONFIG).is_file():
            merged.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise ToolkitError(f"The adapters in '{folder}' cannot be loaded ({first_line(error)}).") from None
    for parameter in merged.parameters():  # PEFT froze them; what is merged trains like any checkpoint
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def _grow(model: Any, folder: Path) -> None:
    """Give a model the rows of embeddings that adapters were trained with, for tokens that were added to it."""
    from safetensors import safe_open

    file = folder / ADAPTER_WEIGHTS
    embeddings = model.get_input_embeddings()
    if embeddings is None or not file.is_file():
        return
    (name,) = (name for name, module in model.named_modules() if module is embeddings)
    with safe_open(file, framework="pt") as tensors:
        saved = f"base_model.model.{name}.weight"
        rows = tensors.get_slice(saved).get_shape()[0] if saved in tensors.keys() else 0  # noqa: SIM118 (no mapping)
    if rows > embeddings.num_embeddings:
        with quiet_transformers():
            model.resize_token_embeddings(rows, mean_resizing=False)  # the adapters replace them all


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and loading reports of transformers off the terminal."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
