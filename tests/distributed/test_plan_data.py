"""``ParallelPlan``: plain data that survives YAML and JSON, and refuses what it cannot mean."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.distributed.plan import ParallelPlan, glob_to_regex, match_names
from shardwright.errors import PlanError, ShardwrightError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
GLOBS = TEXT.filter(lambda text: text == text.strip())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def plans(draw: Any) -> ParallelPlan:
    styles = draw(st.dictionaries(GLOBS, TEXT, max_size=4))
    optional = draw(st.sets(st.sampled_from(sorted(styles)))) if styles else set()
    attributes = draw(st.dictionaries(GLOBS, st.lists(TEXT, max_size=2), max_size=2))
    return ParallelPlan(
        styles,
        frozenset(optional),
        attributes,
        local_arguments=draw(st.dictionaries(GLOBS, st.lists(TEXT, max_size=2), max_size=2)),
        source=draw(TEXT),
        notes=tuple(draw(st.lists(TEXT, max_size=2))),
        tp=draw(st.none() | st.integers(1, 64)),
    )


@given(plans())
def test_survives_json_yaml_and_dict(plan: ParallelPlan) -> None:
    assert ParallelPlan.from_json(plan.to_json()) == plan
    assert ParallelPlan.from_yaml(plan.to_yaml()) == plan
    assert ParallelPlan.from_dict(plan.to_dict()) == plan
    assert list(ParallelPlan.from_yaml(plan.to_yaml()).styles) == list(plan.styles)  # order decides: the last wins
    assert plan.diff(plan) == []
    assert all(glob in str(plan) for glob in plan.styles)


KEYS = ["styles", "optional", "local_attributes", "local_arguments", "source", "tp", "notes", "other"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_data_is_a_plan_or_refused(data: dict[str, Any]) -> None:
    try:
        plan = ParallelPlan.from_dict(data)
    except PlanError:
        return
    assert "other" not in data
    assert ParallelPlan.from_json(plan.to_json()) == plan


@given(st.text(max_size=30))
def test_any_text_is_a_plan_or_refused(text: str) -> None:
    for read in (ParallelPlan.from_json, ParallelPlan.from_yaml):
        with pytest.raises(PlanError):
            read(text)  # no text this short has the key 'styles' by chance


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"styles": {}, "stylse": {}}, "'stylse'"),
        ({"optional": []}, "'styles'"),
        ({"styles": ["a"]}, "list"),
        ({"styles": {"a": 3}}, "3"),
        ({"styles": {"a": ""}}, "'a'"),
        ({"styles": {"": "colwise"}}, "''"),
        ({"styles": {" a": "colwise"}}, "' a'"),
        ({"styles": {"a": "colwise"}, "optional": ["b"]}, "'b'"),
        ({"styles": {"a": "colwise"}, "optional": "a"}, "optional"),
        ({"styles": {"a": "colwise"}, "optional": 5}, "optional"),
        ({"styles": {"a": "colwise"}, "notes": None}, "notes"),
        ({"styles": {"a": "colwise"}, "local_attributes": {"a": "heads"}}, "heads"),
        ({"styles": {"a": "colwise"}, "local_attributes": {"a": 3}}, "'a'"),
        ({"styles": {"a": "colwise"}, "local_attributes": ["a"]}, "local_attributes"),
        ({"styles": {"a": "colwise"}, "source": 3}, "source"),
        ([], "mapping"),
    ],
)
def test_bad_data_is_refused_by_name(data: Any, named: str) -> None:
    with pytest.raises(PlanError, match=named.replace("'", ".")):
        ParallelPlan.from_dict(data)


def test_errors_can_be_caught_in_every_promised_way() -> None:
    for kind in (PlanError, ShardwrightError, AssertionError, ValueError):
        with pytest.raises(kind):
            ParallelPlan({"a": 1})  # type: ignore[dict-item]


def test_is_frozen_and_does_not_share_its_input() -> None:
    styles = {"a": "colwise"}
    plan = ParallelPlan(styles)
    styles["b"] = "rowwise"
    assert plan.styles == {"a": "colwise"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.source = "other"  # type: ignore[misc]


def test_diff_says_what_each_side_has() -> None:
    here = ParallelPlan({"q": "colwise", "o": "rowwise"})
    there = ParallelPlan({"q": "colwise", "o": "replicate", "k": "colwise"}, local_attributes={"attn": ["heads"]})
    assert here.diff(there) == ["- o: rowwise", "+ o: replicate", "+ k: colwise", "+ attn: local heads"]


@pytest.mark.parametrize(
    ("glob", "matched"),
    [
        ("*", ["lm_head"]),
        ("layers.*.q", ["layers.0.q", "layers.11.q"]),
        ("layers.0.*", ["layers.0.q"]),
        ("layers.*", []),
        ("lay*s.*.q", ["layers.0.q", "layers.11.q"]),
        ("layers.1*.q", ["layers.11.q"]),
        ("layers[0].q", []),  # a dotted name, not a pattern language
        ("layers.0.q|lm_head", []),
        ("layers?0?q", []),
    ],
)
def test_a_star_never_crosses_a_dot(glob: str, matched: list[str]) -> None:
    assert match_names(glob, ["layers.0.q", "layers.11.q", "layers.0.attn.q", "lm_head"]) == matched


@given(st.lists(TEXT.filter(lambda text: "*" not in text), min_size=1, max_size=4))
def test_a_name_without_stars_matches_itself_alone(parts: list[str]) -> None:
    name = ".".join(parts)
    assert glob_to_regex(name).fullmatch(name)
    assert not glob_to_regex(name).fullmatch(f"{name}x")


def test_data_modules_import_no_torch() -> None:
    modules = "shardwright, shardwright.errors, shardwright.distributed.config, shardwright.distributed.plan"
    code = (
        f"import sys, {modules}, shardwright.distributed.plans as plans\n"
        "plans.optimized_plans()\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy', 'yaml'}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_text_of_a_plan_is_that_of_every_process() -> None:
    """Ranks under torchrun have other hash seeds, and so sets in another order; they compare ``repr``."""
    code = (
        "from shardwright.distributed.plan import ParallelPlan\n"
        "names = [f'layer.{i}' for i in range(9)]\n"
        "print(ParallelPlan(dict.fromkeys(names, 'colwise'), frozenset(names)))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "1234"
    }
    assert len(texts) == 1
