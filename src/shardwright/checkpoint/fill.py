"""Values into the (possibly sharded, still empty) tensors of a model: read from a folder, or computed."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardwright._transformers import names_missing_by_design
from shardwright.checkpoint.conversion import LoadPlan, Reading
from shardwright.checkpoint.folder import Entry
from shardwright.checkpoint.initial import Initial
from shardwright.checkpoint.layout import Box, owned_parts
from shardwright.checkpoint.slices import SliceReader, open_slices, split_box
from shardwright.checkpoint.together import rank_and_world
from shardwright.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # converted into each other

Read = Callable[[Tensor], object]  # puts values into a tensor of their shape


def to_empty(model: nn.Module, device: torch.device | str) -> None:
    """Give every tensor of ``model`` (this rank's part of it) memory on ``device``, with no value in it yet.

    ``torch.nn.Module.to_empty`` keeps the ties of DTensors and unties plain parameters; here both stay tied.

    Raises:
        ConfigError: they are larger than the memory that ``device`` has in all.
    """
    _require_room(model, torch.device(device))
    homes: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            homes[id(parameter)].append((module, key))
    model.to_empty(device=device)
    for (first, first_key), *others in homes.values():
        for module, key in others:
            if module._parameters[key] is not first._parameters[first_key]:
                module._parameters[key] = first._parameters[first_key]


def _require_room(model: nn.Module, device: torch.device) -> None:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    needed = sum(_local(tensor).nbytes for tensor in tensors.values())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"The part of the model that one rank holds takes {needed / 2**30:,.1f} GiB, and {device} has "
            f"{there / 2**30:,.1f} GiB in all. Shard it over more ranks (dp_shard, tp), or look at the sizes "
            "in its config."
        )


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_fit(plan: LoadPlan, skeleton: PreTrainedModel, folder: Path, entries: Mapping[str, Entry]) -> None:
    """Whether ``plan`` gives every tensor of ``skeleton`` a value of its shape, from ``entries`` of its kind.

    Raises:
        CheckpointError: it does not; the message has the names.
    """
    tensors = skeleton.state_dict(keep_vars=True)
    for name, reading in plan.readings.items():
        if name in tensors and tuple(reading.shape) != tuple(tensors[name].shape):
            raise CheckpointError(
                f"{name} has shape {tuple(reading.shape)} in {folder} and {tuple(tensors[name].shape)} in the model. "
                "The weights belong to another config; load them with the config.json they came with."
            )
        for entry in reading.entries if name in tensors else ():
            _require_kind(entry, entries[entry].dtype, name, tensors[name].dtype, folder)
    found = {id(tensors[name]) for name in plan.readings if name in tensors}
    optional = [re.compile(pattern) for pattern in names_missing_by_design(skeleton)]
    missing = [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in found and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's {len(tensors)} tensors, among them {missing[0]}. It is not "
            f"whole, or not a {type(skeleton).__name__}; entries that fit nothing: {_some(plan.unused)}."
        )
    if plan.unused and rank_and_world()[0] == 0:
        log.warning("%d entries of %s are not part of the model: %s", len(plan.unused), folder, _some(plan.unused))


def _require_kind(entry: str, stored: torch.dtype, name: str, dtype: torch.dtype, folder: Path) -> None:
    """Raises CheckpointError where numbers of one kind would be put into a tensor of another."""
    alike = _is_integer(stored) and _is_integer(dtype)
    if not (stored in _FLOATS if dtype in _FLOATS else stored is dtype or alike):
        raise CheckpointError(
            f"{entry} in {folder} holds {stored}, but {name} in the model is {dtype}. Where weights are quantised, "
            "such numbers stand for others: dequantise the model first."
        )


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


@torch.no_grad()
def fill_from_folder(model: nn.Module, folder: Path, entries: Mapping[str, Entry], plan: LoadPlan) -> int:
    """Read this rank's part of every tensor that ``plan`` has a reading for; returns the bytes read."""
    tensors = model.state_dict(keep_vars=True)
    order = sorted(plan.readings, key=lambda name: _place(entries[plan.readings[name].entries[0]]))
    filled: set[int] = set()
    with open_slices(folder, entries) as reader:
        for name in order:
            tensor = tensors[name]
            take = _refuse_if_different(name) if id(tensor) in filled else _fill
            _each_part(tensor, plan.readings[name], reader, entries, take)
            filled.add(id(tensor))
    log.info("read %.3f GB from %s", reader.bytes_read / 1e9, folder)
    return reader.bytes_read


def _place(entry: Entry) -> tuple[str, int]:
    return entry.file, entry.offset


def _each_part(
    tensor: Tensor,
    reading: Reading,
    reader: SliceReader,
    entries: Mapping[str, Entry],
    take: Callable[[Tensor, Read], None],
) -> None:
    """Call ``take(part of the local tensor, what reads its values)`` for all of this rank's part of ``tensor``."""
    local = _local(tensor)
    parts = owned_parts(tensor)
    if reading.lazy is None:
        whole = reading.compute(reader.whole) if parts else None
        for part in parts:
            assert whole is not None
            take(local[part.local], _copies(whole[part.whole]))
        return
    for part in parts:
        for source in reading.lazy.sources:
            mine = source.within(part.whole)
            if mine is None:
                continue
            entry = entries[mine.name]
            for box in split_box(mine.source_box(), entry.shape, entry.dtype.itemsize):
                piece = mine.cut(box)
                target = local[_shifted(piece.box(), part.whole, part.local)]
                take(piece.as_entry(target), partial(reader.read, piece.name, box))


def _shifted(box: Box, whole: Box, local: Box) -> Box:
    shifts = [there.start - here.start for here, there in zip(whole, local, strict=True)]
    return tuple(slice(cut.start + shift, cut.stop + shift) for cut, shift in zip(box, shifts, strict=True))


def _copies(value: Tensor) -> Read:
    return lambda into: into.copy_(value)


def _fill(target: Tensor, read: Read) -> None:
    read(target)


def _refuse_if_different(name: str) -> Callable[[Tensor, Read], None]:
    def compare(target: Tensor, read: Read) -> None:
        value = torch.empty_like(target)
        read(value)
        if not torch.equal(target, value):
            raise CheckpointError(
                f"The config ties {name} to another weight, but the files hold different values for the two. Set "
                "tie_word_embeddings to false in config.json to load both."
            )

    return compare


@torch.no_grad()
def fill_the_rest(model: nn.Module, initial: Initial, filled: set[str]) -> None:
    """Give every tensor that is not in ``filled`` (nor tied to one that is) its initial value."""
    homes = [
        (f"{path}.{key}" if path else key, module, key, tensor)
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    ]
    done = {id(tensor) for name, _, _, tensor in homes if name in filled}
    for name, module, key, tensor in homes:
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        value = initial.value(name)
        if key in module._buffers and not isinstance(tensor, DTensor):
            module._buffers[key] = value.to(tensor.device)
            continue
        local = _local(tensor)
        for part in owned_parts(tensor):
            local[part.local].copy_(value[part.whole])


def check_complete(model: nn.Module, skeleton: nn.Module) -> None:
    """No tensor of ``model`` is on meta, and what is tied in ``skeleton`` is tied.

    Raises:
        CheckpointError: otherwise.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if meta:
        raise CheckpointError(f"{len(meta)} tensors are still on the meta device, among them {meta[0]}.")
    first: dict[int, str] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if tensors[name] is not tensors[other]:
            raise CheckpointError(f"{name} and {other} are tied in the model, but no longer after it was sharded.")
