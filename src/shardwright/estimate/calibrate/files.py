"""From what was measured to files of a device and a fabric, in the form of those that come with the package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from shardwright.errors import ConfigError
from shardwright.estimate.calibrate.collectives import Link
from shardwright.estimate.calibrate.measure import Measured
from shardwright.estimate.hardware import Device, load_machine

_MIB = 2**20


def device_file(
    measured: Measured, device: torch.device, *, ranks: int, fabric: str, like: Device | None, when: str
) -> dict[str, Any]:
    """The keys of a device.

    Peaks are the best products and the copy that were measured, or those of the datasheet of ``like``; efficiencies are
    shares of them. What compilers save of memory-bound kernels is not measured, and is the package's.

    Args:
        ranks: devices of this machine, which share its memory where they are CPUs.
        fabric: that joins them.
        when: day and version of torch.
    """
    first = measured.sizes.dtypes[0]
    peaks = dict(like.teraflops) if like is not None else _peaks(measured)
    bandwidth = like.memory_gb_per_s if like is not None else _rounded(measured.memory_gb_per_s)
    products = sorted(
        (each for each in measured.products if each.dtype == first), key=lambda each: (each.flops, each.teraflops)
    )
    large = products[len(products) // 2 :]
    name, memory = _name_and_memory(device, ranks)
    return {
        "name": name,
        "memory_mib": memory,
        "teraflops": peaks,
        "memory_gb_per_s": bandwidth,
        "fabric": fabric,
        "gpus_per_node": ranks,
        "efficiencies": {
            "matmul": _rounded(sum(each.teraflops for each in large) / len(large) / peaks[first]),
            "attention": _rounded(measured.attention / peaks[first]),
            "attention_backward": _rounded(measured.attention_backward / peaks[first]),
            "memory": _rounded(measured.memory_gb_per_s / bandwidth),
            "fused": load_machine("h200").efficiencies.fused,
            "launch_us": _rounded(measured.launch_us),
            "products": [[each.flops, _rounded(each.teraflops / peaks[first])] for each in products],
        },
        "source": f"shardwright calibrate, {when}"
        + (f"; peaks of {like.name}" if like is not None else "; the peaks are the best that was measured"),
    }


def fabric_file(link: Link, name: str, when: str) -> dict[str, Any]:
    """The keys of a fabric. ``gb_per_s`` is what collectives reached, so that their efficiency is 1."""
    return {
        "name": name,
        "gb_per_s": _rounded(link.gb_per_s),
        "latency_us": _rounded(link.latency_us),
        "efficiency": 1.0,
        "source": f"shardwright calibrate among {link.ranks} ranks, {when}",
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """As YAML, whole or not at all.

    Raises:
        ConfigError: the file exists, or its folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(yaml.safe_dump(dict(data), sort_keys=False))
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _peaks(measured: Measured) -> dict[str, float]:
    return {dtype: _rounded(measured.best(dtype)) for dtype in dict.fromkeys(each.dtype for each in measured.products)}


def _name_and_memory(device: torch.device, ranks: int) -> tuple[str, int]:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.name, found.total_memory // _MIB
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"a CPU with {os.cpu_count()} cores", memory // _MIB // ranks


def _rounded(value: float) -> float:
    """Four digits: more were not measured."""
    return float(f"{value:.4g}")
