"""A trainer's checkpoint, written and read by all ranks.

The weights are a plain Hugging Face folder (or a plain PEFT adapter), at the same place as a trainer on one process
writes them. Beside them stands ``optimizer/``, the optimizer's state by torch.distributed.checkpoint, each rank its
part: a run goes on from it on any mesh.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from shardwright.checkpoint.adapters import has_adapters, load_adapter_weights
from shardwright.checkpoint.conversion import plan_load
from shardwright.checkpoint.fill import check_fit, fill_from_folder
from shardwright.checkpoint.folder import open_folder
from shardwright.checkpoint.layout import owned_parts
from shardwright.checkpoint.manifest import MANIFEST
from shardwright.checkpoint.pieces import Pieces
from shardwright.checkpoint.save import save_pretrained, skeleton_of
from shardwright.checkpoint.state import MODEL, OPTIMIZER, RunState, model_tensors
from shardwright.checkpoint.storage import SafeReader, read_tensors, write_tensors
from shardwright.checkpoint.together import all_here, barrier, rank_and_world, same_error_everywhere
from shardwright.distributed.apply.guards.fresh import Parallelized
from shardwright.distributed.runtime.layout import whole
from shardwright.errors import CheckpointError
from shardwright.hf.arguments import mesh_sizes
from shardwright.untrusted import ToldAs, read_json

log = logging.getLogger(__name__)

STATE = "optimizer"
DATA = "optimizer.json"
_WEIGHTS = "model.safetensors"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PLAIN = "optimizer.pt"  # what a trainer on one process writes
_TIMEOUT = 600.0  # seconds until ranks that do not come are given up


def save_model(model: nn.Module, folder: Path) -> None:
    """Write the model's weights and config into ``folder``, among what else is there; every rank calls it.

    Raises:
        CheckpointError: not all ranks came, or the disk is full; on every rank.
    """
    if has_adapters(model):
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    if not isinstance(model, PreTrainedModel):
        _save_state(model, folder)
        return
    rank, _ = rank_and_world()
    new = folder / ".model"
    save_pretrained(model, new, timeout=_TIMEOUT)
    with same_error_everywhere(f"Saving to {folder}"):
        if rank == 0:
            written = {file.name for file in new.iterdir()}
            (folder / MANIFEST).unlink(missing_ok=True)
            for name in written:
                os.replace(new / name, folder / name)
            new.rmdir()
            for file in folder.iterdir():  # shards of an earlier save, as transformers removes them
                if _SHARD.fullmatch(file.name) and file.name not in written:
                    file.unlink()
    barrier()


def load_model(model: nn.Module, folder: Path) -> None:
    """Fill the weights of ``model`` from ``folder``, each rank its parts.

    Raises:
        CheckpointError: the folder lacks weights of the model, or they have other shapes; on every rank.
    """
    if has_adapters(model):
        for name in model.peft_config:  # type: ignore[union-attr]
            load_adapter_weights(model, folder if name == "default" else folder / name, name)
        return
    if not isinstance(model, PreTrainedModel):
        _load_state(model, folder)
        return
    with same_error_everywhere(f"Loading {folder}"):
        entries = open_folder(folder)
        skeleton = skeleton_of(model)
        plan = plan_load(skeleton, entries)
        check_fit(plan, skeleton, folder, entries)
    fill_from_folder(model, folder, entries, plan)


def save_optimizer(model: nn.Module, optimizer: Any, folder: Path, on: Parallelized) -> None:
    """Write the state of ``optimizer`` into ``folder``; every rank calls it."""
    state = RunState(model, plain_optimizer(optimizer))
    pieces = {name: Pieces(value) for name, value in state.tensors().items() if name.startswith(OPTIMIZER)}
    rank, _ = rank_and_world()
    all_here(f"saving the optimizer to {folder}", _TIMEOUT)
    with same_error_everywhere(f"Saving to {folder}"):
        if rank == 0:
            shutil.rmtree(folder / STATE, ignore_errors=True)
            (folder / STATE).mkdir(parents=True)
            data = {**state.data(), "mesh": mesh_sizes(on)}
            (folder / DATA).write_text(json.dumps(data, indent=1), encoding="utf-8")
    write_tensors(pieces, folder / STATE, None)
    barrier()


@torch.no_grad()
def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> bool:
    """Put the state in ``folder`` back into ``optimizer``; False where the folder has none.

    Raises:
        CheckpointError: it is of other parameters, damaged, or of a trainer on one process; on every rank.
    """
    with same_error_everywhere(f"Loading {folder}"):
        if not (folder / DATA).is_file():
            if (folder / _PLAIN).is_file():
                raise CheckpointError(
                    f"{folder / _PLAIN} is the optimizer of a model that was not sharded. Go on with the weights "
                    f"alone: load them from {folder} and train without resume_from_checkpoint."
                )
            log.warning("%s has no optimizer: training goes on with a new one.", folder)
            return False
        data = _data(folder)
        state = _OptimizerState(model, plain_optimizer(optimizer))
        reader = SafeReader(folder / STATE)
        state.prepare(reader.read_metadata())
    read_tensors(state.tensors(), reader)
    with same_error_everywhere(f"Loading {folder}"):
        state.restore(data)
    return True


def saved_mesh(folder: Path) -> dict[str, int] | None:
    """The axes of the mesh that wrote the checkpoint in ``folder``; None where it does not say so."""
    file = folder / DATA
    return _data(folder)["mesh"] if file.is_file() else None


def _data(folder: Path) -> dict[str, Any]:
    """What stands beside the optimizer's tensors: its groups, and the mesh."""
    data = read_json(folder / DATA, CheckpointError)
    if not isinstance(data, dict) or not isinstance(data.get("groups"), list) or not isinstance(data.get("mesh"), dict):
        raise CheckpointError(f"{folder / DATA} has no list 'groups' or no mapping 'mesh'. It is damaged.")
    return data


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside of accelerate's."""
    while not isinstance(inner := getattr(optimizer, "optimizer", None), type(None)):
        optimizer = inner
    return optimizer


class _OptimizerState(RunState):
    """The optimizer alone: the weights are beside it, as a Hugging Face folder."""

    def weights(self) -> dict[str, Tensor]:
        return {}


def _save_state(model: nn.Module, folder: Path) -> None:
    """A model that is none of transformers': its state, as Trainer writes it."""
    rank, _ = rank_and_world()
    all_here(f"saving the model to {folder}", _TIMEOUT)
    state = {}
    for name, value in model_tensors(model).items():
        full = whole(value.detach())
        if rank == 0:
            state[name.removeprefix(MODEL)] = full.to("cpu").contiguous()
    with same_error_everywhere(f"Saving to {folder}"):
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def _load_state(model: nn.Module, folder: Path) -> None:
    with same_error_everywhere(f"Loading {folder}"):
        with ToldAs(CheckpointError, f"{folder / _WEIGHTS} is damaged"):
            state = load_file(folder / _WEIGHTS)
        tensors = {name.removeprefix(MODEL): value for name, value in model_tensors(model).items()}
        if different := sorted(set(tensors) ^ set(state)):
            raise CheckpointError(f"{folder / _WEIGHTS} is of another model: {different[0]} is in one of them only.")
        for name, tensor in tensors.items():
            if state[name].shape != tensor.shape or state[name].is_floating_point() != tensor.is_floating_point():
                found, own = (f"{one.dtype} {tuple(one.shape)}" for one in (state[name], tensor))
                raise CheckpointError(f"{name} is {found} in {folder / _WEIGHTS}, and {own} in the model.")
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for part in owned_parts(tensor):
            local[part.local].copy_(state[name][part.whole])
