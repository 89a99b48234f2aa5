"""Loading into shards: every value, every dtype, every tie, and nothing read that is not owned."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import CONFIGS, MESHES, assert_same_state, mesh_for, whole_state
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shardwright import init_pretrained, load_pretrained
from shardwright.checkpoint.folder import open_folder
from shardwright.errors import CheckpointError
from shardwright.verify.ranks import RankPool

Saved = Callable[[str], Path]


class _ReadBytes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("read"):
            self.total += record.args[0] * 1e9  # type: ignore[index, operator]


def _loads(folder: Path, mesh: str, dtype: torch.dtype) -> tuple[float, int]:
    """Compare with plain transformers; returns bytes read by this rank, and bytes of file per byte it owns."""
    config, counter = MESHES[mesh], _ReadBytes()
    logger = logging.getLogger("shardwright.checkpoint.fill")
    logger.addHandler(counter)
    level = logger.level
    logger.setLevel(logging.INFO)
    model = load_pretrained(folder, config, mesh_for(config), dtype=dtype)
    logger.removeHandler(counter)
    logger.setLevel(level)
    owned = {id(p): (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()}
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=ids).logits.float()
    loose = 1e-5 if dtype is torch.float32 else 0.2
    assert (logits - expected).norm() < loose * expected.norm()
    return counter.total, 4 * sum(owned.values())


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_two_ranks(ranks2: RankPool, saved: Saved, name: str, mesh: str) -> None:
    folder = saved(name)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for read, owned in ranks2.run(_loads, folder, mesh, torch.float32):
        # Where weights are cut along their columns, gaps of less than a page are read too; tests/.../test_slices.py.
        assert read == pytest.approx(owned) if mesh == "fsdp2" else owned <= read < size


@pytest.mark.parametrize(("name", "mesh"), [(name, "tp2 x fsdp2") for name in CONFIGS] + [("qwen3_tied", "hsdp")])
def test_four_ranks(ranks4: RankPool, saved: Saved, name: str, mesh: str) -> None:
    for read, owned in ranks4.run(_loads, saved(name), mesh, torch.float32):
        assert read == pytest.approx(owned) if mesh == "hsdp" else owned <= read < 2 * owned


def test_converts_the_dtype(ranks2: RankPool, saved: Saved) -> None:
    ranks2.run(_loads, saved("llama"), "tp2", torch.bfloat16)


def _initial(name: str, mesh: str) -> dict[str, torch.Tensor]:
    config = MESHES[mesh]
    return whole_state(init_pretrained(CONFIGS[name], config, mesh_for(config), seed=7, dtype=torch.float32))


@pytest.mark.parametrize("name", ["qwen3_tied", "mixtral_stacked"])
def test_random_weights_do_not_depend_on_the_mesh(ranks2: RankPool, ranks4: RankPool, saved: Saved, name: str) -> None:
    results = ranks2.run(_initial, name, "tp2") + ranks4.run(_initial, name, "tp2 x fsdp2")
    for state in results[1:]:
        torch.testing.assert_close(state, results[0], rtol=0, atol=0)
    assert results[0]["model.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert not results[0]["model.layers.0.self_attn.q_proj.weight"].equal(
        results[0]["model.layers.1.self_attn.q_proj.weight"]
    )
    expected = AutoModelForCausalLM.from_pretrained(saved(name)).model.rotary_emb.inv_freq
    assert results[0]["model.rotary_emb.inv_freq"].equal(expected)


def _refused(folder: Path) -> str:
    config = MESHES["tp2"]
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder, config, mesh_for(config))
    return str(caught.value)


def _damaged(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of ``folder`` in one file, with its tensors changed."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_weights_that_do_not_fit_are_refused_alike(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    gone = _damaged(saved("llama"), tmp_path / "gone", lambda t: t.pop("model.norm.weight"))
    shape = _damaged(saved("llama"), tmp_path / "shape", lambda t: t.update({"lm_head.weight": torch.zeros(96, 16)}))
    untied = _damaged(saved("qwen3_tied"), tmp_path / "tie", lambda t: t.update({"lm_head.weight": torch.ones(97, 16)}))
    expert = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    fewer = _damaged(saved("mixtral_stacked"), tmp_path / "fewer", lambda t: t.pop(expert))
    for folder, words in [
        (gone, ["lacks 1", "model.norm.weight"]),
        (shape, ["lm_head.weight", "(96, 16)", "(97, 16)"]),
        (untied, ["ties", "tie_word_embeddings"]),
        (fewer, ["model.layers.1.mlp.experts.gate_up_proj"]),
        (tmp_path / "nowhere", ["no folder"]),
    ]:
        messages = ranks2.run(_refused, folder)
        assert all(word in message for message in messages for word in words), messages


def _equal_tie_in_both_places(folder: Path) -> None:
    config = MESHES["tp2"]
    model = load_pretrained(folder, config, mesh_for(config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(folder))


def test_a_tie_written_twice_and_an_extra_entry(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.7.extra"] = torch.zeros(3)

    ranks2.run(_equal_tie_in_both_places, _damaged(saved("qwen3_tied"), tmp_path / "twice", change))


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="PEFT adapters"):
        open_folder(tmp_path)


def test_damaged_files(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    cut, lost, swapped, escaping, pickle = (
        tmp_path / name for name in ("cut", "lost", "swapped", "escaping", "pickle")
    )
    for folder in (cut, lost, swapped, escaping, pickle):
        shutil.copytree(saved("llama"), folder)
    file = sorted(cut.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])
    sorted(lost.glob("*.safetensors"))[0].unlink()
    first, second = sorted(swapped.glob("*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())
    index = json.loads((escaping / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../cut/model.safetensors"
    (escaping / "model.safetensors.index.json").write_text(json.dumps(index))
    for weights in pickle.glob("*.safetensors*"):
        weights.unlink()
    (pickle / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    for folder, words in [
        (cut, [file.name, "damaged"]),
        (lost, ["which its model.safetensors.index.json names"]),
        (swapped, ["does not"]),
        (escaping, ["../cut/model.safetensors", "plain names"]),
        (pickle, ["pytorch_model.bin", "not read"]),
    ]:
        messages = ranks2.run(_refused, folder)
        assert all(word in message for message in messages for word in words), messages


class _CutMeanwhile(LlamaForCausalLM):
    """A model whose files lose their ends while it is built, when their headers have been read."""

    @classmethod
    def _from_config(cls, config: LlamaConfig, **kwargs: Any) -> PreTrainedModel:
        dist.barrier()
        if dist.get_rank() == 1:
            for file in Path(config.cut).glob("*.safetensors"):
                os.truncate(file, file.stat().st_size - 8)
        return super()._from_config(config, **kwargs)


def _refused_in_the_middle(folder: Path) -> str:
    config = MESHES["fsdp2"]
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder, config, mesh_for(config), model_class=_CutMeanwhile)
    return str(caught.value)


def test_files_that_are_cut_while_they_are_read(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "cut")
    told = json.loads((tmp_path / "cut" / "config.json").read_text()) | {"cut": str(tmp_path / "cut")}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(told))
    messages = ranks2.run(_refused_in_the_middle, tmp_path / "cut")
    assert all("ends at byte" in message for message in messages), messages
