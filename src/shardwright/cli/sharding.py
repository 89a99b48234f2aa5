"""The options of a command that takes a sharding: one for every field of ``ParallelConfig``, and ``KEY=VALUE``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any

import click

from shardwright.distributed.config import ParallelConfig, runs_code
from shardwright.settings import apply_overrides, build, search_here

# What an option means that is given without a value.
_ALONE = {"activation_checkpointing": "full", "compile": "true"}
_KINDS: dict[Any, str] = {"int": "N", "float": "NUMBER"}


def sharding(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of :class:`ParallelConfig`, and let it end with ``KEY=VALUE`` arguments.

    The command gets a ``config``. Values are read as YAML; a key, which can also name what is inside a field, such as
    ``precision.param=bfloat16``, counts more than an option.

    Args:
        defaults: where this command has others than ``ParallelConfig``.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(overrides: tuple[str, ...], **values: Any) -> None:
            options = {field.name: values.pop(field.name) for field in fields(ParallelConfig)}
            given = [f"{name}={value}" for name, value in options.items() if value is not None]
            keys = [text.removeprefix("sharding.") for text in overrides]  # as in the file of a run
            config = build(ParallelConfig, apply_overrides(defaults, [*given, *keys]))
            if runs_code(config.plan):
                search_here()
            function(config=config, **values)

        helps = _field_helps()
        made: Callable[..., None] = command
        for field in reversed(fields(ParallelConfig)):
            made = _option(field, defaults.get(field.name, field.default), helps[field.name])(made)
        return click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(made)

    return decorate


def _option(field: Field[Any], default: Any, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag = f"--{field.name.replace('_', '-')}"
    if field.type == "bool":
        return click.option(flag, flag_value="true", help=text)
    if default not in (None, False, MISSING):
        text += f" [default: {default}]"
    alone = _ALONE.get(field.name)
    kind = _KINDS.get(field.type, "TEXT")
    return click.option(
        flag, metavar=kind if alone is None else f"[{kind}]", is_flag=False, flag_value=alone, help=text
    )


def _field_helps() -> dict[str, str]:
    """What the docstring of ``ParallelConfig`` says of every field."""
    text = (ParallelConfig.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    parts = re.split(r"^ {8}(\w+): ", text, flags=re.MULTILINE)[1:]
    said = {name: " ".join(words.split()).replace("`", "") for name, words in zip(parts[::2], parts[1::2], strict=True)}
    said = {name: words[:1].upper() + words[1:] for name, words in said.items()}
    return {field.name: said.get(field.name, "") for field in fields(ParallelConfig)}
