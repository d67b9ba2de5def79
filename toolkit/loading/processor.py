"""The processor beside a model: what makes tensors of images, and the files that it is read from."""

from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, first_line
from toolkit.loading.source import CONFIG, Source, read_json

PROCESSOR_CONFIG = "processor_config.json"
IMAGE_PROCESSOR_CONFIG = "preprocessor_config.json"
VIDEO_PROCESSOR_CONFIG = "video_preprocessor_config.json"
PROCESSOR_FILES = (
    PROCESSOR_CONFIG,
    IMAGE_PROCESSOR_CONFIG,
    VIDEO_PROCESSOR_CONFIG,
    "chat_template.jinja",
    "chat_template.json",
)


def has_processor(folder: Path) -> bool:
    """Whether a folder has the files of a processor for images, not of a tokenizer alone."""
    return any((folder / name).is_file() for name in (PROCESSOR_CONFIG, IMAGE_PROCESSOR_CONFIG))


def processor_files(folder: Path | None) -> dict[str, bytes]:
    """The files of a folder's processor by name; none without one."""
    if folder is None or not has_processor(folder):
        return {}
    return {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}


def add_files(files: dict[str, bytes], folder: Path) -> None:
    """Write the files that ``folder`` does not have yet: a tokenizer that was saved there keeps its chat template."""
    for name, content in files.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def load_processor(source: Source) -> Any:
    """The processor of a source, of adapters without one that of their base model; None where there is none.

    Images are prepared by Pillow, whether or not torchvision is installed, so that tensors are the same everywhere.
    Videos need torchvision, as in transformers; without it the processor takes images and text.

    Raises:
        ToolkitError: it does not load, or needs a package that is not installed.
    """
    folder = source.folder
    if source.gguf is not None or not has_processor(folder):
        return None if source.base is None else load_processor(source.base)
    require_pillow()

    from transformers import AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    try:
        if is_torchvision_available():
            return AutoProcessor.from_pretrained(folder, backend="pil", **source.options)
        return _without_videos(folder, source.options)
    except ToolkitError:
        raise
    except ImportError as error:
        raise ToolkitError(
            f"The processor in '{folder}' needs a package that is not installed ({first_line(error)})."
        ) from None
    except Exception as error:  # transformers raises many kinds
        raise ToolkitError(f"The processor in '{folder}' cannot be loaded ({first_line(error)}).") from None


def require_pillow() -> None:
    """Raise ToolkitError where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ToolkitError("Images need the package 'pillow': pip install train-infer-toolkit[vision].") from None


def _without_videos(folder: Path, options: dict[str, Any]) -> Any:
    """The processor, whose part for videos has its settings and prepares none.

    ``AutoProcessor`` refuses a processor with a part for videos where torchvision is missing, images or not.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    files = {name: read_json(folder / name) for name in PROCESSOR_FILES[:3] if (folder / name).is_file()}
    kind = _processor_class(folder, files, options)
    if kind is None or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, backend="pil", **options)
    parts: dict[str, Any] = {}
    for name in kind.get_attributes():
        if name == "tokenizer":
            parts[name] = AutoTokenizer.from_pretrained(folder, **options)
        elif name == "image_processor":
            parts[name] = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        elif name == "video_processor":
            settings = files.get(VIDEO_PROCESSOR_CONFIG) or files.get(PROCESSOR_CONFIG, {}).get(name) or {}
            parts[name] = _NoVideos(files.get(IMAGE_PROCESSOR_CONFIG, {}) | settings)
        else:
            raise ImportError(f"its {name} is read with torchvision")
    own = files.get(PROCESSOR_CONFIG, {})
    extra = {name: value for name, value in own.items() if name not in parts and name != "processor_class"}
    taken = kind.__init__.__code__.co_varnames[: kind.__init__.__code__.co_argcount]
    template = getattr(parts.get("tokenizer"), "chat_template", None)
    return _taking(kind)(
        **parts, **{name: value for name, value in extra.items() if name in taken}, chat_template=template
    )


def _processor_class(folder: Path, files: dict[str, dict[str, Any]], options: dict[str, Any]) -> Any:
    """The class that the files or the model's type name; None for one that comes with the checkpoint."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for values in files.values():
        if values.get("auto_map"):
            return None
    for values in files.values():
        if isinstance(values.get("processor_class"), str):
            return processor_class_from_name(values["processor_class"])
    if not (folder / CONFIG).is_file():
        return None
    config = AutoConfig.from_pretrained(folder, **options)
    return PROCESSOR_MAPPING.get(type(config), None)


class _NoVideos:
    """In the place of a video processor: its settings, which the processor of images and text may read."""

    def __init__(self, settings: dict[str, Any]) -> None:
        vars(self).update(settings, model_input_names=[])

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ToolkitError("Videos need the package 'torchvision', which is not installed.")


def _taking(kind: Any) -> Any:
    """The processor's class, made to take a ``_NoVideos``: the class that it asks for needs torchvision itself."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            _NoVideos if isinstance(argument, _NoVideos) else kind.check_argument_for_proper_class(self, name, argument)
        )

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
