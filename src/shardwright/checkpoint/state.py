"""What a training run consists of, as tensors (for torch.distributed.checkpoint) and plain data (for JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwright.distributed.apply.megatron_fsdp import state_like
from shardwright.errors import CheckpointError

MODEL = "model."
OPTIMIZER = "optimizer."


@dataclass
class RunState:
    """The parts of a run that change while it trains."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, persistent buffer and optimizer tensor, by name; tied weights once."""
        return {**model_tensors(self.model), **self._optimizer_tensors()}

    def data(self) -> dict[str, Any]:
        """The rest: hyper-parameters with the names of their parameters, and the schedule's position."""
        names = self._names()
        groups = [
            {key: [names[p] for p in value] if key == "params" else _plain(value) for key, value in group.items()}
            for group in self.optimizer.param_groups
        ]
        return {
            "groups": groups,
            "schedule": None if self.schedule is None else _scalars(self.schedule.state_dict()),
        }

    def prepare(self, metadata: Metadata) -> None:
        """Give the optimizer the (empty) tensors that a checkpoint with ``metadata`` has, shards where it has shards.

        Raises:
            CheckpointError: the checkpoint is of other parameters.
        """
        for parameter, name in self._names().items():
            prefix = f"{OPTIMIZER}{name}."
            stored = {
                key.removeprefix(prefix): value
                for key, value in metadata.state_dict_metadata.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
            self.optimizer.state[parameter] = {
                key: self._empty(parameter, value)
                for key, value in stored.items()
                if isinstance(value, TensorStorageMetadata)
            }
        missing = set(self.tensors()) - set(metadata.state_dict_metadata)
        extra = set(metadata.state_dict_metadata) - set(self.tensors())
        if missing or extra:
            raise CheckpointError(
                f"The checkpoint is of another model: it lacks {_some(missing)} and has {_some(extra)} on top. Resume "
                "with the model and optimizer it was made with."
            )

    def restore(self, data: Mapping[str, Any]) -> None:
        """Put :meth:`data` back.

        Raises:
            CheckpointError: other parameter groups.
        """
        here, there = self.data()["groups"], data["groups"]
        if [group["params"] for group in here] != [group["params"] for group in there]:
            raise CheckpointError(
                f"The optimizer has {len(here)} parameter groups and the checkpoint {len(there)}, or they hold other "
                "parameters. Resume with the optimizer it was made with."
            )
        for group, stored in zip(self.optimizer.param_groups, there, strict=True):
            group.update({key: _like(group.get(key), value) for key, value in stored.items() if key != "params"})
        if self.schedule is not None and data["schedule"] is not None:
            self.schedule.load_state_dict({**self.schedule.state_dict(), **data["schedule"]})

    def _names(self) -> dict[Tensor, str]:
        """Parameters of the optimizer -> the first of their names in the model."""
        first: dict[Tensor, str] = {}
        for name, parameter in self.model.state_dict(keep_vars=True).items():
            first.setdefault(parameter, name)
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        unknown = sum(parameter not in first for parameter in held)
        if unknown:
            raise CheckpointError(
                f"The optimizer holds {unknown} tensors that are no parameters of the model (any more). Make the "
                "optimizer after the model is sharded."
            )
        return {parameter: first[parameter] for parameter in held}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{OPTIMIZER}{name}.{key}": state_like(parameter, value)
            for parameter, name in self._names().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _empty(self, parameter: Tensor, stored: TensorStorageMetadata) -> Tensor:
        if stored.size == parameter.shape and parameter.ndim:
            return torch.zeros_like(parameter, dtype=stored.properties.dtype).detach()
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        on_device = group.get("capturable") or group.get("fused")  # where torch's optimizers keep their step count
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        device = local.device if on_device else torch.device("cpu")
        return torch.zeros(stored.size, dtype=stored.properties.dtype, device=device)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, as ``model.NAME``; those that are tied under the first of their names."""
    seen: set[int] = set()
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            tensors[MODEL + name] = value
        seen.add(id(value))
    return tensors


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):  # a learning rate kept as a tensor
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(current: Any, stored: Any) -> Any:
    if isinstance(current, Tensor):
        return torch.full_like(current, stored)
    return tuple(stored) if isinstance(current, tuple) else stored


def _scalars(data: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a schedule's state; its functions come from the config."""
    return {key: value for key, value in data.items() if _is_scalar(value) or _is_scalar_list(value)}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))


def _is_scalar_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_scalar, value))


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more if ordered else "nothing"
