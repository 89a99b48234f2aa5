"""Models whose code was replaced by kernels of other packages: refused by name under tensor parallelism.

Such a kernel (Triton) is given addresses and knows of one rank's memory. Those for losses read the head's weight and
the logits, which tensor parallelism cuts, and none of them runs on the CPU, where a plan is proved on a copy without
weights. Under FSDP2 alone they are given gathered parameters, and work.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn

from shardwright.distributed.runtime.forward import original_class
from shardwright.errors import UnsupportedError

# Package -> what it calls itself, and how its patches are left out.
_PACKAGES = {
    "liger_kernel": ("Liger", "do not call apply_liger_kernel_to_..., or set use_liger_kernel=False"),
    "cut_cross_entropy": ("cut_cross_entropy", "do not call cce_patch"),
    "unsloth": ("Unsloth", "load the model with transformers"),
}


def check_fused_kernels(model: nn.Module, ranks: int) -> None:
    """Raise UnsupportedError where ``ranks`` work together on a batch, in a model that runs kernels of other packages.

    Found are modules of their classes, forwards that they have put on classes and instances (0.8 of Liger does both),
    functions that they have put into a model's file, and into torch.
    """
    if ranks < 2:
        return
    found = [(name or "its own forward", _package(_forward_of(part))) for name, part in model.named_modules()]
    files = dict.fromkeys(original_class(part).__module__ for part in model.modules())
    for file in files:
        functions = vars(sys.modules[file]).items() if file in sys.modules else ()
        found += [(name, _package(function)) for name, function in functions if isinstance(function, FunctionType)]
    found.append(("torch.nn.functional.cross_entropy", _package(F.cross_entropy)))
    for package, (called, without) in _PACKAGES.items():
        names = [name for name, origin in found if origin == package]
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UnsupportedError(
                f"This {original_class(model).__name__} runs kernels of {called} ({some}). They know of one rank's "
                f"memory only, and cannot be shown to be exact where {ranks} ranks share a batch (tp x cp). Use them "
                f"with FSDP2 alone (tp=1, cp=1), or leave them out ({without}): loss_tiles and mlp_tiles in "
                "ParallelConfig save the memory that they save, and are exact."
            )


def _forward_of(module: nn.Module) -> Any:
    return vars(module).get("forward") or original_class(module).forward


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]  # a partial function has no module
