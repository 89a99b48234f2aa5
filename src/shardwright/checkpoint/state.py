"""What a training run consists of, as tensors (for torch.distributed.checkpoint) and plain data (for JSON)."""

from __future__ import annotations

import math
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
from shardwright.untrusted import shown

MODEL = "model."
OPTIMIZER = "optimizer."


@dataclass
class RunState:
    """The parts of a run that change while it trains.

    Attributes:
        keeps: the names of what the optimizer keeps for a parameter that has been updated; None: not known, so that a
            checkpoint is believed about it.
        trained_only: parameters that are frozen come from elsewhere, and are no part of a checkpoint.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None = None
    keeps: frozenset[str] | None = None
    trained_only: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, persistent buffer and optimizer tensor, by name; tied weights once."""
        return {**self.weights(), **self._optimizer_tensors()}

    def weights(self) -> dict[str, Tensor]:
        """Those of :meth:`tensors` that are the model's."""
        return {
            name: tensor
            for name, tensor in model_tensors(self.model).items()
            if tensor.requires_grad or not (self.trained_only and isinstance(tensor, nn.Parameter))
        }

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
            CheckpointError: the checkpoint is of other parameters, shapes or dtypes. The optimizer is as before then.
        """
        stored: dict[str, Any] = dict(metadata.state_dict_metadata)
        kept = {parameter: self._stored_for(parameter, name, stored) for parameter, name in self._names().items()}
        names = {
            *self.weights(),
            *(f"{OPTIMIZER}{name}.{key}" for parameter, name in self._names().items() for key in kept[parameter]),
        }
        missing, extra = names - set(stored), set(stored) - names
        if missing or extra:
            raise CheckpointError(
                f"The checkpoint is of another model: it lacks {_some(missing)} and has {_some(extra)} on top. Resume "
                "with the model and optimizer it was made with."
            )
        require_alike(self.weights(), stored)
        for parameter, values in kept.items():
            self.optimizer.state[parameter] = {key: self._empty(parameter, value) for key, value in values.items()}

    def _stored_for(self, parameter: Tensor, name: str, stored: Mapping[str, Any]) -> dict[str, TensorStorageMetadata]:
        """What the checkpoint has of the optimizer's state of one parameter, of sizes and kinds that make sense."""
        prefix = f"{OPTIMIZER}{name}."
        found = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        found = {key: value for key, value in found.items() if "." not in key}
        if self.keeps is not None and found and found.keys() != self.keeps:
            raise CheckpointError(
                f"The checkpoint has {', '.join(sorted(found))} of the optimizer for {name}; this one keeps "
                f"{', '.join(sorted(self.keeps))}. Resume with the optimizer it was made with."
            )
        for key, value in found.items():
            dtype, size = value.properties.dtype, tuple(value.size)
            if value.size.numel() > max(parameter.numel(), 1) or len(size) > parameter.ndim:
                raise CheckpointError(
                    f"{prefix}{key} has the shape {size}; its parameter has {tuple(parameter.shape)}."
                )
            if size == tuple(parameter.shape) and dtype.is_floating_point != parameter.is_floating_point():
                raise CheckpointError(f"{prefix}{key} is {dtype}, but its parameter {parameter.dtype}.")
        return found

    def restore(self, data: Mapping[str, Any]) -> None:
        """Put :meth:`data` back.

        Raises:
            CheckpointError: other parameter groups, or values of other kinds.
        """
        here, there = self.data()["groups"], data["groups"]
        names = [group.get("params") if isinstance(group, Mapping) else None for group in there]
        if [group["params"] for group in here] != names:
            raise CheckpointError(
                f"The optimizer has {len(here)} parameter groups and the checkpoint {len(there)}, or they hold other "
                "parameters. Resume with the optimizer it was made with."
            )
        schedule = _scalars(self.schedule.state_dict()) if self.schedule is not None else {}
        stored_schedule = data.get("schedule") or {}
        for mine, stored in [*zip(here, there, strict=True), (schedule, stored_schedule)]:
            _require_same_kinds(mine, stored)
        for group, stored in zip(self.optimizer.param_groups, there, strict=True):
            group.update({key: _like(group.get(key), value) for key, value in stored.items() if key != "params"})
        if self.schedule is not None and stored_schedule:
            self.schedule.load_state_dict({**self.schedule.state_dict(), **stored_schedule})

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


def require_alike(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint's record of one of ``tensors`` has another shape or dtype."""
    for name, tensor in tensors.items():
        here, there = (tuple(tensor.shape), tensor.dtype), (tuple(stored[name].size), stored[name].properties.dtype)
        if here != there:
            raise CheckpointError(
                f"{name} is {there[0]} {there[1]} in the checkpoint and {here[0]} {here[1]} in the model. Use the "
                "model and the dtype it was made with."
            )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):  # a learning rate kept as a tensor
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(current: Any, stored: Any) -> Any:
    if isinstance(current, Tensor):
        return torch.full_like(current, stored)
    return tuple(stored) if isinstance(current, tuple) else stored


def _require_same_kinds(here: Mapping[str, Any], stored: Any) -> None:
    """Raises CheckpointError unless ``stored`` has values for the keys of ``here``, of their kinds and finite."""
    what = "of the optimizer or its schedule"
    if not isinstance(stored, Mapping) or not set(stored) <= set(here):
        raise CheckpointError(f"The checkpoint has {shown(stored)} {what}, where this one has {shown(dict(here))}.")
    for key, value in stored.items():
        if _kind(value) != _kind(here[key]) and not (value is None or here[key] is None):
            raise CheckpointError(f"{key} {what} is {shown(value)} in the checkpoint and {shown(here[key])} here.")
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise CheckpointError(f"{key} {what} is {shown(value)} in the checkpoint; it must be finite.")


def _kind(value: Any) -> Any:
    """What must agree: numbers are alike, lists are where their elements are."""
    if isinstance(value, list):
        return [_kind(one) for one in value]
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


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
