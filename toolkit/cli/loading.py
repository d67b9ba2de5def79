"""A model and its tokenizer from a local folder: safetensors only, and never a download."""

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError

DTYPES = ("float32", "bfloat16", "float16", "float64")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def load_model(path: str | Path, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer or None) from a Hugging Face folder, or from a training run's latest checkpoint.

    A folder of PEFT adapters gives their base model, which must be a local folder too, with the adapters merged in.
    ``dtype``: one of ``DTYPES``. The model is in eval mode. Raises ToolkitError with one sentence for what
    is missing, corrupt or does not fit; a weight that the files lack is an error, never made at random.
    """
    if dtype not in DTYPES:
        raise ToolkitError(f"dtype is '{dtype}'; allowed are {', '.join(map(repr, DTYPES))}.")
    folder = resolve(path)
    base = _base(folder)
    config = _config(base)
    _check_weights(base)

    import torch

    try:
        target = torch.device(device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device was found")
    except RuntimeError as error:
        raise ToolkitError(f"device is '{device}', which cannot be used ({_first_line(error)}).") from None
    model = _model(base, config, getattr(torch, dtype))
    if base != folder:
        model = _merged(model, folder)
    return model.to(target).eval(), _tokenizer(folder)


def resolve(path: str | Path) -> Path:
    """The folder that holds the model: ``path``, or the latest checkpoint of the training run there."""
    from toolkit.training import checkpoint

    folder = Path(path)
    if not folder.exists():
        raise ToolkitError(f"Model folder '{path}' does not exist; models are read from local folders only.")
    if not folder.is_dir():
        raise ToolkitError(f"Model '{path}' is a file; allowed are a model's folder and a training run's.")
    if _holds_model(folder):
        return folder
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise ToolkitError(f"Folder '{path}' has neither a config.json nor checkpoints/latest of a training run.")
    if not _holds_model(found):
        raise ToolkitError(f"Checkpoint '{found}' has no config.json.")
    return found


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER).is_file()


def _base(folder: Path) -> Path:
    """The folder with the weights: that of the base model for adapters."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER).is_file():
        return folder
    name = _json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        raise ToolkitError(f"'{folder / ADAPTER}' names the base model {name!r}, which is no local folder of a model.")
    return Path(name)


def _merged(model: Any, folder: Path) -> Any:
    try:
        import peft

        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:
        raise ToolkitError(f"The adapters in '{folder}' cannot be loaded ({_first_line(error)}).") from None


def _config(folder: Path) -> Any:
    fields = _json(folder / "config.json")
    if not isinstance(fields.get("model_type"), str):
        raise ToolkitError(f"'{folder / 'config.json'}' has no model_type.")

    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ToolkitError(
            f"'{folder / 'config.json'}' is no configuration that transformers reads (model_type "
            f"'{fields['model_type']}': {_first_line(error)})."
        ) from None


def _check_weights(folder: Path) -> None:
    """Every safetensors file is there and whole: its header can be read and ends where the file does."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ToolkitError(f"'{folder / INDEX}' has no weight_map of tensors to files.")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise ToolkitError(f"'{folder / INDEX}' names files outside of its folder.")
    else:
        names = ["model.safetensors"]
    for name in names:
        file = folder / name
        if not file.is_file():
            pickled = sorted(other.name for kind in PICKLED for other in folder.glob(kind))
            if pickled:
                raise ToolkitError(
                    f"'{folder}' has no {name}, only '{pickled[0]}'; pickled weights are refused, "
                    "save the model as safetensors."
                )
            raise ToolkitError(f"'{folder}' has no {name}.")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ToolkitError(f"'{file}' is not a whole safetensors file ({_first_line(error)}).") from None


def _model(folder: Path, config: Any, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what the report would warn of is an error here
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ToolkitError(f"'{folder}' cannot be loaded as a causal language model ({_first_line(error)}).") from None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ToolkitError(f"The weights in '{folder}' lack '{missing[0]}'{more}.")
    return model


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ToolkitError(f"The tokenizer in '{folder}' cannot be loaded ({_first_line(error)}).") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ToolkitError(f"'{file}' is not valid JSON ({_first_line(error)}).") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"'{file}' does not hold a JSON object.")
    return content


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")
