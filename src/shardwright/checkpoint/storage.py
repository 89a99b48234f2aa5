"""The files of a training checkpoint, through torch.distributed.checkpoint, without its open door."""

from __future__ import annotations

import io
import os
import warnings
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
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from shardwright.checkpoint.distcp import Window, parse_metadata, read_tensor
from shardwright.checkpoint.pieces import Pieces
from shardwright.errors import CheckpointError
from shardwright.untrusted import read_file

_METADATA_BYTES = 512 * 2**20  # of the metadata: about 300 bytes for each chunk, of which every rank has one per tensor


class SafeReader(dcp.FileSystemReader):
    """Reads metadata and tensors as :mod:`.distcp` does, and runs nothing."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            file = Path(self.path) / ".metadata"
            self._metadata = parse_metadata(read_file(file, CheckpointError, _METADATA_BYTES), str(file))
            self._metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks: dict[tuple[str, torch.Size], tuple[torch.dtype, torch.Size]] = {}
        for key, stored in self.read_metadata().state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks |= {(key, chunk.offsets): (stored.properties.dtype, chunk.sizes) for chunk in stored.chunks}
        items = [(self.storage_data[item.storage_index], item) for item in plan.items]
        for info, item in sorted(items, key=lambda pair: (pair[0].relative_path, pair[0].offset)):
            path, index = Path(self.path) / info.relative_path, item.storage_index
            name = f"{index.fqn} in {path}"
            with path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < info.offset + info.length:
                    raise CheckpointError(f"{name} is beyond the end of the file, which was cut.")
                dtype, sizes = chunks[index.fqn, index.offset or torch.Size()]
                tensor = read_tensor(Window(stream, info.offset, info.length), dtype, sizes, name)
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor[box])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"The checkpoint has bytes for {read_item.dest_index.fqn}; only tensors are read.")


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
        with _alone():
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
        with _alone():
            dcp.load(pieces, storage_reader=reader, planner=_TensorsOnly(), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"Cannot read {reader.path}: {_causes(error)}.") from error


@contextmanager
def _alone() -> Generator[None, None, None]:
    """Without torch's warning that there is one process only: an export has no other."""
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
