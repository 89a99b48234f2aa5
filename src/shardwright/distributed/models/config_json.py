"""The ``config.json`` of a model folder, checked before transformers is given it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.errors import ConfigError
from shardwright.untrusted import read_json, shown

CONFIG = "config.json"
_BYTES = 16 * 2**20
# Keys that count or measure something, at any level of a config. Others may be negative (the number of a layer).
_COUNTS = re.compile(
    r"^(num|n)_\w*(layer|head|expert)|_(layers|heads)$|(hidden|intermediate|vocab)_size$|^(head_dim|ffn_dim|n_embd|d_model|d_ff)$"
)
_LAYERS = re.compile(r"^(num_hidden_layers|num_layers|n_layers?)$")


def read_config_json(path: Path, trusted: bool = False) -> dict[str, Any]:
    """What is in the config file ``path``, or in that of the folder ``path``.

    Args:
        trusted: code that the folder brings, or that its config names, may run.

    Raises:
        ConfigError: there is none, it is no JSON within the limits, or :func:`check_values` refuses it.
    """
    if path.is_dir() and not (path / CONFIG).is_file():
        raise ConfigError(f"There is no {CONFIG} in the folder {path}, so it is no checkpoint.")
    file = path / CONFIG if path.is_dir() else path
    values = read_json(file, ConfigError, _BYTES)
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys to values; it holds {shown(values)}.")
    check_values(values, str(file), trusted)
    return values


def check_values(values: Mapping[str, Any], name: str, trusted: bool = False) -> None:
    """Whether the values of a model config, of any type, are of the kinds that every config has, and name no code.

    Args:
        name: of the file, for errors.

    Raises:
        ConfigError: naming the key.
    """
    for key, kind in (("model_type", str), ("architectures", list), ("auto_map", dict)):
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{key} in {name} is {shown(value)}; it must be a {kind.__name__}.")
    named = [*(values.get("architectures") or ()), *(values.get("auto_map") or {}).values()]
    for one in named:  # a tokenizer's code may be a list: a slow and a fast class, one of which may be null
        if not isinstance(one, str) and not (isinstance(one, list) and all(isinstance(n, str | None) for n in one)):
            raise ConfigError(
                f"architectures or auto_map in {name} has {shown(one)} where the name of a class should be."
            )
    if "configuration_files" in values:
        raise ConfigError(f"{name} names other config files (configuration_files), which are not read. Merge them.")
    for key, value in _walk(values):
        if key.endswith("_implementation") and not trusted and _names_a_kernel(value):
            raise ConfigError(
                f"{key} in {name} is {shown(value)}, a kernel of the hub, which would be fetched and run. Take the key "
                "out of the file."
            )
        if isinstance(value, int) and value < 0 and _COUNTS.search(key):
            raise ConfigError(f"{key} in {name} is {value}; it cannot be negative.")
        if value == 0 and not isinstance(value, bool) and _LAYERS.search(key):
            raise ConfigError(f"{key} in {name} is 0; a model has at least one layer.")


def _names_a_kernel(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(part, str) and "/" in part for part in parts)


def _walk(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key of ``values`` and of the mappings in it, with its value."""
    for key, value in values.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from _walk(value)
