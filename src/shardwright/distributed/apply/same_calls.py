"""A tensor-parallel group works on one batch, with one stream of dropout: its ranks' first calls are compared.

Both mistakes compute without an error what is no model of anything: batches handed out by global rank (embeddings of
different tokens are added up), and seeds that differ (each rank drops other elements of a residual stream that all of
them hold).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from shardwright.distributed.styles import collectives as c
from shardwright.distributed.styles.forward import Around, Forward, wrap_forward
from shardwright.errors import ConfigError

_BY_VALUE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def compare_first_calls(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make ``model`` compare its first call in training and its first in evaluation over the ranks of ``mesh``.

    That sends a few bytes, once. Compared are integer and boolean inputs by value and all others by shape and dtype,
    since an encoder that a rank has run before may round differently; and the random states where the call uses them.
    A call raises ConfigError, on every rank alike, where they differ.
    """
    if dist.get_backend(mesh.get_group()) != "fake":  # nothing is exchanged in a fake process group
        wrap_forward(model, _SameCalls(mesh))


class _SameCalls(Around):
    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.device = c.Group.of(mesh), mesh.device_type
        self.compared: set[bool] = set()  # whether in training

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training in self.compared:
            return forward(*args, **kwargs)
        device = torch.device(self.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.synchronize(device)  # the inputs are read on another stream
        before = _unseen(_random_states, device)
        inputs, *states = _unseen(self._ranks_that_differ, device, _unseen(_digest, args, kwargs), *before)
        if inputs:
            raise ConfigError(
                f"Ranks 0 and {inputs[0]} of a tensor-parallel group were called with different inputs. The ranks of "
                "such a group work on one batch together: choose a rank's batch by its place among the data-parallel "
                "ranks (mesh = shardwright.make_mesh(config); mesh['dp'].get_local_rank() of mesh['dp'].size()), not "
                "by its global rank."
            )
        result = forward(*args, **kwargs)
        for ranks, was, now in zip(states, before, _unseen(_random_states, device), strict=True):
            if ranks and was != now:
                raise ConfigError(
                    f"The model draws random numbers (dropout), and ranks 0 and {ranks[0]} of a tensor-parallel group "
                    "have different random states: they would drop different elements of what must be equal on both. "
                    "Seed them alike, for example with mesh = shardwright.make_mesh(config) and "
                    "torch.manual_seed(seed + mesh['dp'].get_local_rank())."
                )
        self.compared.add(module.training)
        return result

    def _ranks_that_differ(self, device: torch.device, *digests: int) -> list[list[int]]:
        """For each of ``digests``, the ranks of the group that have another one than the first."""
        everyone = c.all_gather(torch.tensor([digests], device=device), 0, self.group.size, self.group).tolist()
        columns = list(zip(*everyone, strict=True))
        return [[rank for rank, value in enumerate(column) if value != column[0]] for column in columns]


def _unseen(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a thread of its own: who counts the caller's collectives or operations counts those of the model."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def _digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    whole = hashlib.sha256()
    for leaf in tree_leaves((args, dict(sorted(kwargs.items())))):
        if isinstance(leaf, Tensor):
            whole.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        if type(leaf) is Tensor and leaf.dtype in _BY_VALUE and leaf.layout is torch.strided and not leaf.is_meta:
            whole.update(leaf.cpu().contiguous().numpy().tobytes())
    return _number(whole.digest())


def _random_states(device: torch.device) -> list[int]:
    """Of the CPU, and of ``device`` where that is a GPU."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [_number(hashlib.sha256(state.numpy().tobytes()).digest()) for state in states]


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:7])
