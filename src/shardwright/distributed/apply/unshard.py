"""Whole FSDP2 parameters for a while: :func:`unshard_fsdp2_model`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardwright import _torch
from shardwright._torch import reshards_after_forward


@contextmanager
def unshard_fsdp2_model(model: nn.Module) -> Generator[None, None, None]:
    """Gather every FSDP2 parameter of ``model`` on entry, keep them gathered inside, shard them again on exit.

    Inside, FSDP2 communicates nothing, so every rank may run the model as often as it likes: log-probabilities of
    its own batches, ``generate()`` of its own length. Collectives of tensor parallelism still run, so the ranks of
    one ``tp`` group must do the same. Entering is a collective over the data-parallel ranks; leaving is not.

    Prefetch and reshard settings are those from before on exit, also when the body raises, and so is what FSDP2
    remembers of earlier forwards: a training step after it does what it would have done without it. The contexts
    nest, on one model or on parts of it; the parameters are sharded again when the outermost one ends. What is written
    into a gathered parameter inside is lost, and an optimizer step inside does not reach the gathered copies. A
    model without FSDP2 parameters is left as it is.

    Args:
        model: parameters (any dtype, any shape) are gathered in the compute dtype of FSDP2's precision policy; with
            tensor parallelism they are then DTensors over ``tp`` alone.

    Raises:
        RuntimeError: from FSDP2, when ``model`` still has parameters on the meta device.
    """
    states = _torch.states_of(model)
    for state in states:
        _torch.find_root(state)  # outermost first; otherwise a forward inside would choose a root of its own
    groups = [group for state in states for group in _torch.groups_of(state) if not _stays_gathered(group)]
    held = [_Held.of(group) for group in groups]
    recorded = _torch.recorded_forwards(groups)
    solo = [module for module in _outside_units(model) if _torch.runs_in_step(module)] if states else []
    try:
        # A tensor made in inference mode could never be trained with, and FSDP2 keeps its buffers for life.
        with torch.inference_mode(mode=False):
            for item in held:
                item.gather()
        for module in solo:
            _torch.set_runs_in_step(module, False)
        yield
    finally:
        for module in solo:
            _torch.set_runs_in_step(module, True)
        if held:
            _torch.forget_unfinished_pass(states)
        # FSDP2 prefetches along the recorded order of forwards. Ranks ran different numbers of them inside: left in
        # the record, they would make the next backward gather different units on different ranks.
        _torch.forget_forwards(groups, recorded)
        for item in held:
            item.release()


@dataclass
class _Held:
    """A parameter group and its settings from before."""

    group: Any
    post_forward_mesh_info: Any
    reshard_after_backward: bool

    @classmethod
    def of(cls, group: Any) -> _Held:
        return cls(group, group.post_forward_mesh_info, group.reshard_after_backward)

    def gather(self) -> None:
        self.group.lazy_init()  # refuses parameters on meta
        self.group.reshard()  # a root may stay gathered after a forward, and be older than the last optimizer step
        self.group.post_forward_mesh_info = None
        self.group.reshard_after_backward = False
        self.group.unshard()
        self.group.wait_for_unshard()
        self.group.is_held = True

    def release(self) -> None:
        self.group.is_held = False
        self.group.post_forward_mesh_info = self.post_forward_mesh_info
        self.group.reshard_after_backward = self.reshard_after_backward
        self.group.reshard()


def _stays_gathered(group: Any) -> bool:
    """Whether nothing but its owner would shard ``group`` again: it is in an outer context, or the user keeps it."""
    return group.is_unsharded and not reshards_after_forward(group) and not group.reshard_after_backward


def _outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` and what is below it down to, and without, the FSDP2 units inside it."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _outside_units(child)
