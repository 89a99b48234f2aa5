"""Model folders that are not what they say, or that are somebody's: told before they are read, and never replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_models import CONFIGS, MESHES, mesh_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shardwright import load_pretrained, save_pretrained
from shardwright.checkpoint.description import read_generation_config, read_tokenizer
from shardwright.checkpoint.folder import open_folder
from shardwright.checkpoint.manifest import MANIFEST
from shardwright.distributed.models.build import build_on_meta, load_config
from shardwright.distributed.models.config_json import check_values
from shardwright.errors import CheckpointError, ConfigError, ShardwrightError
from shardwright.verify.ranks import RankPool

Saved = Callable[[str], Path]
TP2 = MESHES["tp2"]


def _load_and_save(folder: Path, to: Path, overwrite: bool) -> str:
    model = load_pretrained(folder, TP2, mesh_for(TP2))
    try:
        save_pretrained(model, to, overwrite=overwrite)
    except CheckpointError as error:
        return str(error).removeprefix("On rank 0: ")
    return ""


def test_a_base_model_and_notes_are_not_replaced(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    base = shutil.copytree(saved("llama"), tmp_path / "base")
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_text("ref")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    for overwrite, told in [(False, "holds files that Shardwright did not write"), (True, "was not written by")]:
        messages = ranks2.run(_load_and_save, saved("llama"), base, overwrite)
        assert all(told in message for message in messages), messages
        assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_we_wrote_is_replaced_where_that_is_asked_for(ranks2: RankPool, saved: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ranks2.run(_load_and_save, saved("llama"), out, False) == ["", ""]
    assert "set overwrite" in ranks2.run(_load_and_save, saved("llama"), out, False)[0]
    (out / "notes.txt").write_text("mine")
    (out / ".git").mkdir()
    assert ranks2.run(_load_and_save, saved("qwen3_tied"), out, True) == ["", ""]
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / ".git").is_dir()


def _told(folder: Path) -> str:
    try:
        load_pretrained(folder, TP2, mesh_for(TP2))
    except ShardwrightError as error:
        return str(error)
    return ""


def _changed(folder: Path, to: Path, **values: torch.Tensor) -> Path:
    """A copy of ``folder`` in one file, with some tensors replaced."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    save_file({**tensors, **values}, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_numbers_of_another_kind_are_not_converted(
    ranks2: RankPool, saved: Saved, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = _changed(saved("llama"), tmp_path / "x", **{"model.norm.weight": torch.ones(16).to(dtype)})
    for message in ranks2.run(_told, folder):
        assert f"holds {dtype}, but model.norm.weight in the model is torch.float32" in message
    half = _changed(saved("llama"), tmp_path / "half", **{"model.norm.weight": torch.ones(16).to(torch.float16)})
    assert ranks2.run(_told, half) == ["", ""]


def _load_save_and_plant(folder: Path, to: Path, file: str) -> str:
    model = load_pretrained(folder, TP2, mesh_for(TP2))
    save_pretrained(model, to, overwrite=True)
    if dist.get_rank() == 0:
        index = {"weight_map": dict.fromkeys(model.state_dict(), "planted.safetensors")}
        (to / "planted.safetensors").write_bytes((to / "model.safetensors").read_bytes())
        (to / file).write_text(json.dumps(index if "index" in file else {"eos_token_id": 5}))
    dist.barrier()
    return _told(to)


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "generation_config.json"])
def test_files_that_the_manifest_does_not_list_are_not_read(
    ranks2: RankPool, saved: Saved, tmp_path: Path, file: str
) -> None:
    """An index beside the one file of weights is looked at first, and leads to others."""
    for message in ranks2.run(_load_save_and_plant, saved("llama"), tmp_path / "out", file):
        assert f"{file} is not listed in {MANIFEST}" in message or f"{file} has" in message


def test_headers_and_counts_that_no_model_has(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for header, told in [
        ((2**40).to_bytes(8, "little"), "headers are read up to"),
        ((2**33).to_bytes(8, "little") + b"x", "headers are read up to"),
        ((70_000).to_bytes(8, "little") + b'{"a":' + b"[" * 69_995, "nested deeper"),
        (b"\x02\0\0\0\0\0\0\0[]", "is damaged"),
        (b"", "is not valid JSON"),
    ]:
        file.write_bytes(header)
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            open_folder(tmp_path)
        assert told in str(caught.value)
    entry = '{"dtype":"BOOL","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{n}":{entry}' for n in range(200_001)) + "}").encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="more than 200,000 tensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers in c is -1; it cannot be negative"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in c is 0"),
        ({"text_config": {"n_layer": 0}}, "n_layer in c is 0"),
        ({"vision_config": {"num_attention_heads": -8}}, "num_attention_heads in c is -8"),
        ({"vocab_size": -5}, "vocab_size in c is -5"),
        ({"model_type": 5}, "model_type in c is 5; it must be a str"),
        ({"architectures": "Llama"}, "architectures in c is 'Llama'"),
        ({"architectures": [5]}, "has 5 where the name of a class should be"),
        ({"auto_map": [1]}, "auto_map in c is [1]"),
        ({"attn_implementation": "someone/kernel"}, "a kernel of the hub"),
        ({"text_config": {"_attn_implementation": {"": "a/b"}}}, "a kernel of the hub"),
        ({"configuration_files": ["config.4.json"]}, "names other config files"),
    ],
)
def test_values_that_no_config_has(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_values(values, "c")
    assert told in str(caught.value)


def test_values_that_a_config_may_have() -> None:
    check_values(
        {
            "num_experts": 0,
            "vision_feature_layer": -2,
            "pad_token_id": -1,
            "auto_map": {"AutoTokenizer": ["a.T", None], "AutoConfig": "a.C"},
            "attn_implementation": "sdpa",
            "architectures": None,
        },
        "c",
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "[1]", '"\\ud800"', "{", "\xff"])
def test_a_config_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_model_of_too_many_modules_is_not_waited_for() -> None:
    config = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 2**40})
    with pytest.raises(ConfigError, match="more than 100,000 modules"):
        build_on_meta(config)
    build_on_meta(CONFIGS["llama"])


def _tokenizer(folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a a"]}},
        {"model": {"type": "Unigram", "unk_id": 10**6, "vocab": [["a", 0.0]]}},
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": 1}}},
        {"added_tokens": [{"id": 2**40}]},
        {"added_tokens": 5},
        {"version": 2},
        {"decoder": []},
    ],
)
def test_a_damaged_tokenizer_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**_tokenizer(tmp_path), **change}))
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers can load"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"tokenizer_class": 5}', '{"auto_map": 5}', '{"auto_map": ["x.Y", null]}']
)
def test_a_damaged_tokenizer_config_is_told_and_nobody_is_asked(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "x.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="holds no tokenizer that transformers can load"):
        read_tokenizer(tmp_path)


def test_a_damaged_generation_config_is_told(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    for text in ("[]", "{", '{"max_length": 1' + "0" * 5000 + "}", '{"compile_config": 5}'):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read_generation_config(tmp_path)


def test_the_reference_of_a_first_step_reads_no_pickles(saved: Saved, tmp_path: Path) -> None:
    from shardwright.train.model import _load

    shutil.copytree(saved("llama"), tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ConfigError, match="transformers cannot load the checkpoint"):
        _load(str(tmp_path / "x"), torch.float32)
    AutoModelForCausalLM.from_pretrained(saved("llama"))
