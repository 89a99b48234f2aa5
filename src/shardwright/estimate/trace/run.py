"""A forward and backward of the short model on fake tensors, on one rank of a group that exchanges nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from shardwright._torch import FakeTensorMode, fake_store, tree_leaves, tree_map
from shardwright._transformers import one_document_in_each_row
from shardwright.distributed.apply.activation_checkpointing import apply_activation_checkpointing
from shardwright.distributed.apply.expert_parallel import apply_expert_parallel
from shardwright.distributed.apply.loss_tiles import apply_loss_tiles
from shardwright.distributed.apply.mlp_tiles import apply_mlp_tiles
from shardwright.distributed.apply.tensor_parallel import apply_tensor_parallel
from shardwright.distributed.config import Degrees, ParallelConfig, saved_every
from shardwright.distributed.mesh import axis, make_mesh
from shardwright.distributed.planning.decided import DecidedPlan
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward
from shardwright.distributed.steps import split_sequences
from shardwright.errors import UnsupportedError
from shardwright.estimate.trace.balanced import BALANCED
from shardwright.estimate.trace.live import Live, Segment
from shardwright.estimate.trace.short import Short
from shardwright.estimate.workload import Workload


@contextmanager
def fake_ranks(config: ParallelConfig) -> Iterator[DeviceMesh | None]:
    """The mesh of ranks that exchange nothing, of which this process is one. None with one rank.

    It is the rank that has most to do: of a sequence the last part, whose queries see all keys, and of everything else
    the first part. There are as many data-parallel ranks as experts are spread over.
    """
    tp, cp, ep = config.tp, config.cp, config.ep
    degrees = Degrees(1, lcm(ep, cp * tp) // (cp * tp), cp, tp, ep)
    if degrees.world_size == 1:
        yield None
        return
    dist.init_process_group("fake", store=fake_store(), rank=(cp - 1) * tp, world_size=degrees.world_size)
    try:
        yield make_mesh(degrees, "cpu")
    finally:
        dist.destroy_process_group()


def traced_step(
    short: Short, workload: Workload, config: ParallelConfig, *, output: torch.dtype | None = None
) -> list[Segment]:
    """The segments of a forward, its loss and its backward.

    Args:
        config: for its degrees.
        output: dtype that the model's outputs are cast to; None: as they are.

    Raises:
        UnsupportedError: experts of a list on ranks of their own.
    """
    decided, model = short.decided, short.model
    if decided.experts is not None and any(own.listed is not None for own in decided.experts.modules.values()):
        raise UnsupportedError(
            f"{type(model).__name__} calls its experts one after another, with as many tokens as its router says"
        )
    with fake_ranks(config) as mesh:
        if mesh is not None:
            _spread(model, decided, mesh)
        if decided.tiles.head is not None:
            apply_loss_tiles(model, decided.tiles.head, decided.tiles.loss)
        apply_mlp_tiles(model, decided.tiles.mlps, decided.tiles.mlp)
        if decided.recomputed:
            selective = saved_every(decided.activation_checkpointing)
            apply_activation_checkpointing(model, decided.recomputed, selective=selective, offload=False)
        elif decided.compiled:  # a compiler keeps what selective checkpointing keeps, and what its products read
            blocks = decided.blocks if decided.compiled_whole else decided.compiled
            apply_activation_checkpointing(model, blocks, selective=1, offload=False)
        groups = {} if mesh is None else {_group(mesh, name): (name, axis(mesh, name).size()) for name in _axes(config)}
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            parameters = list(model.parameters())  # while a unit runs, modules show local copies
            live = Live(lambda: _gradients(parameters), groups, compiled_embedding=decided.compiled_whole)
            return _step(model, live, short, workload, output)


def _axes(config: ParallelConfig) -> list[str]:
    sizes = {"ep": config.ep, "cp": config.cp, "tp": config.tp}
    return [name for name, size in sizes.items() if size > 1]


def _group(mesh: DeviceMesh, name: str) -> str:
    group: str = axis(mesh, name).get_group().group_name
    return group


class _Causal(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), CausalBias):
            kwargs = {**kwargs, "attn_mask": None, "is_causal": True}
        return func(*args, **kwargs)


class ToldCausal(Around):
    """Around a module whose attention has a mask that says that it is causal: GPUs never write that mask out."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Causal():
            return forward(*args, **kwargs)


def _spread(model: nn.Module, decided: DecidedPlan, mesh: DeviceMesh) -> None:
    """What :func:`shardwright.parallelize` does to a model before FSDP2, in its order; experts get equal loads."""
    tp_mesh = axis(mesh, "tp")
    if decided.experts is not None:
        apply_expert_parallel(model, decided.experts, axis(mesh, "ep"), tp_mesh, BALANCED)
    if decided.tensor is not None:
        apply_tensor_parallel(model, tp_mesh, decided.tensor, units=decided.summing)
    if decided.context is not None:
        split_sequences(model, axis(mesh, "cp"), tp_mesh, decided.context)
        for name in decided.context.attention:
            wrap_forward(model.get_submodule(name), ToldCausal())


def _step(model: nn.Module, live: Live, short: Short, workload: Workload, output: torch.dtype | None) -> list[Segment]:
    marks = _Marks(live)
    for name in dict.fromkeys(short.stands_for.values()):
        marks.put(model.get_submodule(name), name)
    if output is not None:
        model.register_forward_hook(lambda module, args, result: _cast(result, output))
    ids = torch.zeros((workload.batch_size, workload.seq_len), dtype=torch.long)
    with live, one_document_in_each_row(masking_utils):
        live.begin("", backward=False)
        if workload.loss == "model":
            loss = model(input_ids=ids, labels=ids).loss
            live.begin("", backward=True)
            loss.backward()
        else:
            _loss_outside(model, live, ids, short.decided.compiled_whole)
        live.end()
    return live.segments


def _loss_outside(model: nn.Module, live: Live, ids: Tensor, compiled: bool) -> None:
    """The loss of logits that stay until backward has ended.

    Args:
        compiled: the model is one compiled function, which is handed the gradient of the logits and lets it go when all
            of its backward has ended.
    """
    logits = model(input_ids=ids).logits
    handed_back: list[Tensor] = []
    logits.register_hook(lambda gradient: live.begin(""))
    if compiled:
        logits.register_hook(handed_back.append)
    live.begin("", loss=True)
    loss = cross_entropy(logits.flatten(0, 1), ids.flatten())
    live.begin("", backward=True, loss=True)
    loss.backward()


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
