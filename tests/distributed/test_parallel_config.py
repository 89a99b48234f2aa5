"""``ParallelConfig``: read from YAML and JSON, checked, and turned into degrees."""

from __future__ import annotations

import dataclasses
import re
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright import ParallelConfig
from shardwright.distributed.config import CHECKPOINTING_MODES, ENGINES, Degrees, runs_code
from shardwright.distributed.precision import BF16_MIXED, DTYPES, Precision
from shardwright.errors import ConfigError

DEGREE = st.integers(1, 8)
FSDP2_ONLY = (
    {},
    {"reshard_after_forward": "always", "prefetch": 2},
    {"reshard_after_forward": "never"},
    {"keep_gathered_gib": 1.5, "shard_ends": True, "loss_tiles": 8},
)


def _config(engine: str, settings: dict[str, Any], **rest: Any) -> ParallelConfig:
    rest["compile"] = rest["compile"] if rest["activation_checkpointing"] != "selective_2" else False
    return ParallelConfig(engine=engine, **(settings if engine == "fsdp2" else {}), **rest)


CONFIGS = st.builds(
    _config,
    dp_replicate=DEGREE,
    dp_shard=DEGREE | st.just(-1),
    cp=DEGREE,
    tp=DEGREE,
    sequence_parallel=st.booleans(),
    engine=st.sampled_from(ENGINES),
    precision=st.builds(Precision, *[st.sampled_from(DTYPES)] * 3),
    settings=st.sampled_from(FSDP2_ONLY),
    activation_checkpointing=st.sampled_from((*CHECKPOINTING_MODES, "every_1", "every_12", "selective_2")),
    compile=st.booleans() | st.sampled_from(["inductor", "aot_eager"]),
    plan=st.none() | st.text(st.characters(blacklist_categories=("Cs", "Cc"))),
)
FIELDS = [field.name for field in dataclasses.fields(ParallelConfig)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


@given(CONFIGS)
def test_survives_json_yaml_and_dict(config: ParallelConfig) -> None:
    assert ParallelConfig.from_dict(config.to_dict()) == config
    if runs_code(config.plan):  # nothing that is read from a text may name Python code
        for read, text in ((ParallelConfig.from_json, config.to_json()), (ParallelConfig.from_yaml, config.to_yaml())):
            with pytest.raises(ConfigError, match="names Python code"):
                read(text)
        config = config.with_(plan=f"{config.plan}.yaml")
    assert ParallelConfig.from_json(config.to_json()) == config
    assert ParallelConfig.from_yaml(config.to_yaml()) == config
    assert hash(config) == hash(ParallelConfig.from_dict(config.to_dict()))


@given(st.dictionaries(st.sampled_from([*FIELDS, "dp"]), JSON))
def test_any_data_is_a_config_or_refused(data: dict[str, Any]) -> None:
    try:
        config = ParallelConfig.from_dict(data)
    except ConfigError:
        return
    assert "dp" not in data
    assert ParallelConfig.from_json(config.to_json()) == config


@given(CONFIGS, st.integers(1, 600))
def test_degrees_multiply_to_the_world_or_the_error_shows_every_factor(config: ParallelConfig, world: int) -> None:
    fixed = config.dp_replicate * config.cp * config.tp
    if world % fixed or config.dp_shard not in (-1, world // fixed):
        with pytest.raises(ConfigError) as caught:
            config.degrees(world)
        factors = [f"{name} ({getattr(config, name)})" for name in ("dp_replicate", "cp", "tp")]
        factors += [] if config.dp_shard == -1 else [f"dp_shard ({config.dp_shard})"]
        assert all(factor in str(caught.value) for factor in factors)
        assert re.search(rf"world size (is )?{world}\b", str(caught.value))
        return
    degrees = config.degrees(world)
    assert prod(dataclasses.astuple(degrees)) == degrees.world_size == world
    assert (degrees.dp_replicate, degrees.cp, degrees.tp) == (config.dp_replicate, config.cp, config.tp)
    assert config.dp_shard in (-1, degrees.dp_shard)
    filled = config.with_(dp_shard=degrees.dp_shard)
    assert degrees.data_ranks == filled.data_ranks == degrees.dp_replicate * degrees.dp_shard
    assert filled.averaging_ranks == filled.parameter_ranks * degrees.dp_replicate == world // degrees.tp
    assert world % config.least_world_size == 0


def test_the_empty_config_takes_every_rank_for_sharding() -> None:
    assert ParallelConfig.from_yaml("").degrees(6) == Degrees(dp_replicate=1, dp_shard=6, cp=1, tp=1)
    assert ParallelConfig().degrees(1) == Degrees(1, 1, 1, 1)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"tpp": 2}, "'tpp'"),
        ({"tp": 0}, "tp is 0"),
        ({"tp": -1}, "tp is -1"),
        ({"tp": 2.0}, "tp is 2.0"),
        ({"tp": True}, "tp is True"),
        ({"tp": "2"}, "tp is '2'"),
        ({"dp_shard": 0}, "dp_shard is 0"),
        ({"dp_shard": -2}, "dp_shard is -2"),
        ({"cp": None}, "cp is None"),
        ({"sequence_parallel": "yes"}, "sequence_parallel is 'yes'"),
        ({"compile": 1}, "compile is 1"),
        ({"compile": ""}, "compile is ''"),
        ({"engine": "ddp"}, "fsdp2, megatron_fsdp"),
        ({"activation_checkpointing": True}, "none, full, selective"),
        ({"activation_checkpointing": "every_0"}, "every_2, every_3"),
        ({"activation_checkpointing": "every_2 "}, "every_2, every_3"),
        ({"activation_checkpointing": "selective_0"}, "selective_2, selective_3"),
        ({"activation_checkpointing": "selective_2", "compile": True}, "chooses by itself what to keep"),
        ({"shard_ends": 1}, "shard_ends is 1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"reshard_after_forward": True}, "default, always, never"),
        ({"keep_gathered_gib": -1}, "keep_gathered_gib is -1"),
        ({"keep_gathered_gib": True}, "keep_gathered_gib is True"),
        ({"keep_gathered_gib": float("nan")}, "keep_gathered_gib is nan"),
        ({"keep_gathered_gib": 1, "reshard_after_forward": "always"}, "leaves no choice"),
        ({"engine": "megatron_fsdp", "prefetch": 2}, "prefetch (2) is for the engine fsdp2"),
        ({"engine": "megatron_fsdp", "loss_tiles": 2}, "loss_tiles (2) is for the engine fsdp2"),
        ({"loss_tiles": 0}, "loss_tiles is 0"),
        ({"engine": "megatron_fsdp", "reshard_after_forward": "never"}, "is for the engine fsdp2"),
        ({"precision": "fp8"}, "float32, bf16"),
        ({"precision": {"param": "int8"}}, "precision.param is 'int8'"),
        ({"precision": {"parm": "float32"}}, "parm"),
        ({"plan": {"q_proj": "colwise"}}, "plan is"),
        ("tp: 2", "mapping"),
    ],
)
def test_bad_data_is_refused_by_name(data: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        ParallelConfig.from_dict(data)


@pytest.mark.parametrize("text", ["tp: [", "- tp", "tp", "tp: 2\ntp2: 3"])
def test_bad_yaml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        ParallelConfig.from_yaml(text)


def test_short_forms_of_precision() -> None:
    assert ParallelConfig.from_yaml("precision: bf16").precision == BF16_MIXED
    assert ParallelConfig(precision={"param": "bfloat16"}).precision == Precision("bfloat16")  # type: ignore[arg-type]
    assert ParallelConfig().precision == Precision("model", "model", "model")
    assert ParallelConfig.from_yaml("precision: float32").precision == Precision("float32", "float32", "float32")


def test_is_frozen_and_copies_are_checked() -> None:
    config = ParallelConfig(tp=2)
    assert config.with_(tp=4) == ParallelConfig(tp=4)
    assert config.tp == 2
    with pytest.raises(ConfigError):
        config.with_(tp=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tp = 4  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class _Wider(ParallelConfig):
    """A field is its line: what it may hold follows from its type and its default."""

    first: int = 0
    amount: float = 0.5
    switch: bool = True
    name: str | None = None


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("first", [0, 3], [-1, True, 1.0, "1", None]),
        ("amount", [0, 2.5], [-1, True, float("inf"), float("nan"), "1", None]),
        ("switch", [True, False], [0, "yes", None]),
        ("name", [None, "x"], [0, ["x"]]),
    ],
)
def test_a_new_field_is_checked_by_its_type(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert _Wider.from_dict({field: value}).to_dict()[field] == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{field} is .*; it must be"):
            _Wider.from_dict({field: value})
