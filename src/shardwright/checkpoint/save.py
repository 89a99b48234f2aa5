"""``save_pretrained``: from a sharded model to a plain Hugging Face folder, written by all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from shardwright._transformers import conversions_of, set_conversions
from shardwright.checkpoint.adapters import has_adapters
from shardwright.checkpoint.atomic import FolderWriter, unfinished
from shardwright.checkpoint.conversion import SavePlan, Writing, plan_save
from shardwright.checkpoint.folder import INDEX
from shardwright.checkpoint.manifest import Sums, sums_of, write_manifest
from shardwright.checkpoint.together import all_here, barrier, from_all, rank_and_world, same_error_everywhere
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.runtime.forward import original_class
from shardwright.distributed.runtime.layout import whole as made_whole
from shardwright.errors import CheckpointError, UnsupportedError
from shardwright.untrusted import usable_path

_PATTERN = "model{suffix}.safetensors"


@torch.no_grad()
def save_pretrained(
    model: nn.Module,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    timeout: float = 120.0,
) -> None:
    """Write ``model`` as the folder that plain transformers would write: same names, same layout, same bytes.

    Collective: every rank calls it, and ``path`` is on a disk that all of them see. The files are dealt out to the
    ranks; weights are gathered one at a time, and each rank keeps those of the one file it writes at the moment. So
    a rank needs host memory for one file, and device memory for one whole weight (one group of weights, where they
    are converted together, such as the experts of one layer).

    Beside them stands ``manifest.json``, the checksums of all files, by which :func:`load_pretrained` finds damage.
    The folder appears under its name when it is whole.

    Args:
        model: a transformers model, sharded or not.
        path: the folder.
        tokenizer: saved along with it.
        overwrite: where ``path`` is there already, replace the files that its manifest lists. All others stay; one that
            has the name of a new file is an error.
        max_shard_size: size of a file, in bytes or as ``"5GB"``.
        timeout: seconds to wait for ranks that have not called this yet.

    Raises:
        CheckpointError: not all ranks made this call in time; the folder cannot be written (a full disk, not shared by
            all ranks, something there that would be replaced); on every rank alike.
        UnsupportedError: not a transformers model.
    """
    folder = usable_path(path, "The folder to save to", CheckpointError).resolve()
    all_here(f"save_pretrained({folder})", timeout)
    rank, _ = rank_and_world()
    with same_error_everywhere(f"Saving to {folder}"):
        skeleton = skeleton_of(model)
        plan = plan_save(skeleton)
        split = split_state_dict_into_shards_factory(
            plan.entries, get_storage_size=_bytes_of, filename_pattern=_PATTERN, max_shard_size=max_shard_size
        )
        check_ties(model, skeleton)
    with ExitStack() as stack:
        writer = None
        with same_error_everywhere(f"Saving to {folder}"):
            if rank == 0:
                writer = stack.enter_context(FolderWriter(folder, overwrite))
        with same_error_everywhere(f"Saving to {folder}"):
            if not unfinished(folder).is_dir():
                raise CheckpointError(
                    f"Rank 0 made {unfinished(folder)}, but rank {rank} does not see it. Save to a disk that all share."
                )
        _write_files(model, skeleton, plan, split.filename_to_tensors, unfinished(folder))
        sums = _checksums(list(split.filename_to_tensors), unfinished(folder))
        with same_error_everywhere(f"Saving to {folder}"):
            if writer is not None:
                if split.is_sharded:
                    total = {"total_parameters": skeleton.num_parameters(), **split.metadata}
                    _write_index(writer.path, total, split.tensor_to_filename)
                write_description(skeleton, tokenizer, writer.path)
                write_manifest(writer.path, sums)
                writer.finish()
    barrier()


def skeleton_of(model: nn.Module) -> PreTrainedModel:
    """A whole copy of ``model`` on meta, of the class it had before FSDP2 gave it another."""
    name = original_class(model).__name__
    if has_adapters(model):
        raise UnsupportedError(
            f"This {name} has PEFT adapters, which have a format of their own. On every rank, call "
            "model.save_pretrained(folder): it writes the folder that plain PEFT writes. Or merge them into the "
            "weights first, on every rank: model = model.merge_and_unload()."
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{name} is no transformers model, so it has no Hugging Face layout. Save its state with "
            "torch.distributed.checkpoint."
        )
    state = model.state_dict()  # asked first: it makes gathered parameters, which may be rounded, shards again
    cls = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    skeleton = build_on_meta(deepcopy(model.config), cls, next(model.parameters()).dtype)
    skeleton.generation_config = deepcopy(model.generation_config)
    conversions = conversions_of(model)
    if conversions is not None:
        set_conversions(skeleton, conversions)
    here = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    there = {name: (tuple(value.shape), value.dtype) for name, value in skeleton.state_dict().items()}
    different = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if different:
        name = different[0]
        raise UnsupportedError(
            f"{name} is {here.get(name, 'not')} in the model, but {there.get(name, 'not')} in a {cls.__name__} of the "
            f"model's own config ({len(different)} such tensors). Make model.config fit the model before saving it."
        )
    return skeleton


def check_ties(model: nn.Module, skeleton: nn.Module) -> None:
    """Raise CheckpointError where weights that are one in ``skeleton`` are two in ``model``."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if tensors[name] is not tensors[other]:
            raise CheckpointError(
                f"The config ties {name} to {other}, but in this model they are two weights. Set "
                "model.config.tie_word_embeddings to False to save both, or tie them again."
            )


def _write_files(
    model: nn.Module, skeleton: PreTrainedModel, plan: SavePlan, files: dict[str, list[str]], folder: Path
) -> None:
    rank, world = rank_and_world()
    state = model.state_dict()
    names = list(files)
    for start in range(0, len(names), world):
        round_ = names[start : start + world]
        mine = set(files[round_[rank]]) if rank < len(round_) else set()
        wanted = {entry for name in round_ for entry in files[name]}
        tensors = dict(_gathered(state, skeleton, plan, wanted, mine))
        with same_error_everywhere(f"Writing {round_[0]}"):
            if mine:
                ordered = {entry: tensors.pop(entry) for entry in files[round_[rank]]}
                _save(ordered, folder / round_[rank])


def _checksums(files: list[str], folder: Path) -> Sums:
    """Of all weight files; every rank reads those that it wrote."""
    rank, world = rank_and_world()
    with same_error_everywhere(f"Reading {folder}"):
        mine = sums_of(folder, [folder / file for file in files[rank::world]])
    return {file: told for part in from_all(mine) for file, told in part.items()}


def _gathered(
    state: dict[str, Tensor], skeleton: PreTrainedModel, plan: SavePlan, wanted: set[str], mine: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The entries in ``mine``, on the CPU. Takes part in gathering all that are ``wanted`` by some rank."""
    for writing in plan.writings:
        if wanted.isdisjoint(writing.entries):
            continue
        whole = {name: made_whole(state[name]) for name in writing.tensors}
        if not mine.isdisjoint(writing.entries):
            yield from _converted(writing, whole, skeleton, mine)


def _converted(
    writing: Writing, whole: dict[str, Tensor], skeleton: PreTrainedModel, mine: set[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in writing.convert(whole, skeleton).items():
        if name in mine:
            on_cpu = value.to("cpu").contiguous()
            part_of_more = on_cpu.untyped_storage().nbytes() != on_cpu.nbytes  # would keep all of it in memory
            yield name, on_cpu.clone() if part_of_more else on_cpu


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"Cannot write {file}: {error}.") from error


def _write_index(folder: Path, total: dict[str, Any], places: dict[str, str]) -> None:
    text = json.dumps({"metadata": total, "weight_map": places}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_description(skeleton: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config, generation config and tokenizer: all of a model folder but its weights."""
    config: Any = skeleton.config
    config.dtype = str(next(skeleton.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(skeleton).__name__]
    if skeleton.is_remote_code():  # a class that came with the folder it was loaded from, or was registered as such
        folder.mkdir(exist_ok=True)
        custom_object_save(skeleton, folder, config=config)
    config.save_pretrained(folder)
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
