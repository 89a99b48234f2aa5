"""How much of a model was really split, and which of its parameters are experts and routers."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardwright.distributed.axes import EXPERTS
from shardwright.distributed.models.huggingface import head_name, text_model
from shardwright.distributed.planning.experts import decide_experts
from shardwright.distributed.replay.reading import ModelReading


def tp_sharded_fraction(model: nn.Module) -> float:
    """Share of the elements of the text model's matrices, embeddings and head included, split over the ``tp`` axis.

    A matrix is a parameter of two or more dimensions. Of a model that is not from transformers, all count. A tower for
    images or audio does not: it is FSDP's to shard.
    """
    everything = {name for name, _ in model.named_parameters()}
    counted = text_parameters(model) if isinstance(model, PreTrainedModel) else everything
    total = split = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name not in counted:
            continue
        total += parameter.numel()
        if isinstance(parameter, DTensor) and "tp" in (names := parameter.device_mesh.mesh_dim_names or ()):
            # Strided shards (packed weights) are no subclass of Shard in every version of torch.
            split += 0 if parameter.placements[names.index("tp")].is_replicate() else parameter.numel()
    return split / total if total else 0.0


def spread_fraction(model: nn.Module) -> float:
    """Share of the elements of all parameters that lie on an ``ep`` axis, cut along the experts."""
    total = spread = 0
    for parameter in model.parameters():
        total += parameter.numel()
        if isinstance(parameter, DTensor) and EXPERTS in (names := parameter.device_mesh.mesh_dim_names or ()):
            spread += 0 if parameter.placements[names.index(EXPERTS)].is_replicate() else parameter.numel()
    return spread / total if total else 0.0


def expert_groups(model: nn.Module, ep: int) -> dict[str, set[str]]:
    """The names of the parameters of a plain model that are experts and that choose among them; empty for one rank.

    What has a row per expert beside them is taken for what chooses among them.
    """
    plan = decide_experts(ModelReading(model), ep)
    if plan is None:
        return {}
    experts, routers = set(plan.parameters), set()
    for module, own in plan.modules.items():
        around = f"{module.rpartition('.')[0]}."
        routers |= {
            name
            for name, parameter in model.named_parameters()
            if name.startswith(around) and name not in experts and parameter.shape[:1] == (own.count,)
        }
    return {"experts": experts, "routers": routers}


def text_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of the text model and the head; models within the text model are towers."""
    text, inner = text_model(model)
    head = head_name(model) or text
    inside = [name for name, part in inner.named_modules() if part is not inner and isinstance(part, PreTrainedModel)]
    towers = tuple(f"{text}.{name}." if text else f"{name}." for name in inside)
    names = [name for name, _ in model.named_parameters()]
    return {
        name
        for name in names
        if (not text or name.startswith((f"{text}.", f"{head}."))) and not name.startswith(towers)
    }
