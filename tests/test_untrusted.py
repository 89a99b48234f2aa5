"""Text that somebody else wrote: any of it is data within limits, or one sentence, in little time and memory."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.distributed.plan import ParallelPlan, match_names
from shardwright.errors import CheckpointError, ConfigError, PlanError
from shardwright.untrusted import DEPTH, check_values, parse_json, parse_yaml, read_file, shown, usable_path

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "more than 50,000 values"),
        ("&a [*a]", "inside of what it repeats"),
        ("x: &x {y: [*x]}", "inside of what it repeats"),
        ("[" * 200_000, "deeper than 64"),
        ("- " * 1000, "deeper than 64"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "deeper than 64"),
        ("x" * 300_000, "read up to"),
        ("x: 2001-01-01", "Put quotes around it"),
        ("x: 2001-99-99", "does not fit its YAML tag"),
        ("!!int ''", "does not fit its YAML tag"),
        ("!!bool x", "does not fit its YAML tag"),
        ("!!timestamp x", "does not fit its YAML tag"),
        ("x: " + "9" * 5000, "does not fit its YAML tag"),
        ("x: " + "9" * 50, "beyond 64 bits"),
        ('x: "\\uD800"', "no Unicode"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_yaml_beyond_the_limits_is_refused_soon(text: str, told: str) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"f\.yaml") as caught:
        parse_yaml(text, "f.yaml", ConfigError)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.process_time() - begin < 5


def test_yaml_within_the_limits_is_what_it_says() -> None:
    text = "base: &base {lr: 1.5, steps: [1, 2]}\nother: {<<: *base, name: a}\nagain: *base"
    base = {"lr": 1.5, "steps": [1, 2]}
    assert parse_yaml(text, "f", ConfigError) == {"base": base, "other": base | {"name": "a"}, "again": base}
    assert parse_yaml("[" * DEPTH + "]" * DEPTH, "f", ConfigError)
    assert math.isnan(parse_yaml("x: .nan", "f", ConfigError)["x"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "deeper than 64"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("9" * 5000, "not valid JSON"),
        ("9" * 50, "beyond 64 bits"),
        ('{"\\ud800": 1}', "no Unicode"),
        (b'"\xff"', "not UTF-8"),
        ("{'a': 1}", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_beyond_the_limits_is_refused(text: str | bytes, told: str) -> None:
    with pytest.raises(CheckpointError, match=r"f\.json") as caught:
        parse_json(text, "f.json", CheckpointError)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("[]{}:,-&*a !?|>'\"\n0", max_size=60))
def test_any_text_is_yaml_or_is_refused(text: str) -> None:
    with suppress(ConfigError):
        data = parse_yaml(text, "f", ConfigError)
        check_values(data, "f", ConfigError)
        json.dumps(data, skipkeys=True).encode()  # whatever comes out can be written and shown


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    (tmp_path / "large").write_bytes(bytes(11))
    for name, told in [
        ("pipe", "no regular file"),
        (".", "no regular file"),
        ("large", "11 bytes; files of its kind are read up to 10"),
        ("gone", "No such file"),
        ("a" * 300, "File name too long"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            read_file(tmp_path / name, CheckpointError, limit=10)
    assert read_file(tmp_path / "large", CheckpointError, limit=11) == bytes(11)


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a" * 300, "a/" * 3000, "a\0b"])
def test_paths_that_the_system_cannot_take(text: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.dir is .*, which is no usable path: ") as caught:
        usable_path(text, "output.dir", ConfigError)
    assert len(str(caught.value)) < 400


def test_values_are_shown_in_short() -> None:
    deep: Any = []
    for _ in range(30):
        deep = [deep] * 30
    assert len(shown(deep)) < 2000
    assert len(shown("x" * 10**6)) < 200
    assert shown({"a": 1}) == "{'a': 1}"


def test_a_plan_is_read_within_the_limits() -> None:
    for text in (LAUGHS, "[" * 5000, '"\\ud800"'):
        with pytest.raises(PlanError):
            ParallelPlan.from_yaml(text)
    with pytest.raises(PlanError, match="globs of local_attributes must be a list of strings"):
        ParallelPlan.from_yaml("styles: {}\nlocal_attributes: {1: [a]}")
    begin = time.process_time()
    assert match_names("*a" * 40 + "b", ["a" * 200]) == []
    assert match_names("a*b*c", ["abc", "axbxxc", "ab.c", "a.bc", "abcbc"]) == ["abc", "axbxxc", "abcbc"]
    assert time.process_time() - begin < 1
