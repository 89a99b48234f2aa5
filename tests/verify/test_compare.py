"""What counts as equal."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from shardwright.verify.compare import EXACT, Report, compare, relative_error
from shardwright.verify.precision import computing_in
from shardwright.verify.sharded import text_parameters
from shardwright.verify.source import load_config
from shardwright.verify.step import Trace
from shardwright.verify.tiny import build, shrunk_config


@pytest.fixture
def trace() -> Trace:
    torch.manual_seed(0)
    names = ("a.weight", "a.bias", "b.weight", "c.weight")
    return Trace(
        losses=[torch.tensor(5.0)],
        logits=[torch.randn(2, 3), torch.randn(2, 3)],
        gradients={name: torch.randn(4) for name in names[:3]} | {"c.weight": None},
        norm=torch.tensor(3.0),
        parameters={name: torch.randn(4) for name in names},
    )


def test_equal_is_equal(trace: Trace) -> None:
    errors, problems = compare(copy.deepcopy(trace), trace)
    assert not problems
    assert all(difference.error == 0.0 and not difference.over for difference in errors.values())


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 1.001, 2.0, math.nan])
def test_a_changed_gradient_is_seen(trace: Trace, factor: float) -> None:
    wrong = copy.deepcopy(trace)
    wrong.gradients["b.weight"] *= factor
    errors, _ = compare(wrong, trace)
    assert errors["gradient"].error > 9e-4
    assert list(errors["gradient"].over) == [errors["gradient"].name] == ["b.weight"]


def test_a_missing_and_a_surplus_gradient_are_seen(trace: Trace) -> None:
    missing, surplus = copy.deepcopy(trace), copy.deepcopy(trace)
    missing.gradients["b.weight"] = None
    surplus.gradients["c.weight"] = torch.ones(4)
    assert compare(missing, trace)[0]["gradient"].name == "b.weight"
    assert compare(surplus, trace)[0]["gradient"].name == "c.weight"
    assert compare(surplus, trace)[0]["gradient"].error > 1


def test_rounding_in_a_gradient_that_is_zero_is_no_difference(trace: Trace) -> None:
    trace.gradients["a.bias"] = torch.full((4,), 1e-9)
    noise = copy.deepcopy(trace)
    noise.gradients["a.bias"] *= -1
    assert compare(noise, trace)[0]["gradient"].error < EXACT
    noise.gradients["a.bias"] += 1e-3  # one thousandth of the weight's gradient in the same module
    assert compare(noise, trace)[0]["gradient"].error > EXACT


def test_a_small_gradient_is_judged_by_its_own_size(trace: Trace) -> None:
    trace.gradients["b.weight"] *= 1e-2
    wrong = copy.deepcopy(trace)
    wrong.gradients["b.weight"] *= 1.5
    assert 0.4 < compare(wrong, trace)[0]["gradient"].error < 0.6


@pytest.mark.parametrize("kind", ["losses", "logits", "norm", "parameters"])
def test_every_kind_is_looked_at(trace: Trace, kind: str) -> None:
    wrong = copy.deepcopy(trace)
    values = getattr(wrong, kind)
    if kind == "norm":
        wrong.norm *= 1.0001
    else:
        values[1 if kind == "logits" else 0 if kind == "losses" else "c.weight"] *= 1.0001
    errors, _ = compare(wrong, trace)
    changed = {"losses": {"loss", "loss_diff"}, "logits": {"logits"}, "norm": {"norm"}, "parameters": {"parameter"}}
    assert {name for name, difference in errors.items() if difference.over} == changed[kind]


def test_other_names_and_shapes_are_problems(trace: Trace) -> None:
    other = copy.deepcopy(trace)
    other.gradients["head.weight"] = other.gradients.pop("b.weight")
    _, problems = compare(other, trace)
    assert "parameters that are gone: b.weight" in problems
    assert any("head.weight" in problem for problem in problems)
    assert relative_error(torch.ones(2), torch.ones(3)) == math.inf


def test_the_report_is_json_even_with_infinite_errors() -> None:
    report = Report(False, 0.0, math.inf, 0.1, "b.weight", 0.5, "custom")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {"exact", "loss_diff", "logits_rel_err", "max_grad_rel_err", "worst_parameter", "sharded_fraction",
            "plan_source"} <= set(data)  # fmt: skip
    assert data["logits_rel_err"] is None
    assert "gradient of b.weight off by 1.0e-01" in report.summary()


def test_float64_is_float64_throughout() -> None:
    x = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
    with computing_in(torch.float64):
        rounded = torch.softmax(x.float() / 3, dim=-1, dtype=torch.float32).to(torch.float32) + torch.ones(5)
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
    assert rounded.dtype == torch.float64
    assert torch.equal(rounded, torch.softmax(x / 3, dim=-1) + 1)
    assert torch.get_default_dtype() == torch.float32
    with computing_in(torch.float32):
        assert x.float().dtype == torch.float32


@pytest.mark.parametrize(("model_type", "tower"), [("chameleon", "model.vqmodel."), ("llava", "model.vision_tower.")])
def test_towers_do_not_count_as_text(model_type: str, tower: str) -> None:
    model = build(shrunk_config(load_config(model_type)))
    counted = text_parameters(model)
    assert "lm_head.weight" in counted
    assert any("layers.1.mlp" in name for name in counted)
    assert any(name.startswith(tower) for name, _ in model.named_parameters())
    assert not any(name.startswith(tower) for name in counted)
