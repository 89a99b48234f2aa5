"""Blocks that are recomputed leave their buffers as blocks that are not: running statistics, counters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)
        self.register_buffer("added", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("table", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        self.added += 1
        self.replaced = self.replaced + 1
        return x + self.norm(self.linear(x)).tanh() * self.table * self.added / (1 + self.replaced)


@pytest.mark.parametrize("selective", [0, 1, 2])
def test_buffers_and_gradients(selective: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    recomputed = copy.deepcopy(plain)
    apply_activation_checkpointing(recomputed, ["0", "1"], selective=selective)
    runs = []
    recomputed[0].linear.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        x = torch.randn(4, 8)
        for model in (plain, recomputed):
            model(x).square().mean().backward()
    assert len(runs) == 6
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(recomputed.get_buffer(name), buffer, rtol=0, atol=0, msg=name)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(recomputed.get_parameter(name).grad, parameter.grad)
