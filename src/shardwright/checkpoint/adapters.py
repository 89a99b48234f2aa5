"""PEFT's adapters of a sharded model, in the folders that plain PEFT writes and reads.

Which tensors a folder has, and under which names, is PEFT's to say: its own function is asked with the sharded state,
and what it hands out is looked up by identity. So this knows no kind of adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from shardwright.checkpoint.atomic import FolderWriter, unfinished
from shardwright.checkpoint.layout import owned_parts
from shardwright.checkpoint.manifest import write_manifest
from shardwright.checkpoint.together import all_here, barrier, rank_and_world, same_error_everywhere
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import CheckpointError, UnsupportedError

_TIMEOUT = 600.0  # seconds until ranks that do not come are given up


def has_adapters(model: nn.Module) -> bool:
    """Whether ``model`` is PEFT's, or a transformers model that adapters were added to."""
    return isinstance(getattr(model, "peft_config", None), dict)


def save_adapters(model: Any, forward: Callable[..., Any], given: dict[str, Any]) -> None:
    """Write the adapters of ``model`` as plain PEFT does; every rank calls it.

    Args:
        forward: PEFT's (or transformers') ``save_pretrained`` of the model.
        given: its arguments by name.
    """
    folder = Path(given["save_directory"]).absolute()
    all_here(f"save_pretrained({folder})", _TIMEOUT)
    names = given.get("selected_adapters") or list(model.peft_config)
    state = dict(model.state_dict())
    with same_error_everywhere(f"Saving to {folder}"):
        kept = {id(value) for name in names for value in _entries(model, state, name, given).values()}
    rank, _ = rank_and_world()
    gathered = {}
    for key, value in state.items():
        if id(value) in kept:
            full = whole(value)
            if rank == 0:
                gathered[key] = full.detach().to("cpu").contiguous()
    with same_error_everywhere(f"Saving to {folder}"):
        if rank == 0:
            forward(**{**given, "save_directory": str(folder), "state_dict": gathered, "is_main_process": True})
    barrier()


def describe_adapters(model: Any, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the adapters' config and the tokenizer: all of an adapter's folder but its weights."""
    for name, config in model.peft_config.items():
        config.save_pretrained(folder if name == "default" else folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_adapter_folder(model: Any, path: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the adapters of ``model`` and the tokenizer as one folder, which is there whole or not at all.

    What Shardwright has written there before is replaced. Every rank calls it.

    Raises:
        CheckpointError: it cannot be written; on every rank.
    """
    folder = path.resolve()
    all_here(f"saving to {folder}", _TIMEOUT)
    rank, _ = rank_and_world()
    with ExitStack() as stack:
        writer = None
        with same_error_everywhere(f"Saving to {folder}"):
            if rank == 0:
                writer = stack.enter_context(FolderWriter(folder, overwrite=True))
        model.save_pretrained(unfinished(folder))
        with same_error_everywhere(f"Saving to {folder}"):
            if writer is not None:
                if tokenizer is not None:
                    tokenizer.save_pretrained(writer.path)
                write_manifest(writer.path, {})
                writer.finish()
    barrier()


@torch.no_grad()
def load_adapter_weights(model: nn.Module, folder: str | Path, name: str) -> None:
    """Fill the adapter ``name`` of ``model`` from ``folder`` (or a name on the hub), each rank its parts.

    Raises:
        CheckpointError: the folder lacks tensors of the adapter, has others, or they have other shapes; on every rank.
    """
    from peft.utils.save_and_load import load_peft_weights

    with same_error_everywhere(f"Loading {folder}"):
        found = load_peft_weights(str(folder), device="cpu")
        wanted = _entries(model, dict(model.state_dict(keep_vars=True)), name, {"save_embedding_layers": False})
        extra = {key for key in found if key not in wanted}
        if missing := sorted(set(wanted) - set(found)):
            raise CheckpointError(
                f"{folder} is of another adapter: it lacks {missing[0]} ({len(missing)} tensors) and has {len(extra)} "
                f"that the adapter {name!r} has not."
            )
        for key, tensor in wanted.items():
            if found[key].shape != tensor.shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(found[key].shape)} in {folder} and {tuple(tensor.shape)} in the model. "
                    "The adapter was made with another config."
                )
    for key, tensor in wanted.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for part in owned_parts(tensor):
            local[part.local].copy_(found[key][part.whole])


def _entries(model: Any, state: dict[str, Tensor], name: str, given: dict[str, Any]) -> dict[str, Tensor]:
    """What a folder of the adapter ``name`` holds: entry -> the tensor of ``state``.

    Raises:
        UnsupportedError: PEFT computes an entry instead of handing out a tensor.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    embedding = given.get("save_embedding_layers", "auto")
    entries = get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=embedding)
    known = {id(value) for value in state.values()}
    for key, value in entries.items():
        if id(value) not in known:
            kind = model.peft_config[name].peft_type
            raise UnsupportedError(
                f"PEFT computes {key} of an adapter of type {kind} from this rank's parts, which is not supported. "
                "Merge the adapter, or save the run with torch.distributed.checkpoint."
            )
    return dict(entries)
