"""A forward and backward of the short model on fake tensors, on one rank of a group that exchanges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import masking_utils

from shardwright._torch import FakeTensorMode, fake_store, tree_leaves, tree_map
from shardwright._transformers import one_document_in_each_row
from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.loss_tiles import apply_loss_tiles
from shardwright.distributed.apply.mlp_tiles import apply_mlp_tiles
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.estimate.trace.live import Live, Segment
from shardwright.estimate.trace.short import Short
from shardwright.estimate.workload import Workload


@contextmanager
def fake_ranks(ranks: int) -> Iterator[DeviceMesh | None]:
    """The ``tp`` mesh of so many ranks that exchange nothing; this process is the first. None with one rank."""
    if ranks == 1:
        yield None
        return
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def traced_step(short: Short, workload: Workload, *, output: torch.dtype | None = None) -> list[Segment]:
    """The segments of a forward, its loss and its backward.

    Args:
        output: dtype that the model's outputs are cast to; None: as they are.
    """
    decided = short.decided
    tp = 1 if decided.tensor is None else decided.tensor.tp
    with fake_ranks(tp) as mesh:
        model = short.model
        if mesh is not None and decided.tensor is not None:
            apply_tensor_parallel(model, mesh, decided.tensor, units=decided.summing)
        if decided.tiles.head is not None:
            apply_loss_tiles(model, decided.tiles.head, decided.tiles.loss)
        apply_mlp_tiles(model, decided.tiles.mlps, decided.tiles.mlp)
        if decided.recomputed:
            selective = decided.activation_checkpointing == "selective"
            apply_activation_checkpointing(model, decided.recomputed, selective=selective, offload=False)
        elif decided.compiled:  # a compiler keeps what selective checkpointing keeps, and what its products read
            apply_activation_checkpointing(model, decided.compiled, selective=True, offload=False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            return _step(model, list(dict.fromkeys(short.stands_for.values())), workload, output, tp)


def _step(
    model: nn.Module, blocks: list[str], workload: Workload, output: torch.dtype | None, tp: int
) -> list[Segment]:
    parameters = list(model.parameters())  # while a unit runs, modules show local copies
    live = Live(lambda: _gradients(parameters), tp)
    marks = _Marks(live)
    for name in blocks:
        marks.put(model.get_submodule(name), name)
    if output is not None:
        model.register_forward_hook(lambda module, args, result: _cast(result, output))
    ids = torch.zeros((workload.batch_size, workload.seq_len), dtype=torch.long)
    with live, one_document_in_each_row(masking_utils):
        live.begin("", backward=False)
        logits = None
        if workload.loss == "model":
            loss = model(input_ids=ids, labels=ids).loss
        else:
            logits = model(input_ids=ids).logits
            loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
        live.begin("", backward=True)
        loss.backward()
        del logits
        live.end()
    return live.segments


class _Marks:
    """Begins segments where blocks begin and end, forward and backward."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self._handed_on: Tensor | None = None  # what the last block returned: its gradient ends the next one's backward

    def put(self, block: nn.Module, name: str) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.live.begin(name)
            first = _first(args, kwargs)
            if first is not None:
                self.live.segments[-1].input = _bytes(first)
            if first is not None and first is not self._handed_on:
                first.register_hook(lambda gradient: self.live.begin(""))

        def after(module: nn.Module, args: Any, result: Any) -> None:
            self._handed_on = _first(result)
            if self._handed_on is not None:
                self._handed_on.register_hook(lambda gradient: self.live.begin(name))
            self.live.begin("")

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)


def _first(*values: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad), None)


def _cast(result: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(one, result)


def _gradients(parameters: list[nn.Parameter]) -> int:
    return sum(_bytes(param.grad) for param in parameters if param.grad is not None)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()
