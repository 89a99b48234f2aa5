"""How much of a model tensor parallelism really split."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardwright.distributed.models.huggingface import head_name, text_model


def tp_sharded_fraction(model: nn.Module) -> float:
    """Share of the elements of the text model's matrices, embeddings and head included, split over the ``tp`` axis.

    A matrix is a parameter of two or more dimensions. Of a model that is not from transformers, all count. A tower for
    images or audio does not: it is FSDP's to shard.
    """
    parts = [""]
    if isinstance(model, PreTrainedModel):
        text = text_model(model)[0]
        parts = [text, head_name(model) or text]
    total = split = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not any(not part or name.startswith(f"{part}.") for part in parts):
            continue
        total += parameter.numel()
        if isinstance(parameter, DTensor) and "tp" in (names := parameter.device_mesh.mesh_dim_names or ()):
            # Strided shards (packed weights) are no subclass of Shard in every version of torch.
            split += 0 if parameter.placements[names.index("tp")].is_replicate() else parameter.numel()
    return split / total if total else 0.0
