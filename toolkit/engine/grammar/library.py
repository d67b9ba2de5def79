"""The library that grammars are compiled by, which is an optional dependency."""

from types import ModuleType

from toolkit.errors import ToolkitError


def library() -> ModuleType:
    """The package ``llguidance``. Raises ToolkitError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ToolkitError(
            "structured_outputs needs the package 'llguidance': pip install train-infer-toolkit[structured]."
        ) from None
    return llguidance
