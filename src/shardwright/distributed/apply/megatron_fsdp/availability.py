"""Whether Megatron-FSDP can be used here, and why not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from shardwright.errors import MissingPackageError, UnsupportedError

TESTED = ("0.5", "0.6")  # minor versions of megatron-fsdp that our repairs (engine.py) are tested with
DEVICE_TYPES = ("cuda",)
_PLACEHOLDER = "0.0.0rc0"  # the version of "nvfsdp" on the package index, which holds nothing
INSTALL = "pip install 'shardwright[megatron-fsdp]'"


def is_available() -> bool:
    """Whether ``megatron-fsdp``, or an ``nvfsdp`` that is more than the empty placeholder, is installed."""
    return _importable("megatron_fsdp") or (_importable("nvfsdp") and _version("nvfsdp") != _PLACEHOLDER)


def require(device_type: str) -> None:
    """Raise unless a model on ``device_type`` can be sharded with the installed package.

    Raises:
        MissingPackageError: the package is missing.
        UnsupportedError: its version is untested, or the device is not a GPU.
    """
    if not _importable("megatron_fsdp"):
        older = " The nvfsdp that is installed is from before that and is not supported." if is_available() else ""
        raise MissingPackageError(
            f"nvFSDP is not installed: {INSTALL} installs it under the name that it is published with, Megatron-FSDP "
            f"(package megatron-fsdp).{older} Or use fsdp2_strategy_parallelize, or engine: fsdp2."
        )
    installed = _version("megatron-fsdp")
    if ".".join(installed.split(".")[:2]) not in TESTED:
        raise UnsupportedError(
            f"megatron-fsdp {installed} is installed, but exactness depends on internals of the package that are "
            f"tested with {' and '.join(TESTED)} only. {INSTALL} 'megatron-fsdp>=0.5,<0.7', or use engine: fsdp2."
        )
    if device_type not in DEVICE_TYPES:
        raise UnsupportedError(
            f"Megatron-FSDP runs on CUDA devices only: it orders its collectives with CUDA streams and takes its "
            f"buffers from the GPU. The mesh is on {device_type!r}. Run on GPUs, or use engine: fsdp2 "
            "(fsdp2_strategy_parallelize), which computes the same on any device."
        )


def installed() -> tuple[int, int]:
    """Major and minor version of the package that is installed."""
    major, minor = _version("megatron-fsdp").split(".")[:2]
    return int(major), int(minor)


def _importable(module: str) -> bool:
    return find_spec(module) is not None


def _version(distribution: str) -> str:
    """The version of an installed distribution; ``"unknown"`` for a module that no distribution brought along."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
