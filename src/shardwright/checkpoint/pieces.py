"""A tensor as torch.distributed.checkpoint sees it: boxes of a whole tensor, of which this rank holds some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from shardwright._torch import make_wrapper
from shardwright.checkpoint.layout import Box, owned_parts


class Pieces(Tensor):
    """What this rank holds of a tensor, plain or DTensor.

    torch.distributed.checkpoint takes a DTensor's local part for one box. That of a packed weight (gate and up in one
    matrix, split inside each half) is several; here every box is a chunk of its own.
    """

    _chunks: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, tensor: Tensor, copy: bool = False) -> Pieces:
        """Views of ``tensor``, or (``copy``) copies of this rank's part in CPU memory."""
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        local = local.to("cpu", copy=True) if copy else local
        made = make_wrapper(cls, tensor.shape, dtype=local.dtype, device=local.device)
        made._chunks = {_offset(part.whole): local[part.local] for part in owned_parts(tensor)}
        return made

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, value.size()) for offset, value in self._chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._chunks[index.offset]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} on the pieces of a tensor; only torch.distributed.checkpoint reads them.")


def _offset(box: Box) -> torch.Size:
    return torch.Size(part.start for part in box)
