"""Checkpoints that somebody has changed, manifest and all: nothing in them is run, what is read is what was saved."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_store import _run, _save_and_go_on
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import LlamaConfig

from shardwright.checkpoint.distcp import parse_metadata
from shardwright.checkpoint.export import export, inspect
from shardwright.checkpoint.manifest import MANIFEST, write_manifest
from shardwright.checkpoint.run_info import read_info
from shardwright.checkpoint.store import load_checkpoint
from shardwright.errors import CheckpointError, ConfigError, ShardwrightError
from shardwright.verify.ranks import RankPool

WEIGHT = "model.model.norm.weight"


class _Plant:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def saved(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint; nothing may be changed in it."""
    folder = tmp_path_factory.mktemp("saved")
    ranks2.run(_save_and_go_on, "llama", "fsdp2", folder)
    return folder / "step-00000002"


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "step-00000002")


def _seal(folder: Path) -> None:
    """A manifest that fits whatever is in the folder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, {})


def _metadata(folder: Path, change: Callable[[Metadata], None]) -> None:
    file = folder / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    _seal(folder)


def _load(folder: Path) -> str:
    """What a rank says about it; empty where it loads."""
    state, _ = _run("llama", "fsdp2", seed=5)
    try:
        load_checkpoint(folder, state)
    except CheckpointError as error:
        return str(error)
    return ""


def _refused(ranks: RankPool, folder: Path, told: str) -> None:
    """By resuming, by inspecting and by exporting; by none of them as anything but one error."""
    for message in ranks.run(_load, folder):
        assert told in message
    for read in (lambda: inspect(folder), lambda: export(folder, folder.parent / "out")):
        with pytest.raises(ShardwrightError) as caught:
            read()
        assert told in str(caught.value)
    assert not (folder.parent / "out").exists()


def test_a_weight_that_is_said_to_be_bytes_is_not_unpickled(ranks2: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "hacked"
    buffer = io.BytesIO()
    torch.save(_Plant(mark), buffer)
    (checkpoint / "state" / "__9_0.distcp").write_bytes(buffer.getvalue())

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[WEIGHT] = BytesStorageMetadata()
        metadata.storage_data = {key: at for key, at in metadata.storage_data.items() if key.fqn != WEIGHT}
        metadata.storage_data[MetadataIndex(WEIGHT)] = _StorageInfo("__9_0.distcp", 0, len(buffer.getvalue()))

    _metadata(checkpoint, change)
    _refused(ranks2, checkpoint, "is no tensor")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_metadata_that_calls_something_is_not_run(
    ranks2: RankPool, checkpoint: Path, tmp_path: Path, protocol: int
) -> None:
    mark = tmp_path / "hacked"
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(_Plant(mark), protocol))
    _seal(checkpoint)
    _refused(ranks2, checkpoint, ".metadata has")
    assert not mark.exists()


def test_a_tensor_s_own_pickle_is_not_run(ranks2: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    """Every chunk's description is replaced, at the same length."""
    mark = tmp_path / "h"
    for file in (checkpoint / "state").glob("*.distcp"):
        data = bytearray(file.read_bytes())
        at = -1
        while (at := data.find(b"ctorch._utils\n_rebuild_tensor_v2\n", at + 1)) >= 0:
            planted = f"cposix\nsystem\n(V touch {mark}\ntR.".encode()
            data[at : at + len(planted)] = planted
        file.write_bytes(data)
    _seal(checkpoint)
    for message in ranks2.run(_load, checkpoint):
        assert "which torch does not write there" in message or "is damaged" in message
    with pytest.raises(CheckpointError):
        export(checkpoint, tmp_path / "out")
    assert not mark.exists()


def _half(metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata["model.lm_head.weight"]
    lost = stored.chunks.pop()
    del metadata.storage_data[MetadataIndex("model.lm_head.weight", lost.offsets)]


def _twice(metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata["model.lm_head.weight"]
    first, second = stored.chunks
    sizes = torch.Size([first.sizes[0] + 1, *first.sizes[1:]])
    stored.chunks[:] = [ChunkStorageMetadata(first.offsets, sizes), second]


def _elsewhere(metadata: Metadata) -> None:
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index].relative_path = "../../secret"


def _beyond(metadata: Metadata) -> None:
    for at in metadata.storage_data.values():
        at.offset += 2**40


def _larger(metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata["model.lm_head.weight"]
    stored.size = torch.Size([2**40, 16])
    stored.chunks[0].sizes = torch.Size([2**40 - stored.chunks[1].sizes[0], 16])
    moved = stored.chunks[1]
    at = metadata.storage_data.pop(MetadataIndex("model.lm_head.weight", moved.offsets))
    moved.offsets = torch.Size([2**40 - moved.sizes[0], 0])
    metadata.storage_data[MetadataIndex("model.lm_head.weight", moved.offsets)] = at


def _dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[WEIGHT].properties.dtype = torch.int32


def _more(metadata: Metadata) -> None:
    """A state that no optimizer keeps, of a size that would fill the memory, which one number is said to be all of."""
    name, nowhere = "optimizer.model.norm.weight.huge", torch.Size([0] * 3)
    chunk = ChunkStorageMetadata(nowhere, torch.Size([1] * 3))
    metadata.state_dict_metadata[name] = TensorStorageMetadata(
        TensorProperties(torch.float32), torch.Size([2**14] * 3), [chunk]
    )
    metadata.storage_data[MetadataIndex(name, nowhere)] = next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_half, "is not whole: some of it is in no chunk"),
        (_twice, "is not whole: some of it is in several chunks"),
        (_elsewhere, "'../../secret', which is no file of a checkpoint"),
        (_larger, "is larger than the bytes that hold it"),
        (_more, "is not whole"),
    ],
)
def test_metadata_that_does_not_fit_itself(
    ranks2: RankPool, checkpoint: Path, change: Callable[[Metadata], None], told: str
) -> None:
    _metadata(checkpoint, change)
    _refused(ranks2, checkpoint, told)


@pytest.mark.parametrize(("change", "told"), [(_beyond, "beyond the end of the file"), (_dtype, "torch.int32")])
def test_metadata_that_does_not_fit_the_files(
    ranks2: RankPool, checkpoint: Path, change: Callable[[Metadata], None], told: str
) -> None:
    _metadata(checkpoint, change)
    for message in ranks2.run(_load, checkpoint):
        assert told in message
    with pytest.raises(CheckpointError, match=told):
        export(checkpoint, checkpoint.parent / "out")


def test_metadata_whose_places_would_fill_the_memory() -> None:
    """Ten bytes of a pickle make Python's unpickler allocate gigabytes for a place in its memo."""
    for operation in (b"r" + (2**31 - 1).to_bytes(4, "little"), b"p2147483647\n"):
        with pytest.raises(CheckpointError, match=r"damaged|which torch does not write"):
            parse_metadata(b"\x80\x04N" + operation + b".", "m")


def _compressed(file: Path) -> Iterator[bytes]:
    """Every tensor in a file of torch.distributed.checkpoint, deflated: a small file that is read as a large one."""
    data = file.read_bytes()
    starts = [at for at in range(len(data)) if data.startswith(b"PK\x03\x04", at) and b"data.pkl" in data[at : at + 60]]
    for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
        made = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(data[start:stop])) as old,
            zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for member in old.infolist():
                new.writestr(member.filename, old.read(member))
        yield made.getvalue()


def test_tensors_that_were_deflated_are_not_inflated(ranks2: RankPool, checkpoint: Path) -> None:
    moves: dict[tuple[str, int], tuple[int, int]] = {}
    metadata = pickle.loads((checkpoint / "state" / ".metadata").read_bytes())
    for file in (checkpoint / "state").glob("*.distcp"):
        places = sorted(at.offset for at in metadata.storage_data.values() if at.relative_path == file.name)
        made = b""
        for offset, part in zip(places, _compressed(file), strict=True):
            moves[file.name, offset] = (len(made), len(part))
            made += part
        file.write_bytes(made)

    def change(metadata: Metadata) -> None:
        for at in metadata.storage_data.values():
            at.offset, at.length = (
                moves[at.relative_path, at.offset][0],
                max(4096, moves[at.relative_path, at.offset][1]),
            )

    _metadata(checkpoint, change)
    for message in ranks2.run(_load, checkpoint):
        assert "larger than the bytes that hold it" in message or "a description of" in message


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update({name: value})


def _group(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["state"]["groups"][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("step", -1), "step in"),
        (_set("step", "x"), "step in"),
        (_set("step", None), "step in"),
        (_set("step", True), "step in"),
        (_set("step", 10**30), "beyond 64 bits"),
        (_set("step", 3), "says step 3, but the folder is step-00000002"),
        (_set("world_size", 0), "world_size in"),
        (_set("metric", float("nan")), "metric in"),
        (_set("progress", []), "progress in"),
        (_set("state", {}), "no list 'groups'"),
        (_set("more", 1), "must hold step, progress"),
        (lambda data: data.pop("saved"), "must hold step, progress"),
    ],
)
def test_run_json_of_other_values(ranks2: RankPool, checkpoint: Path, change: Any, told: str) -> None:
    _change_run(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"run\.json") as caught:
        read_info(checkpoint)
    assert told in str(caught.value)


def _change_run(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "run.json").read_text())
    change(data)
    (folder / "run.json").write_text(json.dumps(data))
    _seal(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_group("lr", "fast"), "lr of the optimizer or its schedule is 'fast'"),
        (_group("lr", float("inf")), "it must be finite"),
        (_group("betas", [0.9]), "betas of the optimizer or its schedule is [0.9]"),
        (_group("planted", 1), "of the optimizer or its schedule, where this one has"),
        (_group("params", ["model.norm.weight"]), "parameter groups"),
        (lambda data: data["state"].update(groups=[1, 2]), "parameter groups"),
        (lambda data: data["state"].update(schedule={"last_epoch": "x"}), "last_epoch"),
        (lambda data: data["state"].update(schedule=[1]), "of the optimizer or its schedule, where this one has"),
    ],
)
def test_an_optimizer_of_other_values(ranks2: RankPool, checkpoint: Path, change: Any, told: str) -> None:
    _change_run(checkpoint, change)
    for message in ranks2.run(_load, checkpoint):
        assert told in message


def test_files_that_the_manifest_does_not_list_are_not_read(ranks2: RankPool, checkpoint: Path) -> None:
    for name in ("state/__9_0.distcp", "model/tokenizer.json", "notes.txt", "model/more/x"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("planted")
        _refused(
            ranks2, checkpoint, f"holds {'model/more' if 'more' in name else name}, which its manifest.json does not"
        )
        (checkpoint / name).unlink()
        if "more" in name:
            (checkpoint / "model" / "more").rmdir()
    assert ranks2.run(_load, checkpoint) == ["", ""]


@pytest.mark.parametrize(
    "change",
    [
        lambda states: {},
        lambda states: {"cpu": states["cpu"][:-8]},
        lambda states: {"cpu": states["cpu"].float()},
        lambda states: {"cpu": torch.full_like(states["cpu"], 255)},
        lambda states: {"cpu": states["cpu"][None]},
    ],
)
def test_random_states_of_other_shapes(ranks2: RankPool, checkpoint: Path, change: Any) -> None:
    for file in checkpoint.glob("random-*"):
        save_file(change(load_file(file)), file)
    _seal(checkpoint)
    for message in ranks2.run(_load, checkpoint):
        assert "is damaged" in message or "has (" in message


@pytest.mark.parametrize("size", [20, 2**21])
def test_a_random_state_that_is_no_safetensors(ranks2: RankPool, checkpoint: Path, tmp_path: Path, size: int) -> None:
    planted = pickle.dumps(_Plant(tmp_path / "hacked"))
    (checkpoint / "random-00001.safetensors").write_bytes(planted.ljust(size, b"\0"))
    _seal(checkpoint)
    for message in ranks2.run(_load, checkpoint):
        assert "random-00001.safetensors" in message
    assert not (tmp_path / "hacked").exists()


AUTO = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model", "AutoTokenizer": ["planted.T", None]}


@pytest.mark.parametrize("answer", ["", "y\n" * 1000])
def test_code_in_a_checkpoint_runs_only_where_it_is_trusted(checkpoint: Path, tmp_path: Path, answer: str) -> None:
    """transformers would ask, and take yes for an answer from a pipe."""
    mark = tmp_path / "hacked"
    for folder in (checkpoint, checkpoint / "model", checkpoint / "state", tmp_path):
        for name in ("planted.py", "configuration_planted.py", "sitecustomize.py", "__init__.py"):
            (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    config = json.loads((checkpoint / "model" / "config.json").read_text())
    (checkpoint / "model" / "config.json").write_text(json.dumps({**config, "auto_map": AUTO, "model_type": "planted"}))
    (checkpoint / "model" / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO, "tokenizer_class": "T"}))
    _seal(checkpoint)
    command = [sys.executable, "-P", "-m", "shardwright.cli", "export", str(checkpoint), "out"]
    done = subprocess.run(command, cwd=tmp_path, input=answer, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "its code comes with the folder" in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_sizes_of_a_config_that_do_not_fit_what_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(checkpoint / "model")
    for values, told in [
        ({"num_hidden_layers": 1}, "does not hold a LlamaForCausalLM"),
        ({"num_hidden_layers": -1}, "cannot be negative"),
        ({"num_hidden_layers": 2**40}, "more than 100,000 modules"),
        ({"hidden_size": 32, "head_dim": 4}, "in the checkpoint and"),
        ({"hidden_size": 2**40}, "GiB in all"),
        ({"architectures": 7}, "architectures"),
        ({"architectures": [{"x": 1}]}, "architectures"),
        ({"dtype": "int8"}, "dtype"),
        ({"attn_implementation": "someone/kernel"}, "a kernel of the hub"),
    ]:
        (checkpoint / "model" / "config.json").write_text(json.dumps({**config.to_dict(), **values}))
        _seal(checkpoint)
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            export(checkpoint, tmp_path / "out")
        assert told in str(caught.value)
