"""Strict models read from YAML: an unknown key, a missing one or one given twice is an error with a suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from axonn.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of all configuration and records: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader to which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML's own error says so.
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML reads 1e-3 as a string, since YAML 1.1 asks for a dot; everyone who writes a learning rate means a number.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path | str) -> Any:
    """The plain content of a YAML file. Raises `ConfigError` naming the file and the place."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error


def load_yaml(path: Path | str, model: type[M]) -> M:
    """Read a YAML file into `model`. Raises `ConfigError` naming file, key and the nearest valid key."""
    return validate(read_yaml(path), model, where=str(path))


def validate(data: Any, model: type[M], *, where: str) -> M:
    """Check plain data against `model`. Raises `ConfigError` naming `where`, the key and the nearest valid key."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item, model) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def _explain(item: Any, model: type[BaseModel]) -> str:
    keys, chosen, others = _follow(model, item["loc"])
    location = ".".join(keys) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{location}'; {_hint(keys[-1], chosen, others)}"
    if item["type"] == "missing":
        return f"the key '{location}' is missing"
    return f"'{location}': {item['msg']} (found {item['input']!r})"


def _hint(key: str, chosen: list[type[BaseModel]], others: list[type[BaseModel]]) -> str:
    belongs = [str(_kind(other)) for other in others if key in other.model_fields]
    if belongs:
        return f"it belongs to a model of kind '{belongs[0]}'"
    known = list(dict.fromkeys(name for m in chosen for name in m.model_fields))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"


def _follow(
    model: type[BaseModel], location: tuple[Any, ...]
) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
    """The keys of an error's location as the file has them, the models that have the last of them, and those that
    could have been in their place.

    Where a value may be one of several models, pydantic's locations tell which, by its `kind`.
    """
    keys: list[str] = []
    models: list[type[BaseModel]] = [model]
    holders, others = models, list[type[BaseModel]]()
    left: list[type[BaseModel]] = []
    for part in location:
        chosen = [m for m in models if len(models) > 1 and _kind(m) == part]
        if chosen:
            models, left = chosen, [m for m in models if m not in chosen]
            continue
        keys.append(str(part))
        holders, others = models, left
        if not isinstance(part, int):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models, left = [found for field in fields for found in _models(field.annotation)], []
    return keys, holders, others


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All models that a value of this type can be, or contain."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models(argument)]
