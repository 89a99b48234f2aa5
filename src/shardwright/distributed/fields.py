"""Checks of the fields of a config: of names, and of values by their annotations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, fields
from math import inf
from typing import Any, Self

from shardwright.errors import ConfigError
from shardwright.untrusted import shown


def only_known(cls: Any, names: Iterable[Any]) -> None:
    """Raise ConfigError where ``cls`` has no field of one of ``names``."""
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(names) - known, key=str)
    if unknown:
        raise ConfigError(
            f"Unknown key(s) {', '.join(map(shown, unknown))} for {cls.__name__}. Known: {', '.join(sorted(known))}."
        )


class Named:
    """A dataclass that raises ConfigError for a field that it does not have, with the names of those that it has."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        only_known(cls, values)
        return super().__new__(cls)


def check_type(field: Field[Any], value: Any) -> None:
    """Raise ConfigError unless ``value`` is of the type that the field is annotated with.

    Whole numbers are 1 or more, or the field's default; numbers are finite, 0 or more. A type that is a class of its
    own is checked where values of it are made.
    """
    kinds = str(field.type).split(" | ")
    wanted = {
        "int": "a whole number >= 1" + (f", or {field.default}" if field.default != 1 else ""),
        "float": "a number, 0 or more",
        "bool": "true or false",
        "str": "text",
        "None": "left out",
    }
    whole = isinstance(value, int) and not isinstance(value, bool)
    right = {
        "int": whole and (value >= 1 or value == field.default),
        "float": (whole or isinstance(value, float)) and 0 <= value < inf,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "None": value is None,
    }
    known = [kind for kind in kinds if kind in right]
    if known and not any(right[kind] for kind in known):
        allowed = ", or ".join(wanted[kind] for kind in known)
        raise ConfigError(f"{field.name} is {shown(value)}; it must be {allowed}.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")
