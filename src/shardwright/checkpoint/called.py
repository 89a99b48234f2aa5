"""``model.save_pretrained`` and ``model.load_adapter`` as they are called on a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from shardwright.checkpoint.adapters import has_adapters, load_adapter_weights, save_adapters
from shardwright.checkpoint.save import save_pretrained
from shardwright.errors import PlanError, UnsupportedError

# Arguments of both that change nothing for a sharded model.
_FREE = {
    "save_directory", "is_main_process", "state_dict", "save_function", "max_shard_size", "safe_serialization",
    "save_peft_format", "selected_adapters", "save_embedding_layers", "path_initial_model_for_weight_conversion",
    "push_to_hub", "token", "variant", "save_original_format",
}  # fmt: skip


def save(model: nn.Module, forward: Callable[..., Any], given: dict[str, Any]) -> None:
    """Write the folder that plain transformers, or plain PEFT, would write; every rank calls it.

    Args:
        forward: the method of the model itself.
        given: its arguments by name.

    Raises:
        UnsupportedError: an argument that is not supported on a sharded model.
        CheckpointError: not all ranks came, or the disk is full; on every rank.
    """
    unknown = sorted(set(given) - _FREE)
    asked = [name for name in ("push_to_hub", "variant") if given.get(name)]
    if unknown or asked or given.get("save_original_format") is False or given.get("safe_serialization") is False:
        raise UnsupportedError(
            f"save_pretrained of a sharded model was called with {', '.join(unknown or asked) or 'another format'}, "
            "which it does not support. Save to a folder first, model.save_pretrained(folder) on every rank, and work "
            "on that with plain transformers."
        )
    if has_adapters(model):
        save_adapters(model, forward, given)
    else:
        size = given.get("max_shard_size", "5GB")
        save_pretrained(model, given["save_directory"], overwrite=True, max_shard_size=size)


def load_adapter(model: Any, given: dict[str, Any]) -> None:
    """Fill an adapter that the model has from a folder that PEFT wrote, each rank its parts; every rank calls it.

    Raises:
        PlanError: the model has no adapter of this name.
        CheckpointError: the folder is of another adapter.
    """
    name = given.get("adapter_name") or "default"
    folder = given["model_id"] if "model_id" in given else given["peft_model_id"]
    known = list(model.peft_config) if has_adapters(model) else []
    if name not in known:
        raise PlanError(
            f"The model has the adapters {known or 'none'}, and {name!r} would be put on it after it was sharded. Put "
            "all adapters on first, PeftModel.from_pretrained(model, folder) and model.load_adapter(...), and "
            "parallelize last."
        )
    load_adapter_weights(model, folder, name)
