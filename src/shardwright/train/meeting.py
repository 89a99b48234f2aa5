"""How the ranks of a run find each other, and how one tells the others why it fails."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from shardwright.distributed.mesh import default_device_type
from shardwright.errors import ConfigError, RunError, ShardwrightError, from_system
from shardwright.train.place import Place
from shardwright.train.rank_settings import RankSettings
from shardwright.train.watchdog import Watchdog, within

_FAILED = "shardwright/failed"
_WAIT = 5.0  # seconds for the rank that fails first to say why
_LINGER = 1.0  # seconds in which the others can read it
_MARGIN = 60.0  # seconds that torch's own limit on a collective is behind the watchdog's, which says more


@dataclass(frozen=True)
class StorePeers:
    """The other ranks, through a store: a connection of its own, which no call of the main thread blocks."""

    store: dist.Store
    rank: int
    world_size: int

    def asked(self) -> bool:
        return bool(self.store.check(["shardwright/hangs"]))

    def ask(self) -> None:
        self.store.set("shardwright/hangs", "1")

    def tell(self, phase: str) -> None:
        self.store.set(f"shardwright/hangs/{self.rank}", phase)

    def forget(self) -> None:
        """Take back what this rank has told."""
        self.store.delete_key(f"shardwright/hangs/{self.rank}")

    def told(self) -> dict[int, str | None]:
        keys = {rank: f"shardwright/hangs/{rank}" for rank in range(self.world_size)}
        return {rank: self.store.get(key).decode() if self.store.check([key]) else None for rank, key in keys.items()}


@contextmanager
def joined(settings: RankSettings, place: Place, watchdog: Watchdog) -> Iterator[tuple[Place, torch.device]]:
    """The ranks joined: NCCL between GPUs (gloo for objects on the CPU), gloo otherwise; cores shared out evenly.

    Yields the place of this rank with all its numbers, and its device. An error that leaves the block on one rank is
    the error of all.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    joining = f"joining the other ranks at {_address(place)}"
    watchdog.begin(joining)
    limit = timedelta(seconds=max(settings.step_timeout, settings.seconds_per_phase) + _MARGIN)
    store = _store(place, limit)
    watchdog.peers = peers = arrived = StorePeers(store.clone(), place.rank, place.world_size)  # type: ignore[attr-defined]
    arrived.tell(joining)  # so that the others know who is missing
    place = _located(place, store)
    assert place.local_rank is not None
    assert place.local_world_size is not None
    check_devices(settings, place.local_world_size)
    kind = device_type(settings)
    device = torch.device(kind, place.local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // place.local_world_size, 1))
    if place.world_size == place.local_world_size:
        # torchrun keeps one store over its restarts, with the addresses of the ranks that were killed still in it. The
        # machines of a larger job may count their restarts differently, so there is no common prefix there.
        prefix = f"attempt-{place.attempt}"
        store = dist.PrefixStore(prefix, store)
        watchdog.peers = peers = StorePeers(dist.PrefixStore(prefix, peers.store), place.rank, place.world_size)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
        device_id=device if kind == "cuda" else None,
    )
    arrived.forget()
    try:
        with _one_error(peers):
            yield place, device
    finally:
        watchdog.begin("parting from the other ranks")
        dist.destroy_process_group()


def _address(place: Place) -> str:
    """Host and port of the store through which the ranks meet."""
    if place.init_method == "env://":
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return place.init_method.removeprefix("tcp://")


def _store(place: Place, limit: timedelta) -> dist.Store:
    """The store at that address. Unlike torch's own, rank 0 serves it without waiting for all ranks to come."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves it
        store, _, _ = next(dist.rendezvous(place.init_method, place.rank, place.world_size, timeout=limit))
        return store
    host, _, port = _address(place).rpartition(":")
    return dist.TCPStore(
        host,
        int(port),
        place.world_size,
        is_master=place.rank == 0,
        timeout=limit,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _located(place: Place, store: dist.Store) -> Place:
    if place.local_rank is not None:
        return place
    store.set(f"shardwright/host/{place.rank}", socket.gethostname())
    return place.among([store.get(f"shardwright/host/{rank}").decode() for rank in range(place.world_size)])


@contextmanager
def _one_error(peers: StorePeers) -> Iterator[None]:
    """A rank that fails says why in the store; ranks whose collectives break after that raise its error.

    Raises:
        ShardwrightError: this rank's own error, what the system refused included; or that of the rank that failed.
    """
    try:
        yield
    except ShardwrightError as error:
        _leave(peers, error)
        raise
    except Exception as error:
        told = from_system(error)
        if told is not None:
            _leave(peers, told)
            raise told from error
        first = within(_WAIT + 1, lambda: _first_failure(peers)) if isinstance(error, RuntimeError) else None
        if first is not None:
            raise RunError(first) from error
        raise


def _leave(peers: StorePeers, error: ShardwrightError) -> None:
    within(_WAIT, lambda: peers.store.compare_set(_FAILED, "", f"On rank {peers.rank}: {error}"))
    if peers.rank == 0:  # which may hold the store
        time.sleep(_LINGER)


def _first_failure(peers: StorePeers) -> str:
    peers.store.wait([_FAILED], timedelta(seconds=_WAIT))
    return peers.store.get(_FAILED).decode()


def device_type(settings: RankSettings) -> str:
    """``"cuda"`` or ``"cpu"``: what the ranks of this run compute on."""
    return default_device_type() if settings.device == "auto" else settings.device


def check_devices(settings: RankSettings, local_world_size: int) -> None:
    """Raises ConfigError where a GPU is asked for and there is none, or not one for every rank."""
    count = torch.cuda.device_count()
    if settings.device == "cuda" and count == 0:
        raise ConfigError("device is cuda, but torch finds no GPU here. Set device to auto or cpu.")
    if settings.device != "cpu" and 0 < count < local_world_size:
        fitting = f"sharding.dp_shard={count} sharding.tp=1 sharding.sequence_parallel=false"
        raise ConfigError(
            f"{local_world_size} ranks on this machine need a GPU each, and it has {count}. Lower the degrees, for "
            f"example with {fitting}" + ("." if settings.sharding.engine == "megatron_fsdp" else ", or set device=cpu.")
        )
