"""From a recipe's YAML and ``key=value`` overrides to a validated ``Recipe``, or one clear sentence."""

import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from toolkit.config.objective import OBJECTIVES, ObjectiveSection
from toolkit.config.schema import Recipe
from toolkit.errors import ToolkitError, did_you_mean, nearest
from toolkit.sentences import sentence


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """The plain values of a text, ``1e-3`` a number; ToolkitError, naming ``where``, for what is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ToolkitError(f"{where}{line} is not valid YAML: {problem}.") from None


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe given as a path or by the name of a shipped one.

    Raises ToolkitError where neither exists.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    if path.is_dir():
        raise ToolkitError(f"Recipe '{recipe}' is a folder; give a YAML file or the name of a shipped recipe.")
    names = shipped()
    if path.suffix in ("", ".yaml", ".yml") and path.stem in names and path.parent in (Path(), Path("recipes")):
        return names[path.stem]
    listed = ", ".join(f"'{name}'" for name in names) or "none"
    raise ToolkitError(
        f"Recipe '{recipe}' is neither a file nor a shipped recipe (shipped are {listed})"
        f"{nearest(path.stem, list(names)) or '.'}"
    )


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """The validated recipe of a file (or shipped name) with dotted ``key=value`` overrides laid over it.

    Values of overrides are typed by YAML: ``train.max_steps=100``, ``data.include=[*.py, *.md]``,
    ``tokenizer.name_or_path=null``. A recipe without a ``run_name`` takes its file's name.
    Raises ToolkitError (one sentence) for anything unreadable, unknown, mistyped or out of range.
    """
    path = find(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ToolkitError(f"Recipe '{recipe}' cannot be read: {reason}.") from None
    values = read_yaml(text, f"Recipe '{recipe}'")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ToolkitError(f"Recipe '{recipe}' must hold a mapping of fields, got {_kind(values)}.")
    values.setdefault("run_name", path.stem)
    for override in overrides:
        _override(values, override)
    return validate(values)


def validate(values: Mapping[str, Any]) -> Recipe:
    """The recipe of nested plain values; ToolkitError with one sentence for the first thing wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key is the cause of what else is missing or inconsistent.
        problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        objective = values.get("objective")
        kind = objective.get("kind") if isinstance(objective, dict) else "pretrain"
        raise ToolkitError(_sentence(dict(problem), kind if isinstance(kind, str) else None)) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; ``load_recipe`` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=100)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ToolkitError(f"Override '{override}' is not of the form key=value, e.g. train.max_steps=100.")
    *parents, last = key.split(".")
    target = values
    for depth, parent in enumerate(parents):
        inner = target.get(parent)
        if inner is None:
            inner = target[parent] = {}
        if not isinstance(inner, dict):
            within = ".".join(parents[: depth + 1])
            raise ToolkitError(
                f"Override '{override}' names a field inside {within}, which is {inner!r}, not a mapping."
            )
        target = inner
    target[last] = read_yaml(text, f"The value of override '{override}'")


def _section(annotation: Any, kind: str | None) -> type[BaseModel] | None:
    """The section of a field's type, that of ``kind`` for the objective; None for a plain value."""
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return OBJECTIVES.get(kind or "") if one is ObjectiveSection else one
    return None


def field_names(section: type[BaseModel] = Recipe, prefix: str = "", kind: str | None = "pretrain") -> list[str]:
    """Every dotted field name of a section and of those inside of it but in lists, with an objective of ``kind``."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        inner = _section(field.annotation, kind)
        if inner is not None and typing.get_origin(field.annotation) is not list:
            names += field_names(inner, f"{prefix}{name}.", kind)
    return names


def _unknown(key: str, objective: str | None) -> str:
    parent, _, last = key.rpartition(".")
    names = field_names(kind=objective)
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    hint = nearest(last, [name.rpartition(".")[2] for name in siblings])
    if hint and parent:
        hint = hint.replace("'", f"'{parent}.", 1)
    if not hint:
        same = [name for name in names if name.rpartition(".")[2] == last]
        hint = did_you_mean(same[0]) if same else ""
    if not hint:
        hint = "; fields are " + ", ".join(name.rpartition(".")[2] for name in siblings) + "."
    return f"Unknown field '{key}'{hint}"


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"{value!r}"


def annotation_of(key: str, kind: str | None) -> Any:
    """The type of a dotted field, with an objective of ``kind``; None where there is no such field."""
    annotation: Any = Recipe
    for part in key.split("."):
        section = _section(annotation, kind)
        field = section.model_fields.get(part) if section else None
        if field is None:
            return None
        annotation = field.annotation
    return annotation


def _nullable(key: str, kind: str | None) -> bool:
    annotation = annotation_of(key, kind)
    return typing.get_origin(annotation) in (typing.Union, types.UnionType) and type(None) in typing.get_args(
        annotation
    )


def _sentence(problem: dict[str, Any], objective: str | None) -> str:
    inner = ("constrained", "function", "literal[", "list[")  # which of a field's types
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(inner))
    kind = problem["type"]
    if kind == "extra_forbidden":
        return _unknown(key, objective)
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        named = message.startswith(tuple(field_names(kind=objective)))
        end = "" if message.endswith((".", "?")) else "."
        return f"{message if named else message[0].upper() + message[1:]}{end}"
    wanted = None
    if kind == "string_pattern_mismatch":
        wanted = "a folder name of letters, digits, '.', '_' and '-'" if key == "run_name" else "module:function"
    return sentence(problem, key, requirement=wanted, nullable=_nullable(key, objective))
