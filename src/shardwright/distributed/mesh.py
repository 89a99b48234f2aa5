"""From degrees to a ``DeviceMesh``."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwright._torch import add_view, concatenated, flatten, flattened_names
from shardwright.distributed.axes import DATA, EVERY_SHARD, EXPERT_SHARDS, EXPERTS, FLATTENED, NAMES
from shardwright.distributed.config import Degrees, ParallelConfig
from shardwright.errors import ConfigError, UnsupportedError


def default_device_type() -> str:
    """``"cuda"`` where torch can use a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_mesh(config: ParallelConfig | Degrees, device_type: str | None = None) -> DeviceMesh:
    """The mesh ``dp_replicate x dp_shard x cp x tp`` with the flattened axes ``dp``, ``dp_shard_cp`` and ``dp_cp``.

    With experts on ranks of their own (``ep``) it can also be asked for ``efsdp`` and ``ep``.

    ``torch.distributed`` must be initialised (a world of one rank will do). Neighbouring ranks share a ``tp`` group,
    which puts tensor parallelism inside a node under torchrun's numbering.

    Args:
        config: degrees; ``dp_shard=-1`` is filled from the world size.
        device_type: ``"cuda"`` or ``"cpu"``; None takes the GPU where there is one and the ranks talk through more
            than gloo.

    Raises:
        ConfigError: the degrees do not multiply to the world size, or torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "torch.distributed is not initialised. Start the script with torchrun and call "
            "torch.distributed.init_process_group() before making a mesh."
        )
    world_size = dist.get_world_size()
    degrees = config.degrees(world_size) if isinstance(config, ParallelConfig) else config
    if degrees.world_size != world_size:
        raise ConfigError(f"{degrees} multiply to {degrees.world_size}, but the world size is {world_size}.")
    sizes = tuple(getattr(degrees, name) for name in NAMES)
    mesh = init_device_mesh(device_type or _device_type_of_ranks(), sizes, mesh_dim_names=NAMES)
    flattened = dict(FLATTENED)
    if degrees.ep > 1 or (degrees.tp > 1 and degrees.dp_shard * degrees.cp > 1):
        name, axes = EVERY_SHARD
        flattened[name] = axes
    for name, axes in flattened.items():
        flatten(mesh[axes], name)
    if degrees.ep > 1:
        folded = degrees.dp_shard * degrees.cp * degrees.tp
        add_view(mesh, EVERY_SHARD[0], (folded // degrees.ep, degrees.ep), (EXPERT_SHARDS, EXPERTS))
    return mesh


def _device_type_of_ranks() -> str:
    """As :func:`default_device_type`; ``"cpu"`` for ranks that were joined with gloo alone."""
    backends = dict(pair.split(":") for pair in str(dist.get_backend_config()).split(","))
    return "cpu" if backends.get("cuda", "gloo") == "gloo" else default_device_type()


def axis(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The one-dimensional submesh of an axis, or of axes that were flattened into one.

    Raises:
        ConfigError: the mesh has no such axis.
    """
    found = axis_or_none(mesh, name)
    if found is None:
        raise ConfigError(
            f"The mesh {mesh} has no axis {name!r}. Make it with shardwright.make_mesh, or pass the names that yours "
            "has."
        )
    return found


def axis_or_none(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """The same; None where the mesh has no such axis."""
    try:
        return _slice(mesh, name) if mesh.mesh_dim_names else None
    except KeyError:
        return None


def _slice(mesh: DeviceMesh, names: str | tuple[str, ...]) -> DeviceMesh:
    """``mesh[names]``; torch 2.11 to 2.14 warn about flattened axes, to which a given mesh has no other way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Slicing a flattened dim")
        return mesh[names]


def data_parallel_mesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """The mesh FSDP2 works on: ``shard`` alone where nothing is replicated, else ``replicate x shard`` (HSDP)."""
    shards, replicas = axis(mesh, shard), axis_or_none(mesh, replicate)
    if replicas is None or replicas.size() == 1:
        return shards
    return _slice(mesh, (replicate, shard))


def batch_mesh(mesh: DeviceMesh, one_batch: Collection[str]) -> DeviceMesh | None:
    """The one-dimensional mesh of ranks that are given a batch each; None where all of ``mesh`` share one.

    Args:
        one_batch: the axes along which ranks are given the same batch; those that ``mesh`` does not have do not matter.
    """
    names = tuple(name for name in mesh.mesh_dim_names or () if name not in one_batch)
    if not names:
        return None
    if len(names) == 1:
        return axis(mesh, names[0])
    name = DATA if names == FLATTENED[DATA] else "_".join(names)
    if name not in flattened_names(mesh):
        flatten(mesh[names], name)
    return axis(mesh, name)


def expert_data_parallel_mesh(mesh: DeviceMesh, replicate: str) -> DeviceMesh:
    """The mesh on which FSDP2 works with experts: ``efsdp`` alone, or ``replicate x efsdp`` (HSDP)."""
    shards, replicas = axis(mesh, EXPERT_SHARDS), axis_or_none(mesh, replicate)
    if replicas is None or replicas.size() == 1:
        return shards
    return concatenated(replicas, shards)


def check_every_axis_used(mesh: DeviceMesh, names: tuple[str, ...]) -> None:
    """Raise unless the axes called ``names`` tell all ranks of ``mesh`` apart; an axis that is missing has one rank.

    Along an axis that nothing uses (pipeline stages, a name mistyped) every rank would train a model of its own.

    Raises:
        ConfigError: with the sizes.
    """
    found = {name: submesh.size() for name in names if (submesh := axis_or_none(mesh, name)) is not None}
    if prod(found.values()) == mesh.size():
        return
    missing = [name for name in names if name not in found]
    raise ConfigError(
        f"The mesh {mesh} has {mesh.size()} ranks, but the axes that are used, "
        + (" x ".join(f"{name} ({size})" for name, size in found.items()) or "none of them")
        + f", have {prod(found.values())}"
        + (f", and it has no axis {' and no axis '.join(map(repr, missing))}. " if missing else ". ")
        + "Pass the names that your mesh has. Pipeline stages are not supported yet."
    )


def check_degrees(config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Raise ConfigError where a degree of ``config`` is not the size of that axis of ``mesh``; -1 is any size."""
    names = (*NAMES, EXPERTS)
    sizes = {name: found.size() if (found := axis_or_none(mesh, name)) is not None else 1 for name in names}
    asked = {name: getattr(config, name) for name in names}
    wrong = [f"{name}={asked[name]}" for name in names if asked[name] not in (-1, sizes[name])]
    if wrong:
        raise ConfigError(
            f"The config says {', '.join(wrong)}, but the mesh has "
            + " x ".join(f"{name} ({size})" for name, size in sizes.items())
            + ". Make the mesh from the config, mesh = shardwright.make_mesh(config), or leave it out: parallelize("
            "model, config) makes it."
        )


def refuse_context_parallel(mesh: DeviceMesh, engine: str) -> None:
    """Raise UnsupportedError where the mesh splits sequences over ranks, which ``engine`` cannot."""
    found = axis_or_none(mesh, "cp")
    if found is not None and found.size() > 1:
        raise UnsupportedError(
            f"The mesh has cp={found.size()}: context parallelism is not offered with engine: {engine}. Use engine: "
            "fsdp2, or cp=1 and give those ranks to tp (with sequence parallelism, which also splits activations along "
            "the sequence) or to dp_shard."
        )
