"""Random numbers that all ranks of a group draw alike, although each has a random state of its own."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def drawing_alike(mesh: DeviceMesh) -> Iterator[None]:
    """Inside, every rank of a one-dimensional ``mesh`` draws the numbers that its first rank draws. A collective.

    The random states are torch's (the CPU's, and the current device's where ``mesh`` is on another), Python's and
    NumPy's. Afterwards a rank that came with the state of the first has what that has then, as on one process; a rank
    that came with another has its own back.
    """
    group = mesh.get_group()
    if dist.get_backend(group) == "fake":  # nothing is exchanged there
        yield
        return
    own = _states(mesh.device_type)
    everyone = list(own)
    dist.broadcast_object_list(everyone, group=group, group_src=0)
    _restore(mesh.device_type, everyone)
    try:
        yield
    finally:
        now = _states(mesh.device_type)
        _restore(
            mesh.device_type,
            [later if mine == first else mine for mine, first, later in zip(own, everyone, now, strict=True)],
        )


def share_states(mesh: DeviceMesh) -> None:
    """Give every rank of a one-dimensional ``mesh`` the random states of its first rank. A collective."""
    states = _states(mesh.device_type)
    dist.broadcast_object_list(states, group=mesh.get_group(), group_src=0)
    _restore(mesh.device_type, states)


def _states(device: str) -> list[bytes]:
    found = [torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate())]
    found.append(pickle.dumps(numpy.random.get_state()))
    if device != "cpu":
        found.append(torch.get_device_module(device).get_rng_state().numpy().tobytes())
    return found


def _restore(device: str, states: list[bytes]) -> None:
    torch.set_rng_state(_tensor(states[0]))
    random.setstate(pickle.loads(states[1]))
    numpy.random.set_state(pickle.loads(states[2]))
    if device != "cpu":
        torch.get_device_module(device).set_rng_state(_tensor(states[3]))


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
