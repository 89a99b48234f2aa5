"""Ranks that share a batch work on it with one stream of dropout: their first calls are compared.

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
from torch.distributed.tensor import DTensor

from shardwright._torch import tree_leaves, tree_map_only
from shardwright.distributed.runtime.forward import Around, Forward, wrap_forward
from shardwright.errors import ConfigError

_BY_VALUE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

_HAS_PARTS = (
    " Where a loader gives each rank its part of the sequences, shardwright.shard_batch(batch, mesh, "
    "already_split=True) says so."
)


def compare_first_calls(model: nn.Module, mesh: DeviceMesh, kind: str = "tensor") -> None:
    """Make ``model`` compare its first call in training and its first in evaluation over the ranks of ``mesh``.

    The ranks meet in the store of the process group, so that no collective is added to the model's. Compared are
    integer and boolean inputs by value and all others by shape and dtype, since an encoder that a rank has run before
    may round differently; and the random states where the call uses them. A call raises ConfigError, on every rank
    alike, where they differ.

    Args:
        kind: which parallelism the ranks are of, ``"tensor"`` or ``"context"``.
    """
    # Nothing is exchanged in a fake process group; one that was written in Python may have no store.
    if dist.get_backend(mesh.get_group()) != "fake" and _store() is not None:
        wrap_forward(model, _SameCalls(mesh, kind))


def _store() -> Any:
    assert dist.group.WORLD is not None, "there is a mesh"
    return dist.group.WORLD.get_group_store()


class _SameCalls(Around):
    def __init__(self, mesh: DeviceMesh, kind: str) -> None:
        self.group = f"a {kind}-parallel group"
        self.hint = _HAS_PARTS if kind == "context" else ""
        self.ranks = dist.get_process_group_ranks(mesh.get_group())
        self.rank, self.device = mesh.get_local_rank(), mesh.device_type
        self.compared: set[bool] = set()  # whether in training

    @torch.compiler.disable
    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training in self.compared:
            return forward(*args, **kwargs)
        before = self._unseen(_random_states, self.device)
        inputs, *states = self._ranks_that_differ(
            [self._unseen(self._digest, args, kwargs), *(state for _, state in before)]
        )
        if inputs:
            raise ConfigError(
                f"Ranks 0 and {inputs[0]} of {self.group} were called with different inputs. The ranks of such a group "
                "work on one batch together: choose a rank's batch by its place among the data-parallel ranks (mesh = "
                "shardwright.make_mesh(config); mesh['dp'].get_local_rank() of mesh['dp'].size()), not by its global "
                f"rank.{self.hint}"
            )
        result = forward(*args, **kwargs)
        for ranks, was, now in zip(states, before, self._unseen(_random_states, self.device), strict=True):
            if ranks and was[1] != now[1] and was[0] == now[0]:  # a model that seeds itself (Reformer) says nothing
                raise ConfigError(
                    f"The model draws random numbers (dropout), and ranks 0 and {ranks[0]} of {self.group} "
                    "have different random states: they may drop different elements of what must be equal on both. "
                    "Seed them alike, for example with mesh = shardwright.make_mesh(config) and "
                    "torch.manual_seed(seed + mesh['dp'].get_local_rank())."
                )
        self.compared.add(module.training)
        return result

    def _digest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """A part of a sequence, which differs along the ranks that it is dealt out to, is compared along all others."""

        def compared(x: DTensor) -> Tensor:
            mesh = x.device_mesh
            if mesh.ndim > 1 or dist.get_process_group_ranks(mesh.get_group()) == self.ranks:
                return x  # by its shape
            return x.to_local()

        return digest(tree_map_only(DTensor, compared, (args, dict(sorted(kwargs.items())))))

    def _ranks_that_differ(self, digests: list[str]) -> list[list[int]]:
        """For each of ``digests``, the ranks of the group that have another one than the first."""
        store = _store()
        group = f"shardwright/{'-'.join(map(str, self.ranks))}"
        turn = store.add(f"{group}/{self.rank}/turns", 1)
        store.set(f"{group}/{self.rank}/{turn}", " ".join(digests))
        everyone = [store.get(f"{group}/{rank}/{turn}").decode().split() for rank in range(len(self.ranks))]
        columns = zip(*everyone, strict=True)
        return [[rank for rank, value in enumerate(column) if value != column[0]] for column in columns]

    def _unseen(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it in a thread of its own: who counts a model's operations finds only the model's.

        Not on GPUs, where a thread has another current device and another stream.
        """
        if self.device != "cpu":
            return function(*args)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *args).result()


def digest(values: Any, *, floats: bool = False) -> str:
    """Of all tensors in ``values`` shape, dtype and, where they are integers or ``floats`` is set, what is in them."""
    whole = hashlib.sha256()
    for leaf in tree_leaves(values):
        if not isinstance(leaf, Tensor):
            continue
        whole.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
        read = type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_meta
        if read and (floats or leaf.dtype in _BY_VALUE):
            whole.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _random_states(device: str) -> list[tuple[int, str]]:
    """Seed, and digest of the state, of the CPU's generator, and of the current GPU's where ``device`` is one."""
    generators = [(torch.initial_seed(), torch.get_rng_state())]
    if device == "cuda":
        generators.append((torch.cuda.initial_seed(), torch.cuda.get_rng_state()))
    return [(seed, hashlib.sha256(state.numpy().tobytes()).hexdigest()) for seed, state in generators]
