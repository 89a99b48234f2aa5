"""Which keys context-parallel ranks look at, read from masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor
from transformers.models.llama import modeling_llama

from shardwright.distributed.planning.context import plan_context
from shardwright.distributed.planning.context_method import ContextMethod
from shardwright.distributed.replay.reading import ModelReading
from shardwright.distributed.runtime import collectives as c
from shardwright.distributed.runtime.context.parts import Split
from shardwright.distributed.runtime.context.reach import reach_of, sends_less

SPLIT = Split.even(c.Group("none", 3, 1), 2, 14)  # 5, 5 and 4 positions
LEAST = torch.finfo(torch.float32).min


def causal(window: int = 14) -> Tensor:
    ones = torch.ones(14, 14, dtype=torch.bool)
    return (ones.tril() & ones.triu(1 - window)).expand(2, 1, -1, -1).clone()


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, LEAST)


def documents() -> Tensor:
    """The second row's last document begins at position 8."""
    mask = causal()
    mask[0, :, 4:, :4] = mask[1, :, 8:, :8] = False
    return mask


def padded() -> Tensor:
    """The first row's first three positions look at nothing."""
    mask = causal(3)
    mask[0, ..., :3] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "expected", "less"),
    [
        (causal(), [(0, 5), (0, 10), (0, 14)], False),
        (causal(3), [(0, 5), (3, 10), (8, 14)], True),
        (causal(7), [(0, 5), (0, 10), (4, 14)], True),
        (added(causal(3)), [(0, 5), (3, 10), (8, 14)], True),
        (documents(), [(0, 5), (0, 10), (4, 14)], True),
        (padded(), [(0, 5), (3, 10), (8, 14)], True),
        (added(padded()), [(0, 14), (3, 10), (8, 14)], True),
        (torch.zeros(1, 1, 14, 14, dtype=torch.bool), [(0, 5), (5, 10), (10, 14)], True),
        (torch.ones(1, 4, 14, 14, dtype=torch.bool), [(0, 14)] * 3, False),
    ],
)
def test_masks(mask: Tensor, expected: list[tuple[int, int]], less: bool) -> None:
    reach = reach_of(mask, {}, SPLIT)
    assert reach == tuple(expected)
    assert sends_less(reach, SPLIT) == less


def test_what_is_not_known() -> None:
    """Then all keys are gathered: masks of other forms and of numbers, and a bias for pairs of positions."""
    for mask in (None, causal()[..., :1, :], causal().long(), causal().to("meta")):
        assert reach_of(mask, {}, SPLIT) is None
    assert reach_of(causal(3), {"position_bias": torch.zeros(1, 4, 14, 14)}, SPLIT) is None
    assert reach_of(causal().to("meta"), {"sliding_window": 3}, SPLIT) == ((0, 5), (3, 10), (8, 14))


def test_a_kernel_that_counts_keys_is_given_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = modeling_llama.eager_attention_forward

    def counting(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kernel(module, query * key.shape[2], key, *args, **kwargs)

    def all_keys() -> set[bool]:
        plan = plan_context(ModelReading(build("llama", attn_implementation="eager")))
        return {use.all_keys for use in plan.attention.values()}

    assert all_keys() == {False}
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counting)
    assert all_keys() == {True}


@pytest.mark.parametrize(("kernel", "expected"), [("eager", True), ("sdpa", False)])
def test_a_kernel_that_could_not_be_tried_is_given_all(
    monkeypatch: pytest.MonkeyPatch, kernel: str, expected: bool
) -> None:
    """The mask of the trial may tell nothing, and that of a call may: then torch's kernel alone is known."""
    monkeypatch.setattr("shardwright.distributed.replay.context_answers.reach_of", lambda *_: None)
    plan = plan_context(ModelReading(build("llama", attn_implementation=kernel)))
    assert {use.all_keys for use in plan.attention.values()} == {expected}


def test_windows_are_fetched_where_the_method_is_auto() -> None:
    plan = plan_context(ModelReading(build("mistral")), ContextMethod("auto"))
    assert {(use.method, use.window) for use in plan.attention.values()} == {("gather", 6)}
    assert "fetches the keys and values of its window, 6 positions (of a long sequence" in next(iter(plan.notes()))
