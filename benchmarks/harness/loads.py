"""On the ranks of ``loading.py``: one load and what it took, and what anybody's load takes at the least."""

from __future__ import annotations

import cProfile
import ctypes
import gc
import pstats
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from harness.layouts import Layout
from harness.machine import versions

STEP = 4 * 2**20  # bytes of a file at once


def warm_up(peer: str, folder: str, layout: dict[str, Any], dtype: str) -> dict[str, str]:
    """Load a small model, so that nothing is imported later; the versions of the packages."""
    look_at(import_module(f"harness.peers.{peer}").load(folder, Layout(**layout), dtype))
    gc.collect()
    return versions()


def load(peer: str, folder: str, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Load, look at every weight once, then write every weight once, and say what each took.

    A library that maps files into memory has read nothing until it looks, and owns nothing until it writes.
    """
    library = import_module(f"harness.peers.{peer}")
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed; a load that gets it would be seen to need less
    dist.barrier()
    began, worked, read = time.perf_counter(), time.process_time(), read_calls()
    with watched("RssAnon", "RssFile", "VmRSS") as sizes:
        model = library.load(folder, Layout(**layout), dtype)
        shard = look_at(model)
    looked = time.perf_counter()
    found = {
        "seconds": looked - began,
        "processor": time.process_time() - worked,
        "read": read_calls() - read,
        "mapped": sizes["RssFile grew"],
        "anonymous": sizes["RssAnon"],
        "resident": sizes["VmRSS"],
        "shard": shard,
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
    }
    write_to(model)
    found["written"] = time.perf_counter() - began
    del model
    gc.collect()
    return found


def local_parts(model: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def look_at(model: Any) -> int:
    """Read every parameter of this rank once; their bytes."""
    total = 0
    for part in local_parts(model):
        total += part.numel() * part.element_size()
        if part.numel():
            part.max()
    return total


def write_to(model: Any) -> None:
    """Change every parameter of this rank in place, as the first step of an optimizer does."""
    for part in local_parts(model):
        part.mul_(0.5)


def floor(file: str, dtype: str) -> dict[str, float]:
    """What a load takes whose weights have memory of their own, and that does nothing else: half of ``file`` for each.

    Returns:
        Seconds for values in new memory, and until they have been looked at (and those of the processor); seconds for
        the same values again, into memory that is in use.
    """
    half = (Path(file).stat().st_size // 2 - STEP) // STEP * STEP
    values = torch.empty(half // 2, dtype=getattr(torch, dtype))
    seconds, start = {}, dist.get_rank() * half
    dist.barrier()
    began, worked = time.perf_counter(), time.process_time()
    read_half(file, start, values)
    seconds["new memory"] = time.perf_counter() - began
    values.max()
    seconds |= {"seconds": time.perf_counter() - began, "processor": time.process_time() - worked}
    dist.barrier()
    began = time.perf_counter()
    read_half(file, start, values)
    return seconds | {"memory in use": time.perf_counter() - began}


def read_half(file: str, start: int, into: torch.Tensor) -> None:
    """bfloat16 values from byte ``start`` of ``file`` on, converted where ``into`` has another dtype."""
    buffer = torch.empty(STEP // 2, dtype=torch.bfloat16)
    with open(file, "rb", buffering=0) as opened:
        opened.seek(start)
        for part in into.split(STEP // 2):
            direct = part.dtype == buffer.dtype
            opened.readinto((part if direct else buffer).view(torch.uint8).numpy().data)
            if not direct:
                part.copy_(buffer)


def profile(peer: str, folder: str, layout: dict[str, Any], dtype: str, functions: list[str]) -> dict[str, float]:
    """Seconds of the processor that one load spends in each of the library's ``functions``, what they call included.

    Under cProfile, which slows what calls much.
    """
    library = import_module(f"harness.peers.{peer}")
    dist.barrier()
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    model = library.load(folder, Layout(**layout), dtype)
    profiler.disable()
    del model
    gc.collect()
    found = dict.fromkeys(functions, 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in vars(pstats.Stats(profiler))["stats"].items():
        if name in found and "shardwright" in Path(file).parts:
            found[name] += cumulative
    return found


def read_calls() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def memory(names: Sequence[str]) -> dict[str, int]:
    """Lines of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


@contextmanager
def watched(*names: str, interval: float = 0.005) -> Iterator[dict[str, int]]:
    """Lines of /proc/self/status, sampled in a thread: by ``name`` how much each grew at its highest.

    By ``name grew``: all of its increases added up, which also counts what was let go in between.
    """
    before = memory(names)
    last, found, done = dict(before), dict.fromkeys(names, 0), threading.Event()
    found |= dict.fromkeys((f"{name} grew" for name in names), 0)

    def look() -> None:
        for name, now in memory(names).items():
            found[name] = max(found[name], now - before[name])
            found[f"{name} grew"] += max(0, now - last[name])
            last[name] = now

    def watch() -> None:
        while not done.wait(interval):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()
