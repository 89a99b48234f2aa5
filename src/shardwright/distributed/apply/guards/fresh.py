"""Models that something has parallelized already: refused before anything is changed."""

from __future__ import annotations

from functools import cached_property

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from shardwright.distributed.axes import AXES
from shardwright.distributed.mesh import batch_mesh
from shardwright.distributed.plan import ParallelPlan
from shardwright.errors import PlanError

_MARK = "_parallelized"
_WRAPPERS = (DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)


def check_fresh(model: nn.Module) -> None:
    """Raise PlanError where ``model`` is parallelized already: by Shardwright, FSDP2 or one of torch's wrappers."""
    for name, module in model.named_modules():
        what = f"{name} ({type(module).__name__})" if name else f"This {type(module).__name__}"
        if isinstance(module, _WRAPPERS):
            raise PlanError(
                f"{what} is wrapped in {type(module).__name__}, which averages or shards gradients by itself: they "
                "would be reduced twice. Pass the model inside, model.module; parallelize does what the wrapper does."
            )
        if _MARK in vars(module) or (module is model and isinstance(module, FSDPModule)):
            raise PlanError(
                f"{what} is parallelized already. Call parallelize once, on a plain model that is built anew (or "
                "loaded) on every rank; to change its config, build it again and load the weights."
            )


class Parallelized:
    """What a parallelized model is spread over. Copies of the model share it.

    Attributes:
        mesh: all of its ranks.
        engine: ``"fsdp2"`` or ``"megatron_fsdp"``.
        plan: the tensor-parallel plan; None where there is one tensor-parallel rank.
    """

    def __init__(self, mesh: DeviceMesh, tp: str, engine: str, plan: ParallelPlan | None) -> None:
        self.mesh = mesh
        self.engine = engine
        self.plan = plan
        self._one_batch = {tp, *(axis.name for axis in AXES if axis.one_batch)}

    def __deepcopy__(self, memo: object) -> Parallelized:
        return self

    @cached_property
    def batches(self) -> DeviceMesh | None:
        """The one-dimensional mesh of the ranks that are given a batch each; None where all share one.

        A collective the first time where the mesh has several such axes that are not flattened.
        """
        return batch_mesh(self.mesh, self._one_batch)


def mark_parallelized(model: nn.Module, parallelized: Parallelized) -> None:
    """Let :func:`check_fresh` know ``model``, also as a part of another one."""
    vars(model)[_MARK] = parallelized


def parallelized_model(model: nn.Module) -> Parallelized | None:
    """What ``model``, or the model inside of it, is spread over; None where it is not parallelized."""
    return next((vars(module)[_MARK] for module in model.modules() if _MARK in vars(module)), None)
