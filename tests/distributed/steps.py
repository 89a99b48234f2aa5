"""Comparing a sharded model with the same model in one piece, on the rank that holds both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from shardwright.verify.compare import EXACT, gradient_scales, relative_error
from shardwright.verify.step import full

Loss = Callable[[nn.Module], torch.Tensor]


def assert_same(value: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = relative_error(full(value), full(expected))
    assert error < EXACT, f"{what}: relative error {error:.1e}"


def assert_same_gradients(model: nn.Module, reference: nn.Module, what: str = "") -> None:
    """Every gradient, by name; one that is missing on one side only is a difference."""
    here = {name: None if p.grad is None else full(p.grad) for name, p in model.named_parameters()}
    there = {name: None if p.grad is None else full(p.grad) for name, p in reference.named_parameters()}
    assert sorted(here) == sorted(there), what
    scales = gradient_scales(there)
    assert any(expected is not None and expected.any() for expected in there.values()), what  # something to compare
    for name, expected in there.items():
        found = here[name]
        assert (found is None) == (expected is None), f"{what}: {name}"
        if found is not None and expected is not None:
            error = relative_error(found, expected, scales[name])
            assert error < EXACT, f"{what}: gradient of {name}: relative error {error:.1e}"


def assert_same_parameters(model: nn.Module, reference: nn.Module, what: str = "") -> None:
    there = dict(reference.named_parameters())
    assert sorted(name for name, _ in model.named_parameters()) == sorted(there), what
    for name, parameter in model.named_parameters():
        assert_same(parameter, there[name], f"{what}: {name}")


def assert_same_step(model: nn.Module, reference: nn.Module, loss: Loss, what: str) -> None:
    """One forward and backward on both."""
    for each in (model, reference):
        each.zero_grad()
    mine, theirs = loss(model), loss(reference)
    assert type(mine) is torch.Tensor, f"{what}: the loss is a {type(mine).__name__}"
    assert_same(mine, theirs, what)
    mine.sum().backward()
    theirs.sum().backward()
    assert_same_gradients(model, reference, what)
