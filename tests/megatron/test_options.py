"""What can be said without ranks: is the package there, do the options and units make sense."""

from __future__ import annotations

import logging
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

import pytest
import torch
from standin import cuda_standin
from torch import nn
from training import build_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from shardwright.distributed.apply.megatron_fsdp import Options, availability, is_available
from shardwright.distributed.apply.megatron_fsdp import options as options_module
from shardwright.distributed.apply.megatron_fsdp.units import unit_classes
from shardwright.distributed.config import ParallelConfig
from shardwright.errors import ConfigError, UnsupportedError


class FakeMesh:
    """Names of axes are all that the checks of options read."""

    mesh_dim_names = ("dp", "tp")

    def _get_root_mesh(self) -> FakeMesh:
        return self

    _flatten_mapping: ClassVar[dict[str, Any]] = {}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distribution versions by module name, instead of what is installed."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(availability, "find_spec", lambda name: ModuleSpec(name, None) if name in versions else None)
    monkeypatch.setattr(availability, "version", lambda name: versions[name.replace("-", "_")])
    return versions


def test_nothing_is_installed(installed: dict[str, str]) -> None:
    assert not is_available()
    with pytest.raises(UnsupportedError, match=r"pip install 'shardwright\[megatron-fsdp\]'"):
        availability.require("cuda")


def test_the_placeholder_does_not_count(installed: dict[str, str]) -> None:
    installed["nvfsdp"] = "0.0.0rc0"
    assert not is_available()
    installed["nvfsdp"] = "0.1.0"
    assert is_available()
    with pytest.raises(UnsupportedError, match="nvfsdp that is installed"):
        availability.require("cuda")


@pytest.mark.parametrize(("version", "works"), [("0.4.0", False), ("0.5.1", True), ("0.6.1", True), ("0.7.0", False)])
def test_versions(installed: dict[str, str], version: str, works: bool) -> None:
    installed["megatron_fsdp"] = version
    assert is_available()
    if works:
        availability.require("cuda")
        return
    with pytest.raises(UnsupportedError, match=f"megatron-fsdp {version}"):
        availability.require("cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_sharding_strategy": "zero"}, "no_shard, optim, optim_grads, optim_grads_params"),
        ({"data_parallel_sharding_strategy": "no_shard", "init_nvfsdp_with_meta_device": True}, "no_shard"),
        ({"average_in_collective": True, "calculate_per_token_loss": True}, "Choose one"),
        ({"nccl_ub": True}, "nccl_allocator"),
        ({"dp_mesh_name": "data"}, "no axis 'data'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        Options(**options).check(FakeMesh())  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["fsdp_double_buffer", "nccl_ub"])
def test_double_buffers_need_0_6(installed: dict[str, str], option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_has_nccl_allocator", lambda: True)
    installed["megatron_fsdp"] = "0.6.1"
    Options(**{option: True}).check(FakeMesh())  # type: ignore[arg-type]
    installed["megatron_fsdp"] = "0.5.1"
    with pytest.raises(UnsupportedError, match=r"Install megatron-fsdp 0\.6"):
        Options(**{option: True}).check(FakeMesh())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"overlap_grad_reduce": False}, "overlap_grad_reduce=False"),
        ({"keep_fp8_transpose_cache_when_using_custom_fsdp": True}, "keep_fp8_transpose_cache_when_using_custom_fsdp"),
        ({"overlap_grad_reduce": False, "data_parallel_sharding_strategy": "optim"}, None),
        ({}, None),
    ],
)
def test_options_without_effect_are_named(
    options: dict[str, Any], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shardwright"):
        Options(**options).check(FakeMesh())  # type: ignore[arg-type]
    assert [named in record.getMessage() for record in caplog.records] == [True] * (named is not None)


def test_replicas_of_a_sharded_model_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="dp_replicate is 2"):
        Options.from_config(ParallelConfig(dp_replicate=2, engine="megatron_fsdp"))


def test_units(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model()
    path = "transformers.models.llama.modeling_llama.LlamaDecoderLayer"
    assert unit_classes(model, None) == [LlamaDecoderLayer]
    assert unit_classes(model, [path]) == [LlamaDecoderLayer]
    with caplog.at_level(logging.WARNING, "shardwright"):
        assert unit_classes(model, ["transformers.Llama4.Nothing", path, "math.pi", nn.Conv1d]) == [LlamaDecoderLayer]
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "transformers.Llama4.Nothing" in messages
    assert "math.pi" in messages
    assert "Conv1d" in messages


def test_a_model_without_blocks_is_one_unit() -> None:
    assert unit_classes(nn.Linear(2, 2), None) == [nn.Linear]


@pytest.mark.parametrize("chosen", [[], ["nowhere.Block"], ["torch.nn.Conv1d"], "torch.nn.Linear"])
def test_no_units_are_left(chosen: Any) -> None:
    with pytest.raises(ConfigError, match="nvfsdp_unit_modules"):
        unit_classes(build_model(), chosen)


def test_the_standin_restores_torch() -> None:
    before = (torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.cuda, availability.DEVICE_TYPES)
    with cuda_standin():
        assert torch.cuda.Stream is not before[0]
    assert before == (torch.cuda.Stream, torch.cuda.current_device, torch.Tensor.cuda, availability.DEVICE_TYPES)
