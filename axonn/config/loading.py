"""Strict models read from YAML: an unknown key, a missing one or one given twice is an error with a suggestion."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    create_model,
)
from pydantic_core import CoreSchema, core_schema

from axonn.durable_files import parse_json, read_bytes, reason_of
from axonn.errors import AxonnError, ConfigError, RecordError

LARGEST_YAML = 2**21
"""Bytes of a YAML file; the file of a measured machine has some 50 thousand."""
_MOST_VALUES = 100_000
"""Values in a YAML file, each counted as often as aliases and merge keys repeat it."""
_LONGEST_NUMBER = 40
"""Characters of a whole number."""
_MOST_ERRORS = 20
"""Mistakes of one file that are reported one by one."""
LONGEST_NAME = 100
"""Characters of a name that becomes a file or folder."""


class StrictModel(BaseModel):
    """Base of all configuration and records: immutable, no unknown keys, no silent conversion of types, only finite
    numbers unless a field says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def alternatives(cls) -> list[type[StrictModel]]:
        """Return the models that a field of this type can hold: this one, or those that a base class stands for."""
        return [cls]

    @classmethod
    def is_kind_of(cls, data: Any) -> bool:
        """Return whether plain `data` is meant for this one of several alternatives."""
        return True

    @classmethod
    def called(cls) -> str:
        """Return the words for this one of several alternatives in a message."""
        return cls.__name__


class FileValue:
    """Base of frozen dataclasses that a model holds as they are; a file has their fields as keys.

    A constraint on a key is an annotation of its field, and holds for what is read from a file.
    """

    @classmethod
    def file_keys(cls) -> type[StrictModel]:
        """Return the keys of a file, as a model."""
        dataclass: Any = cls
        return _keys_of_fields(dataclass)

    def _in_file(self) -> StrictModel:
        keys = self.file_keys()
        return keys.model_construct(**{key: getattr(self, key) for key in keys.model_fields})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        keys = handler.generate_schema(cls.file_keys())
        return core_schema.no_info_wrap_validator_function(
            cls._of_file,
            keys,
            serialization=core_schema.plain_serializer_function_ser_schema(cls._in_file, return_schema=keys),
        )

    @classmethod
    def _of_file(cls, value: object, validated: ValidatorFunctionWrapHandler) -> Self:
        return value if isinstance(value, cls) else cls(**validated(value).model_dump())


@cache
def _keys_of_fields(dataclass: Any) -> type[StrictModel]:
    types = get_type_hints(dataclass, include_extras=True)
    keys: dict[str, Any] = {field.name: (types[field.name], field.default) for field in fields(dataclass)}
    return create_model(dataclass.__name__, __base__=StrictModel, **keys)


M = TypeVar("M", bound=StrictModel)


def is_plain(name: str) -> bool:
    """Return whether `name` can be the name of a file or folder, in every shell too."""
    return (
        re.fullmatch(r"[A-Za-z0-9._-]+", name) is not None
        and name not in {".", ".."}
        and not name.startswith("-")
        and len(name) <= LONGEST_NAME
    )


def _checked_name(name: str) -> str:
    if not is_plain(name):
        raise ValueError(
            f"{shortened(name)} is no name of a folder or file: it may have letters, digits, '.', '_' and '-', up to "
            f"{LONGEST_NAME}, and does not begin with '-'"
        )
    return name


Name = Annotated[str, AfterValidator(_checked_name)]
"""A name that becomes a file or folder, and so cannot lead to another folder."""


Loss = Annotated[float, Field(allow_inf_nan=True)]
"""A loss or a difference of losses; infinite or NaN for a run that diverged."""


def _checked_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{shortened(text)} is more than one line, or has control characters")
    return text


Line = Annotated[str, AfterValidator(_checked_line)]
"""A text that is shown, or written into a file of lines: printable, on one line."""


def _checked_inside(path: str) -> str:
    if not path.isprintable() or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{shortened(path)} leads out of the repository; give a path in it, without '..'")
    return path


Inside = Annotated[str, AfterValidator(_checked_inside)]
"""A path relative to the repository that does not lead out of it."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
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
    """Return the plain content of a YAML file. Raises `ConfigError` naming the file and the place."""
    try:
        return parse_yaml(read_bytes(path, most=LARGEST_YAML).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason_of(error, path)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply; write it flatter") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """Return the plain data of a YAML text.

    Raises `yaml.YAMLError`, `ValueError` for values that no file of the suite has, and `RecursionError`.
    """
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML's constructors raise these for the tag of another type.
        raise ValueError(f"a value is not of the type that it claims: {type(error).__name__}: {error}") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the values in a node, all aliases followed. Raises `ValueError` for too many, or one that is too long."""
    if id(node) in known:
        counted = known[id(node)]
        if counted is None:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands inside of what it stands for")
        return counted
    known[id(node)] = None
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_count(one, known) for pair in node.value for one in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(one, known) for one in node.value)
    elif node.tag.endswith(":int") and len(node.value) > _LONGEST_NUMBER:
        raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value)} digits")
    if total > _MOST_VALUES:
        raise ValueError(
            f"line {node.start_mark.line + 1}: more than {_MOST_VALUES} values, all aliases followed; no file of the "
            "suite has so many"
        )
    known[id(node)] = total
    return total


def load_yaml(path: Path | str, model: type[M]) -> M:
    """Read a YAML file into `model`. Raises `ConfigError` naming file, key and the nearest valid key."""
    return validate(read_yaml(path), model, where=str(path))


def load_json(path: Path | str, model: type[M], *, otherwise: str, error: type[AxonnError] = RecordError) -> M:
    """Read a JSON file into `model`. Raises `error` naming file and place, with `otherwise`, the advice, at its end."""
    try:
        content = read_bytes(path)
        # Refuses what pydantic's own parser accepts and no other parser could read.
        parse_json(content)
        return model.model_validate_json(content)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {reason_of(problem, path)}; {otherwise}") from problem
    except ValidationError as problem:
        raise error(f"{path}: {first_of(problem)}; {otherwise}") from problem
    except ValueError as problem:
        raise error(f"{path}: is not valid JSON: {problem}; {otherwise}") from problem


def first_of(error: ValidationError) -> str:
    """Return the first mistake, with its place."""
    first = error.errors(include_url=False)[0]
    return f"'{'.'.join(shortened(part, plain=True) for part in first['loc'])}': {_mistake(first)}"


def validate(data: Any, model: type[M], *, where: str) -> M:
    """Check plain data against `model`. Raises `ConfigError` naming `where`, the key and the nearest valid key."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, found {_found(data)}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        items = error.errors()
        lines = [_explain(item, model, data) for item in items[:_MOST_ERRORS]]
        if len(items) > _MOST_ERRORS:
            lines.append(f"and {len(items) - _MOST_ERRORS} more mistakes")
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error
    except RecursionError as error:
        raise ConfigError(f"{where}: is nested too deeply; write it flatter") from error


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values that are not mappings, each with the keys that lead to it joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def shortened(value: Any, *, plain: bool = False) -> str:
    """Return a file's value for a message, cut short: as Python writes it, or without quotes if `plain`."""
    shown = _SHORT.repr(value)
    return shown[1:-1] if plain and isinstance(value, str) else shown


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 3, 8, 8


def _explain(item: Any, model: type[StrictModel], data: Any) -> str:
    keys, chosen, others = _follow(model, item["loc"], data)
    location = ".".join(shortened(key, plain=True) for key in keys) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{location}'; {_hint(keys[-1], chosen, others)}"
    if item["type"] == "missing":
        return f"the key '{location}' is missing"
    return f"'{location}': {_mistake(item)} (found {_found(item['input'])})"


def _mistake(item: Any) -> str:
    """Return the mistake in a value, in terms of the file."""
    if item["type"] in ("model_type", "model_attributes_type", "dataclass_type"):
        # Pydantic names the class.
        return "expected keys and values"
    return str(item["msg"]).removeprefix("Value error, ")


def _found(value: Any) -> str:
    """Return a value as the author of the file wrote it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing" if value is None else shortened(value)


def _hint(key: str, chosen: list[type[StrictModel]], others: list[type[StrictModel]]) -> str:
    belongs = [m.called() for m in others if key in m.model_fields]
    if belongs:
        return f"it belongs to {belongs[0]}"
    known = list(dict.fromkeys(name for m in chosen for name in m.model_fields))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"


def _follow(
    model: type[StrictModel], location: tuple[Any, ...], data: Any
) -> tuple[list[str], list[type[StrictModel]], list[type[StrictModel]]]:
    """Follow an error's location: return its keys as the file has them, the models that the last key belongs to, and
    the models that could have been there instead. The `kind` or `name` of a value tells which of several models it is.
    """
    keys: list[str] = []
    models, left = [model], list[type[StrictModel]]()
    holders, others = models, left
    for part in location:
        keys.append(str(part))
        holders, others = models, left
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
        if not isinstance(part, int):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            possible = [alternative for field in fields for alternative in _models(field.annotation)]
            models = [one for one in possible if len(possible) == 1 or one.is_kind_of(data)]
            left = [one for one in possible if one not in models]
    return keys, holders, others


def _models(annotation: Any) -> list[type[StrictModel]]:
    """Return all models that a value of this type can be or contain."""
    if isinstance(annotation, type) and issubclass(annotation, FileValue):
        return [annotation.file_keys()]
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation.alternatives()
    return [model for argument in get_args(annotation) for model in _models(argument)]
