"""Frozen dataclasses from YAML: nested sections, ``section.key=value`` overrides, typed values, no unknown keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from shardwright.errors import ConfigError
from shardwright.untrusted import DEPTH, check_values, parse_yaml, read_file, shown, usable_path

T = TypeVar("T")
_PLAIN_TEXT = 4096  # characters of an override that may be no YAML: a path or a glob
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
}


class HasShortForms:
    """A section that may also be given as one word; the class that has it as a field resolves the word."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML (the message has the line), or not a mapping.
    """
    path = usable_path(path, "The config file", ConfigError)
    if not os.path.exists(path):
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))[:5] if path.parent.is_dir() else []
        hint = f" There is {', '.join(near)}." if near else ""
        raise ConfigError(f"There is no config file {path}.{hint}")
    data = parse_yaml(read_file(path, ConfigError), str(path), ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, such as 'steps: 100'; it holds {shown(data)}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``data`` with ``section.key=value`` strings applied; values are read as YAML."""
    result = dict(data)
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or "" in parts or len(parts) > DEPTH:
            raise ConfigError(
                f"{shown(text)} is not an override. Write key=value, for example steps=100 or sharding.tp=2."
            )
        result = _with(result, parts, _parsed(value, text), text)
    return result


def _parsed(value: str, text: str) -> Any:
    """``value`` as YAML; what is no YAML is a text, such as ``*.py``, and whoever reads the key checks it."""
    try:
        return parse_yaml(value, shown(text), ConfigError)
    except ConfigError as error:
        if len(value) > _PLAIN_TEXT:
            raise
        if value.lstrip().startswith(("[", "{")):
            raise ConfigError(f"{error} Put quotes around what is in it.") from None
        check_values(value, shown(text), ConfigError)
        return value


def _with(data: Any, path: list[str], value: Any, text: str) -> dict[str, Any]:
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{shown(text)} sets a key inside {shown(data)}, which is a single value and has no keys.")
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
        raise ConfigError(f"{where or 'The config'} must be a section of keys and values, not {shown(data)}.")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            name = shown(key).strip("'")
            raise ConfigError(unknown_key(f"{where}.{name}" if where else name, name, known))
    types = get_type_hints(cls)
    values = {key: convert(value, types[key], f"{where}.{key}" if where else key) for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def search_here() -> None:
    """Let Python find modules in the current folder, after all others; an installed command does not look there."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


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
        short_form = isinstance(value, str) and issubclass(kind, HasShortForms)
        return value if isinstance(value, kind) or short_form else build(kind, value, name)
    if origin is UnionType:
        return _convert_union(value, get_args(kind), name)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name} is {shown(value)}; it must be a list.")
        inner = get_args(kind)[0]  # all tuples here are of one type; whoever owns the key checks how many there are
        return tuple(convert(item, inner, name) for item in items)
    if origin is dict:
        kind = dict
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _to_float(value, name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} is {shown(value)}; it must be {_WORDS[kind]}.")
    return value


def _convert_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    for kind in kinds:
        try:
            return convert(value, kind, name)
        except ConfigError:
            continue
    words = " or ".join(_WORDS[get_origin(kind) or kind] for kind in kinds)
    raise ConfigError(f"{name} is {shown(value)}; it must be {words}.")


def _to_float(value: int | str, name: str) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name} is {shown(value)}; it must be a number.") from None
