"""Copies of a model that FSDP2 shards: refused with what works instead, for averaged weights above all."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from shardwright.errors import UnsupportedError


def refuse_copies(model: nn.Module) -> None:
    """Make ``copy.deepcopy(model)`` raise UnsupportedError, where torch's own message says nothing of the purpose."""
    vars(model)["__deepcopy__"] = _refuse


def _refuse(memo: object) -> NoReturn:
    raise UnsupportedError(
        "A model that FSDP2 shards cannot be copied: its units belong to process groups. For averaged weights, copy "
        "first and shard both: averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=...), then "
        "parallelize(model, config, mesh) and parallelize(averaged.module, config, mesh); averaged.update_parameters("
        "model) and averaged(**batch) work on the shards. Or keep a list, average = [p.detach().clone() for p in "
        "model.parameters()], update it with mean.lerp_(p.detach(), 0.01) for each, and copy_ it into the parameters "
        "under torch.no_grad() to evaluate. For a second model, build it anew and load "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict(model)."
    )
