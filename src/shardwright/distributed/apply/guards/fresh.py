"""Models that something has parallelized already: refused before anything is changed."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

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


def mark_parallelized(model: nn.Module) -> None:
    """Let :func:`check_fresh` know ``model``, also as a part of another one."""
    vars(model)[_MARK] = True
