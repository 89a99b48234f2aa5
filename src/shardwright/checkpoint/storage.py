"""The files of a training checkpoint, through torch.distributed.checkpoint, without its open door."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from shardwright.checkpoint.folder import is_plain_name
from shardwright.checkpoint.pieces import Pieces
from shardwright.errors import CheckpointError

_MODULES = {
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the plain records that torch.distributed.checkpoint's metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == dcp_metadata.__name__ and "." not in name and name in _METADATA_CLASSES:
            return _METADATA_CLASSES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if name in _MODULES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"The checkpoint's metadata wants to make a {module}.{name}, which no checkpoint contains. It was tampered "
            "with; do not use it."
        )


_METADATA_CLASSES = {
    name: value
    for name, value in vars(dcp_metadata).items()
    if isinstance(value, type) and value.__module__ == dcp_metadata.__name__
}


class SafeReader(dcp.FileSystemReader):
    """Reads tensors with ``weights_only`` (as its base does) and metadata without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        data = (Path(self.path) / ".metadata").read_bytes()
        try:
            metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}/.metadata is damaged: {error}.") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{self.path}/.metadata is no metadata of a checkpoint.")
        for stored in metadata.storage_data.values():
            if not is_plain_name(stored.relative_path):
                raise CheckpointError(
                    f"{self.path}/.metadata names {stored.relative_path!r}, which is not in its folder."
                )
        metadata.storage_meta = metadata.storage_meta or dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Files(FileSystem):
    """Files that say why they could not be written: torch's own error only says at which byte it noticed."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:
                try:
                    os.write(stream.fileno(), bytes(1))  # the disk has an answer to one more byte
                except OSError as cause:
                    raise OSError(cause.errno, cause.strerror, str(path)) from error
                raise


def write_tensors(pieces: dict[str, Pieces], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write what this rank holds; collective over ``group``. Replicas are written once.

    Raises:
        CheckpointError: some rank could not write, on every rank.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    writer.fs = _Files()
    try:
        dcp.save(pieces, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"Cannot write {folder}: {_causes(error)}.") from error


def read_tensors(into: Mapping[str, Tensor], reader: SafeReader) -> None:
    """Fill this rank's part of the tensors ``into``; collective. They may be sharded in any way.

    Raises:
        CheckpointError: some rank could not read, on every rank.
    """
    pieces = {name: Pieces(tensor) for name, tensor in into.items()}
    try:
        dcp.load(pieces, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"Cannot read {reader.path}: {_causes(error)}.") from error


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
