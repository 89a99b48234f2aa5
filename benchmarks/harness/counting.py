"""Counts the collectives of a block of code: every call, and the bytes that a rank sends for it.

Runs in the contenders' interpreters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of torch's operators for one kind of collective, as functional collectives and as c10d calls.
KINDS = {
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_coalesced": "all-gather",
    "_allgather_base": "all-gather",
    "allgather": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "alltoall_base": "all-to-all",
    "broadcast": "broadcast",
    "scatter": "scatter",
}


class Call(NamedTuple):
    """One collective.

    Attributes:
        kind: ``all-reduce``, ``all-gather``, ...
        sent: bytes that each rank sends, in a ring: an all-reduce of S bytes over n ranks sends 2 S (n - 1) / n.
    """

    kind: str
    sent: float


class CollectiveCounter(TorchDispatchMode):
    """Inside ``with CollectiveCounter() as counter``, ``counter.calls`` lists the collectives in order.

    Groups of one rank send nothing and are not listed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor first; what it does with the local tensors comes back here
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")
        if name[0] in ("_c10d_functional", "_c10d_functional_autograd", "c10d"):
            kind = KINDS.get(name[2].rstrip("_"))
            if kind is not None:
                self._note(kind, args, result)
        return result

    def _note(self, kind: str, args: Any, result: Any) -> None:
        size = _group_size(args)
        if size > 1:
            # The larger of what goes in and what comes out is the whole tensor, whichever way it is cut.
            inputs = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            outputs = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            whole = max(_bytes(inputs[:1]), _bytes(inputs[1:2]), _bytes(outputs))
            rounds = 2 if kind == "all-reduce" else 1
            self.calls.append(Call(kind, rounds * whole * (size - 1) / size))


def _group_size(args: Any) -> int:
    for each in args:
        if isinstance(each, str) and (each.isdigit() or ":" in each):
            return _resolve_process_group(each).size()
        if isinstance(each, torch.ScriptObject):
            return ProcessGroup.unbox(each).size()
    raise ValueError(f"A collective without a group: {args}")


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
