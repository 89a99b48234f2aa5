"""A training checkpoint as a Hugging Face folder, and what is in it. Needs no GPU and no other rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from shardwright.checkpoint.atomic import require_replaceable
from shardwright.checkpoint.description import read_generation_config, read_tokenizer
from shardwright.checkpoint.fill import to_empty
from shardwright.checkpoint.manifest import read_manifest, verify
from shardwright.checkpoint.run_info import DESCRIPTION, STATE, RunInfo, find_checkpoint, read_info
from shardwright.checkpoint.save import save_pretrained
from shardwright.checkpoint.source import class_in, read_config
from shardwright.checkpoint.state import MODEL, OPTIMIZER, model_tensors, require_alike
from shardwright.checkpoint.storage import SafeReader, read_tensors
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.models.config_json import read_config_json
from shardwright.errors import CheckpointError
from shardwright.untrusted import printable, read_json, usable_path

_ADAPTER = "adapter_config.json"  # PEFT's


def export(path: Path, out: Path, trust_remote_code: bool = False, overwrite: bool = False) -> None:
    """Write the model in a training checkpoint as a folder that plain transformers loads.

    Args:
        path: a checkpoint, or the folder of a run: its newest one.
        out: the folder to make. Host memory: the whole model.
        trust_remote_code: run model code that is in the checkpoint.
        overwrite: where ``out`` is there already, replace the files that its manifest lists. All others stay.

    Raises:
        CheckpointError: damaged, or ``out`` cannot be written.
    """
    folder = find_checkpoint(path)
    out = usable_path(out, "The folder to export to", CheckpointError)
    require_replaceable(out, overwrite)
    verify(folder, exactly=True)
    if (folder / DESCRIPTION / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter alone, and no model. A run with checkpoint.resume=true writes it as a folder "
            "of PEFT's at its end; that takes a moment where no steps are left."
        )
    reader = SafeReader(folder / STATE)
    stored = _model_part(reader.read_metadata())
    config = read_config(folder / DESCRIPTION, trust_remote_code)
    model = build_on_meta(config, class_in(folder / DESCRIPTION, config, trust_remote_code), config.dtype)
    to_empty(model, "cpu")
    tensors = model_tensors(model)
    if set(tensors) != set(stored):
        raise CheckpointError(f"{folder} does not hold a {type(model).__name__} as its config says.")
    require_alike(tensors, stored)
    read_tensors(tensors, reader)
    model.generation_config = read_generation_config(folder / DESCRIPTION) or model.generation_config
    tokenizer = None
    if (folder / DESCRIPTION / "tokenizer_config.json").is_file():
        tokenizer = read_tokenizer(folder / DESCRIPTION, trust_remote_code)
    save_pretrained(model, out, tokenizer, overwrite=overwrite)


def _kind(description: Path) -> str:
    """The model's type; of adapters alone, their kind."""
    if (description / _ADAPTER).is_file():
        return f"adapters, {read_json(description / _ADAPTER, CheckpointError).get('peft_type')}"
    return str(read_config_json(description, trusted=True).get("model_type"))


def _model_part(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: value
        for name, value in metadata.state_dict_metadata.items()
        if name.startswith(MODEL) and isinstance(value, TensorStorageMetadata)
    }


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Attributes:
        folder: where it is.
        info: what it says about the run.
        model_type: of its config.
        parameters: how many numbers the model has.
        dtypes: dtype -> tensors of the model.
        optimizer_tensors: how many tensors the optimizer has.
        files: how many files.
        size: bytes of all files.
    """

    folder: Path
    info: RunInfo
    model_type: str
    parameters: int
    dtypes: dict[str, int]
    optimizer_tensors: int
    files: int
    size: int

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        info = self.info
        dtypes = ", ".join(f"{count} tensors {dtype}" for dtype, count in self.dtypes.items())
        facts: dict[str, Any] = {
            "checkpoint": self.folder,
            "step": info.step,
            "saved": f"{info.saved} by {info.world_size} ranks",
            **({} if info.metric is None else {"metric": f"{info.metric:.6g}"}),
            "model": f"{self.model_type}, {self.parameters:,} parameters ({dtypes})",
            "optimizer": f"{self.optimizer_tensors} tensors, {len(info.state['groups'])} parameter groups",
            "files": f"{self.files}, {self.size / 1e9:.3f} GB",
            **{key: value for key, value in info.notes.items() if not isinstance(value, (dict, list))},
            "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
        }
        return [printable(f"{key:<12}{value}") for key, value in facts.items()]


def inspect(path: Path, check: bool = True) -> Contents:
    """What is in a training checkpoint.

    Args:
        path: a checkpoint, or the folder of a run: its newest one.
        check: read every file and compare its checksum.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = find_checkpoint(path)
    if check:
        verify(folder, exactly=True)
    sums = read_manifest(folder)
    metadata = SafeReader(folder / STATE).read_metadata()
    stored = _model_part(metadata)
    return Contents(
        folder=folder,
        info=read_info(folder),
        model_type=_kind(folder / DESCRIPTION),
        parameters=sum(prod(value.size) for value in stored.values()),
        dtypes=dict(Counter(str(value.properties.dtype).removeprefix("torch.") for value in stored.values())),
        optimizer_tensors=sum(name.startswith(OPTIMIZER) for name in metadata.state_dict_metadata),
        files=len(sums) + 1,
        size=sum(size for size, _ in sums.values()),
    )
