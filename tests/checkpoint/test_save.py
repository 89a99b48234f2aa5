"""Saving shards: the bytes that plain transformers writes, by any mesh, whole or not at all."""

from __future__ import annotations

import filecmp
import resource
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import CONFIGS, MESHES, mesh_for
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shardwright.api import parallelize
from shardwright.checkpoint import save
from shardwright.checkpoint.full import full_weights
from shardwright.checkpoint.load import init_pretrained, load_pretrained
from shardwright.checkpoint.manifest import MANIFEST, read_manifest
from shardwright.checkpoint.save import save_pretrained
from shardwright.errors import CheckpointError, UnsupportedError
from shardwright.verify.ranks import RankPool

Saved = Callable[[str], Path]


def _load(folder: Path, mesh: str) -> PreTrainedModel:
    config = MESHES[mesh]
    return load_pretrained(folder, config, mesh_for(config))


def _load_and_save(folder: Path, mesh: str, to: Path) -> None:
    model = _load(folder, mesh)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])  # FSDP2's root stays gathered after this
    save_pretrained(model, to, max_shard_size="20KB")
    saved = {name: value for file in to.glob("*.safetensors") for name, value in load_file(file).items()}
    given = [(name, value.clone()) for name, value in full_weights(model)]
    assert sorted(name for name, _ in given) == sorted(saved)
    assert all(torch.equal(value, saved[name]) for name, value in given)


@pytest.mark.parametrize(("name", "mesh"), [(name, "tp2") for name in CONFIGS] + [("mixtral_stacked", "fsdp2")])
def test_two_ranks(ranks2: RankPool, saved: Saved, tmp_path: Path, name: str, mesh: str) -> None:
    ranks2.run(_load_and_save, saved(name), mesh, tmp_path / "out")
    _assert_same_files(tmp_path / "out", saved(name))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_four_ranks(ranks4: RankPool, saved: Saved, tmp_path: Path, name: str) -> None:
    ranks4.run(_load_and_save, saved(name), "tp2 x fsdp2", tmp_path / "out")
    _assert_same_files(tmp_path / "out", saved(name))


def _assert_same_files(folder: Path, expected: Path) -> None:
    names = sorted(file.name for file in expected.iterdir())
    assert {*read_manifest(folder), MANIFEST} == {file.name for file in folder.iterdir()}
    assert [file.name for file in folder.parent.iterdir() if file.name.startswith(".")] == []
    if "mixtral" in expected.name:  # transformers puts the experts of a layer into one file, whatever its size
        assert _tensors(folder).keys() == _tensors(expected).keys()
        assert all(_tensors(folder)[name].equal(value) for name, value in _tensors(expected).items())
        return
    assert sorted(file.name for file in folder.iterdir()) == sorted([*names, MANIFEST])
    assert sum(name.endswith(".safetensors") for name in names) >= 2
    assert filecmp.cmpfiles(folder, expected, names, shallow=False)[0] == names


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _save_from_scratch(mesh: str, to: Path) -> None:
    config = MESHES[mesh]
    model = init_pretrained(CONFIGS["mixtral_stacked"], config, mesh_for(config), seed=3)
    save_pretrained(model, to)


def test_a_model_made_from_a_config_has_the_original_layout(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(_save_from_scratch, "fsdp2", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    names = ["model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "again", names, shallow=False)[0] == names


def _flip_a_bit(folder: Path, to: Path) -> str:
    model = _load(folder, "tp2")
    save_pretrained(model, to, max_shard_size="20KB")
    file = sorted(to.glob("*.safetensors"))[1]
    if dist.get_rank() == 0:
        data = bytearray(file.read_bytes())
        data[-9] ^= 16  # inside a weight: the file can still be read
        file.write_bytes(data)
    dist.barrier()
    with pytest.raises(CheckpointError, match=rf"{file.name} is not what was written.*remove its manifest") as caught:
        _load(to, "tp2")
    load_pretrained(to, MESHES["tp2"], mesh_for(MESHES["tp2"]), checksums=False)
    return str(caught.value)


def test_a_flipped_bit_in_a_saved_weight_is_found(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    first, second = ranks2.run(_flip_a_bit, saved("llama"), tmp_path / "out")
    assert first.removeprefix("On rank 1: ") == second.removeprefix("On rank 0: ")


def _one_rank_alone(folder: Path, to: Path) -> None:
    model = _load(folder, "tp2")
    if dist.get_rank() == 0:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="1 of 2 ranks"):
                save_pretrained(model, to, timeout=0.2)
    dist.barrier()
    save_pretrained(model, to)
    save_pretrained(model, to, overwrite=True)


def test_one_rank_alone_gets_an_error_and_nothing_hangs(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    ranks2.run(_one_rank_alone, saved("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


_SAVE = save._save


def _with_little_space(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """The real function, with room for 4096 bytes; only around it, or the ranks' own store would have no room."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        _SAVE(tensors, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, before)


def _disk_full(folder: Path, to: Path) -> str:
    model = _load(folder, "tp2")
    save_pretrained(model, to)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if dist.get_rank() == 1:
        save._save = _with_little_space
    try:
        with pytest.raises(CheckpointError) as caught:
            save_pretrained(model, to, overwrite=True, max_shard_size="20KB")
    finally:
        save._save = _SAVE
    return str(caught.value)


def test_a_disk_that_is_full_on_one_rank(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    first, second = ranks2.run(_disk_full, saved("llama"), tmp_path / "out")
    assert "too large" in second
    assert "On rank 1" in first
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.abs().sum() > 0  # the save before is still there, whole


def _refusals(to: Path) -> None:
    config = MESHES["tp2"]
    with pytest.raises(UnsupportedError, match="no transformers model"):
        save_pretrained(nn.Linear(2, 2), to)
    own = parallelize(nn.Sequential(nn.Linear(4, 4)), MESHES["fsdp2"], mesh_for(MESHES["fsdp2"]))
    with pytest.raises(UnsupportedError, match=r"^Sequential is no transformers model"):
        save_pretrained(own, to)
    model = parallelize(AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"])), config, mesh_for(config))
    with pytest.raises(CheckpointError, match="holds files that Shardwright did not write"):
        save_pretrained(model, to.parent)
    model.peft_config = {}  # what PEFT leaves on a model that it adds adapters to
    with pytest.raises(UnsupportedError, match="PEFT adapters"):
        save_pretrained(model, to)
    del model.peft_config
    model.config.vocab_size += 1
    with pytest.raises(UnsupportedError, match="lm_head"):
        save_pretrained(model, to)


def test_refusals(ranks2: RankPool, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    ranks2.run(_refusals, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
