"""Between the passes of an FSDP2 model its parameters are its shards, and every forward computes with these.

FSDP2 leaves what it does not reshard after forward (the root's parameters, the last block's) gathered until a backward
has used it. Until then ``model.parameters()`` shows the gathered copies, and the next forward computes with them,
whatever the shards have become. Here:

- after a forward without gradients everything is sharded again;
- after one with gradients the shards are what modules show, while backward's copies stay where they are, and when
  backward begins it finds them where it expects them (a recomputed block reads them);
- a forward that finds something gathered gathers it anew;
- what a forward or backward that was cut short by an error has left behind is cleared.

An ordinary step (forward, backward, optimizer) gathers and reduces what it would without this. What a user keeps
gathered after backward (``set_reshard_after_backward(False)``) is gathered anew only if the shards were written to.

Data-parallel ranks may use different parameters (:mod:`.skipped_units`). FSDP2 reduces those that have a gradient, and
its reduction wants the same ones on every rank: the others get zeros before it, and None again where no rank used them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright import _torch

Explaining = Callable[[], AbstractContextManager[None]]


def watch_passes(model: nn.Module, before: Callable[[nn.Module], None], explaining: Explaining) -> None:
    """Keep these promises for ``model``, the root of FSDP2's units, in place.

    Args:
        before: called with the model when a forward begins, while all parameters are shards.
        explaining: put around FSDP2's collectives.
    """
    _Passes(model, before, explaining)


class _Passes:
    """The forwards and backwards of one model."""

    def __init__(self, model: nn.Module, before: Callable[[nn.Module], None], explaining: Explaining) -> None:
        self._before, self.explaining = before, explaining
        self._states = _torch.states_of(model)
        self._groups: list[_Group] = [group for state in self._states for group in _torch.groups_of(state)]
        self._depth = 0  # of forwards of the model, one inside the other
        self._in_backward = False
        self._recorded: list[tuple[int, int]] = []
        for group in self._groups:
            group.__class__ = _Group
            group.passes = self
        model.register_forward_pre_hook(self._begin_forward, prepend=True)
        model.register_forward_hook(self._end_forward, always_call=True)

    def begin_backward(self) -> None:
        """Called by every group when backward comes to it."""
        if self._in_backward:
            return
        self._in_backward = True
        for group in self._groups:
            if group.is_unsharded:
                _torch.register_gathered(group)
        _torch.after_backward(self._end_backward)

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        if _torch.in_backward():
            return  # a checkpoint repeats it
        self._depth += 1
        if self._depth > 1:
            return
        with _normal_tensors():
            _torch.find_root(self._states[0])
        if self._in_backward or _torch.is_unfinished(self._states[0]):
            for group in self._groups:
                _torch.drop_gathered_gradients(group)  # a part of them: of the units that backward came to
            self._recorded = [(0, 0)] * len(self._groups)
            self._clear()
        self._recorded = _torch.recorded_forwards(self._groups)
        for group in self._groups:
            _torch.learn_dtypes(group)
        for group in self._left_gathered():
            if group.reshard_after_backward or group.is_outdated():
                group.settle()
        self._before(module)
        for group in self._left_gathered():
            _torch.register_gathered(group)

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if _torch.in_backward() or not self._depth:
            return
        self._depth -= 1
        if self._depth:
            return
        if _torch.root_of(self._states[0]) is self._states[0]:
            self._clear()
            return
        if not torch.is_grad_enabled():
            _torch.forget_forwards(self._groups, self._recorded)
        for group in self._left_gathered():
            if group.reshard_after_backward and not torch.is_grad_enabled():
                group.settle()
            else:
                _torch.register_shards(group)

    def _end_backward(self) -> None:
        self._in_backward = False
        for group in self._groups:
            group.forget_zeros()
        for group in self._left_gathered():
            _torch.register_shards(group)

    def _clear(self) -> None:
        """Forget a pass that an error has cut short."""
        self._in_backward = False
        _torch.forget_unfinished_pass(self._states)
        _torch.forget_forwards(self._groups, self._recorded)
        for group in self._left_gathered():
            group.settle()
        for group in self._groups:
            group._filled = ()

    def _left_gathered(self) -> list[_Group]:
        """The groups that are gathered, but for those that ``unshard_fsdp2_model`` holds."""
        found = (group for group in self._groups if group.is_unsharded or _torch.is_gathering(group))
        return [group for group in found if not group.is_held]


class _Group(_torch.FSDPParamGroup):
    """A parameter group that says when its backward begins."""

    passes: _Passes
    is_held = False
    _versions: list[tuple[int, int]] | None = None
    _filled: tuple[nn.Parameter, ...] = ()

    def is_outdated(self) -> bool:
        """Whether the shards were written to since they were gathered."""
        return self._versions != _torch.written_versions(self)

    def settle(self) -> None:
        """Shard what is gathered or about to be."""
        self.wait_for_unshard()
        self.reshard()

    def unshard(self, async_op: bool = False) -> None:
        with self.passes.explaining(), _normal_tensors():
            super().unshard(async_op)

    def wait_for_unshard(self) -> None:
        gathers = _torch.is_gathering(self)
        with self.passes.explaining(), _normal_tensors():
            super().wait_for_unshard()
        if gathers and not self.reshard_after_backward:
            self._versions = _torch.written_versions(self)

    def pre_backward(self, default_prefetch: bool, *unused: Any) -> None:
        self.passes.begin_backward()
        super().pre_backward(default_prefetch, *unused)

    def post_backward(self, *unused: Any) -> None:
        if self.reduce_grads and _torch.runs_backward(self):
            # Ranks may have used different parameters, and the reduction wants the same ones on all.
            self._filled += tuple(shard for shard in _torch.fill_in_gradients(self) if shard.grad is None)
        with self.passes.explaining():
            super().post_backward(*unused)

    def forget_zeros(self) -> None:
        """Take away the gradients of parameters that no rank has used, as one process has none."""
        for shard in self._filled:
            if shard.grad is not None and _used_by_none(_local(shard.grad)):
                shard.grad = None
        self._filled = ()


def _used_by_none(grad: torch.Tensor) -> bool:
    """Whether all ranks have filled in zeros, which are negative (:func:`shardwright._torch.fill_in_gradients`).

    A shard without elements cannot tell, and has nothing to update.
    """
    return not grad.any() and bool(grad.flatten()[:1].signbit().all())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _normal_tensors() -> Iterator[None]:
    """Inside, tensors are made that can be trained with, also in inference mode: FSDP2 keeps its buffers for life."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
