"""Frozen dataclasses from YAML: nested sections, ``section.key=value`` overrides, typed values, no unknown keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from shardwright.distributed.config import Precision
from shardwright.errors import ConfigError

T = TypeVar("T")
# Sections that may also be given as a word, which the dataclass that owns them resolves.
SHORT_FORMS = (Precision,)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML (the message has the line), or not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" There is {', '.join(near)}." if near else ""
        raise ConfigError(f"There is no config file {path}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, such as 'steps: 100'; it holds {data!r}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with ``section.key=value`` strings applied; values are read as YAML."""
    result = dict(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or "" in key.split("."):
            raise ConfigError(f"{text!r} is not an override. Write key=value, for example steps=100 or sharding.tp=2.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            if value.lstrip().startswith(("[", "{")):
                raise ConfigError(
                    f"The value in {text!r} is not valid YAML; put quotes around what is in it."
                ) from None
            parsed = value  # such as *.py, which YAML would take for an alias; whoever reads the key checks it
        result = _with(result, key.split("."), parsed, text)
    return result


def _with(data: Any, path: list[str], value: Any, text: str) -> dict[str, Any]:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{text!r} sets a key inside {data!r}, which is a single value and has no keys.")
    head, *rest = path
    return {**data, head: _with(data.get(head), rest, value, text) if rest else value}


def build(cls: type[T], data: Any, where: str = "") -> T:
    """An instance of the dataclass ``cls`` from a mapping; a section is itself a dataclass.

    Args:
        where: dotted name of this section, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one the class refuses.
    """
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'The config'} must be a section of keys and values, not {data!r}.")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ConfigError(unknown_key(f"{where}.{key}" if where else str(key), str(key), known))
    types = get_type_hints(cls)
    values = {key: convert(value, types[key], f"{where}.{key}" if where else key) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def unknown_key(full_name: str, key: str, known: Iterable[str]) -> str:
    """The message about a key that does not exist: the nearest one that does, or all of them."""
    known = sorted(known)
    near = get_close_matches(key, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
    return f"Unknown key {full_name!r}. {hint}"


def convert(value: Any, kind: Any, name: str) -> Any:
    """``value`` as the annotated type ``kind``; only conversions that lose nothing.

    ``3e-4`` is a string in YAML 1.1 and a whole number is a valid float; both become floats here.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        short_form = isinstance(value, str) and kind in SHORT_FORMS
        return value if isinstance(value, kind) or short_form else build(kind, value, name)
    if origin is UnionType:
        return _convert_union(value, get_args(kind), name)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name} is {value!r}; it must be a list.")
        inner = get_args(kind)
        pairs = zip(items, [inner[0]] * len(items) if inner[-1] is Ellipsis else inner, strict=False)
        return tuple(convert(item, one, name) for item, one in pairs)
    if origin is dict:
        kind = dict
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _to_float(value, name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} is {value!r}; it must be {_WORDS[kind]}.")
    return value


def _convert_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    for kind in kinds:
        try:
            return convert(value, kind, name)
        except ConfigError:
            continue
    words = " or ".join(_WORDS[get_origin(kind) or kind] for kind in kinds)
    raise ConfigError(f"{name} is {value!r}; it must be {words}.")


def _to_float(value: int | str, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}; it must be a number.") from None
