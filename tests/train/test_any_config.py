"""Any YAML is a run or one clear error: nothing else comes out of reading it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ConfigError
from shardwright.settings import apply_overrides, build
from shardwright.train.config import TrainConfig

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5000)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["1e-3", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def _section(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Mappings with the keys of ``cls``, and sometimes another; sections within it are such mappings or anything."""
    types = get_type_hints(cls)
    needed: dict[str, st.SearchStrategy[Any]] = {}
    others: dict[str, st.SearchStrategy[Any]] = {"other": VALUES}
    for field in fields(cls):
        inner = next((one for one in (types[field.name], *get_args(types[field.name])) if is_dataclass(one)), None)
        values = VALUES if inner is None else _section(inner) | VALUES  # type: ignore[arg-type]
        (needed if field.default is field.default_factory is MISSING else others)[field.name] = values
    return st.fixed_dictionaries(needed, optional=others)


@settings(deadline=None)
@given(_section(TrainConfig), st.lists(st.text(max_size=8), max_size=2))
def test_any_data_is_a_run_or_is_refused(data: dict[str, Any], overrides: list[str]) -> None:
    with suppress(ConfigError):
        config = build(TrainConfig, apply_overrides(data, overrides))
        assert isinstance(config, TrainConfig)
        assert build(TrainConfig, yaml.safe_load(config.to_yaml())) == config


@settings(deadline=None)
@given(st.text(max_size=8), VALUES)
def test_what_is_valid_survives_yaml(name: str, value: Any) -> None:
    data: dict[str, Any] = {"model": {"path": name}, "data": {"paths": [name]}, "clip_norm": value}
    with suppress(ConfigError):
        config = build(TrainConfig, data)
        assert build(TrainConfig, yaml.safe_load(config.to_yaml())) == config
